"""The papers' claims, one row each: which runs show it, what is compared, whether it held.

    python claims.py --first                    the pair of runs that shows most, as `make` does
    python claims.py                            every claim over three seeds, laptop size: hours
    python claims.py --claims table-3 --seeds 0 1
    python claims.py --scale gpu                on the papers' data, at their size
    python claims.py --claims saccade --dataset folder --data-dir PHOTOS -- --epochs 40
                                                what follows -- goes to every train.py

Trains and probes what is missing, so it may be stopped and started again; prints the table, and
writes claims.json, claims.md and claims.png into --out.

A claim compares two numbers that evaluate.py measured, seed by seed. It holds if their difference
(the effect) is above 0 by more than twice its standard deviation over seeds, the spread; it does
not if it is as far below 0; else it is undecided. Checked in tests/test_claims.py.
"""
import dataclasses
import json
import os
import re
import shlex
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import config as settings
from figures.claims import draw_claims
from plumbing import command, flags
from plumbing.command import refuse_unwritable
from plumbing.errors import BadInput, printable
from plumbing.files import save_atomically
from plumbing.jobs import Job, run_side_by_side
from plumbing.runs import MAY_CHANGE

HERE = Path(__file__).parent
KEPT = HERE / "results" / "claims.json"         # rows of three seeds: the spread for a single one
MOST_JOBS = 64
RESULTS = ("claims.json", "claims.md", "claims.png")

# The runs, as flags of train.py.  Most claims compare two of them.
RUNS = {
    "saccade": "--mode saccade",
    "saccade-no-actions": "--mode saccade --condition none",
    "saccade-anywhere": "--mode saccade --saliency uniform --no-ior",
    "saccade-one-view": "--mode saccade --views 1",
    "rotation": "--mode rotation",
    "rotation-no-actions": "--mode rotation --condition none",
    "rotation-aggregator": "--mode rotation --action-in aggregator",
    "rotation-predictor": "--mode rotation --action-in predictor",
    "rotation-raw": "--mode rotation --action-embed raw",
    "rotation-noise": "--mode rotation --action-embed noise",
    "rotation-narrow": "--mode rotation --action-dim 16",
    "rotation-one-view": "--mode rotation --views 1",
    "augment-nothing": "--mode augment --condition none",
    "augment-crop": "--mode augment --condition crop",
    "augment-jitter": "--mode augment --condition jitter",
    "augment-blur": "--mode augment --condition blur",
    "regions": "--mode regions",
    "regions-i-jepa": "--mode regions --method i-jepa",
    "regions-random": "--mode regions --order random",
    "regions-flat": "--mode regions --order flat",
}
PAIR = ("saccade", "saccade-no-actions")        # the runs of --first
DATASETS = {                                    # mode -> data set, where --dataset names none
    "quick": dict.fromkeys(settings.MODES, "solids"),
    "gpu": dict(saccade="stl10", rotation="3diebench", augment="cifar100", regions="imagenet"),
}
# Of evaluate.py.  MLP heads on few samples overfit: rotations are sampled more often.
SAMPLINGS = {"saccade": 1, "rotation": 8, "augment": 4, "regions": 1}


# ---------------------------------------------------------------- the claims

class Number(NamedTuple):
    """Where a number stands: a run, and a row of its probes.json."""
    run: str
    probe: str
    predicts: str
    features: str


class Claim(NamedTuple):
    """`first` is larger than `second`, or no smaller than it less `slack`."""
    name: str
    where: str              # in the papers
    words: str              # what both numbers are
    compared: tuple         # words for what distinguishes them
    first: Number
    second: Number
    paper: tuple = None     # the two numbers there
    slack: float = 0.0      # by which `first` may fall short

    @property
    def unit(self):
        return "top-1 %" if self.first.probe in ("classify", "linear") else "R2"

    @property
    def runs(self):
        return {self.first.run, self.second.run}


def top1(run, features):
    """The Number of a linear classifier on these features, in per cent."""
    return Number(run, "classify", "class", features)


