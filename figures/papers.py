"""What the papers' tables report: the column `paper` of evaluate.py, from papers.csv.

    paper_numbers(config, dataset)      {(probe, predicts, from): value}
    as_published(config)                whether a run was theirs; if not, nothing stands beside it

Checked in tests/test_papers.py.
"""
import csv
import dataclasses
from pathlib import Path

import config as settings

PAPERS = Path(__file__).parents[1] / "papers.csv"
VARIED = ("dataset", "mode", "method", "encoder", "condition", "views")     # by the papers' tables
# Fields of Config that change nothing of what is learned, but by chance.
NOT_LEARNED = ("data_dir", "download", "workers", "resident", "keep_every", "seed", "device", "amp",
               "compile", "probe_every", "out", "name", "resume", "accumulate")


def as_published(config):
    """Whether a run was the papers': its preset's in every field that changes what is learned.

    Fixations were drawn from DeepGaze's saliency maps, computed or published; ours are others."""
    varied = {name: getattr(config, name) for name in VARIED}
    preset = settings.preset(config.dataset, config.mode, method=config.method,
                             projector=config.projector, recipe=config.recipe)
    preset = settings.Config(**preset | varied)
    if config.encoder == "vit-huge":
        preset = dataclasses.replace(preset, image_size=448, epochs=300)
    if config.mode == "saccade":
        if config.saliency in ("signature", "uniform"):
            return False
        preset = dataclasses.replace(preset, saliency=config.saliency)
    if config.views > preset.object_views - 1:          # more views than its objects have
        return False
    expected = dataclasses.asdict(settings.check(preset))
    found = dataclasses.asdict(config)
    return all(found[name] == expected[name] for name in found if name not in NOT_LEARNED)


def paper_numbers(config, dataset=None):
    """{(probe, predicts, from): value} that the papers report for a run with these settings, or {}.

    dataset: what it is probed on, if not on its own (column `probed` of papers.csv).
    A --quick run, other saliency or an ablation that has no row cannot be put beside them."""
    if not as_published(config):
        return {}
    numbers = {}
    with open(PAPERS, newline="") as file:
        for line in csv.DictReader(file):
            same = all(line[name] in ("", str(getattr(config, name))) for name in VARIED)
            if same and (line["probed"] or config.dataset) == (dataset or config.dataset):
                key = line["probe"], line["predicts"], line["from"]
                numbers[key] = float(line["value"])
    return numbers
