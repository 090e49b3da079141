"""One table of many runs, as the papers print them (seq-JEPA Tables 1-3 and 6, Fig. 1).

    python compare.py runs/A runs/B runs/B-seed-1           the table
    python compare.py runs/* --out DIR                      and compare.md, compare.csv, compare.png
    python compare.py runs/M* --figure heatmap --out DIR    another figure of many runs

Nothing is read but what evaluate.py wrote, probes.json.  A row is a setting: runs that differ in
--seed alone share one, with mean and sample standard deviation over the seeds.  A column is what a
head reads from frozen features: top-1 of the class, R^2 of an action or of a view's parameters.
Each row stands beside its untrained twin and, where papers.csv has it, the paper's number.

    results {file: dict}  ->  rows [Row], columns [Column]  ->  markdown, CSV, points of the figure

Checked in tests/test_compare.py.
"""
import csv
import dataclasses
import io
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from config import Config
from figures import runs as figures
from figures.papers import NOT_LEARNED
from plumbing import command, flags
from plumbing.command import refuse_unwritable
from plumbing.errors import BadInput, printable
from plumbing.files import save_atomically

# Probes that are compared, in the order of the columns.  High is better in all of them.
PROBES = ("classify", "linear", "cls", "finetune", "action", "parameters")
# The settings that come first in the name of a row, and those that need no name of their own.
FIRST = ("method", "weights", "mode", "dataset", "probed on", "condition", "views")
BARE = ("method", "mode", "dataset", "encoder")
# Numbers of runs that differ in these do not compare: settings, and facts of the evaluation.
ALIKE = ("mode", "dataset", "image_size", "rotation_range", "hue_range", "material",
         "object_views", "limit", "epochs", "probed on")
ALIKE_PROBED = ("step", "classes", "n_train", "n_val", "samplings")
# Those that a figure over M_tr does not show: it takes runs that differ in them for seeds.
UNSEEN = [f.name for f in dataclasses.fields(Config)
          if f.name not in (*NOT_LEARNED, "method", "condition", "views")]
# --figure: what draws it, the files of a run's folder that it shows, what should be alike in them.
FIGURES = {"heatmap": (figures.draw_heatmap, "probes.json", UNSEEN),
           "sweep": (figures.draw_sweep, "probes.json", UNSEEN),
           "transfer": (figures.draw_transfer, "probes-transfer-*.json", ALIKE)}


class Column(NamedTuple):
    """What a head predicts, from which features."""
    probe: str
    predicts: str
    source: str
    unit: str

    def heading(self):
        if self.predicts == "class":
            return f"{self.unit}, {self.source}"
        return f"R\u00b2 {self.predicts}, {self.source}"


@dataclass
class Row:
    """A setting, measured with some seeds."""
    settings: dict                                  # {field of Config: value}
    cells: dict = field(default_factory=lambda: defaultdict(dict))      # {Column: {seed: line}}
    name: str = ""

    def seeds(self):
        return {seed for lines in self.cells.values() for seed in lines}

    def value(self, column, model="trained"):
        """(mean, sample standard deviation or None of one seed, number of seeds), None if unknown.

        model: trained | untrained | paper"""
        key = "value" if model == "trained" else model
        values = [line.get(key) for line in self.cells.get(column, {}).values()]
        values = [value for value in values if value is not None]
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return statistics.mean(values), deviation, len(values)


# ---------------------------------------------------------------- from files to rows

def result_files(given, pattern="probes.json"):
    """The files that were named, and those of this name in folders that were named.

    Raises: BadInput for a folder without one, or a file that comes twice."""
    files = {}
    for path in map(Path, given):
        found = sorted(path.glob(pattern)) if path.is_dir() else [path]
        if not found:
            raise BadInput(f"{path}: has no {pattern}; run evaluate.py on its last.pt, or name "
                           "another probes-*.json")
        for file in found:
            if file.resolve() in files:
                raise BadInput(f"{file}: is given twice; leave one out")
            files[file.resolve()] = file
    return list(files.values())


def gather(results):
    """Rows and columns of {file: what evaluate.py wrote}.

    Raises: BadInput if there is nothing to compare, or a seed of a setting comes twice."""
    rows = {}
    for file, result in results.items():
        settings = settings_of(result)
        row = rows.setdefault(tuple(settings.items()), Row(settings))
        seed = result["config"].get("seed", 0)
        for line in compared(result):
            column = Column(line["probe"], line["predicts"], line["from"], line["unit"])
            if seed in row.cells[column]:
                earlier = row.cells[column][seed]["file"]
                raise BadInput(f"{file}: has the settings and seed {seed!s:.20} of {earlier}; "
                               "leave one out, or train it with another --seed")
            row.cells[column][seed] = line | dict(file=file)
    rows = [row for row in rows.values() if row.cells]
    figures.refuse_nothing(rows, " or ".join(PROBES))
    names = telling(rows)
    for row in rows:
        row.name = row_name(row, names)
    columns = dict.fromkeys(column for row in rows for column in row.cells)
    return rows, sorted(columns, key=place)