def told(name, where, words, mode, row, paper=None, slack=0.0):
    """A claim on what actions do: the same row of the runs with and without them."""
    return Claim(name, where, words, ("with actions", "without"), Number(mode, *row),
                 Number(f"{mode}-no-actions", *row), paper, slack)


RELATIVE = ("action", "rotation", "z_1, z_2")
LINEAR = ("linear", "class", "last 4 blocks, mean patch")


def ablated(name, first, second, compared, paper, slack=0.0):
    """A claim of Table 4: what it does to the R^2 of relative rotations."""
    words = "R\u00b2 of the relative rotation, from z"
    return Claim(name, "Table 4", words, compared, Number(first, *RELATIVE),
                 Number(second, *RELATIVE), paper, slack)


def augmented(name, kind, paper):
    """A claim of Table 2: an augmentation is read better from z if the model is told of it."""
    row = ("action", kind, "z_1, z_2")
    return Claim(name, "Table 2", f"R\u00b2 of the relative {kind}", ("told of it", "told nothing"),
                 Number(f"augment-{kind}", *row), Number("augment-nothing", *row), paper)


CLAIMS = (
    told("relative-rotation", "Table 1, Fig. 1", "R\u00b2 of the relative rotation, from z",
         "rotation", RELATIVE, (0.71, 0.29)),
    told("individual-rotation", "Table 1", "R\u00b2 of a view's own rotation, from its z",
         "rotation", ("parameters", "rotation", "z_1"), (0.74, 0.37)),
    told("rotation-class", "Table 1", "class from z_agg of 3, % (unharmed: 2 points at most)",
         "rotation", ("classify", "class", "z_agg M=3"), (86.14, 86.05), slack=2.0),
    Claim("rotation-views", "Table 1, Table 6, Fig. 8", "class from z_agg, %",
          ("5 views", "1 view"),
          top1("rotation", "z_agg M=5"), top1("rotation", "z_agg M=1"), (87.41, 81.72)),
    Claim("rotation-passes-z", "Table 6", "class, %", ("z_agg of 5", "z"),
          top1("rotation", "z_agg M=5"), top1("rotation", "z"), (87.41, 82.49)),
    Claim("rotation-more-training-views", "Fig. 8", "R\u00b2 of the relative rotation, from z",
          ("trained on 3 views", "on 1"), Number("rotation", *RELATIVE),
          Number("rotation-one-view", *RELATIVE)),
    Claim("rotation-not-in-z_agg", "B.2", "R\u00b2 of a view's rotation",
          ("from its z", "from z_agg, actions zeroed"),
          Number("rotation", "parameters", "rotation", "z_1"),
          Number("rotation", "invariance", "rotation", "z_agg M=3, no actions"), (0.74, 0.141)),

    augmented("told-crop", "crop", (0.78, 0.64)),
    augmented("told-jitter", "jitter", None),
    augmented("told-blur", "blur", None),

    told("saccade-class", "Table 3", "class from z_agg of 4, %", "saccade",
         ("classify", "class", "z_agg M=4"), (83.44, 70.45)),
    told("saccade-class-1", "Table 6", "class from z_agg of 1, %", "saccade",
         ("classify", "class", "z_agg M=1"), (71.45, 62.21)),
    told("saccade-class-6", "Table 3", "class from z_agg of 6, %", "saccade",
         ("classify", "class", "z_agg M=6")),
    told("saccade-class-z", "Table 6", "class from z of the whole image, %", "saccade",
         ("classify", "class", "z"), (81.20, 61.38)),
    # Its column is lost from our copy of the paper: as a later version has it, at second hand.
    told("saccade-position", "Table 3", "R\u00b2 of the relative position, from z", "saccade",
         ("action", "position", "z_1, z_2"), (0.80, 0.38)),
    Claim("saccade-views", "Table 3, Table 6, Fig. 8", "class from z_agg, %",
          ("6 patches", "1 patch"),
          top1("saccade", "z_agg M=6"), top1("saccade", "z_agg M=1"), (84.12, 71.45)),
    Claim("saccade-passes-z", "Table 6", "class, %", ("z_agg of 6 patches", "z of the image"),
          top1("saccade", "z_agg M=6"), top1("saccade", "z"), (84.12, 81.20)),
    Claim("saccade-more-training-views", "Fig. 8", "class from z_agg of 4, %",
          ("trained on 4 patches", "on 1"),
          top1("saccade", "z_agg M=4"), top1("saccade-one-view", "z_agg M=4")),
    Claim("saccade-where-to-look", "Table 3", "class from z_agg of 4, %",
          ("by saliency, IoR", "anywhere"), top1("saccade", "z_agg M=4"),
          top1("saccade-anywhere", "z_agg M=4"), (83.44, 79.85)),

    Claim("path-needs-actions", "Fig. 7", "R\u00b2 of the path, from z_agg of 4",
          ("views and actions", "actions zeroed"),
          Number("saccade", "path", "position", "z_agg, a_M, M=4"),
          Number("saccade", "path", "position", "z_agg, a_M, M=4, no actions")),
    Claim("path-hardly-views", "Fig. 7", "R\u00b2 of the path, from z_agg of 4",
          ("views zeroed", "actions zeroed"),
          Number("saccade", "path", "position", "z_agg, a_M, M=4, no views"),
          Number("saccade", "path", "position", "z_agg, a_M, M=4, no actions")),
    Claim("angular-path-needs-actions", "Fig. 7", "R\u00b2 of the path, from z_agg of 3",
          ("views and actions", "actions zeroed"),
          Number("rotation", "path", "rotation", "z_agg, a_M, M=3"),
          Number("rotation", "path", "rotation", "z_agg, a_M, M=3, no actions")),

    ablated("only-aggregator", "rotation-aggregator", "rotation-no-actions",
            ("told the aggregator", "told nobody"), (0.37, 0.29)),
    ablated("only-predictor", "rotation-predictor", "rotation-aggregator",
            ("told the predictor", "told the aggregator"), (0.53, 0.37)),
    ablated("both-parts", "rotation", "rotation-predictor",
            ("told both", "told the predictor"), (0.71, 0.53)),
    ablated("learned-actions", "rotation", "rotation-raw",
            ("learned embedding", "raw numbers"), (0.71, 0.34)),
    ablated("true-actions", "rotation", "rotation-noise", ("true actions", "noise"), (0.71, 0.20)),
    ablated("any-action-width", "rotation-narrow", "rotation", ("E = 16", "E of the preset"),
            (0.70, 0.71), slack=0.05),

    Claim("dseq-linear", "DSeq-JEPA Table 1", "class, linear, %", ("DSeq-JEPA", "I-JEPA"),
          Number("regions", *LINEAR), Number("regions-i-jepa", *LINEAR)),
    Claim("dseq-order", "DSeq-JEPA Table 5", "class, linear, %",
          ("most telling first", "random order"),
          Number("regions", *LINEAR), Number("regions-random", *LINEAR)),
    Claim("dseq-sequence", "DSeq-JEPA Table 4", "class, linear, %",
          ("one after another", "all at once"),
          Number("regions", *LINEAR), Number("regions-flat", *LINEAR)),
)


