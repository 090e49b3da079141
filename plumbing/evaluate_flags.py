"""The command line of evaluate.py: its flags, and their bounds.

    parse(argv, probes, modes, encoders, datasets)  ->  options, with the flags as attributes
    typed(options, names)                           ->  {name: value} of what was not left out
    result_path(options)                            ->  where the numbers go

What is offered comes from the caller. What of it goes together, only evaluate.py can say, for that
depends on the run. Checked in tests/test_evaluate.py and tests/test_hostile_evaluate.py.
"""
import argparse
from pathlib import Path

from plumbing import flags
from plumbing.errors import BadInput

MOST_VIEWS = 100                # M_val, ten times the papers' longest
MOST_EPOCHS = 10_000            # of a head; the papers' longest take 300
MOST_SAMPLINGS = 300            # of a training sample; an epoch sees one of them

# Flags that say, with --weights, what is in the file and what it is probed on ...
DESCRIBE = ("mode", "dataset", "encoder", "image_size", "patch_size", "saliency", "data_dir",
            "limit")
SEEN = ("image_size", "patch_size", "saliency")     # ... and, with a run, how other data is seen


def parse(argv, *, probes, modes, encoders, datasets):
    """Options from the command line: argparse's Namespace. The others: names to choose from."""
    p = flags.Parser(prog="evaluate.py", description="Probe a trained model.")
    add_source(p, modes, encoders)
    add_probes(p, probes)
    add_data(p, datasets)
    add_rest(p)
    options = p.parse_args(argv)
    options.probe = list(dict.fromkeys(options.probe or []))        # each once, in their order
    check_source(options)
    check_bounds(options)
    return options


def add_source(p, modes, encoders):
    """What is probed."""
    p.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?",
                   help="a run's last.pt; settings come from it")
    p.add_argument("--weights", metavar="FILE",
                   help="in place of CHECKPOINT: weights of others, on --dataset; what the file "
                        "does not tell is said with --mode, --encoder, --image-size, --patch-size")
    p.add_argument("--mode", choices=modes, help="with --weights: what a view is")
    p.add_argument("--encoder", choices=encoders, help="with --weights: what it holds")


def add_probes(p, probes):
    """How."""
    p.add_argument("--probe", nargs="+", choices=probes,
                   help="which probes (default: all that apply to the run's mode)")
    p.add_argument("--views", nargs="+", type=int, metavar="M",
                   help="inference lengths M_val (default: the paper's for the mode)")
    p.add_argument("--probe-epochs", type=int, default=0, metavar="N",
                   help="epochs of every head (default: the paper's; a fifth of them for MLP heads "
                        "of a --quick run)")
    p.add_argument("--samplings", type=int, default=4, metavar="S",
                   help="view samplings of each training sample (default: 4); with as many as "
                        "epochs, 28, `linear` draws fresh crops in each, as the paper")
    p.add_argument("--quick", action="store_true",
                   help="shorter training of MLP heads and dense probes, as for a --quick run")
    p.add_argument("--untrained", action=argparse.BooleanOptionalAction,
                   help="the same probes on a model of the same shape that has learnt nothing "
                        "(default: all but finetune)")


def add_data(p, datasets):
    """On what."""
    p.add_argument("--data-dir", metavar="DIR", help="where the data is now, if it moved")
    p.add_argument("--limit", type=int, metavar="N", help="use N images or objects of each split")
    p.add_argument("--dataset", choices=datasets,
                   help="probe on another data set: with --probe transfer, or any probe of mode "
                        "regions; dense probes need one of their own, --weights any")
    p.add_argument("--image-size", type=int, metavar="N",
                   help="with --probe transfer: its image size (default: its preset's); with "
                        "--weights: the ViT's, where the file does not tell")
    p.add_argument("--patch-size", type=int, metavar="N",
                   help="with --probe transfer: its patch size (default: the run's); with "
                        "--weights: the ViT's, where the file does not tell")
    p.add_argument("--saliency", metavar="S",
                   help="with --probe transfer: its saliency maps, as train.py's --saliency "
                        "(default: the run's)")


def add_rest(p):
    """Where it runs, and where numbers and figures go."""
    switch = argparse.BooleanOptionalAction
    p.add_argument("--amp", action=switch, default=True, help="bfloat16 autocast, on CUDA")
    p.add_argument("--compile", action=switch, default=False, help="torch.compile the encoder")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    p.add_argument("--json", metavar="FILE",
                   help="where the numbers go (default: probes.json in the run's folder, or "
                        "probes-PROBE-DATASET-limitN-epochsN-quick.json for part of them; with "
                        "--weights beside FILE)")
    p.add_argument("--figures", action="store_true",
                   help="draw the figures and report.html into the run's folder")


def check_source(options):
    """Raises: BadInput unless there is one thing to probe, and only flags that belong to it."""
    if options.checkpoint is None and options.weights is None:
        raise BadInput("required: CHECKPOINT, the last.pt of a run, or --weights FILE")
    if options.checkpoint is not None and options.weights is not None:
        raise BadInput("--weights: stands in the place of CHECKPOINT; leave out one of them")
    if options.weights is not None and options.figures:
        raise BadInput("--figures: shows a run; leave it out with --weights")
    for name in ("mode", "encoder"):
        if options.weights is None and getattr(options, name) is not None:
            raise BadInput(f"--{name}: only with --weights; a run's own comes from its checkpoint")


def check_bounds(options):
    """Raises: BadInput for a number out of its bounds, with their reason."""
    for M in options.views or []:
        if not 1 <= M <= MOST_VIEWS:
            raise BadInput(f"--views {M}: M_val must be at least 1 and at most {MOST_VIEWS}, "
                           "ten times the papers' longest")
    if not 1 <= options.samplings <= MOST_SAMPLINGS:
        raise BadInput(f"--samplings {options.samplings}: must be at least 1 and at most "
                       f"{MOST_SAMPLINGS}; an epoch sees one, and the papers' longest head takes "
                       "300 epochs")
    if not 0 <= options.probe_epochs <= MOST_EPOCHS:
        raise BadInput(f"--probe-epochs {options.probe_epochs}: must be at least 0, the paper's, "
                       f"and at most {MOST_EPOCHS:,}; the papers' longest take 300")
    if options.limit is not None and options.limit < 0:
        raise BadInput(f"--limit {options.limit}: must be at least 0, which means all")


def typed(options, names):
    """{name: value} of these flags, without those that were left out."""
    found = {name: getattr(options, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def ending(options):
    """What ends the names of an evaluation's files: a try in small does not replace the whole."""
    words = []
    if options.limit:
        words.append(f"-limit{options.limit}")
    if options.probe and options.probe_epochs:
        words.append(f"-epochs{options.probe_epochs}")
    if options.probe and options.quick:
        words.append("-quick")
    return "".join(words)


def result_path(options):
    """Where the numbers go. A part of the probes, or of the data, does not replace the whole.

    Of --weights there may be many files in a folder, and no run's name tells their data apart: the
    file's name comes first, and no earlier result is replaced."""
    if options.json is not None:
        return Path(options.json)
    words = ["probes", *options.probe]
    if options.dataset:
        words.append(options.dataset)
    if options.weights is not None:
        words.insert(0, Path(options.weights).stem)
    folder = Path(options.weights or options.checkpoint).parent
    result = folder / f"{'-'.join(words)}{ending(options)}.json"
    if options.weights is not None and result.is_file():
        raise BadInput(f"{result}: has the numbers of an earlier evaluation; say with --json where "
                       "these go")
    return result