def compared(result):
    """The rows of a probes.json that the table shows."""
    return [line for line in result["rows"] if line["probe"] in PROBES]


def settings_of(result):
    """{name: value} of all that changes what is learned.  Older files lack some: the defaults."""
    settings = dataclasses.asdict(Config()) | result["config"]
    settings["probed on"] = result.get("dataset", settings["dataset"])
    settings["weights"] = str(result.get("weights") or "its own")       # a file of others
    names = dict.fromkeys([*FIRST, *settings])
    return {name: settings[name] for name in names if name not in NOT_LEARNED}


def place(column):
    """Where a column stands: by probe, then by M_val; else as they came, for the sort is stable."""
    length = re.search(r"M=(\d{1,4})\b", column.source)
    return PROBES.index(column.probe), int(length[1]) if length else 0


def telling(rows):
    """The fewest settings, besides the method, that tell all rows apart.

    Learning rates, for example, may differ between methods: the method says it already."""
    names = ["method"]
    for name in named(rows):
        if groups(rows, [*names, name]) > groups(rows, names):
            names.append(name)
    return names


def named(rows):
    """Names of all settings; a file of newer code may hold some of its own."""
    return dict.fromkeys(name for row in rows for name in row.settings)


def groups(rows, names):
    """How many groups of rows these settings tell apart."""
    return len({tuple(row.settings.get(name) for name in names) for row in rows})


def row_name(row, names):
    """These settings of a row in words."""
    words = []
    for name in names:
        value = f"{row.settings.get(name)!s:.40}"
        words.append(value if name in BARE else f"{name} {value}")
    return printable(", ".join(words))


# ---------------------------------------------------------------- what a reader must know

def warnings(results, alike=ALIKE):
    """A line for each thing in which the runs should be alike and are not: mostly none."""
    seen = defaultdict(lambda: defaultdict(list))           # {what: {value: files}}
    for file, result in results.items():
        settings = settings_of(result)
        facts = {name: settings[name] for name in alike}
        facts |= {name: result.get(name) for name in ALIKE_PROBED}
        if settings["probed on"] != "solids":
            facts["data_dir"] = result["config"].get("data_dir")
        for line in compared(result):
            head = f"the head of {line['probe']} {line['predicts']}"
            facts[head] = f"{line['head']}, {line['epochs']} epochs"
        run = file.parent if file.name == "probes.json" else file
        for what, value in facts.items():
            seen[what][f"{value!s:.40}"].append(str(run))
    lines = []
    for what, files in seen.items():
        told = []
        for value, some in files.items():
            told.append(f"{value} ({', '.join(some) if len(some) < 4 else f'{len(some)} runs'})")
        if len(told) > 1:
            lines.append(printable(f"- warning: the runs differ in {what}: {'; '.join(told)}"))
    return lines


def notes(rows):
    """A line on settings in which rows differ, that neither their names nor a warning tell."""
    told = (*ALIKE, *telling(rows))
    others = [name for name in named(rows) if name not in told and groups(rows, [name]) > 1]
    return [f"- note: the rows differ in {', '.join(map(printable, others))} too"] if others else []


# ---------------------------------------------------------------- the table

def best(rows, column):
    """The highest trained mean of a column; None where all are the same, or there is one."""
    means = {row.value(column)[0] for row in rows if row.value(column)}
    return max(means) if len(means) > 1 else None


def cell(row, column, model, mark):
    """A cell in words: 71.4 ± 0.8, bold if it is the best of its column; - if not measured."""
    value = row.value(column, model)
    if value is None:
        return "-"
    mean, deviation, n = value
    digits = 1 if column.unit == "top-1 %" else 3
    text = f"{mean:.{digits}f}"
    if model == "paper":
        return text
    if deviation is not None:
        text += f" \u00b1 {deviation:.{digits}f}"
    if model == "trained" and mean == mark:
        text = f"**{text}**"
    return text if n == len(row.seeds()) else f"{text} (n {n})"