# ---------------------------------------------------------------- running them

def show_claims(options):
    """Train and probe what the chosen claims need, judge them, print and keep the table."""
    claims = choose(options)
    wanted = set().union(*(claim.runs for claim in claims))
    needed = [name for name in RUNS if name in wanted]
    plans = []
    for seed in options.seeds:
        plans += [plan(name, seed, claims, options) for name in needed]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        refuse_unwritable(out / name, "choose another --out")
    missing = [each for each in plans if not each.is_measured()]
    if missing:
        at_once = min(options.jobs, len(missing))
        threads = max(1, (os.cpu_count() or 1) // at_once)
        run_side_by_side([each.job() for each in missing], at_once, threads, " epochs")

    results = {(each.run, each.seed): json.loads(each.result.read_text()) for each in plans}
    rows = [judge(claim, results, options) for claim in claims]
    keep(rows, out)
    print(table(rows))
    print(f"wrote {', '.join(RESULTS)} in {printable(out)}")
    return 0


def choose(options):
    """The claims asked for: by name, by the start of a name, or by the start of where they stand.

    Raises: BadInput for a word that fits none."""
    claims = [claim for claim in CLAIMS if not options.first or claim.runs <= set(PAIR)]
    chosen = []
    for word in options.claims:
        found = [claim for claim in claims if fits(word, claim)]
        if not found:
            raise BadInput(f"--claims {word}: fits none of "
                           f"{', '.join(claim.name for claim in claims)}")
        chosen += found
    return [claim for claim in claims if claim in chosen or not options.claims]


def fits(word, claim):
    """Whether a typed word means this claim: "table-3" is all that stands in Table 3."""
    def simple(text):
        return text.strip().lower().replace(" ", "-").replace(".", "")

    places = [simple(place) for place in claim.where.split(",")]
    begins = word != "" and claim.name.lower().startswith(word.lower())
    return begins or simple(word) in places


class Plan(NamedTuple):
    """A run to train and to probe."""
    run: str
    seed: int
    config: settings.Config
    train: list             # argument lists
    evaluate: list
    untrained: bool         # whether the random twin is probed too
    samplings: int
    numbers: list           # that claims read of it

    @property
    def result(self):
        return self.config.run_dir / "probes.json"

    def is_measured(self):
        """Whether this run is finished and its probes.json has, since then, all that claims read.

        Raises: BadInput if the file is that of another run, or no such file."""
        if not self.result.exists():
            return False
        try:
            found = json.loads(self.result.read_text())
            known = settings.Config(**found["config"])
            rows = {(row["probe"], row["predicts"], row["from"]): row for row in found["rows"]}
            asked = (found["samplings"], found.get("probe_epochs", 0), found.get("limit"))
            untrained = [row["untrained"] is not None for row in found["rows"]]
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{self.result}: not what evaluate.py writes; delete it") from None
        self.refuse_other_run(known)
        done = self.config.run_dir / "last.pt"
        return (self.epochs_trained() == self.config.epochs
                and (not done.exists() or self.result.stat().st_mtime >= done.stat().st_mtime)
                and asked == (self.samplings, 0, self.config.limit)
                and all(number[1:] in rows for number in self.numbers)
                and (all(untrained) or not self.untrained)
                and ("--figures" not in self.evaluate
                     or (self.config.run_dir / "report.html").exists()))

    def refuse_other_run(self, known):
        """Raises BadInput if `known`, the Config that was measured, is not this run's."""
        may_change = MAY_CHANGE | {"quick"}
        if self.config.dataset != "solids":
            may_change -= {"data_dir"}          # other photos, it may be
        for field in dataclasses.fields(known):
            was = getattr(known, field.name)
            wanted = getattr(self.config, field.name)
            if field.name not in may_change and was != wanted:
                raise BadInput(f"{self.result}: is of a run with {flags.name_of(field.name)} "
                               f"{was}, not {wanted}; choose another --out or delete the run")

    def epochs_trained(self):
        """Lines of metrics.csv."""
        metrics = self.config.run_dir / "metrics.csv"
        return max(0, metrics.read_bytes().count(b"\n") - 1) if metrics.exists() else 0

    def epochs_done(self):
        """The same; the probes count as one more epoch."""
        return self.epochs_trained() + self.result.exists()

    def job(self):
        commands = (self.train, self.evaluate)
        return Job(self.config.name, commands, self.config.run_dir.with_suffix(".log"),
                   self.config.epochs + 1, self.epochs_done)


def plan(run, seed, claims, options):
    """How a run is made.

    Raises: BadInput if its flags are refused."""
    words = shlex.split(RUNS[run])
    mode = words[words.index("--mode") + 1]
    dataset = options.dataset or DATASETS[options.scale][mode]
    argv = ["--dataset", dataset, *words, "--seed", str(seed), "--data-dir", options.data_dir,
            "--out", options.out, "--name", f"{run}-{seed}"]
    if options.scale == "quick":
        argv.append("--quick")
    config = settings.from_command_line([*argv, *options.train])
    if options.train:
        refuse_redefined(config, settings.from_command_line(argv))
    argv += options.train
    untrained = any(claim.first.run == run for claim in claims)
    samplings = SAMPLINGS[mode]
    probe = [sys.executable, str(HERE / "evaluate.py"), str(config.run_dir / "last.pt"),
             "--samplings", str(samplings), "--json", str(config.run_dir / "probes.json"),
             "--probe", *probes_of(run)]
    if not untrained:
        probe.append("--no-untrained")
    if seed == options.seeds[0]:
        probe.append("--figures")
    train = [sys.executable, str(HERE / "train.py"), *argv, "--resume"]
    return Plan(run, seed, config, train, probe, untrained, samplings, numbers_of(run))


def refuse_redefined(config, plain):
    """Raises BadInput if flags after -- changed what makes a run this claim's: `plain` has none."""
    defining = set(re.findall(r"--(?:no-)?([\w-]+)", " ".join(RUNS.values())))
    for name in sorted({*defining, "dataset", "data-dir", "out", "name", "seed", "quick"}):
        field = name.replace("-", "_")
        if getattr(config, field) != getattr(plain, field):
            raise BadInput(f"--{name} {getattr(config, field)}: not after --, for it makes the "
                           "claims' runs what they are; leave it out there")


def numbers_of(run):
    """All numbers that claims read of a run, whichever claims are asked for."""
    numbers = [number for claim in CLAIMS for number in (claim.first, claim.second)]
    return [number for number in numbers if number.run == run]


def probes_of(run):
    """Names of their probes."""
    return list(dict.fromkeys(number.probe for number in numbers_of(run)))


# ---------------------------------------------------------------- judging them

def judge(claim, results, options):
    """A row of claims.json.  results: {(run, seed): what evaluate.py wrote}"""
    first = [value_of(claim.first, results[claim.first.run, seed]) for seed in options.seeds]
    second = [value_of(claim.second, results[claim.second.run, seed]) for seed in options.seeds]
    untrained = [value_of(claim.first, results[claim.first.run, seed], "untrained")
                 for seed in options.seeds]
    effects = [a - b for a, b in zip(first, second)]
    spread = spread_of(claim, effects, options)
    effect = statistics.mean(effects)
    return {
        "claim": claim.name, "where": claim.where, "measure": claim.words,
        "unit": claim.unit, "compared": list(claim.compared), "with": statistics.mean(first),
        "without": statistics.mean(second), "untrained": statistics.mean(untrained),
        "effect": effect, "spread": spread, "slack": claim.slack, "paper": claim.paper,
        "verdict": verdict(effect + claim.slack, spread),
        "seeds": options.seeds, "scale": options.scale, "runs": sorted(claim.runs),
        "values": {"with": first, "without": second, "untrained": untrained},
    }


def value_of(number, result, key="value"):
    """What evaluate.py found there.

    Raises: BadInput if it has no such row."""
    for row in result["rows"]:
        if (row["probe"], row["predicts"], row["from"]) == number[1:]:
            return row[key]
    raise BadInput(f"{result['checkpoint']}: its probes.json has no row {', '.join(number[1:])}")


def spread_of(claim, effects, options):
    """Standard deviation of the effect over seeds; of one seed, that of the kept table or None."""
    if len(effects) > 1:
        return statistics.stdev(effects)
    if options.scale == "quick" and not options.dataset and not options.train and KEPT.exists():
        for row in json.loads(KEPT.read_text()):
            if row["claim"] == claim.name:
                return row["spread"]
    return None


def verdict(effect, spread):
    """What an effect says: "holds", "does not", "undecided"."""
    if spread is None or abs(effect) <= 2 * spread:
        return "undecided"
    return "holds" if effect > 0 else "does not"


# ---------------------------------------------------------------- showing them

def digits_of(row):
    """Decimals that a row is shown with: 1 for per cent, 3 for R^2."""
    return 1 if row["unit"] == "top-1 %" else 3


def cells(row):
    """A row of the printed table, as words."""
    digits = digits_of(row)
    spread = "?" if row["spread"] is None else f"{row['spread']:.{digits}f}"
    paper = "-"
    if row["paper"]:
        paper = " / ".join(f"{number:g}" for number in row["paper"])
    return [row["where"], row["measure"], *(f"{row[key]:.{digits}f}" for key in
                                            ("with", "without", "untrained")),
            f"{row['effect']:+.{digits}f} \u00b1 {spread}", paper, row["verdict"]]


def table(rows):
    """Rows as aligned text, those that compare the same under one heading."""
    lines = []
    for compared in dict.fromkeys(tuple(row["compared"]) for row in rows):
        lines.append(["where", "what", *compared, "untrained", "effect \u00b1 spread",
                      "paper", "verdict"])
        lines += [cells(row) for row in rows if tuple(row["compared"]) == compared]
        lines.append([])
    widths = [max(map(len, column)) for column in zip(*filter(None, lines))]
    text = []
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths)]
        text.append("  ".join(padded).rstrip())
    seeds = rows[0]["seeds"]
    over = "seeds" if len(seeds) > 1 else f"the seeds of results/{KEPT.name}, ? if unknown"
    text.append(f"seeds {' '.join(map(str, seeds))}; spread: standard deviation of the effect over "
                f"{over}; untrained: the first number, of a random model")
    return "\n".join(text)


