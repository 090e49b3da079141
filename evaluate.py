"""Evaluate a trained world model with the papers' protocols (seq-JEPA Secs. 4.3, 5.5, A.2, B.2;
DSeq-JEPA 0.A.1.3).

    python evaluate.py runs/NAME/last.pt                     every probe that applies, one table
    python evaluate.py runs/NAME/last.pt --views 1 3 5       other inference lengths M_val
    python evaluate.py runs/NAME/last.pt --probe action path --figures
    python evaluate.py runs/NAME/last.pt --probe transfer --dataset imagenet --data-dir DIR     B.6
    python evaluate.py runs/NAME/last.pt --probe linear finetune --dataset cub --data-dir DIR
    python evaluate.py --weights FILE --dataset folder --data-dir DIR         weights of others
    torchrun --nproc-per-node 8 evaluate.py runs/NAME/last.pt --probe segment --dataset ade20k ...
                                                             a dense task (docs/dense.md)

Prints a table, each number beside the same probe on a randomly initialised model of the same shape
(but for finetune, unless asked), and beside the paper's (papers.csv) where there is one; writes it
to runs/NAME/probes.json.

PROTOCOLS has one row for each mode. The probes themselves are in probes.py, probes_regions.py and,
if they train a network of their own, in dense/.
Checked in tests/test_evaluate.py.
"""
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import config as settings
import probes
import probes_regions
from build import EncoderAlone, build_model, build_views, outside_model
from dense import probes as dense
from encoder import VITS
from figures import regions as figures_of_regions
from figures import sequences as figures
from figures.papers import paper_numbers
from plumbing import command, distributed, evaluate_flags, flags
from plumbing.command import refuse_unwritable
from plumbing.device import pick_device, seed_all
from plumbing.errors import BadInput, printable
from plumbing.files import save_atomically
from plumbing.loop import launch
from plumbing.report import show, write_report
from plumbing.runs import load_checkpoint, restore
from sources.weights import from_file

SETTLE_BATCHES = 20
ONLINE_LIMIT = 2000             # samples of each split that an online probe looks at
ONLINE_EPOCHS = 50              # of its heads

# (model, train features, val features, setup) -> rows of the table
PROBES = {
    "classify": probes.probe_classify,
    "knn": probes.probe_knn,
    "action": probes.probe_action,
    "parameters": probes.probe_parameters,
    "path": probes.probe_path,
    "invariance": probes.probe_invariance,
    "retrieval": probes.probe_retrieval,
    "transfer": probes.probe_transfer,
    "linear": probes_regions.probe_linear,
    "cls": probes_regions.probe_cls,
    "finetune": dense.later("dense.finetune", "probe_finetune"),
    **dense.PROBES,
}
AGGREGATE = ("path", "invariance", "retrieval", "transfer")     # of these: what reads z_agg alone
FROM_SCRATCH = ("finetune",)            # on the untrained model: training from scratch, for days


# ---------------------------------------------------------------- one row for each mode

@dataclass(frozen=True)
class Protocol:
    """How a mode is probed, looked at while it trains, and drawn."""
    probes: tuple               # names in PROBES: run unless others are asked for
    measure: Callable           # (model, setup) -> train features, val features
    online: Callable            # (model, setup, {split: indices}) -> a number for each of
    online_columns: tuple       # ... these columns of metrics.csv
    draw: Callable              # (model, views, config, rows, run_dir) -> paths of the figures
    lengths: tuple = ()         # M_val: how many observed views z_agg is probed on, if there is one
    heads: dict = field(default_factory=dict)   # A.2: {part of an action: its regressor}, or linear
    on_request: tuple = ()      # probes that are run only if asked for
    any_images: bool = False    # whether --dataset is for all its probes, not for `transfer` alone


# What samples that are sequences of views have in common: from this row a new mode makes its own.
SEQUENCES = Protocol(
    probes=("classify", "knn", "action", "parameters"),
    lengths=(1, 3, 5),
    measure=probes.measure_views,
    online=probes.online_views,
    online_columns=("knn_z", "knn_z_agg", "action_r2"),
    draw=figures.draw_all)

