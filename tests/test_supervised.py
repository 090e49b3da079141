"""Two classes that differ in brightness are learnt from the labels; the parts are those of the
run."""
import numpy as np
import pytest
import torch

from benchmarks import supervised
from build import build_views
from plumbing.errors import BadInput


def test_learns_what_the_labels_say_and_reports_every_length(make_config, monkeypatch, capsys,
                                                             tmp_path):
    from PIL import Image
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (tmp_path / name).mkdir()
        for i in range(40):
            pixels = rng.integers(low, low + 127, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    config = make_config(dataset="folder", data_dir=str(tmp_path), image_size=16, patch_size=8,
                         epochs=16, batch_size=16, lr=3e-3, warmup_epochs=1, views=2, workers=1,
                         width=8, agg_hidden=32, action_dim=16)
    assert supervised.measure(config) == 0
    said = capsys.readouterr().out
    assert said.count("top-1 100.0 %") == 3 and "M=6" in said


def test_every_part_but_the_predictor_learns(make_config, photos):
    config = make_config(dataset="folder", data_dir=str(photos), epochs=1, width=8,
                         agg_hidden=32, action_dim=16, batch_size=16)
    views = build_views(config, "train", torch.device("cpu"))
    before = supervised.build_model(config, views.groups).state_dict()
    after = supervised.train_on_labels(config, views, torch.device("cpu")).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for part, moves in (("encoder.", True), ("aggregator.", True), ("embed.linear", True),
                        ("predictor.", False)):
        names = {name for name in before if name.startswith(part) and name.endswith("weight")}
        assert names and names & moved == (names if moves else set()), part


def test_a_batch_larger_than_the_data_is_refused(make_config, photos):
    config = make_config(dataset="folder", data_dir=str(photos), batch_size=500, width=8)
    with pytest.raises(BadInput, match="--batch-size 500: there are"):
        supervised.measure(config)


def test_other_methods_are_refused_in_one_line(capsys):
    assert supervised.main(["--dataset", "solids", "--mode", "regions", "--quick"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: --method dseq-jepa") and "\n" not in said
