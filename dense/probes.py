"""Which probes train a network of their own, on what data, and where both are (DSeq-JEPA Table 2).

    PROBES[name](model, None, None, setup)      -> rows of the table; setup.views holds the data
    READERS[dataset](config, split)             -> a split: its length, classes, mean, std,
                                                in_memory, digest(); to segment also label_names
                                                and labelled(i), to detect objects(i)

They are imported when called: most evaluations need nothing of them, torchvision least of all.
Called by evaluate.py. Checked in tests/test_dense_probes.py.
"""
from importlib import import_module

from plumbing import distributed
from plumbing.errors import BadInput


def later(module, name):
    """module.name, imported when it is called."""
    return lambda *args: getattr(import_module(module), name)(*args)


PROBES = {
    "segment-linear": later("dense.segment", "probe_segment_linear"),
    "segment": later("dense.segment", "probe_segment"),
    "detect": later("dense.detect", "probe_detect"),
}
READERS = {
    "scenes": later("sources.scenes", "load"),
    "ade20k": later("sources.ade20k", "load"),
    "coco": later("sources.coco", "load"),
}
DATA = {                        # which probe is for which data set, --dataset
    "segment-linear": ("scenes", "ade20k"),
    "segment": ("scenes", "ade20k"),
    "detect": ("scenes", "coco"),
}
NO_FEATURES = (*PROBES, "finetune")         # see the images themselves; several processes may share


def refuse(names, dataset, compiled=False):
    """Raises: BadInput for probes and a data set (or None) that do not go together.

    compiled: --compile was typed."""
    dense = [name for name in names if name in PROBES]
    if dense and (len(names) > 1 or dataset not in DATA[dense[0]]):
        raise BadInput(f"--probe {dense[0]}: stands alone and needs --dataset "
                       f"{' or '.join(DATA[dense[0]])}")
    if dataset in READERS and not dense:
        users = [name for name in PROBES if dataset in DATA[name]]
        raise BadInput(f"--dataset {dataset}: is for --probe {' or '.join(users)}")
    if compiled and set(names) <= set(NO_FEATURES):
        raise BadInput(f"--compile: is for frozen features, which --probe {' '.join(names)} does "
                       "not read; leave it out")
    if distributed.world_size() > 1 and set(names) - set(NO_FEATURES):
        raise BadInput(f"--nproc-per-node: only --probe {', '.join(NO_FEATURES)} can share their "
                       "work among processes; start one")
