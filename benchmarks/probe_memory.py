"""How much memory probing takes, and whether it grows with the number of images.

    python -m benchmarks.probe_memory                   10,000, 100,000 and 1,000,000 images
    python -m benchmarks.probe_memory --images 1000000 --memory 6000    with evaluate's own bound

The probes are real, `linear knn cls` of a ViT and `transfer` of seq-JEPA. Images and encoder are
dummies: what is measured is everything behind the encoder. Each line is of a process of its own:
the most host memory it had, pages of the files that a batch had touched included, and how much of
that PyTorch took before it began. Heads are trained
for a few epochs, for memory does not depend on their number.

Files lie in TMPDIR, else in the current folder, and are gone afterwards.
Checked in tests/test_probe_memory.py.
"""
import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import nn

from benchmarks.bench import check_kept, keep
from evaluate import PROBES
from images import Batch
from plumbing import command, flags, scratch
from plumbing.errors import BadInput
from probes import Setup, measure_views
from probes_regions import measure_images

KINDS = {               # what is asked for, and what extracts features for it
    "regions": (("linear", "knn", "cls"), measure_images),
    "saccade": (("transfer",), measure_views),
}
CLASSES = 100
VALIDATION = 500        # images
SAMPLINGS = 2
EPOCHS = 3              # more than samplings, so that crops are stored
M = 4                   # views


class DummyViews:
    """N images of 2 x 2 pixels: those of their class, and noise."""

    patch_size = 2

    def __init__(self, N):
        self.labels = torch.arange(N) % CLASSES
        self.classes = [str(label) for label in range(CLASSES)]
        self.of_class = torch.randn(CLASSES, 3, 2, 2, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.labels)

    def clean(self, index):
        """(b, 3, 2, 2)"""
        pixels = self.of_class[self.labels[index]]
        return pixels + torch.randn(pixels.shape)

    augmented = clean

    def __call__(self, index, M):
        """Batch of M+1 views."""
        views = torch.stack([self.clean(index) for _ in range(M + 1)], dim=1)
        return Batch(views, torch.randn(len(index), M, 2), torch.randn(len(index), M + 1, 2),
                     self.labels[index])


class DummyModel(nn.Module):
    """A linear map of pixels to D numbers, in the place of every part of either kind of model."""

    depth = 12
    cls_token = True

    def __init__(self, D):
        super().__init__()
        self.encoder = nn.Linear(12, D)
        self.norm = nn.Identity()

    @property
    def representation(self):
        """The ViT."""
        return self

    def forward(self, images, keep):
        """[tokens (b, 3, D) of each block, and of the output]"""
        tokens = self.encoder(images.flatten(1))[:, None].expand(-1, 3, -1)
        return [tokens] * (len(keep) + 1)

    def encode(self, views):
        """(b, V, 3, 2, 2) -> z (b, V, D)"""
        return self.encoder(views.flatten(2))

    def embed(self, actions):
        """(b, V-1, 2), as they are"""
        return actions

    def aggregate(self, z, a):
        """z (b, M, D) -> z_agg (b, D)"""
        return z.mean(1)


def peak():
    """Bytes of memory that this process has had at most."""
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(kind, N, D, bound, threads):
    """What probing N images took, in a fresh process.  bound: bytes kept in memory"""
    torch.set_num_threads(threads)
    scratch.IN_MEMORY = bound
    before = peak()
    started = time.monotonic()
    names, extract = KINDS[kind]
    views = dict(train=DummyViews(N), val=DummyViews(VALIDATION))
    setup = Setup(views, torch.device("cpu"), 0, M_train=M, lengths=(M,), probes=names,
                  samplings=SAMPLINGS, probe_epochs=EPOCHS, folder=".")
    model = DummyModel(D)
    train, val = extract(model, setup)
    extracted = time.monotonic()
    size = 0
    for value in train:
        tensors = value.values() if isinstance(value, dict) else [value]
        size += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    top1 = {}
    for name in names:
        for row in PROBES[name](model, train, val, setup):
            top1[f"{name}, {row['from']}"] = row["value"]
    return dict(kind=kind, images=N, features_gb=round(size / 1e9, 3),
                peak_gb=round(peak() / 1e9, 3), before_gb=round(before / 1e9, 3),
                extraction_seconds=round(extracted - started, 1),
                heads_seconds=round(time.monotonic() - extracted, 1), top1=top1)


def measure_all(options):
    """Print and keep a line for each kind and number of images."""
    started = time.monotonic()
    spawn = multiprocessing.get_context("spawn")        # a fork would begin with our own peak
    rows = []
    print("kind      images      features  peak memory  of it before  extraction  heads")
    for kind in options.only or KINDS:
        for N in options.images:
            with ProcessPoolExecutor(1, spawn) as process:
                found = process.submit(measure, kind, N, options.width, options.memory * 1e6,
                                       options.threads).result()
            rows.append(found)
            print("{kind:8s} {images:9,d}  {features_gb:8.2f} GB  {peak_gb:8.2f} GB  "
                  "{before_gb:9.2f} GB  {extraction_seconds:8.0f} s  {heads_seconds:3.0f} s"
                  .format(**found), flush=True)
            if options.json is not None:
                keep(options.json, torch.device("cpu"), started, threads=options.threads,
                     width=options.width, in_memory_mb=options.memory, samplings=SAMPLINGS,
                     epochs=EPOCHS, rows=rows)
    return 0


def parse(argv=None):
    """Options from the command line."""
    p = flags.Parser(prog="python -m benchmarks.probe_memory", description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, nargs="+", metavar="N",
                   default=[10_000, 100_000, 1_000_000], help="how many to train heads on")
    p.add_argument("--only", nargs="+", choices=list(KINDS), help="of one mode (default: both)")
    p.add_argument("--width", type=int, default=128, metavar="D",
                   help="numbers of a token (default: 128; 1,000,000 images then take 2.6 GB)")
    p.add_argument("--memory", type=int, default=50, metavar="MB",
                   help="features that may stay in memory (default: 50)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    p.add_argument("--json", metavar="FILE", help="where the numbers go (default: nowhere)")
    options = p.parse_args(argv)
    for name, least, most in (("width", 1, 1024), ("memory", 0, 10 ** 6), ("threads", 1, 1024)):
        value = getattr(options, name)
        if not least <= value <= most:
            raise BadInput(f"--{name} {value}: must be at least {least} and at most {most:,}")
    for N in options.images:
        if not 100 <= N <= 10 ** 8:
            raise BadInput(f"--images {N}: must be at least 100 and at most 100,000,000")
    if options.json is not None:
        check_kept(options.json)
    return options


def main(argv=None):
    """Exit status 0, 2 for bad input, 128 + signal if stopped."""
    return command.run(measure_all, parse, argv, less="lower --images, --width or --memory")


if __name__ == "__main__":
    sys.exit(main())
