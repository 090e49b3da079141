"""The table of many runs: its numbers by hand, its rows and columns, what it says of runs that do
not compare.  Bad input: tests/test_hostile_evaluate.py."""
import csv
import dataclasses
import json
import math
import statistics

import pytest
from test_figures import drawn

import compare
import evaluate
import train
from compare import Column
from config import Config
from probes import row

Z = Column("classify", "class", "z", "top-1 %")
ROTATION = Column("action", "rotation", "z_1, z_2", "R2")


def line(column, value, untrained=0.0, paper=None, epochs=300):
    probe, predicts, source, unit = column
    return (row(probe, predicts, source, "linear", epochs, unit, value)
            | dict(untrained=untrained, paper=paper))


def agg(M):
    return Column("classify", "class", f"z_agg M={M}", "top-1 %")


@pytest.fixture
def run(tmp_path):
    """Makes the folder of a run with the probes.json of these values, {Column: value}."""
    def make(name, values, file="probes.json", result=(), lines=None, **settings):
        config = Config(dataset="solids", mode="rotation", condition="rotation", views=3, name=name)
        config = dataclasses.asdict(config) | settings
        lines = lines or [line(column, value) for column, value in values.items()]
        result = dict(dataset="solids", step=10, classes=5, n_train=60, n_val=20, samplings=4,
                      config=config, rows=lines) | dict(result)
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(result))
        return folder / file

    return make


def read(*files):
    results = {file: compare.figures.read_result(file) for file in files}
    return (results, *compare.gather(results))


def table(*files):
    """The printed table as {(row, model): {heading: cell}}."""
    _, rows, columns = read(*files)
    lines = [[word.strip() for word in text.split("|")[1:-1]]
             for text in compare.markdown(rows, columns).splitlines()]
    found = {}
    name = ""
    for words in lines[2:]:
        name = words[0] or name                             # a row's name stands once
        found[name, words[2]] = dict(zip(lines[0], words))
    return found


# ---------------------------------------------------------------- numbers

def test_mean_and_sample_deviation_of_three_seeds_by_hand(run):
    """70, 72, 74: squares of -2, 0, 2 over n - 1 = 2.  0.1, 0.2, 0.6: (.04 + .01 + .09) / 2."""
    values = [(70.0, 0.1), (72.0, 0.2), (74.0, 0.6)]
    files = [run(f"s{seed}", {Z: top1, ROTATION: r2}, seed=seed)
             for seed, (top1, r2) in enumerate(values)]
    cells = table(*files)["seq-jepa", "trained"]
    assert cells["top-1 %, z"] == "72.0 \u00b1 2.0"
    assert cells["R\u00b2 rotation, z_1, z_2"] == "0.300 \u00b1 0.265"
    assert cells["seeds"] == "3"
    _, (row,), _ = read(*files)
    assert row.value(Z) == (72.0, 2.0, 3)
    assert row.value(ROTATION) == (pytest.approx(0.3), pytest.approx(math.sqrt(0.07)), 3)


def test_untrained_twins_have_mean_and_deviation_the_paper_one_number(run):
    files = [run(f"s{seed}", {}, lines=[line(Z, 50.0 + seed, untrained, 82.49)], seed=seed)
             for seed, untrained in enumerate((10.0, 20.0))]
    found = table(*files)
    assert found["seq-jepa", "untrained"]["top-1 %, z"] == f"15.0 \u00b1 {math.sqrt(50):.1f}"
    assert found["seq-jepa", "paper"]["top-1 %, z"] == "82.5"
    assert list(found) == [("seq-jepa", model) for model in ("trained", "untrained", "paper")]


def test_one_seed_has_no_deviation_and_no_paper_no_line(run):
    found = table(run("a", {Z: 71.44}))
    assert found["seq-jepa", "trained"]["top-1 %, z"] == "71.4"
    assert ("seq-jepa", "paper") not in found


def test_a_run_probed_without_its_twin_has_no_line_for_it(run):
    files = [run("a", {}, lines=[line(Z, 70.0, None)], seed=0),
             run("b", {Z: 70.0}, condition="none"),
             run("c", {}, lines=[line(Z, 70.0, None)], condition="none", seed=1)]
    found = table(*files)
    assert ("seq-jepa, condition rotation", "untrained") not in found
    assert found["seq-jepa, condition none", "untrained"]["top-1 %, z"] == "0.0 (n 1)"
    _, rows, columns = read(*files)
    assert compare.as_csv(rows, columns).splitlines()[1].endswith(",1,70.0,,,,,")


