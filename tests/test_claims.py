"""Verdicts by hand; every number that a claim names is one that evaluate.py really measures; what
was made is not made again, and never taken for something else."""
import json
import os
import shlex
import statistics
import time

import pytest

import claims
import config as settings
import evaluate
import train
from claims import CLAIMS, RUNS, Claim, Number, judge, parse, plan, table, verdict
from plumbing.errors import BadInput

TINY = ["--limit", "64", "--epochs", "1", "--warmup-epochs", "0", "--width", "8", "--image-size",
        "32"]


def options_of(tmp_path, *argv):
    return parse([*argv, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out"),
                  "--", *TINY])


# ---------------------------------------------------------------- the two tables

def test_names_are_unique_and_every_run_is_used():
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    assert {run for claim in CLAIMS for run in claim.runs} == RUNS.keys()


@pytest.mark.parametrize("scale", claims.DATASETS)
@pytest.mark.parametrize("run", RUNS)
def test_flags_of_every_run_are_accepted(run, scale, tmp_path):
    options = parse(["--scale", scale, "--out", str(tmp_path), "--seeds", "3"])
    made = plan(run, 3, CLAIMS, options)
    assert made.config.name == f"{run}-3" and made.config.seed == 3
    assert made.config.quick == (scale == "quick")
    others = {plan(other, 3, CLAIMS, options).config for other in RUNS if other != run}
    names = [settings.dataclasses.replace(each, name=made.config.name) for each in others]
    assert made.config not in names, "two runs that differ in nothing"


