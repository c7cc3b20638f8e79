// A driver for tests/test_report.py: reads result rows as tab-separated text and reports on them.
//
//   report table|summary|chart ROWS.tsv      report figures ROWS.tsv WHERE
//   report heatmap CELLS.tsv OUT.svg LO HI
#define PAINTERS_NO_MAIN
#include "../painters.c"

// Splits a text into lines and cells in place. Returns the cells; all lines have *cols of them.
static char **read_cells(const char *path, int64_t *rows, int64_t *cols) {
    int64_t bytes, n = 0;
    char *text = read_file(path, &bytes), **cell = NULL;
    *rows = 0;
    for (char *p = text; *p; p++) {
        cell = grow(cell, n + 1, sizeof *cell, "cells");
        cell[n++] = p;
        p += strcspn(p, "\t\n");
        *rows += *p == '\n';
        *p = 0;
    }
    *cols = *rows ? n / *rows : 0;
    return cell;
}

static double number(const char *text) {
    return strtod(text, NULL);
}

int main(int argc, char **argv) {
    int64_t n, cols;
    if (argc < 3) die("report: table|summary|chart|figures|heatmap and a file are missing; add them");
    char **cell = read_cells(argv[2], &n, &cols);
    if (!strcmp(argv[1], "heatmap")) {
        Row *value = allocate(n * cols, sizeof *value, "cells");
        char **name = allocate(n + cols, sizeof *name, "names");
        for (int64_t i = 0; i < n * cols; i++) value[i].value = number(cell[i]);
        for (int64_t i = 0; i < n + cols; i++) {
            Text t = {0};
            text_printf(&t, "%lld", (long long)i);
            name[i] = t.s;
        }
        Figure g = {.view = MATRIX, .rows = (int)n, .cols = (int)cols, .row_name = name,
                    .col_name = name, .title = "Cosine similarity of hidden states", .subtitle = "",
                    .cell = value, .x_label = "layer", .y_label = "layer",
                    .scale = {number(argv[4]), number(argv[5]), false}};
        write_svg(argv[3], &g);
        return 0;
    }
    if (n && cols != 16) die("%s: %lld columns; there are 16", argv[2], (long long)cols);
    Row *rows = allocate(n + 1, sizeof *rows, "rows");
    for (int64_t i = 0; i < n; i++) {
        char **c = cell + 16 * i;
        Schedule s = {.method = c[2], .start = atoi(c[3]), .argument = atoll(c[4]),
                      .n_layers = atoi(c[6])};
        rows[i] = schedule_row(&s, c[5]);
        rows[i].task = c[0];
        rows[i].metric = c[1];
        rows[i].value = number(c[7]);
        rows[i].error = number(c[8]);
        rows[i].n = atoll(c[9]);
        rows[i].cut = atoll(c[10]);
        rows[i].chance = number(c[11]);
        rows[i].first = *c[12] == '1';
        rows[i].bos = c[13];
        rows[i].family = c[14];
        rows[i].items = atoll(c[15]);
    }
    Report made = make_report(rows, n);
    if (!strcmp(argv[1], "table")) print_rows(stdout, made.rows, made.n);
    else if (!strcmp(argv[1], "summary")) report_summary(stdout, &made);
    else if (!strcmp(argv[1], "chart")) report_chart(stdout, &made);
    else if (!strcmp(argv[1], "figures") && argc > 3) report_figures(argv[3], &made);
    else die("report: %s is unknown; use table, summary, chart, figures or heatmap", argv[1]);
    return 0;
}