def test_the_best_trained_mean_of_each_column_is_marked(run):
    color = ROTATION._replace(predicts="color")
    files = [run("a", {Z: 70.0, ROTATION: -0.5, agg(3): 50.0, color: 0.0}),
             run("b", {Z: 60.0, ROTATION: -0.2, color: 0.0}, condition="none"),
             run("c", {}, lines=[line(Z, 70.0, untrained=99.0, paper=99.0)], condition="all")]
    found = table(*files)
    marked = {(name, model, heading) for (name, model), cells in found.items()
              for heading, cell in cells.items() if "**" in cell}
    assert marked == {
        ("seq-jepa, condition rotation", "trained", "top-1 %, z"),          # a tie of two
        ("seq-jepa, condition all", "trained", "top-1 %, z"),
        ("seq-jepa, condition none", "trained", "R\u00b2 rotation, z_1, z_2")}
    # z_agg: the best of one is no news; color: nor is what all share


def test_csv_has_every_cell_unrounded(run):
    files = [run("a", {Z: 1 / 3}, seed=0), run("b", {Z: 2 / 3}, seed=1),
             run("c", {Z: 0.1, ROTATION: 0.2}, condition="none")]
    _, rows, columns = read(*files)
    lines = list(csv.DictReader(compare.as_csv(rows, columns).splitlines()))
    assert [(each["row"], each["probe"], each["seeds"], each["best"]) for each in lines] == [
        ("seq-jepa, condition rotation", "classify", "2", "best"),
        ("seq-jepa, condition none", "classify", "1", ""),
        ("seq-jepa, condition none", "action", "1", "")]
    assert float(lines[0]["trained"]) == 0.5
    assert float(lines[0]["trained_std"]) == statistics.stdev([1 / 3, 2 / 3])
    assert lines[1]["trained_std"] == "" and lines[1]["paper"] == ""
    assert lines[2]["from"] == "z_1, z_2" and lines[2]["unit"] == "R2"


# ---------------------------------------------------------------- rows and columns

def names(*files):
    _, rows, _ = read(*files)
    return [row.name for row in rows]


def test_runs_that_differ_in_seed_name_and_paths_are_one_row(run):
    files = [run("a", {Z: 1.0}, seed=0, data_dir="x", out="y", device="cpu", workers=3),
             run("b", {Z: 2.0}, seed=2**64 - 1, data_dir="z", out="w", device="cuda", resume=True)]
    assert names(*files) == ["seq-jepa"]


def test_a_row_is_named_by_what_tells_it_apart(run):
    files = [run("a", {Z: 1.0}), run("b", {Z: 1.0}, condition="none"),
             run("c", {Z: 1.0}, action_in="predictor")]
    assert names(*files) == ["seq-jepa, condition rotation, action_in both",
                             "seq-jepa, condition none, action_in both",
                             "seq-jepa, condition rotation, action_in predictor"]
    assert names(files[0], files[2]) == ["seq-jepa, action_in both",
                                         "seq-jepa, action_in predictor"]


def test_what_the_method_tells_is_not_told_again_but_noted(run):
    files = [run("a", {Z: 1.0}), run("b", {Z: 1.0}, method="byol", lr=1e-3, warmup_epochs=0)]
    results, rows, _ = read(*files)
    assert [row.name for row in rows] == ["seq-jepa", "byol"]
    assert compare.notes(rows) == ["- note: the rows differ in lr, warmup_epochs too"]
    assert compare.warnings(results) == []


def test_settings_that_older_files_lack_are_the_defaults(run):
    old = run("old", {Z: 1.0}, seed=1)
    result = json.loads(old.read_text())
    del result["config"]["inside"]
    old.write_text(json.dumps(result))
    assert names(old, run("new", {Z: 1.0})) == ["seq-jepa"]
    assert names(old, run("other", {Z: 1.0}, inside=True)) == ["seq-jepa, inside False",
                                                               "seq-jepa, inside True"]


def test_a_setting_of_newer_code_tells_rows_apart_too(run):
    assert names(run("a", {Z: 1.0}), run("b", {Z: 1.0}, flux=3)) == ["seq-jepa, flux None",
                                                                     "seq-jepa, flux 3"]


def test_columns_stand_by_probe_and_length_whatever_came_first(run):
    own = ROTATION._replace(probe="parameters", source="z_1")
    knn = Z._replace(probe="knn")
    files = [run("a", {own: 0.1, agg(10): 1.0, agg(1): 1.0, knn: 1.0, ROTATION: 0.1}),
             run("b", {agg(3): 1.0, Z: 1.0}, condition="none")]
    _, _, columns = read(*files)
    assert columns == [Z, agg(1), agg(3), agg(10), ROTATION, own]       # and none for k-NN