PROTOCOLS = {
    "saccade": dataclasses.replace(                                                     # Table 3
        SEQUENCES,
        probes=(*SEQUENCES.probes, "path"),
        on_request=("transfer",),
        lengths=(1, 4, 6),
        heads={"position": "linear"},
        draw=functools.partial(figures.draw_all, draw_views=figures.draw_scanpaths)),
    "rotation": dataclasses.replace(                                                    # Table 1
        SEQUENCES,
        probes=(*SEQUENCES.probes, "path", "invariance", "retrieval"),
        heads={"rotation": "mlp", "color": "linear"}),
    "augment": dataclasses.replace(                                                     # Table 2
        SEQUENCES,
        heads={"crop": "mlp", "jitter": "mlp", "blur": "linear"}),
    "regions": Protocol(                                                    # DSeq-JEPA, Table 1
        probes=("linear", "knn", "cls"),
        on_request=dense.NO_FEATURES,
        any_images=True,
        measure=probes_regions.measure_images,
        online=probes_regions.online_regions,
        online_columns=("knn_patches", "knn_cls", "object_auc", "object_r1"),
        draw=figures_of_regions.draw_all),
}


def protocol(mode):
    """The row of a mode. Raises: BadInput if there is none."""
    if mode not in PROTOCOLS:
        raise BadInput(f"mode {mode} has no row in evaluate.PROTOCOLS; add one (README, 'Fork it')")
    return PROTOCOLS[mode]


# ---------------------------------------------------------------- the two models, the table

def evaluate(options):
    """Load the checkpoint, probe it and a randomly initialised twin, print and keep the table."""
    started = time.monotonic()
    source = from_outside(options) if options.checkpoint is None else from_run(options)
    refuse_unwritable(source.result, "choose another place with --json", holds='"checkpoint"')
    folder = source.path.parent
    if options.figures:
        refuse_unwritable(folder / "report.html", "leave out --figures")
    device = distributed.own_device(pick_device(options.device))
    distributed.connect(device)
    names = choose_probes(options, source.config)
    data = choose_data(options, source.config)
    if set(names) & set(dense.NO_FEATURES):
        refuse_unwritable(folder / f"{names[0]}.pt", f"--probe {' '.join(names)} keeps what it "
                          "trains and draws there; copy the checkpoint to a folder of yours")
    setup = prepare(options, source, names, data, device)
    beside = probed_beside(options, names)
    model, twin = two_models(source, setup.views, device, bool(beside))
    if options.compile:
        for each in filter(None, (model, twin)):
            each.representation.compile()
    paper = {}
    if source.of_run and not options.probe_epochs and not options.quick:
        paper = paper_numbers(source.config, data.dataset)
    rows = measure_both(model, twin, setup, protocol(source.config.mode), paper, beside)
    if distributed.is_main():
        result = described(options, source, data, setup, rows)
        result["seconds"] = round(time.monotonic() - started, 1)
        show(result)
        text = json.dumps(result, indent=1) + "\n"
        save_atomically(source.result, lambda part: part.write_text(text))
        if options.figures:
            draw(model, source, setup, beside, result)
    return 0


def prepare(options, source, names, data, device):
    """The probes' Setup, with the images: what is refused early, before they are rendered, too."""
    config = source.config
    lengths = choose_lengths(options, config, names)
    settings.check(config)
    settings.check_views(dataclasses.replace(config, views=max((2, *lengths))))
    views = distributed.in_turn(open_data, data, device)
    whose = "" if source.of_run else f"{source.path.stem}-"
    return probes.Setup(
        views, device, config.seed, M_train=config.views, lengths=lengths, probes=names,
        heads=protocol(config.mode).heads, samplings=options.samplings,
        probe_epochs=options.probe_epochs, quick=config.quick or options.quick,
        amp=options.amp and device.type == "cuda", folder=source.path.parent,
        tag=f"{whose}{data.dataset}{evaluate_flags.ending(options)}")


def probed_beside(options, names):
    """Names of the probes that the untrained twin is put to as well."""
    if options.untrained is None:
        return tuple(name for name in names if name not in FROM_SCRATCH)
    return names if options.untrained else ()


