"""The benchmark runs real probes on what it makes up, reads memory, and leaves nothing behind."""
import json

import pytest
import torch

from benchmarks import probe_memory
from plumbing import scratch

THREADS = torch.get_num_threads()


@pytest.mark.parametrize("kind", list(probe_memory.KINDS))
def test_its_probes_learn_on_disk_what_they_learn_in_memory(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(scratch, "IN_MEMORY", 0)                    # to be put back: it is set
    monkeypatch.setattr(probe_memory, "CLASSES", 5)
    monkeypatch.setattr(probe_memory, "EPOCHS", 60)
    found = []
    for bound in (0, 1e9):
        torch.manual_seed(0)
        found.append(probe_memory.measure(kind, 400, 16, bound, THREADS))
    on_disk, in_memory = found
    assert on_disk["top1"].keys() == in_memory["top1"].keys()
    assert [name.split(",")[0] for name in on_disk["top1"]] == (
        ["linear", "knn", "knn", "cls"] if kind == "regions" else ["transfer"])
    for name, value in on_disk["top1"].items():
        assert value == pytest.approx(in_memory["top1"][name], abs=2)
    assert max(in_memory["top1"].values()) > 50                     # of 5 classes
    assert 0 < on_disk["before_gb"] <= on_disk["peak_gb"] < 100
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_the_features_is_what_their_shapes_say(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(scratch, "IN_MEMORY", 0)
    found = probe_memory.measure("regions", 5000, 16, 0, THREADS)
    crops = probe_memory.SAMPLINGS * 4 * 16
    assert found["features_gb"] == round(5000 * (2 * (crops + 2 * 16) + 8) / 1e9, 3) > 0


def test_a_line_and_a_record_for_each_kind(monkeypatch, tmp_path, capsys):
    class Here:
        """A process pool that is this process."""
        def __init__(self, *_):
            self.submit = lambda function, *args: self
            self.result = lambda: dict(kind="regions", images=7, features_gb=1.0, peak_gb=2.0,
                                       before_gb=0.5, extraction_seconds=3.0, heads_seconds=4.0)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(probe_memory, "ProcessPoolExecutor", Here)
    kept = tmp_path / "x.json"
    assert probe_memory.main(["--images", "100", "200", "--json", str(kept)]) == 0
    record = json.loads(kept.read_text())
    assert len(record["rows"]) == 4 and {"command", "commit", "device", "seconds"} <= record.keys()
    assert capsys.readouterr().out.count("2.00 GB") == 4
    assert probe_memory.main(["--images", "100", "--only", "saccade"]) == 0
    assert capsys.readouterr().out.count("2.00 GB") == 1


@pytest.mark.parametrize("flags", ["--images 5", "--images 1000000000", "--memory -1", "--width 0",
                                   "--threads 0"])
def test_bad_input_is_one_line(flags, capsys):
    assert probe_memory.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