def test_a_method_without_an_aggregate_has_a_dash_there(run):
    files = [run("a", {Z: 80.0, agg(3): 84.0}), run("b", {Z: 82.0}, method="byol")]
    found = table(*files)
    assert found["byol", "trained"]["top-1 %, z_agg M=3"] == "-"
    assert found["byol", "untrained"]["top-1 %, z_agg M=3"] == "-"


def test_a_cell_of_fewer_seeds_says_so(run):
    files = [run("a", {Z: 80.0, ROTATION: 0.5}, seed=0), run("b", {Z: 82.0}, seed=1)]
    cells = table(*files)["seq-jepa", "trained"]
    assert cells["R\u00b2 rotation, z_1, z_2"] == "0.500 (n 1)" and "n" not in cells["top-1 %, z"]


def test_parts_of_one_run_complete_one_another(run):
    files = [run("a", {Z: 80.0}, file="probes-classify.json"),
             run("a", {ROTATION: 0.5}, file="probes-action.json")]
    assert len(table(*files)) == 2
    assert table(*files)["seq-jepa", "trained"]["seeds"] == "1"


def test_a_vit_probed_on_two_data_sets_has_two_rows(run):
    linear = Column("linear", "class", "last 4 blocks, mean patch", "top-1 %")
    files = [run("a", {linear: 1.0}, mode="regions", method="i-jepa"),
             run("a", {linear: 2.0}, "probes-folder.json", dict(dataset="folder"), mode="regions",
                 method="i-jepa")]
    results, rows, _ = read(*files)
    assert [row.name for row in rows] == ["i-jepa, probed on solids", "i-jepa, probed on folder"]
    assert "differ in probed on: solids (" in compare.warnings(results)[0]


# ---------------------------------------------------------------- runs that do not compare

@pytest.mark.parametrize("settings, result, words", [
    (dict(mode="saccade"), {}, "mode: rotation ("),
    (dict(dataset="stl10"), {}, "dataset: solids ("),
    (dict(epochs=7), {}, "epochs: 2000 ("),
    (dict(limit=7), {}, "limit: 0 ("),
    (dict(material="plain"), {}, "material: free ("),
    ({}, dict(samplings=1), "samplings: 4 ("),
    ({}, dict(n_train=59), "n_train: 60 ("),
    ({}, dict(classes=4), "classes: 5 ("),
    ({}, dict(step=9), "step: 10 ("),
])
def test_a_warning_names_what_is_not_alike_and_where(settings, result, words, run):
    files = [run("a", {Z: 1.0}), run("b", {Z: 1.0}, result=result, seed=1, **settings)]
    results, _, _ = read(*files)
    lines = compare.warnings(results)
    assert len(lines) == 1 and lines[0].startswith(f"- warning: the runs differ in {words}")
    assert f"({files[0].parent})" in lines[0] and f"({files[1].parent})" in lines[0]
    assert compare.warnings({files[0]: results[files[0]]}) == []


def test_two_folders_of_photos_are_no_two_seeds_of_one(run):
    photos = dict(dataset="folder")
    files = [run("a", {Z: 1.0}, result=photos, dataset="folder", data_dir="A", seed=0),
             run("b", {Z: 1.0}, result=photos, dataset="folder", data_dir="B", seed=1)]
    results, _, _ = read(*files)
    assert "differ in data_dir: A (" in compare.warnings(results)[0]


def test_a_warning_names_heads_that_were_trained_otherwise(run):
    files = [run("a", {}, lines=[line(Z, 1.0), line(ROTATION, 1.0, epochs=60)], seed=0),
             run("b", {}, lines=[line(Z, 1.0), line(ROTATION, 1.0, epochs=300)], seed=1)]
    results, _, _ = read(*files)
    assert compare.warnings(results) == [
        "- warning: the runs differ in the head of action rotation: "
        f"linear, 60 epochs ({files[0].parent}); linear, 300 epochs ({files[1].parent})"]


def test_many_runs_are_counted_not_listed(run):
    files = [run(f"r{seed}", {Z: 1.0}, seed=seed, epochs=1 + (seed == 4)) for seed in range(5)]
    results, _, _ = read(*files)
    assert compare.warnings(results) == [
        f"- warning: the runs differ in epochs: 1 (4 runs); 2 ({files[4].parent})"]


# ---------------------------------------------------------------- Fig. 1 and files