def described(options, source, data, setup, rows):
    """What is kept: the rows, and all that a reader must know of them."""
    val = setup.views["val"]
    on_features = not set(setup.probes) <= set(dense.NO_FEATURES)
    return dict(
        checkpoint=str(source.path), step=source.step,
        weights=None if source.of_run else source.path.name,
        config=dataclasses.asdict(source.trained), device=str(setup.device),
        dataset=data.dataset, classes=len(val.classes),
        n_train=len(setup.views["train"]), n_val=len(val),
        samplings=options.samplings if on_features else None,
        probe_epochs=options.probe_epochs, quick=setup.quick, limit=data.limit,
        rows=rows, remarks=[*source.remarks, *remarks_on(setup.views, source.config)])


def draw(model, source, setup, beside, result):
    """The figures and the report, into the run's folder. Dense probes have drawn theirs."""
    folder = source.path.parent
    if result["dataset"] in dense.READERS:
        pictures = [setup.file(name, ".png") for name in setup.probes]
        pictures += [of_twin(setup, beside).file(name, ".png") for name in beside]
    else:
        rules = protocol(source.config.mode)
        pictures = []
        for picture in rules.draw(model, setup.views["val"], source.config, result["rows"], folder):
            print(f"drew {printable(picture)}")
            pictures.append(picture)
    report = write_report(folder, result, [folder / "curves.png", *pictures])
    print(f"wrote {printable(report)}")


def open_data(data, device):
    """Both splits of the data of this Config: samplers of views, or what dense probes read."""
    read = dense.READERS.get(data.dataset, functools.partial(build_views, device=device))
    return {split: read(data, split) for split in ("train", "val")}


def two_models(source, views, device, untrained=True):
    """The trained model, and one of the same shape that has learnt nothing, or None."""
    groups = getattr(views["val"], "groups", {})        # dense data has no actions
    model = build_model(source.config, groups)
    source.fill(model)
    if not untrained:
        return model.to(device), None
    twin = build_model(source.config, groups).to(device)
    settle_batchnorm(twin, views["train"], source.config.views)
    return model.to(device), twin


def of_twin(setup, beside):
    """The Setup of the twin, whose files are not those of the trained model."""
    return dataclasses.replace(setup, tag=f"{setup.tag}-untrained", probes=beside)


def measure_both(model, twin, setup, rules, paper, beside):
    """All rows of the trained model, each with the untrained one's number and the paper's, or None.

    twin: None leaves the untrained out.  paper: {(probe, predicts, from): value}
    beside: names of the probes that the untrained is put to as well."""
    rows = measure(model, setup, rules)
    others = iter(measure(twin, of_twin(setup, beside), rules) if twin else ())
    for row in rows:
        other = next(others)["value"] if twin and row["probe"] in beside else None
        row["untrained"] = None if row["from"] == "nothing" else other
        row["paper"] = paper.get((row["probe"], row["predicts"], row["from"]))
    return rows


def measure(model, setup, rules):
    """All rows of one model.

    Those that train a network come first: what they have kept of another training they refuse,
    and nothing has been computed in vain.
    Raises: BadInput if a feature or a result is not finite: a classifier on NaN looks like one."""
    rows = {}
    for name in setup.probes:
        if name in dense.NO_FEATURES:
            rows[name] = finite(name, PROBES[name](model, None, None, setup))
    on_features = [name for name in setup.probes if name not in rows]
    if on_features:
        train, val = rules.measure(model, setup)
        rows |= {name: finite(name, PROBES[name](model, train, val, setup)) for name in on_features}
    return [row for name in setup.probes for row in rows[name]]


def finite(probe, rows):
    """A list of these rows. Raises: BadInput if one is not finite."""
    rows = list(rows)
    for row in rows:
        if not math.isfinite(row["value"]):
            raise BadInput(f"--probe {probe}: {row['predicts']} from {row['from']} came out as "
                           f"{row['value']}; if the run diverged, probe a checkpoint from before "
                           "that")
    return rows