def markdown(rows):
    """Rows as a table in Markdown."""
    lines = ["| where | what | compared | first | second | untrained | effect ± spread | paper "
             "| verdict | seeds |", "|---" * 10 + "|"]
    for row in rows:
        where, words, *rest = cells(row)
        compared = " / ".join(row["compared"])
        seeds = str(len(row["seeds"]))
        lines.append("| " + " | ".join([where, words, compared, *rest, seeds]) + " |")
    return "\n".join(lines) + "\n"


def keep(rows, out):
    """claims.json, claims.md and claims.png in `out`."""
    text = json.dumps(rows, indent=1) + "\n"
    words = markdown(rows)
    save_atomically(out / "claims.json", lambda part: part.write_text(text))
    save_atomically(out / "claims.md", lambda part: part.write_text(words, encoding="utf-8"))
    draw_claims(rows, out / "claims.png")


# ---------------------------------------------------------------- the command line

def parse(argv=None):
    """Options from the command line; `train`: what stands after --."""
    argv = sys.argv[1:] if argv is None else list(argv)
    train = []
    if "--" in argv:
        train = argv[argv.index("--") + 1:]
        argv = argv[:argv.index("--")]
    p = flags.Parser(prog="claims.py", description="Show what the papers claim.")
    p.add_argument("--claims", nargs="+", default=[], metavar="CLAIM",
                   help="names, or how they begin (saccade), or places (table-3); default: all")
    p.add_argument("--first", action="store_true",
                   help=f"only what the runs {' and '.join(PAIR)} show, with one seed")
    p.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: 0 1 2")
    p.add_argument("--scale", choices=tuple(DATASETS), default="quick",
                   help="quick: laptop size, on embedded data; gpu: the papers' size and data")
    p.add_argument("--dataset", choices=settings.DATASETS,
                   help="for all runs; default: that of the scale")
    p.add_argument("--data-dir", default="data", metavar="DIR", help="where the data is")
    p.add_argument("--out", metavar="DIR",
                   help="folder of runs, table and figure (default: runs/claims-SCALE; with "
                        "--first runs/first)")
    p.add_argument("--jobs", type=int, default=0, metavar="N",
                   help="processes at once; 0 = one a core, one on a GPU")
    options = p.parse_args(argv)
    options.train = train
    options.claims = list(dict.fromkeys(options.claims))
    options.seeds = list(dict.fromkeys(options.seeds or ([0] if options.first else [0, 1, 2])))
    if not options.out:
        options.out = "runs/first" if options.first else f"runs/claims-{options.scale}"
    if not 0 <= options.jobs <= MOST_JOBS:
        raise BadInput(f"--jobs {options.jobs}: must be at least 0 and at most {MOST_JOBS}")
    if not options.jobs:
        options.jobs = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    return options


def main(argv=None):
    """Exit status 0, 2 for bad input, 128 + signal if stopped."""
    return command.run(show_claims, parse, argv, "give it fewer --jobs")


if __name__ == "__main__":
    sys.exit(main())