def markdown(rows, columns):
    """Lines of each row: trained, untrained and, where there are any, the paper's numbers."""
    marks = {column: best(rows, column) for column in columns}
    lines = [["method", "seeds", "model", *(column.heading() for column in columns)]]
    for row in rows:
        first = [row.name, str(len(row.seeds()))]
        for model in ("trained", "untrained", "paper"):
            cells = [cell(row, column, model, marks[column]) for column in columns]
            if model == "trained" or set(cells) != {"-"}:
                lines.append([*first, model, *cells])
            first = ["", ""]
    lines = [[printable(word).replace("|", r"\|") for word in line] for line in lines]
    widths = [max(map(len, words)) for words in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    text = ["| " + " | ".join(map(str.ljust, line, widths)) + " |\n" for line in lines]
    return "".join(text)


def as_csv(rows, columns):
    """A line a cell, unrounded; columns are named as in papers.csv."""
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow("row probe predicts from unit seeds trained trained_std untrained untrained_std "
                 "paper best".split())
    for column in columns:
        mark = best(rows, column)
        for row in rows:
            if row.value(column):
                mean, deviation, n = row.value(column)
                untrained = row.value(column, "untrained") or (None, None)
                paper = row.value(column, "paper") or (None,)
                out.writerow([row.name, *column, n, mean, deviation, *untrained[:2], paper[0],
                              "best" if mean == mark else ""])
    return file.getvalue()


def points(rows, columns):
    """Rows as draw_scatter takes them: top-1 from z_agg at the longest M_val, from z where a method
    has no aggregate.  Rows without a class or without an action have no point."""
    found = []
    for row in rows:
        classes = [c for c in columns if c.probe == "classify" and row.value(c)]
        scores = {c.predicts: row.value(c)[:2] for c in columns
                  if c.probe == "action" and row.value(c)}
        if classes and scores:
            found.append((row.name, classes[-1].source, row.value(classes[-1])[:2], scores))
    return found


# ---------------------------------------------------------------- the command

def compare(options):
    """Print the table, keep and draw it if --out is given; or draw another figure in its place."""
    draw, pattern, alike = FIGURES.get(options.figure, (None, "probes.json", ALIKE))
    files = result_files(options.runs, pattern)
    results = {file: figures.read_result(file) for file in files}
    if draw:
        path = options.out / f"{options.figure}.png"
        refuse_unwritable(path, "choose another --out", holds="PNG")
        print(f"drew {printable(draw(files, path))}", *warnings(results, alike), sep="\n")
        return 0
    rows, columns = gather(results)
    table = markdown(rows, columns)
    remarks = [*warnings(results), *notes(rows)]
    if remarks:
        table += "\n" + "\n".join(remarks) + "\n"
    if options.out is not None:
        keep(table, rows, columns, options.out)
    print(table, end="")
    return 0


def keep(table, rows, columns, out):
    """compare.md, compare.csv and, where there are points to draw, compare.png in this folder."""
    beginnings = {"compare.md": "| method", "compare.csv": "row,probe", "compare.png": "PNG"}
    for name, beginning in beginnings.items():
        refuse_unwritable(out / name, "choose another --out", holds=beginning)
    texts = {"compare.md": table, "compare.csv": as_csv(rows, columns)}
    for name, text in texts.items():
        save_atomically(out / name, lambda part: part.write_text(text, encoding="utf-8"))
    (out / "compare.png").unlink(missing_ok=True)           # an older table's
    if points(rows, columns):
        figures.draw_scatter(points(rows, columns), out / "compare.png")


def parse(argv=None):
    """Options from the command line."""
    p = flags.Parser(prog="compare.py", description="One table of many runs.")
    p.add_argument("runs", nargs="+", metavar="RUN",
                   help="folders of runs that evaluate.py has probed, or their probes*.json")
    p.add_argument("--out", type=Path, metavar="DIR",
                   help="keep the table in this folder as compare.md and compare.csv, and draw "
                        "top-1 against R2 as compare.png (default: the table is only printed)")
    p.add_argument("--figure", choices=FIGURES,
                   help="draw this into --out in the table's place; heatmap: top-1 for every M_tr "
                        "and M_val; sweep: top-1 and R2 against M_tr; transfer: top-1 on another "
                        "data set against M_val and cost")
    options = p.parse_args(argv)
    if options.figure and options.out is None:
        raise BadInput(f"--figure {options.figure}: goes into a folder; name it with --out")
    return options


def main(argv=None):
    """Exit status 0, 2 for bad input, 128 + signal if stopped."""
    return command.run(compare, parse, argv, "give it fewer runs")


if __name__ == "__main__":
    sys.exit(main())