def remarks_on(views, config):
    """What a reader of the numbers must know: sentences, mostly none."""
    remarks = []
    rules = protocol(config.mode)
    if rules.lengths and not config.aggregates:
        absent = ["rows of z_agg", *(name for name in rules.probes if name in AGGREGATE)]
        remarks.append(f"left out, for {gathers_none(config)} into z_agg: {', '.join(absent)}")
    for split, sampler in views.items():
        labels = getattr(sampler, "labels", None)       # of dense data: files, or none
        if torch.is_tensor(labels) and len(labels.unique()) == 1:
            remarks.append(f"all {split} samples are of one class: top-1 says nothing, "
                           "whatever it is")
    return remarks


def gathers_none(config):
    """Words for who is to blame that there is no z_agg."""
    who = "the file" if isinstance(config, EncoderAlone) else f"method {config.method}"
    return f"{who} gathers no views"


def settle_batchnorm(model, views, M):
    """Give an untrained model the BatchNorm statistics of its own activations; no weight moves.

    Without this the comparison would flatter training: an untrained encoder under eval() is not
    normalised at all. A model without BatchNorm stays as it is."""
    kind = torch.nn.modules.batchnorm._BatchNorm
    norms = [module for module in model.modules() if isinstance(module, kind)]
    if not norms:
        return model
    model.train()
    for module in norms:
        module.reset_running_stats()
        module.momentum = None              # a plain average, without a trace of the initial values
    with torch.no_grad():
        for i in range(SETTLE_BATCHES):
            seed_all(i)
            model(views(torch.randint(len(views), (256,)), M))
    return model


# ---------------------------------------------------------------- while training

def online(model, views, config, device, due=True):
    """Cheap probes during training (--probe-every), on the encoder as it is: {column: value}.

    views: {"train", "val"} samplers; None will do where not due.  k-NN, and R^2 of the action where
    there is one. Not the paper's protocol: fewer samples, shorter heads. NaN unless due."""
    rules = protocol(config.mode)
    if not due:
        return dict.fromkeys(rules.online_columns, float("nan"))
    M = config.views
    setup = probes.Setup(views, device, config.seed, M_train=M,
                         lengths=(M,) if config.aggregates else (), heads=rules.heads,
                         probe_epochs=ONLINE_EPOCHS)
    some = {}
    for split, sampler in views.items():
        count = min(ONLINE_LIMIT, len(sampler))
        some[split] = torch.linspace(0, len(sampler) - 1, count).long()
    # Batches of other sizes would each compile, for minutes.  Named here, not at the head of the
    # function: this imports PyTorch's compiler, a second.
    with torch.compiler.set_stance("force_eager"):
        return dict(zip(rules.online_columns, rules.online(model, setup, some)))


# ---------------------------------------------------------------- the command line

class Source(NamedTuple):
    """What is probed: a run's checkpoint, or weights from outside."""
    path: Path
    config: settings.Config     # with what the command line says of the data
    trained: settings.Config    # the run's own
    fill: Callable              # model -> None: puts the weights into it
    result: Path                # where the numbers go
    step: int = None            # None: weights from outside
    remarks: tuple = ()

    @property
    def of_run(self):
        return self.step is not None


def from_run(options):
    """The Source of a run's checkpoint; its Config with what the command line says of the data."""
    path = Path(options.checkpoint)
    checkpoint = load_checkpoint(path)
    changes = evaluate_flags.typed(options, ("data_dir", "limit"))
    if options.data_dir and not options.dataset:
        # Where the run's data moved to: a wrong folder is to be said, not filled.
        changes["download"] = False
    return Source(path, settings.config_of(checkpoint, **changes), settings.config_of(checkpoint),
                  functools.partial(restore, checkpoint=checkpoint),
                  evaluate_flags.result_path(options), checkpoint["step"])


