"""One page about a run, to send to a colleague: report.html with the table, the curves and every figure inside it.

    write_report(run_dir, result)       the run's config.json and *.png, and what evaluate.py measured; nothing else is needed to view it
"""
import base64
import json
from html import escape

from plumbing.files import save_atomically

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}details{margin:1em 0}"""
COLUMNS = ("probe", "predicts", "from", "head", "epochs", "unit", "value", "untrained", "paper")
FIRST = ("views.png", "curves.png")             # the order in which a reader wants them; the rest by name


def write_report(run_dir, result):
    """Write run_dir/report.html and return its path.  result: the content of probes.json."""
    config = json.loads((run_dir / "config.json").read_text())
    pictures = sorted(run_dir.glob("*.png"), key=lambda p: (FIRST.index(p.name) if p.name in FIRST else len(FIRST), p.name))
    told = "" if config["mode"] == "regions" else f", condition {config['condition']}, M = {config['views']}"
    page = [f"<!doctype html><meta charset='utf-8'><title>{escape(config['name'])}</title><style>{STYLE}</style>",
            f"<h1>{escape(config['name'])}</h1>",
            f"<p>{escape(config['method'])} on {escape(config['dataset'])}, mode {escape(config['mode'])}"
            f"{escape(told)}; {result['step']:,} steps, batch {config['batch_size']}.</p>",
            f"<h2>Probes</h2>{_table(result['rows'])}",
            f"<p>{result['n_train']:,} training and {result['n_val']:,} validation samples, {result['samplings']} view samplings; features of the "
            "frozen model; untrained: the same probe on a randomly initialised model. Every head trained as its row says.</p>"]
    page += [f"<h2>{escape(p.stem)}</h2><img alt='{escape(p.stem)}' src='data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}'>"
             for p in pictures]
    page.append(f"<details><summary>All settings</summary><pre>{escape(json.dumps(config, indent=1))}</pre></details>")
    save_atomically(run_dir / "report.html", lambda part: part.write_text("\n".join(page)))
    return run_dir / "report.html"


def _table(rows):
    def cell(row, column):
        value = row[column]
        if not isinstance(value, float):
            return f"<td>{'-' if value is None else escape(str(value))}</td>"
        return f"<td class='n'>{value:.{1 if row['unit'] == 'top-1 %' else 3}f}</td>"
    head = "".join(f"<th>{'trained' if c == 'value' else c}</th>" for c in COLUMNS)
    body = "".join("<tr>" + "".join(cell(row, c) for c in COLUMNS) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
