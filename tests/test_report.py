"""Tables, summary, charts and figures, from rows made up here: nothing is measured.

Every SVG is parsed; its data attributes must hold the rows to the last bit, its parts must lie on
the page, and the summary must be what a plain computation gives.
"""
import math
import os
import random
import re
import resource
import statistics
import subprocess
import unittest
import xml.etree.ElementTree as ElementTree

import common

SVG = "{http://www.w3.org/2000/svg}"
NAN = float("nan")
FIELDS = ("task", "metric", "method", "start", "arg", "schedule", "layers", "value", "error", "n",
          "cut", "chance", "first", "bos", "family", "items")


def row(task, metric, method, value, start=-1, arg=-1, **more):
    """A result row with the names of struct Row."""
    made = dict(task=task, metric=metric, method=method, start=start, arg=arg, schedule="0 1 2",
                layers=12, value=value, error=0.01, n=400, cut=0, chance=0.25, first=1, bos="no-bos",
                family="llama", items=400)
    made.update(more)
    return made


def study(tasks, layers=12, seeds=10, turns=range(1, 5), seed=1, **more):
    """Rows of a whole sweep. tasks: {name: (metrics, chance)}."""
    rng, rows = random.Random(seed), []
    for task, (metrics, chance) in tasks.items():
        for metric in metrics:
            def add(method, start=-1, arg=-1, low=0.2, high=0.9):
                value = rng.uniform(low, high)
                if "perplexity" in metric:
                    value = math.exp(12 * value)
                rows.append(row(task, metric, method, value, start, arg, chance=chance, n=400,
                                first=int(metric == metrics[0]), layers=layers,
                                error=rng.uniform(0.01, 0.03), **more))
            add("baseline", low=0.9, high=0.95)
            for start in range((layers - 2) // 2 + 1):
                for method in ("skip", "repeat", "reverse", "parallel"):
                    add(method, start)
                for k in range(seeds):
                    add("random", start, k)
                for k in turns:
                    add("loop", start, k)
            for k in range(layers):
                add("drop", k)
            for k in range(layers - 1):
                add("swap", k)
    rng.shuffle(rows)
    return rows


def write(rows):
    """The rows as tests/report.c reads them; returns the path."""
    path = os.path.join(common.scratch(), "rows-%d.tsv" % len(os.listdir(common.scratch())))
    with open(path, "wb") as f:
        for r in rows:
            cells = [r[name] for name in FIELDS]
            text = "\t".join(c if isinstance(c, str) else repr(c) for c in cells) + "\n"
            f.write(text.encode("utf-8", "surrogateescape"))
    return path


def report(what, rows, *more, status=0):
    """The output of tests/report.c; of a refusal, its one line on stderr."""
    done = subprocess.run([common.build("report"), what, write(rows), *more], capture_output=True,
                          check=False)
    if done.returncode != status:
        raise AssertionError("report %s: status %d: %s" % (what, done.returncode, done.stderr))
    return (done.stderr if status else done.stdout).decode("utf-8", "replace")


def figures(rows):
    """All figures of the rows: {file name: parsed SVG}."""
    folder = os.path.join(common.scratch(), "figures-%d" % len(os.listdir(common.scratch())))
    report("figures", rows, folder)
    return {name: ElementTree.parse(os.path.join(folder, name)).getroot()
            for name in sorted(os.listdir(folder))}


def table(text):
    """The lines of a printed table as dicts, by plain splitting at blanks."""
    lines = [line.split() for line in text.splitlines() if line and line[0] != "#"]
    return [dict(zip(lines[0], line)) for line in lines[1:]]


def data(svg, *names):
    """The data attributes of every element that has the first of them."""
    return [tuple(e.get("data-" + n) for n in names) for e in svg.iter() if e.get("data-" + names[0])]


def number(cell):
    return NAN if cell == "-" else float(cell)


LLAMA = {"arc": (["acc_norm", "acc"], 0.25), "gsm8k": (["strict", "flexible"], 0.0),
         "lambada": (["acc", "perplexity"], 0.0), "winogrande": (["acc"], 0.5)}
BERT = {"cola": (["matthews"], 0.0), "mrpc": (["acc", "f1"], 0.68), "rte": (["acc"], 0.53)}


def llama_summary(rows, method, start, arg):
    """The median over tasks of (score - chance) / (full - chance), of first metrics."""
    first = [r for r in rows if r["first"]]
    full = {r["task"]: r["value"] for r in first if r["method"] == "baseline"}
    return statistics.median([
        (r["value"] - r["chance"]) / (full[r["task"]] - r["chance"]) for r in first
        if (r["method"], r["start"], r["arg"]) == (method, start, arg)])


def bert_summary(rows, method, start, arg):
    """The mean over tasks of the mean over a task's metrics."""
    values = {}
    for r in rows:
        if (r["method"], r["start"], r["arg"]) == (method, start, arg):
            values.setdefault(r["task"], []).append(r["value"])
    return statistics.mean(statistics.mean(v) for v in values.values())


class Tables(unittest.TestCase):
    def test_table_holds_every_row(self):
        """Of random, a row for each S: the mean over seeds and their deviation."""
        rows = study(LLAMA)
        found = table(report("table", rows))
        right = {}
        for r in rows:
            arg = "-" if r["method"] == "random" or r["arg"] < 0 else str(r["arg"])
            start = "-" if r["start"] < 0 else str(r["start"])
            right.setdefault((r["task"], r["metric"], r["method"], start, arg), []).append(r)
        self.assertEqual(len(found), len(right))
        for line in found:
            mine = right.pop(tuple(line[k] for k in ("task", "metric", "method", "S/k", "seed/R")))
            values = [r["value"] for r in mine]
            value = statistics.mean(values)
            error = statistics.stdev(values) if len(values) > 1 else mine[0]["error"]
            self.assertAlmostEqual(float(line["value"]), value, delta=6e-5 * max(1, abs(value)))
            self.assertAlmostEqual(float(line["error"]), error, delta=6e-5 * max(1, error))
            self.assertEqual(line["seeds"], "10" if line["method"] == "random" else "-")
            self.assertEqual((line["items"], line["cut"], line["BOS"], line["path"]),
                             ("400", "0", "no-bos", "-"))
        self.assertFalse(right)

    def test_unfinished_tasks_are_named(self):
        rows = study(LLAMA, seeds=2)
        self.assertNotIn("items", report("table", rows).split("path\n", 1)[1])
        for r in rows:
            if r["task"] == "arc" and r["method"] in ("skip", "random"):
                r["n"] = 20
            if r["task"] == "gsm8k":
                r["n"] = 10
        text = report("table", rows)
        self.assertTrue(text.endswith("# arc: 20 to 400 of 400 items\n# gsm8k: 10 of 400 items\n\n"))
        svg = figures(rows)["llama12-arc-acc_norm.svg"]
        self.assertIn("20 to 400 of 400 items", "".join(e.text or "" for e in svg.iter(SVG + "text")))

    def test_order_of_rows_does_not_matter(self):
        rows = study(LLAMA)
        turned = sorted(rows, key=lambda r: random.Random(repr(r)).random())
        for what in ("table", "summary", "chart"):
            self.assertEqual(report(what, rows), report(what, turned))

    def test_columns_are_aligned_and_first_metrics_first(self):
        lines = report("table", study(LLAMA, seeds=1)).splitlines()
        self.assertEqual(lines[0], "# Llama, 12 layers, no-bos")
        ends = {line.rindex(" no-bos  -") for line in lines[2:] if line}
        self.assertEqual(len(ends), 1)
        metrics = [line.split()[1] for line in lines[2:] if line]
        self.assertLess(metrics.index("acc_norm"), metrics.index("acc"))

    def test_missing_errors_large_values_and_paths(self):
        rows = [row("täsk", "perplexity", "baseline", 3.5, error=NAN),
                row("täsk", "perplexity", "path", 1.25e9, schedule="0-3 (4|5)*2 6"),
                row("täsk", "perplexity", "path", float("inf"), schedule="0 1")]
        text = report("table", rows)
        self.assertEqual([line["value"] for line in table(text)], ["3.5000", "inf", "1.25e+09"])
        self.assertEqual(table(text)[0]["error"], "-")
        self.assertIn("  0-3 (4|5)*2 6\n", text)

    def test_largest_seed(self):
        text = report("table", [row("a", "acc", "random", 0.5, 3, 2 ** 52 + 1)])
        self.assertEqual(table(text)[0]["seed/R"], str(2 ** 52 + 1))


class Summary(unittest.TestCase):
    def check(self, rows, expected):
        found = table(report("summary", rows))
        schedules = {(r["method"], r["start"], -1 if r["method"] == "random" else r["arg"])
                     for r in rows}
        self.assertEqual(len(found), len(schedules))
        for line in found:
            start = -1 if line["S/k"] == "-" else int(line["S/k"])
            arg = -1 if line["seed/R"] == "-" else int(line["seed/R"])
            if line["method"] == "random":
                values = [expected(rows, "random", start, k) for k in range(10)]
                self.assertEqual(line["seeds"], "10")
                self.assertAlmostEqual(float(line["error"]), statistics.stdev(values), delta=6e-5)
                right = statistics.mean(values)
            else:
                right = expected(rows, line["method"], start, arg)
                self.assertEqual((line["error"], line["seeds"]), ("-", "-"))
            self.assertAlmostEqual(float(line["value"]), right, delta=6e-5, msg=line)

    def test_llama_median(self):
        self.check(study(LLAMA), llama_summary)

    def test_llama_median_of_an_odd_number(self):
        self.check(study({name: LLAMA[name] for name in ("arc", "gsm8k", "lambada")}), llama_summary)

    def test_bert_mean(self):
        self.check(study(BERT, family="bert", bos="-"), bert_summary)

    def test_what_does_not_count(self):
        """Tasks without a chance level, above-chance baseline or score; incomplete schedules."""
        tasks = dict(LLAMA, text=(["token_perplexity"], NAN), strange=(["acc"], NAN),
                     hard=(["acc"], 0.99))
        rows = study(tasks, seeds=2, turns=[3])
        counted = [r for r in rows if r["task"] in LLAMA]
        gone = [r for r in rows if (r["task"], r["method"], r["start"]) != ("arc", "skip", 2)]
        text = report("summary", gone)
        self.assertTrue(text.splitlines()[0].endswith("tasks: 4"))
        self.assertTrue(text.endswith(
            "\n# Not in the summary: hard (baseline not above chance), strange (level of chance "
            "unknown), text (perplexity)\n\n"))
        found = {(line["method"], line["S/k"]): line for line in table(text)}
        self.assertNotIn(("skip", "2"), found)
        self.assertAlmostEqual(float(found["skip", "3"]["value"]),
                               llama_summary(counted, "skip", 3, -1), delta=6e-5)

    def test_nothing_to_say(self):
        self.assertEqual(report("summary", [row("a", "acc", "skip", 0.5, 3)]),
                         "# No summary: a (no baseline)\n\n")
        self.assertEqual(report("summary", []), "")
        self.assertEqual(report("table", []), "")


class Chart(unittest.TestCase):
    def test_bars_rise_and_lines_fit(self):
        for layers in (12, 32, 80):
            rows = study(LLAMA, layers=layers)
            for r in rows:
                if r["method"] == "skip":
                    r["value"] = 0.3 + 0.5 * r["start"] / layers
            text = report("chart", rows)
            self.assertLessEqual(max(map(len, text.splitlines())), 80)
            bars = [line for line in text.splitlines() if line.startswith("  skip")]
            self.assertEqual(len(bars), len(LLAMA) + 1)
            for line in bars[:1]:
                levels = ["▁▂▃▄▅▆▇█".index(c) for c in line if c in "▁▂▃▄▅▆▇█"]
                self.assertEqual(levels, sorted(levels))
                self.assertGreater(levels[-1], levels[0])

    def test_every_layer_has_its_bar(self):
        """Where there are more layers than columns, the worst of neighbours is shown."""
        for layers, least in ((38, 7), (60, 59), (61, 59), (100, 99)):
            for metric in ("acc", "perplexity"):
                good, bad = (0.9, 0.1) if metric == "acc" else (0.1, 0.9)
                text = report("chart", [
                    row("a", metric, "drop", bad if k == least else good, k, layers=layers,
                        chance=NAN, error=NAN) for k in range(layers)])
                line = next(l for l in text.splitlines() if l.startswith("  drop"))[20:]
                step = 1 if layers <= 60 else 2
                self.assertEqual(len(line), -(-layers // step))
                self.assertEqual([i for i, c in enumerate(line) if c != line[0]], [least // step])
                self.assertEqual("each bar the worst of 2" in text, step == 2)
                self.assertIn("0.1 to 0.9", text)
                self.assertNotIn("nan", text)

    def test_one_point(self):
        self.assertIn("▄", report("chart", [row("a", "acc", "skip", 0.5, 3, error=NAN, chance=NAN)])
                      .replace("▅", "▄"))


class Figures(unittest.TestCase):
    def test_files(self):
        names = set(figures(study(LLAMA, seeds=2)))
        right = {"llama12-%s-%s%s.svg" % (task, metric, part) for task in LLAMA
                 for metric in LLAMA[task][0] for part in ("", "-layers", "-loops")}
        right |= {"llama12-summary%s.svg" % part for part in ("", "-layers", "-loops")}
        self.assertEqual(names, right)
        rows = study({"rte": BERT["rte"]}, family="bert", bos="-", seeds=1, turns=[3])
        self.assertEqual(set(figures(rows)), {"bert12-rte-acc.svg", "bert12-rte-acc-layers.svg"})
        for r in rows:
            r["bos"], r["task"] = "bos", "a/b ü"
        self.assertEqual(set(figures(rows)), {"bert12-bos-a_b___-acc.svg",
                                              "bert12-bos-a_b___-acc-layers.svg"})

    def test_points_are_exact(self):
        rows = study(LLAMA)
        svg = figures(rows)["llama12-arc-acc_norm.svg"]
        mine = [r for r in rows if r["metric"] == "acc_norm"]
        found = {(m, int(x), int(a)): (float(v), float(e)) for m, x, a, v, e
                 in data(svg, "method", "x", "arg", "value", "error")}
        right = {}
        for r in mine:
            if r["method"] in ("skip", "repeat", "reverse", "parallel") or r["arg"] == 3 and \
                    r["method"] == "loop":
                right[r["method"], r["start"], r["arg"]] = (r["value"], r["error"])
        random_rows = [r for r in mine if r["method"] == "random"]
        for start in range(6):
            values = [r["value"] for r in random_rows if r["start"] == start]
            place = [k for k in found if k[:2] == ("random", start)]
            self.assertEqual(len(place), 1)
            value, error = found.pop(place[0])
            self.assertAlmostEqual(value, statistics.mean(values), delta=1e-12)
            self.assertAlmostEqual(error, statistics.stdev(values), delta=1e-12)
        self.assertEqual(found, right)
        lines = dict(data(svg, "line", "value"))
        self.assertEqual(float(lines["chance"]), 0.25)
        self.assertEqual(float(lines["baseline"]),
                         next(r["value"] for r in mine if r["method"] == "baseline"))
        second = figures(rows)["llama12-arc-acc.svg"]
        self.assertEqual([name for name, _ in data(second, "line", "value")], ["baseline"])

    def test_height_shows_the_value(self):
        svg = figures(study(LLAMA, seeds=1))["llama12-winogrande-acc.svg"]
        marks = [(float(e.get("data-value")), float(re.findall(r"[-\d.]+", e.get("transform"))[1]))
                 for e in svg.iter(SVG + "path") if e.get("data-method")]
        (v0, y0), (v1, y1) = min(marks), max(marks)
        for v, y in marks:
            self.assertAlmostEqual(y, y0 + (y1 - y0) * (v - v0) / (v1 - v0), delta=0.02)
        self.assertLess(y1, y0)

    def test_layers(self):
        rows = study(LLAMA, seeds=1)
        found = data(figures(rows)["llama12-gsm8k-strict-layers.svg"], "method", "x", "value")
        right = {(r["method"], str(r["start"])): r["value"] for r in rows
                 if r["metric"] == "strict" and r["method"] in ("drop", "swap")}
        self.assertEqual({(m, x): float(v) for m, x, v in found}, right)

    def test_loop_grid(self):
        rows = study(LLAMA, seeds=1, turns=range(1, 9))
        svg = figures(rows)["llama12-winogrande-acc-loops.svg"]
        found = {(int(r), int(c)): float(v) for r, c, v in data(svg, "row", "col", "value")}
        right = {(8 - r["arg"], 5 - r["start"]): r["value"] for r in rows
                 if r["task"] == "winogrande" and r["method"] == "loop"}
        self.assertEqual(found, right)
        best = [max(r["value"] for r in rows if r["task"] == "winogrande" and r["method"] == "loop"
                    and r["start"] == start) for start in range(6)]
        self.assertEqual(len(data(svg, "best")), len(best))
        texts = [e.text for e in svg.iter(SVG + "text")]
        for name in ("1", "3", "5", "7", "9", "11", "layers in parallel, T − 2S − 1", "turns R"):
            self.assertIn(name, texts)

    def test_parallel_is_one_turn(self):
        rows = study(LLAMA, seeds=1, turns=[2, 3])
        svg = figures(rows)["llama12-winogrande-acc-loops.svg"]
        found = {(int(r), int(c)): float(v) for r, c, v in data(svg, "row", "col", "value")}
        right = {(2, 5 - r["start"]): r["value"] for r in rows
                 if r["task"] == "winogrande" and r["method"] == "parallel"}
        self.assertEqual({k: v for k, v in found.items() if k[0] == 2}, right)

    def test_perplexities_get_a_logarithmic_axis(self):
        svg = figures(study(LLAMA, seeds=1))["llama12-lambada-perplexity.svg"]
        marks = [(math.log(float(e.get("data-value"))),
                  float(re.findall(r"[-\d.]+", e.get("transform"))[1]))
                 for e in svg.iter(SVG + "path") if e.get("data-method")]
        (v0, y0), (v1, y1) = min(marks), max(marks)
        for v, y in marks:
            self.assertAlmostEqual(y, y0 + (y1 - y0) * (v - v0) / (v1 - v0), delta=0.02)
        texts = [e.text for e in svg.iter(SVG + "text")]
        self.assertIn("lambada: perplexity (lower is better)", texts)
        self.assertIn("1000", texts)

    def test_wide_bars_leave_perplexities_their_axis(self):
        rows = [row("a", "perplexity", "skip", 3.0 + s, s, error=700.0, chance=NAN)
                for s in range(4)]
        svg = figures(rows)["llama12-a-perplexity.svg"]
        axis = [float(e.text) for e in svg.iter(SVG + "text") if e.get("text-anchor") == "end"]
        self.assertGreater(min(axis), 2)
        self.assertLess(max(axis), 7)

    def test_notes_say_what_is_there(self):
        def notes(rows, name="llama12-a-acc.svg"):
            return list(figures(rows)[name].iter(SVG + "text"))[1].text.split("items")[1]
        one = [row("a", "acc", "skip", 0.5, 3)]
        seeds = [row("a", "acc", "random", 0.5 + k / 10, 3, k) for k in range(2)]
        self.assertEqual(notes(one), "; bars: standard error")
        self.assertEqual(notes(seeds), "; bars: of random the deviation over seeds")
        self.assertEqual(notes(one + seeds),
                         "; bars: standard error, of random the deviation over seeds")
        self.assertEqual(notes([row("a", "acc", "skip", 0.5, 3, error=NAN)]), "")

    def test_of_equal_cells_one_is_framed(self):
        rows = [row("a", "acc", "loop", 0.5, 3, k) for k in range(1, 5)]
        svg = figures(rows)["llama12-a-acc-loops.svg"]
        self.assertEqual(data(svg, "best", "row"), [("1", "3")])

    def test_everything_lies_on_the_page(self):
        sets = [study(LLAMA), study(LLAMA, layers=32), study(BERT, family="bert", bos="-", layers=80),
                study({"n" * 150: (["acc"], 0.25)}, seeds=1)]
        for rows in sets:
            for name, svg in figures(rows).items():
                width, height = float(svg.get("width")), float(svg.get("height"))
                for e in svg.iter(SVG + "text"):
                    x, y, n = float(e.get("x")), float(e.get("y")), len(e.text)
                    size = float(e.get("font-size", 12)) * 0.6 * n
                    self.assertGreaterEqual(float(e.get("font-size", 12)), 12)
                    anchor = e.get("text-anchor", "start")
                    if e.get("transform"):
                        self.assertGreater(height, size, (name, e.text))
                        continue
                    left = x - {"start": 0, "middle": size / 2, "end": size}[anchor]
                    self.assertGreaterEqual(left, 0, (name, e.text))
                    self.assertLessEqual(left + size, width, (name, e.text))
                    self.assertTrue(0 < y < height, (name, e.text))

    def test_axis_labels_do_not_touch(self):
        for layers in (12, 32, 80):
            for name, svg in figures(study(LLAMA, layers=layers, seeds=1)).items():
                rows = {}
                for e in svg.iter(SVG + "text"):
                    if e.get("text-anchor") == "middle" and re.fullmatch(r"\d+", e.text or ""):
                        rows.setdefault(e.get("y"), []).append((float(e.get("x")), len(e.text)))
                for places in rows.values():
                    places.sort()
                    for (x0, n0), (x1, n1) in zip(places, places[1:]):
                        self.assertGreater(x1 - x0, 3.7 * (n0 + n1), name)

    def test_odd_values(self):
        """NaN and infinite values are left out and break the line; one point is still a figure."""
        rows = [row("a", "acc", "skip", v, s, error=e) for s, (v, e) in enumerate(
            [(0.3, 0.01), (NAN, 0.01), (float("inf"), NAN), (0.4, NAN), (-0.2, 1e9)])]
        svg = figures(rows)["llama12-a-acc.svg"]
        self.assertEqual([x for x, _ in data(svg, "x", "value")], ["0", "3", "4"])
        line = next(e for e in svg.iter(SVG + "path") if e.get("stroke-width") == "2")
        self.assertEqual(line.get("d").count("M"), 2)
        svg = figures([row("a", "acc", "drop", 0.0, 3, chance=NAN, error=NAN)])
        self.assertEqual(data(svg["llama12-a-acc-layers.svg"], "x", "value"), [("3", "0")])
        for turns in ([1, 2], [1, 2, 3]):
            rows = study({"a": (["acc"], 0.2)}, seeds=1, turns=turns)
            for r in rows:
                if r["method"] == "loop" and r["start"] == 2:
                    r["value"] = NAN
            svg = figures(rows)["llama12-a-acc-loops.svg"]
            cells = [float(v) for _, v in data(svg, "row", "value")]
            self.assertEqual(len(cells), 5 * len(turns))

    def test_names_of_every_kind(self):
        """Whatever bytes a task's name has, the figure is XML."""
        for name in ("<&>\"'", "ünï", "\x01\x7f", b"\xff\xc3(\xed\xa0\x80\xef\xbf\xbf".decode(
                "utf-8", "surrogateescape")):
            for svg in figures([row(name, "acc", "skip", 0.5, 3)]).values():
                title = next(e.text for e in svg.iter(SVG + "text"))
                self.assertIn("acc", title)
                if name == "<&>\"'":
                    self.assertEqual(title, "<&>\"': acc")

    def test_one_file_or_a_folder(self):
        one = [row("a", "acc", "skip", 0.5, s) for s in range(3)]
        path = os.path.join(common.scratch(), "one.svg")
        report("figures", one, path)
        self.assertEqual(len(data(ElementTree.parse(path).getroot(), "x")), 3)
        line = report("figures", study(LLAMA, seeds=1), path + "2.svg", status=1)
        self.assertIn("name a folder", line)
        self.assertFalse(os.path.exists(path + "2.svg"))
        line = report("figures", [row("a", "acc", "baseline", 0.5)], path, status=1)
        self.assertIn("use --sweep", line)
        for bad in (path, "/nonexistent/folder"):
            line = report("figures", one, os.path.join(bad, "x"), status=1)
            self.assertEqual(line.count("\n"), 1)
            self.assertTrue(line.startswith("painters: "))

    def test_a_full_disk_is_an_error(self):
        folder = os.path.join(common.scratch(), "full")
        done = subprocess.run(      # with Python's SIGXFSZ, which is ignored
            [common.build("report"), "figures", write([row("a", "acc", "skip", 0.5, 3)]), folder],
            capture_output=True, text=True, check=False, restore_signals=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
        self.assertEqual(done.returncode, 1)
        self.assertIn("llama12-a-acc.svg: cannot be written", done.stderr)


class Runs(unittest.TestCase):
    """What the program itself makes of --svg and of runs without results."""
    MODEL, TASK = (os.path.join(common.TESTS, "small", name) for name in ("llama.bin", "pronoun.tsv"))

    def test_a_place_for_figures_is_checked_before_the_run(self):
        folder = os.path.join(common.scratch(), "early")
        os.mkdir(folder)
        nowhere, one = os.path.join(folder, "none", "x"), os.path.join(folder, "x.svg")
        out = os.path.join(folder, "out")
        for where, sweep, said in ((nowhere, "skip", "cannot be made"),
                                   (nowhere + ".svg", "skip", "cannot be made"),
                                   (one, "skip,drop", "name a folder"), (one, "path:", "--sweep")):
            path = os.path.join(folder, "paths")
            with open(path, "w", encoding="ascii") as f:
                f.write("0 1\n")
            sweep = sweep.replace("path:", "path:" + path)
            line = common.refused(self.MODEL, "--eval", self.TASK, "--sweep", sweep, "--svg", where,
                                  "--out", out)
            self.assertIn(said, line)
            os.remove(path)
            self.assertEqual(os.listdir(folder), [])
        self.assertIn("cannot be made", common.refused(self.MODEL, "--cosine", "--prompt", "a",
                                                       "--svg", nowhere))

    def test_a_shard_without_items(self):
        status, out, errors = common.execute(self.MODEL, "--eval", self.TASK, "--limit", "1",
                                             "--shard", "2/2")
        self.assertEqual((status, out), (0, b""))
        self.assertIn("no results", errors)

    def test_cosine_figure(self):
        path = os.path.join(common.scratch(), "cosine.svg")
        common.run(self.MODEL, "--cosine", "--prompt", "A & B", "--parallel", "3", "--svg", path)
        texts = [e.text for e in ElementTree.parse(path).getroot().iter(SVG + "text")]
        self.assertEqual(texts[1], "Llama, 12 layers, no-bos; “A & B”; parallel 3")
        names = ["emb", "0", "1", "2", "3", "step 5", "9", "10", "11"]
        for name in names:
            self.assertEqual(texts.count(name), 2, name)


class HeatMap(unittest.TestCase):
    def draw(self, cells, low=0, high=1):
        path = os.path.join(common.scratch(), "cells.tsv")
        with open(path, "w", encoding="ascii") as f:
            f.writelines("\t".join(map(repr, line)) + "\n" for line in cells)
        done = subprocess.run([common.build("report"), "heatmap", path, path + ".svg", str(low),
                               str(high)], check=False)
        self.assertEqual(done.returncode, 0)
        return ElementTree.parse(path + ".svg").getroot()

    def test_cosine_matrix(self):
        for n in (1, 13, 33, 81):
            cells = [[math.exp(-abs(i - j) / 4) for j in range(n)] for i in range(n)]
            svg = self.draw(cells)
            found = {(int(r), int(c)): float(v) for r, c, v in data(svg, "row", "col", "value")}
            self.assertEqual(found, {(i, j): cells[i][j] for i in range(n) for j in range(n)})
            texts = [e.text for e in svg.iter(SVG + "text")]
            self.assertEqual("1.00" in texts, n < 20)     # numbers, where they fit

    def test_lightness_rises(self):
        """In grey, and as the colour-blind see it, lighter means more."""
        cells = [[i / 200 for i in range(201)]]
        light = []
        for e in self.draw(cells).iter(SVG + "rect"):
            if e.get("data-row"):
                rgb = [int(c) / 255 for c in re.findall(r"\d+", e.get("fill"))]
                linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
                grey = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
                light.append(116 * grey ** (1 / 3) - 16 if grey > 0.008856 else 903.3 * grey)
        steps = [b - a for a, b in zip(light, light[1:])]
        self.assertEqual(len(light), 201)
        self.assertGreater(light[-1] - light[0], 70)
        self.assertGreater(min(steps), -0.2)
        for start in range(0, 200, 20):
            self.assertGreater(light[start + 20] - light[start], 4)

    def test_no_value_and_beyond_the_range(self):
        svg = self.draw([[0.5, NAN], [-3, 7]])
        fills = [e.get("fill") for e in svg.iter(SVG + "rect") if e.get("data-row")]
        self.assertEqual(fills[1:], ["rgb(68,1,84)", "rgb(253,231,37)"])


if __name__ == "__main__":
    unittest.main()
