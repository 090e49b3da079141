"""The papers' numbers stand beside a run that was theirs in all that teaches, beside no other."""
import csv
import dataclasses

import pytest

import config as settings
import evaluate
from dense import probes as dense_probes
from figures import papers
from figures.papers import paper_numbers


def test_papers_csv_names_settings_and_rows_that_exist():
    """A typo in a line would silently drop the comparison."""
    with open(papers.PAPERS, newline="") as file:
        lines = list(csv.DictReader(file))
    seen = set()
    for line in lines:
        dataset, mode, method, encoder, condition, views = (line[name] for name in papers.VARIED)
        assert (dataset, mode) in settings.PRESETS and method in settings.MODES[mode].methods
        assert encoder in settings.ENCODERS[method]
        assert condition in ("", *settings.MODES[mode].conditions) and (not views or int(views) > 0)
        rules = evaluate.PROTOCOLS[mode]
        assert line["probe"] in (*rules.probes, *rules.on_request)
        dense = ("boxes, 80 classes", "masks, 80 classes", "150 classes")       # Table 2
        assert line["predicts"] in ("class", *rules.heads, *dense)
        if "M=" in line["from"]:
            assert int(line["from"].split("M=")[1].split(",")[0]) in rules.lengths
        assert line["probed"] in (None, "", *settings.DATASETS, *dense_probes.READERS)
        assert (0 if line["probe"] == "classify" else -0.1) < float(line["value"]) < 100
        assert "JEPA Table" in line["source"] or "JEPA B.2" in line["source"]
        seen.add(tuple(v for name, v in line.items() if name not in ("value", "source")))
    assert len(seen) == len(lines) == 294                   # none says again what another says


def test_the_paper_s_numbers_are_beside_the_paper_s_settings_alone():
    paper_s = settings.preset("stl10", "saccade") | dict(saliency="deepgaze")
    config = settings.check(settings.Config(**paper_s))
    published = paper_numbers(config)
    assert published == {
        ("classify", "class", "z"): 81.20, ("classify", "class", "z_agg M=1"): 71.45,
        ("classify", "class", "z_agg M=4"): 83.44, ("classify", "class", "z_agg M=6"): 84.12}
    blind = paper_numbers(dataclasses.replace(config, condition="none"))
    assert blind.keys() < published.keys() and blind["classify", "class", "z"] == 61.38
    maps = dataclasses.replace(config, saliency="maps/of/deepgaze")
    assert paper_numbers(maps) == published
    assert paper_numbers(settings.Config(**settings.preset("solids", "saccade"))) == {}
    large = settings.preset("imagenet", "regions") | dict(encoder="vit-huge")
    assert paper_numbers(settings.check(settings.Config(**large))) == {}
    large = settings.check(settings.Config(**large | dict(image_size=448, epochs=300)))
    assert list(paper_numbers(large).values()) == [82.4, 87.8]
    assert list(paper_numbers(large, "cub").values()) == [68.9]
    base = settings.check(settings.Config(**settings.preset("imagenet", "regions")))
    authors = settings.preset("imagenet", "regions", recipe="authors")
    authors = settings.check(settings.Config(**authors))
    assert paper_numbers(authors) == paper_numbers(base) != {}
    assert paper_numbers(dataclasses.replace(authors, lr=1e-3)) == {}
    assert paper_numbers(dataclasses.replace(base, lr=8e-4)) == {}
    assert paper_numbers(dataclasses.replace(base, accumulate=8)) != {}


def test_what_a_run_is_probed_on_chooses_the_paper_s_column():
    base = settings.check(settings.Config(**settings.preset("imagenet", "regions")))
    linear = "linear", "class", "last 4 blocks, mean patch"
    found = {name: paper_numbers(base, name) for name in ("inat21", "cub", "cars")}
    assert found == dict(inat21={linear: 36.4}, cub={linear: 66.2}, cars={linear: 67.3})
    assert paper_numbers(base, "imagenet") == paper_numbers(base)
    assert paper_numbers(base)[linear] == 73.5
    assert paper_numbers(base, "folder") == {}
    large = dataclasses.replace(base, encoder="vit-large", predictor_depth=12)
    assert list(paper_numbers(large, "clevr-distance").values()) == [71.5]
    assert paper_numbers(dataclasses.replace(base, dataset="cub"), "cub") == {}


ANOTHER = {int: 7, float: 0.123, str: "another", bool: None}      # values that the preset has not


@pytest.mark.parametrize("field", dataclasses.fields(settings.Config), ids=lambda field: field.name)
def test_the_paper_s_column_goes_with_every_field_that_teaches(field, monkeypatch):
    """A flag that is added later, too, takes the column away, or has to be named."""
    if field.name in ("dataset", "mode"):
        return                                              # these choose the row
    monkeypatch.setattr(settings, "check", lambda config: config)
    config = settings.Config(**settings.preset("stl10", "saccade") | dict(saliency="deepgaze"))
    value = ANOTHER[field.type]
    if field.type is bool:
        value = not getattr(config, field.name)
    if field.name == "saliency":
        value = "signature"                                 # a folder of maps may be DeepGaze's
    changed = dataclasses.replace(config, **{field.name: value})
    assert bool(paper_numbers(changed)) == (field.name in papers.NOT_LEARNED)


def test_objects_of_more_renders_than_the_preset_s_are_no_published_run(make_config):
    config = make_config("solids", "rotation", object_views=60, views=50)
    assert not papers.as_published(config) and paper_numbers(config) == {}