def test_a_point_is_z_agg_at_its_longest_or_z_without_one(run):
    files = [run("a", {agg(10): 90.0, agg(3): 95.0, Z: 80.0, ROTATION: 0.7}),
             run("b", {Z: 82.0, ROTATION: 0.1}, method="byol", seed=0),
             run("c", {Z: 84.0, ROTATION: 0.3}, method="byol", seed=1),
             run("d", {Z: 84.0}, method="no action")]
    _, rows, columns = read(*files)
    assert compare.points(rows, columns) == [
        ("seq-jepa", "z_agg M=10", (90.0, None), {"rotation": (0.7, None)}),
        ("byol", "z", (83.0, pytest.approx(math.sqrt(2))),
         {"rotation": (pytest.approx(0.2), pytest.approx(math.sqrt(0.02)))})]


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_table_is_kept_and_drawn_where_out_says_and_only_there(run, tmp_path, monkeypatch,
                                                                    capsys):
    monkeypatch.chdir(tmp_path)
    file = run("a", {Z: 80.0, ROTATION: 0.5})
    out = tmp_path / "out"
    out.mkdir()
    assert compare.main([str(file.parent)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| method") and listed(tmp_path) == ["out", "runs"]
    for _ in range(2):                                      # a second time replaces the first
        assert compare.main([str(file.parent), "--out", str(out)]) == 0
        assert listed(out) == ["compare.csv", "compare.md", "compare.png"]
    assert (out / "compare.md").read_text(encoding="utf-8") == printed
    assert drawn(out / "compare.png")
    assert listed(file.parent) == ["probes.json"]


def test_no_figure_of_an_older_table_stays_beside_one_without_points(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    file = run("a", {Z: 80.0, ROTATION: 0.5})
    compare.main([str(file), "--out", str(out)])
    file = run("b", {Z: 80.0})
    assert compare.main([str(file), "--out", str(out)]) == 0
    assert listed(out) == ["compare.csv", "compare.md"]


@pytest.mark.parametrize("figure", ["heatmap", "sweep", "transfer"])
def test_the_other_figures_are_one_command_too(figure, run, tmp_path, capsys):
    transfer = Column("transfer", "class", "z_agg M=3, 1e9 MAC an image", "top-1 %")
    lines = [line(agg(3), 50.0), line(ROTATION, 0.5)]
    for seed in (0, 1):
        run(f"s{seed}", {}, lines=lines, seed=seed, width=64 + seed)
        run(f"s{seed}", {}, "probes-transfer-folder.json", seed=seed, width=64 + seed,
            lines=[line(transfer, 20.0) | dict(gmac=1.0, patch_size=8)])
    flags = [str(tmp_path / "runs" / name) for name in ("s0", "s1")]
    assert compare.main([*flags, "--figure", figure, "--out", str(tmp_path)]) == 0
    assert drawn(tmp_path / f"{figure}.png")
    assert set(listed(tmp_path)) == {f"{figure}.png", "runs"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"drew {tmp_path / figure}.png"
    # In a figure over M_tr these two look like seeds of one setting.
    warned = [text.startswith("- warning: the runs differ in width: 64") for text in printed[1:]]
    assert warned == ([] if figure == "transfer" else [True])


# ---------------------------------------------------------------- what evaluate.py writes

def test_two_real_runs_of_two_seeds_are_one_row(tmp_path, capsys):
    tiny = ("--dataset solids --mode rotation --image-size 16 --limit 16 --object-views 4 "
            "--width 2 --action-dim 4 --agg-hidden 8 --views 2 --epochs 1 --warmup-epochs 0 "
            "--batch-size 4 --device cpu").split()
    folders = []
    for seed in ("0", "1"):
        folders.append(tmp_path / seed)
        places = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path), "--name", seed]
        assert train.main([*tiny, *places, "--seed", seed]) == 0
        checkpoint = str(folders[-1] / "last.pt")
        assert evaluate.main([checkpoint, "--probe-epochs", "1", "--views", "1", "3",
                              "--samplings", "1"]) == 0
    capsys.readouterr()
    assert compare.main([*map(str, folders), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 4 and "warning" not in printed and "note" not in printed
    assert drawn(tmp_path / "compare.png")
    measured = [json.loads((folder / "probes.json").read_text())["rows"] for folder in folders]
    cells = list(csv.DictReader((tmp_path / "compare.csv").read_text().splitlines()))
    assert len(cells) == len([line for line in measured[0] if line["probe"] in compare.PROBES])
    for cell in cells:
        values = [line["value"] for lines in measured for line in lines
                  if all(line[key] == cell[key] for key in ("probe", "predicts", "from"))]
        assert len(values) == 2
        assert float(cell["trained"]) == pytest.approx(sum(values) / 2)
        assert float(cell["trained_std"]) == pytest.approx(abs(values[0] - values[1]) / 2 ** 0.5)
