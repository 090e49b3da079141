"""How fast views are made, beside the usual per-image way, in the same run on the same machine.

    python bench.py                     every mode, one CPU thread
    python bench.py --threads 2 --device cuda

Counts finished views per second: drawn, cropped or augmented, normalised, in a batch tensor. Both ways start
from uint8 images in memory. The per-image way is what a DataLoader worker does for one sample: a multinomial draw
over all pixels and a slice per fixation; torchvision's transforms per augmented view; torchvision's to-float and
normalise per render.
"""
import argparse
import sys
import time

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import config as settings
from augmentations import CONTEXT, blur_kernel_size
from build import MODES, pick_device
from config import BadInput
from images import Part, Split

MEAN, STD = (0.45, 0.44, 0.40), (0.22, 0.22, 0.22)
CASES = {                       # name: mode, data set of the preset, image size, M
    "saccades, 32 px of 96": ("saccade", "stl10", 96, 4),
    "augmentations, 32 px": ("augment", "cifar100", 32, 2),
    "augmentations, 64 px": ("augment", "tiny-imagenet", 64, 2),
    "rotations, 128 px": ("rotation", "3diebench", 128, 3),
}


def random_split(mode, size, n):
    """A Split of n random images, or of objects with 8 renders each; speed does not depend on the content."""
    rng = np.random.default_rng(0)
    shape = (n, 8, 3, size, size) if mode == "rotation" else (n, 3, size, size)
    latents = rng.uniform(-1, 1, (n, 8, 7)).astype(np.float32) if mode == "rotation" else None
    part = Part(rng.integers(0, 256, shape, dtype=np.uint8), "train", None, n)
    return Split([part], np.zeros(n, dtype=np.int64), ["?"], MEAN, STD, dict(bench=mode, size=size), latents)


def saccades_one_by_one(image, saliency, config):
    """One sample: draw, inhibit, slice, for each fixation in turn.  image (3, S, S) uint8, saliency (S, S)."""
    p, S, patches = config.patch_size, config.image_size, []
    padded = TF.pad(TF.normalize(TF.to_dtype(image, torch.float32, scale=True), MEAN, STD), p)
    saliency = saliency.clone()
    for _ in range(config.views + 1):
        row, column = divmod(int(torch.multinomial(saliency.flatten(), 1)), S)
        top, left = row - p // 2, column - p // 2
        saliency[max(0, top):top + p, max(0, left):left + p] = 0
        patches.append(padded[:, top + p:top + 2 * p, left + p:left + 2 * p])
    return torch.stack(patches)


def augmentations_one_by_one(size):
    """torchvision's chain with CONTEXT's ranges, for one uint8 image."""
    b, c, s, h = CONTEXT.half_range
    return v2.Compose([
        v2.RandomResizedCrop(size, CONTEXT.scale, CONTEXT.ratio, interpolation=TF.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(CONTEXT.flip), v2.RandomApply([v2.ColorJitter(b, c, s, h)], CONTEXT.jitter),
        v2.RandomGrayscale(CONTEXT.grey), v2.GaussianBlur(blur_kernel_size(size), CONTEXT.sigma),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def one_by_one(mode, split, config, saliency):
    """A function that makes all views of `n` samples, one image at a time."""
    images, M = torch.from_numpy(split.parts[0].images), config.views
    chain = augmentations_one_by_one(config.image_size)

    def rotations(i):
        return torch.stack([TF.normalize(TF.to_dtype(images[i, v], torch.float32, scale=True), MEAN, STD)
                            for v in torch.randperm(images.shape[1])[:M + 1]])

    make = {"saccade": lambda i: saccades_one_by_one(images[i], saliency[i], config),
            "augment": lambda i: torch.stack([chain(images[i]) for _ in range(M + 1)]), "rotation": rotations}[mode]
    return lambda n: torch.stack([make(i) for i in range(n)])


def seconds(run, device, repeats):
    """Shortest time of `repeats` runs after one to warm up: the one that others on the machine disturbed least."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure(name, device, batch, repeats):
    """Views/s of the batched and of the per-image way for one case."""
    mode, dataset, size, M = CASES[name]
    config = settings.Config(**settings.preset(dataset, mode) | dict(saliency="uniform"))
    split = random_split(mode, size, batch)
    views = MODES[mode](split, config, device)
    if mode == "saccade":               # uneven maps: a uniform one would flatter neither way, but real ones are uneven
        views.saliency.parts = [torch.rand(batch, size, size, device=device) ** 3]
    index, few = torch.arange(batch), 32
    batched = batch * (M + 1) / seconds(lambda: views(index, M), device, repeats)
    slow = one_by_one(mode, split, config, views.saliency.parts[0].cpu() if mode == "saccade" else None)
    single = few * (M + 1) / seconds(lambda: slow(few), device, repeats)
    return batched, single


def main(argv=None):
    """Print the table."""
    p = argparse.ArgumentParser(prog="bench.py", description="Views per second, batched and one image at a time.")
    p.add_argument("--device", default="cpu", help="auto | cpu | cuda | mps")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    p.add_argument("--batch-size", type=int, default=0, help="samples per batch (default: 64 on a CPU, as --quick; else 512)")
    p.add_argument("--repeats", type=int, default=5, help="runs of which the fastest counts (default: 5)")
    options = p.parse_args(argv)
    try:
        device = pick_device(options.device)
        # Above some 30 MB a batch, a CPU spends its time on fresh memory pages rather than on views.
        options.batch_size = options.batch_size or (64 if device.type == "cpu" else 512)
        if min(options.threads, options.repeats) < 1 or options.batch_size < 32:
            raise BadInput("--threads and --repeats must be at least 1, --batch-size at least 32")
        torch.set_num_threads(options.threads)
        print(f"{'views per second':24s} {'batched':>10s} {'per image':>10s} {'ratio':>7s}   ({device}, {options.threads} threads, "
              f"batch {options.batch_size}; per image on the CPU)")
        for name in CASES:
            batched, single = measure(name, device, options.batch_size, options.repeats)
            print(f"{name:24s} {batched:10,.0f} {single:10,.0f} {batched / single:6.1f}x")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
