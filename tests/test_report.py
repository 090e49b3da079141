"""The table is aligned; the page needs nothing but itself, and shows what belongs to its numbers.
Names that attack it: tests/test_hostile_evaluate.py."""
import re

from PIL import Image

from plumbing.report import show, table, write_report
from probes import row

TOP1 = row("classify", "class", "z", "linear classifier", 300, "top-1 %", 81.234)
R2 = row("action", "position", "z_1, z_2", "linear", 50, "R2", 0.5)
ROWS = [TOP1 | dict(untrained=20.0, paper=81.2), R2 | dict(untrained=-0.01, paper=None)]
CONFIG = dict(name="a <b>", method="seq-jepa", dataset="folder", mode="saccade", condition="none",
              views=3, batch_size=8)
RESULT = dict(config=CONFIG, step=7, n_train=5, n_val=2, samplings=1, remarks=["so & so"],
              rows=ROWS)


def test_table_is_aligned_and_says_what_is_missing():
    lines = table(ROWS).splitlines()
    assert "81.2" in lines[1] and "20.0" in lines[1]
    assert "0.500" in lines[2] and "-0.010" in lines[2] and lines[2].endswith("-")
    assert len({line.index(unit) for line, unit in zip(lines, ("unit", "top-1 %", "R2"))}) == 1


def test_report_is_one_file_with_table_figures_and_settings(tmp_path):
    names = ("lengths.png", "curves.png", "path.png", "views.png")
    for name in (*names, "of-another-evaluation.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    pictures = [tmp_path / name for name in (*names, "absent.png")]
    page = write_report(tmp_path, RESULT, pictures).read_text()
    assert page.count("data:image/png;base64,") == 4
    assert re.findall("<h2>(.*?)</h2>", page) == ["Probes", "views", "curves", "lengths", "path"]
    assert page.count("<tr>") == 1 + len(ROWS) and "<td class='n'>0.500</td><td class='n'>" in page
    assert "a &lt;b&gt;" in page and "<p>so &amp; so</p>" in page
    assert "<td>300</td>" in page and page.count("<td>-</td>") == 1
    assert not re.search(r"""(src|href)=['"](?!data:)""", page)


def test_what_sampled_no_views_says_nothing_of_them(tmp_path, capsys):
    """A network trained on labels reads no frozen features."""
    for samplings, told in ((None, False), (4, True)):
        result = RESULT | dict(samplings=samplings, classes=2, seconds=1.0, device="cpu")
        page = write_report(tmp_path, result, []).read_text()
        assert ("features of the frozen model" in page) == told
        show(result)
        assert ("4 view samplings" in capsys.readouterr().out) == told