def from_outside(options):
    """The Source of --weights, with settings from the file, the command line and the preset."""
    path = Path(options.weights)
    # The authors' actions of augmented views are no function of two views: only z is as ours.
    found = from_file(path, encoder_only=options.mode == "augment")
    result = evaluate_flags.result_path(options)
    typed = evaluate_flags.typed(options, evaluate_flags.DESCRIBE)
    used_up = set(evaluate_flags.DESCRIBE) - {"limit"}
    if options.dataset in dense.READERS:        # no data to learn from: the model's are ImageNet's
        typed |= dict(dataset="imagenet", limit=0)
        used_up.remove("dataset")
    config, fill, remarks = outside_model(found, typed)
    for name in used_up:            # in what follows they mean other data than the model's
        setattr(options, name, None)
    return Source(path, config, config, fill, result, remarks=remarks)


def choose_probes(options, config):
    """Names of the probes to run.  Raises: BadInput for what does not go together."""
    rules = protocol(config.mode)
    offered = (*rules.probes, *rules.on_request)
    usable = [name for name in offered if config.aggregates or name not in AGGREGATE]
    names = tuple(options.probe)
    if not names and options.dataset and not rules.any_images:
        names = ("transfer",)
    for name in names:
        why = f"does not apply to mode {config.mode}"
        if name in offered:
            why = f"reads z_agg, and {gathers_none(config)} into one"
        if name not in usable:
            raise BadInput(f"--probe {name}: {why}; choose from {', '.join(usable)}")
    names = names or tuple(name for name in rules.probes if name in usable)
    if "cls" in options.probe and not config.cls:
        raise BadInput("--probe cls: the run was trained without [CLS]; leave it out")
    if not rules.any_images:
        transfer = "transfer" in names
        if transfer != bool(options.dataset) or transfer and len(names) > 1:
            raise BadInput("--probe transfer: stands alone and needs --dataset, "
                           "the data set to transfer to")
    dense.refuse(names, options.dataset, options.compile)
    return names


def choose_data(options, config):
    """The Config of the data that is probed on: the run's own, or what --dataset names, seen as the
    run sees its own. A patch has the run's size, which the encoder knows; the image its preset's.

    Raises: BadInput for what does not go together."""
    other = options.dataset in settings.DATASETS        # if not, its own, or a dense task's
    any_images = protocol(config.mode).any_images
    if other and options.figures:
        raise BadInput("--figures: shows the run's own data; leave it out with --dataset")
    changes = evaluate_flags.typed(options, evaluate_flags.SEEN)
    for name in changes:
        if not other:
            raise BadInput(f"{flags.name_of(name)}: only with --probe transfer; "
                           "the run's own comes from its checkpoint")
        if any_images:
            raise BadInput(f"{flags.name_of(name)}: in mode {config.mode} the run's own is kept; "
                           "leave it out")
    if not options.dataset:
        return config
    changes["dataset"] = options.dataset
    if not other:                                   # the run's --limit was for its own data
        return dataclasses.replace(config, **changes, limit=options.limit or 0)
    if not any_images:
        size = settings.preset(options.dataset, config.mode)["image_size"]
        changes.setdefault("image_size", size)
    return settings.check(dataclasses.replace(config, **changes))


def choose_lengths(options, config, names):
    """M_val in ascending order, none without z_agg; the invariance probe needs that of training."""
    if not config.aggregates:
        if options.views:
            raise BadInput(f"--views {options.views[0]}: {gathers_none(config)} into z_agg; "
                           "leave it out")
        return ()
    lengths = set(options.views or protocol(config.mode).lengths)
    if "invariance" in names:
        lengths.add(config.views)
    return tuple(sorted(lengths))


LESS = "lower --limit, --samplings or --views, or use --device cpu"      # where memory is short


def parse(argv=None):
    """Options from the command line."""
    return evaluate_flags.parse(
        argv, probes=PROBES, modes=settings.MODES, encoders=("resnet18", *VITS),
        datasets=(*settings.DATASETS, *dense.READERS))


def main(argv=None):
    """Exit status 0, 2 for bad input, 128 + signal if stopped."""
    if os.environ.get("WORLD_SIZE", "1") != "1":                    # torchrun's
        return launch(evaluate, parse, argv, less=LESS, again="start the same again")
    return command.run(evaluate, parse, argv, LESS)


if __name__ == "__main__":
    sys.exit(main())
