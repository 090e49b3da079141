"""What evaluate.py found, as text for a terminal and as one page to send to a colleague.

    show(result)                                prints the table, and what a reader must know of it
    write_report(run_dir, result, pictures)     report.html: the table, the settings and these
                                                pictures; nothing else is needed to view it

All that comes from a file or a user is escaped. Checked in tests/test_report.py.
"""
import base64
import json
from html import escape

from plumbing.files import save_atomically

STYLE = """
body {font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
      color: #222}
table {border-collapse: collapse; font-size: 13px}
td, th {padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left}
td.n {text-align: right; font-variant-numeric: tabular-nums}
img {max-width: 100%}
details {margin: 1em 0}
"""
COLUMNS = ("probe", "predicts", "from", "head", "epochs", "unit", "value", "untrained", "paper")
HEADS = ["trained" if key == "value" else key for key in COLUMNS]
FIRST = ("views.png", "curves.png")             # what a reader wants first; the rest by name


def show(result):
    """Print a result, the content of probes.json."""
    print(table(result["rows"]))
    words = "{n_train:,} training and {n_val:,} validation samples of {classes:,} classes; "
    if result["samplings"]:
        words += "{samplings} view samplings of a training sample; "
    print((words + "{seconds:.0f} s on {device}").format(**result))
    for remark in result["remarks"]:
        print(f"note: {remark}")


def table(rows):
    """Rows as aligned text."""
    lines = [HEADS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def write_report(run_dir, result, pictures):
    """Write run_dir/report.html and return its path.

    pictures: paths of those that belong to the result; what is no file is left out."""
    config = result["config"]               # the checkpoint's own: config.json could be another's
    said = {key: escape(str(value)) for key, value in config.items()}
    name = said["name"]
    told = ""
    if config["mode"] != "regions":
        told = f", condition {said['condition']}, M = {said['views']}"
    of_features = ""
    if result["samplings"]:
        of_features = (f", {result['samplings']} view samplings of a training sample; "
                       "features of the frozen model")
    page = [
        f"<!doctype html><meta charset='utf-8'><title>{name}</title><style>{STYLE}</style>",
        f"<h1>{name}</h1>",
        f"<p>{said['method']} on {said['dataset']}, mode {said['mode']}{told}; "
        f"{result['step']:,} steps, batch {said['batch_size']}.</p>",
        "<h2>Probes</h2>",
        _html_table(result["rows"]),
        f"<p>{result['n_train']:,} training and {result['n_val']:,} validation samples"
        f"{of_features}; untrained: the same probe on a randomly initialised model. "
        "Every head trained as its row says.</p>",
        *(f"<p>{escape(remark)}</p>" for remark in result["remarks"]),
    ]
    for path in _in_order(pictures):
        data = base64.b64encode(path.read_bytes()).decode()
        page.append(f"<h2>{escape(path.stem)}</h2>"
                    f"<img alt='{escape(path.stem)}' src='data:image/png;base64,{data}'>")
    settings = escape(json.dumps(config, indent=1))
    page.append(f"<details><summary>All settings</summary><pre>{settings}</pre></details>")
    # A name that is no UTF-8 becomes question marks, and the page stays readable.
    text = "\n".join(page).encode("utf-8", "replace")
    save_atomically(run_dir / "report.html", lambda part: part.write_bytes(text))
    return run_dir / "report.html"


def _in_order(pictures):
    """Those of the pictures that are there, in the order of the page."""
    there = sorted((path for path in pictures if path.is_file()), key=lambda path: path.stem)
    by_name = {path.name: path for path in there}
    first = [by_name.pop(name) for name in FIRST if name in by_name]
    return [*first, *by_name.values()]


def _cells(row):
    """A row as text, a cell for each of COLUMNS."""
    digits = 1 if row["unit"] in ("top-1 %", "mIoU", "AP") else 3
    cells = []
    for value in (row[key] for key in COLUMNS):
        text = f"{value:.{digits}f}" if isinstance(value, float) else str(value)
        cells.append("-" if value is None else text)
    return cells


def _html_table(rows):
    lines = ["".join(f"<th>{head}</th>" for head in HEADS)]
    for row in rows:
        kinds = [" class='n'" if isinstance(row[key], float) else "" for key in COLUMNS]
        lines.append("".join(f"<td{kind}>{escape(cell)}</td>"
                             for kind, cell in zip(kinds, _cells(row))))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
