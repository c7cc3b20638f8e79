// A driver for tests/test_report.py: reads result rows as tab-separated text and reports on them.
//
//   report table|summary|chart ROWS.tsv      report figures ROWS.tsv WHERE
//   report heatmap CELLS.tsv OUT.svg LO HI
#define PAINTERS_NO_MAIN
#include "../painters.c"

// Splits a text into lines and cells in place. Returns the cells; all lines have *cols of them.
static char **read_cells(const char *path, int64_t *rows, int64_t *cols) {
    int64_t bytes, n = 0, capacity = 0;
    char *text = read_file(path, &bytes), **cell = NULL;
    *rows = 0;
    for (char *p = text; *p; p++) {
        cell = grow(cell, &capacity, n + 1, sizeof *cell, "cells");
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
        double *value = allocate(n * cols, sizeof *value, "cells");
        char **name = allocate(n + cols, sizeof *name, "names");
        for (int64_t i = 0; i < n * cols; i++) value[i] = number(cell[i]);
        for (int64_t i = 0; i < n + cols; i++) {
            Text t = {0};
            text_printf(&t, "%lld", (long long)i);
            name[i] = t.s;
        }
        heatmap_svg(argv[3], "Cosine similarity of hidden states", value, (int)n, (int)cols, "layer",
                    "layer", name, name, number(argv[4]), number(argv[5]));
        return 0;
    }
    if (n && cols != 15) die("%s: %lld columns; there are 15", argv[2], (long long)cols);
    Row *rows = allocate(n + 1, sizeof *rows, "rows");
    for (int64_t i = 0; i < n; i++) {
        char **c = cell + 15 * i;
        rows[i] = (Row){.task = c[0], .metric = c[1], .method = c[2], .start = atoi(c[3]),
                        .arg = atoll(c[4]), .schedule = c[5], .layers = atoi(c[6]),
                        .value = number(c[7]), .error = number(c[8]), .n = atoll(c[9]),
                        .cut = atoll(c[10]), .chance = number(c[11]), .first = *c[12] == '1',
                        .bos = c[13], .family = c[14]};
    }
    if (!strcmp(argv[1], "table")) report_table(stdout, rows, n);
    else if (!strcmp(argv[1], "summary")) report_summary(stdout, rows, n);
    else if (!strcmp(argv[1], "chart")) report_chart(stdout, rows, n);
    else if (!strcmp(argv[1], "figures") && argc > 3) report_figures(argv[3], rows, n);
    else die("report: %s is unknown; use table, summary, chart, figures or heatmap", argv[1]);
    return 0;
}