@pytest.mark.parametrize("run", ["saccade", "rotation", "augment-crop", "regions"])
def test_every_number_of_a_claim_is_measured(run, tmp_path):
    """One tiny run a mode: the rows of probes.json depend on the mode alone."""
    mode = shlex.split(RUNS[run])[1]
    small = ["--limit", "32", "--batch-size", "32", "--epochs", "1", "--image-size", "32"]
    small += dict(rotation=["--object-views", "8"], regions=[]).get(mode, ["--object-views", "2"])
    small += [] if mode == "regions" else ["--width", "8"]
    argv = ["--dataset", "solids", *shlex.split(RUNS[run]), "--quick", *small, "--warmup-epochs",
            "0", "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path), "--name", "x"]
    assert train.main(argv) == 0
    assert evaluate.main([str(tmp_path / "x" / "last.pt"), "--probe-epochs", "1",
                          "--samplings", "1", "--no-untrained"]) == 0
    result = json.loads((tmp_path / "x" / "probes.json").read_text())
    assert all(row["untrained"] is None for row in result["rows"])
    numbers = [number for claim in CLAIMS for number in (claim.first, claim.second)
               if f"--mode {mode}" in RUNS[number.run]]
    assert numbers
    for number in numbers:
        claims.value_of(number, result)
    with pytest.raises(BadInput, match="no row knn, nothing, z"):
        claims.value_of(Number(run, "knn", "nothing", "z"), result)


# ---------------------------------------------------------------- verdicts

@pytest.mark.parametrize("effect, spread, word", [
    (1.0, 0.49, "holds"), (1.0, 0.5, "undecided"), (-1.0, 0.5, "undecided"),
    (-1.0, 0.49, "does not"), (5.0, None, "undecided"), (0.0, 0.0, "undecided"),
])
def test_verdict(effect, spread, word):
    assert verdict(effect, spread) == word


A = Number("a", "classify", "class", "z")
B = Number("b", "classify", "class", "z")


def results_of(a, b, untrained=5.0):
    """{(run, seed): what evaluate.py writes}, with one row."""
    made = {}
    for run, values in (("a", a), ("b", b)):
        for seed, value in enumerate(values):
            row = dict(zip(("probe", "predicts", "from"), A[1:]), value=value, untrained=untrained)
            made[run, seed] = dict(checkpoint=f"{run}-{seed}", rows=[row])
    return made


def test_a_row_by_hand():
    """Effects 3, 2, 4: mean 3, standard deviation 1."""
    claim = Claim("x", "Table 9", "class, %", ("more", "less"), A, B, (2.0, 1.0))
    row = judge(claim, results_of([13, 14, 15], [10, 12, 11]), parse(["--seeds", "0", "1", "2"]))
    assert (row["with"], row["without"], row["untrained"]) == (14, 11, 5)
    assert (row["effect"], row["spread"], row["verdict"]) == (3, 1, "holds")
    text = table([row])
    assert "+3.0 ± 1.0" in text and "2 / 1" in text and "more" in text
    json.dumps(row)


def test_slack_lets_an_effect_be_a_little_below_zero():
    claim = Claim("x", "Table 9", "class, %", ("more", "less"), A, B, None, 2.0)
    options = parse(["--seeds", "0", "1"])
    unharmed = judge(claim, results_of([9.0, 9.2], [10.0, 10.0]), options)
    assert unharmed["verdict"] == "holds" and unharmed["effect"] == pytest.approx(-0.9)
    harmed = judge(claim, results_of([5.0, 5.2], [10.0, 10.0]), options)
    assert harmed["verdict"] == "does not"


def test_one_seed_takes_the_kept_spread_of_the_same_setting(tmp_path, monkeypatch):
    claim = Claim("x", "Table 9", "class, %", ("more", "less"), A, B)
    results = results_of([13.0], [10.0])
    monkeypatch.setattr(claims, "KEPT", tmp_path / "kept.json")
    assert judge(claim, results, parse(["--seeds", "0"]))["verdict"] == "undecided"
    (tmp_path / "kept.json").write_text(json.dumps([dict(claim="x", spread=1.0)]))
    row = judge(claim, results, parse(["--seeds", "0"]))
    assert row["spread"] == 1 and row["verdict"] == "holds"
    for other in (["--scale", "gpu"], ["--dataset", "folder"], ["--", "--epochs", "3"]):
        assert judge(claim, results, parse(["--seeds", "0", *other]))["spread"] is None


def test_the_kept_table_is_of_todays_claims_and_adds_up():
    """results/claims.json, from which a single seed takes its spread."""
    rows = json.loads(claims.KEPT.read_text())
    assert {row["claim"] for row in rows} <= {claim.name for claim in CLAIMS}
    for row in rows:
        pairs = list(zip(row["values"]["with"], row["values"]["without"]))
        effects = [a - b for a, b in pairs]
        assert len(effects) == len(row["seeds"]) >= 2
        assert row["effect"] == pytest.approx(statistics.mean(effects))
        assert row["spread"] == pytest.approx(statistics.stdev(effects))
        assert row["verdict"] == verdict(row["effect"] + row["slack"], row["spread"])


# ---------------------------------------------------------------- choosing

def test_claims_by_name_by_place_and_the_first_pair():
    def chosen(*argv):
        return [claim.name for claim in claims.choose(parse(list(argv)))]

    assert chosen() == [claim.name for claim in CLAIMS]
    assert chosen("--claims", "told-crop") == ["told-crop"]
    assert chosen("--claims", "table-2") == ["told-crop", "told-jitter", "told-blur"]
    assert set(chosen("--claims", "Fig-7")) == {"path-needs-actions", "path-hardly-views",
                                                 "angular-path-needs-actions"}
    first = claims.choose(parse(["--first"]))
    assert all(claim.runs <= set(claims.PAIR) for claim in first) and len(first) > 5
    with pytest.raises(BadInput, match="--claims nonsense: fits none of"):
        claims.choose(parse(["--claims", "nonsense"]))


# ---------------------------------------------------------------- made once

def fake_jobs(made):
    """In place of run_side_by_side: writes what the two commands would have."""
    def run(jobs, at_once, threads, unit):
        for job in jobs:
            made.append(job.name)
            folder = job.log.with_suffix("")
            folder.mkdir(parents=True, exist_ok=True)
            config = made_config(job)
            rows = []
            for claim in CLAIMS:
                for number in (claim.first, claim.second):
                    rows.append(dict(zip(("probe", "predicts", "from"), number[1:]),
                                     value=len(rows) + config["seed"] ** 2, untrained=1.0))
            text = json.dumps(dict(checkpoint="x", config=config, rows=rows, limit=64,
                                   probe_epochs=0, samplings=int(job.commands[1][4])))
            (folder / "metrics.csv").write_text("epoch\n1\n")
            (folder / "report.html").write_text("")
            (folder / "probes.json").write_text(text)
    return run


def made_config(job):
    argv = [word for word in job.commands[0][2:] if word != "--resume"]
    return vars(settings.from_command_line(argv)) | {}


def test_runs_are_shared_made_once_and_told_apart(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(claims, "run_side_by_side", fake_jobs(made))
    argv = ["--claims", "saccade-class", "path", "--seeds", "0", "1"]
    assert claims.show_claims(options_of(tmp_path, *argv)) == 0
    assert sorted(made) == ["saccade-0", "saccade-1", "saccade-no-actions-0",
                            "saccade-no-actions-1"]
    out = tmp_path / "out"
    rows = json.loads((out / "claims.json").read_text())
    assert {"claim", "with", "without", "untrained", "verdict"} <= rows[0].keys()
    assert (out / "claims.md").read_text().count("\n") == len(rows) + 2
    assert (out / "claims.png").stat().st_size > 10_000
    assert "seeds 0 1" in capsys.readouterr().out

    claims.show_claims(options_of(tmp_path, *argv, "--seeds", "0", "1", "2"))
    assert sorted(made[4:]) == ["saccade-2", "saccade-no-actions-2"]

    # A checkpoint that is newer than the probes: trained on since.
    newer = out / "saccade-0" / "last.pt"
    newer.touch()
    os.utime(newer, (time.time() + 5, time.time() + 5))
    claims.show_claims(options_of(tmp_path, *argv))
    assert made[6:] == ["saccade-0"]
    newer.unlink()

    # Probed by hand: part of the rows, of the samples, of the epochs; or not trained to the end.
    whole = json.loads((out / "saccade-1" / "probes.json").read_text())
    for change in (dict(limit=32), dict(probe_epochs=1), dict(samplings=2),
                   dict(rows=whole["rows"][:-40])):
        (out / "saccade-1" / "probes.json").write_text(json.dumps(whole | change))
        claims.show_claims(options_of(tmp_path, *argv))
        assert made.pop() == "saccade-1"
    (out / "saccade-1" / "metrics.csv").write_text("epoch\n")
    claims.show_claims(options_of(tmp_path, *argv))
    assert made.pop() == "saccade-1"

    other = parse([*argv, "--out", str(out), "--", *TINY, "--lr", "0.5"])
    with pytest.raises(BadInput, match="is of a run with --lr"):
        claims.show_claims(other)
    (out / "saccade-1" / "probes.json").write_text("{}")
    with pytest.raises(BadInput, match="not what evaluate.py writes"):
        claims.show_claims(options_of(tmp_path, *argv))


@pytest.mark.parametrize("argv, words", [
    (["--jobs", "-1"], "--jobs -1: must be"), (["--claims", "x"], "--claims x: fits none"),
    (["--seeds", "-1", "--claims", "told-blur"], "--seed"),
    (["--dataset", "folder", "--claims", "relative"], "--mode rotation does not apply"),
    (["--claims", "told-blur", "--", "--views", "0"], "--views"),
    (["--claims", "told-blur", "--", "--nope"], "unrecognized arguments: --nope"),
    (["--claims", "saccade", "--", "--seed", "3"], "--seed 3: not after --"),
    (["--claims", "saccade", "--", "--condition", "none"], "--condition none: not after --"),
    (["--claims", "saccade", "--", "--no-ior"], "--ior False: not after --"),
    (["--claims", "saccade", "--", "--name", "x"], "--name x: not after --"),
    (["--claims", "saccade", "--", "--dataset", "cifar10"], "--dataset cifar10: not after --"),
    (["--claims", ""], "--claims : fits none"),
    (["--seeds", "x"], "--seeds"), (["--scale", "huge"], "--scale"),
])
def test_bad_input_in_one_line(argv, words, capsys, tmp_path):
    place = ["--out", str(tmp_path / "out")]
    try:
        status = claims.main([*place, *argv])
    except SystemExit as left:
        status = left.code
    said = capsys.readouterr().err.strip()
    assert status == 2 and words in said and said.startswith("error: ") and "\n" not in said
    assert not (tmp_path / "out").exists()


def test_results_of_other_photos_are_not_taken_for_these(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "run_side_by_side", fake_jobs([]))
    argv = ["--claims", "saccade-class-z", "--seeds", "0", "1", "--dataset", "folder", "--out",
            str(tmp_path / "out")]
    claims.show_claims(parse([*argv, "--data-dir", "A", "--", *TINY]))
    with pytest.raises(BadInput, match="is of a run with --data-dir A, not B"):
        claims.show_claims(parse([*argv, "--data-dir", "B", "--", *TINY]))


def test_a_place_for_results_is_looked_at_before_hours_of_runs(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(claims, "run_side_by_side", fake_jobs(made))
    (tmp_path / "out" / "claims.png").mkdir(parents=True)
    with pytest.raises(BadInput, match="claims.png: is no plain file"):
        claims.show_claims(options_of(tmp_path, "--claims", "told-crop"))
    assert made == []
