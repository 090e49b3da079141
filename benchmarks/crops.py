"""Crops from photographs, two ways: files decoded at every step, or pictures kept decoded.

images.Pictures and sources.prepare.PICTURE_SIDE rest on this comparison. A core-second is a second
of one processor core, whoever else uses the machine; crops are 224 pixels, of 0.3 to 1 of the
photograph. Called by bench.py: section `crops`, with --data-dir FOLDER --images N for real files.
"""
import functools
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from augmentations import Ranges, resized_crop_flip, sample
from benchmarks.flops import blurred_noise
from images import Part, Pictures, canvas_side
from sources import prepare

SIZE = 224
SIDES = (256, 320, 384)         # shorter sides that pictures might be kept at
IMAGENET = 1_281_167            # training images
WANTED = 2500                   # images/s that a GPU might take
CROPS = Ranges(scale=(0.3, 1.0), flip=0.0, jitter=0.0, grey=0.0, blur=0.0)


def photographs(options, folder):
    """Files of --data-dir, at most --images, or noise written into `folder` as JPEG."""
    from PIL import Image
    if options.data_dir:
        return prepare.image_files(Path(options.data_dir))[:options.images]
    files = []
    for i, pixels in enumerate(blurred_noise(min(options.images, 16), 500)):
        files.append(Path(folder) / f"{i}.jpg")
        Image.fromarray(pixels[:, :375].transpose(1, 2, 0)).save(files[-1], quality=92)
    return files


def decode_crop(job, scaled):
    """The usual way, one file: decode, crop, resize.  scaled: by JPEG's own scaled decoding."""
    from PIL import Image
    path, (top, left, height, width) = job
    with Image.open(path) as image:
        before, _ = image.size
        if scaled:
            share = min(height, width) / SIZE           # as small as the crop allows, or larger
            image.draft("RGB", [int(side / share) for side in image.size])
        s = image.size[0] / before
        box = s * left, s * top, s * (left + width), s * (top + height)
        image = image.convert("RGB").resize((SIZE, SIZE), Image.BICUBIC, box=box)
    return np.asarray(image)


def kept(files, side):
    """Pictures of the files with shorter sides of at most `side`, in memory."""
    pictures = [prepare.picture(file, side) for file in files]
    sizes = np.array([picture.shape[1:] for picture in pictures])
    tail = np.zeros(canvas_side(sizes), np.uint8)
    flat = np.concatenate([*(picture.ravel() for picture in pictures), tail])
    return Pictures(Part(flat, "train", sizes=sizes), torch.device("cpu"))


def random_crops(sizes):
    """Crops (n, 4) of images of these sizes (n, 2)."""
    height, width = torch.as_tensor(sizes).float().split(1, dim=1)
    return sample(len(sizes), (height, width), CROPS).crop


def rates(work, count, repeats):
    """Images per second, and per core-second, that work() makes `count` of: the best of some."""
    wall = cores = 0
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        work()
        wall = max(wall, count / (time.perf_counter() - started))
        cores = max(cores, count / (time.process_time() - used))
    return wall, cores


def table(files, threads, batch_size, repeats):
    """Rows: what, images/s, images per core-second, bytes on disk per image."""
    sizes = np.array([prepare.picture_size(file, math.inf) for file in files])
    jobs = list(zip(files, random_crops(sizes).tolist()))
    disk = np.mean([file.stat().st_size for file in files])
    with ThreadPoolExecutor(threads) as pool:
        for scaled in (False, True):
            work = functools.partial(decode_crop, scaled=scaled)
            name = "decode, crop, resize: " + ("JPEG's scaled decoding" if scaled else "Pillow")
            yield name, *rates(lambda: list(pool.map(work, jobs)), len(jobs), repeats), disk
        whole = functools.partial(prepare.read_image, smallest=1)
        yield ("decode alone", *rates(lambda: list(pool.map(whole, files)), len(files), repeats),
               disk)
    for side in SIDES:
        pictures = kept(files, side)
        index = torch.randint(len(files), (batch_size,))
        crop = random_crops(pictures.sizes[index])
        boxes = torch.cat([index[:, None], crop.long()], dim=1)
        place = crop * torch.tensor([0, 0, 1, 1])
        upright = torch.zeros(batch_size, dtype=torch.bool)
        of_each = 3 * pictures.sizes.prod(1).double().mean().item()
        cut = functools.partial(pictures.__getitem__, boxes)
        yield f"kept at {side}: cut", *rates(cut, batch_size, repeats), of_each

        def resize():
            resized_crop_flip(pictures[boxes].float().div_(255), place, upright, SIZE)

        yield f"kept at {side}: cut, resize", *rates(resize, batch_size, repeats), of_each


def show(rows):
    """Print the table, with what it means for ImageNet and a GPU."""
    print(f"{'crops of photographs':44s} {'images/s':>9s} {'a core-s':>9s} {'cores':>6s} "
          f"{'GB on disk':>10s}   (cores for {WANTED:,} images/s; disk for {IMAGENET:,})")
    for name, wall, cores, size in rows:
        print(f"{name:44s} {wall:9,.0f} {cores:9,.0f} {WANTED / cores:6.1f} "
              f"{size * IMAGENET / 1e9:10,.0f}")
