"""3DIEBench (Garrido et al., 2023; seq-JEPA Sec. 2.3, A.1): packed once, trained from the pack.

    ROOT/<synset>/<object>/image_{0..49}.jpg     256 px renders
    ROOT/<synset>/<object>/latent_{0..49}.npy    (7,) rotation x, y, z; floor hue;
                                                 light theta, phi; light hue
    ROOT/{train,val}_images.npy                  object folders such as "/02691156/<id>/"
    ROOT/{train,val}_labels.npy                  one label each, 55 classes
      ->  images (N, 50, 3, S, S) uint8, latents (N, 50, 7) float32:
          two memory-mapped arrays under DATA_DIR/.cache

ROOT is DATA_DIR/3DIEBench, or DATA_DIR itself. At 128 px the two splits take 103 GB and 26 GB.
Objects are packed one after another and an interrupted pack goes on where it stopped (cache.py).
A pack is tied to the names of its objects, in order, and to its size, not to the dates of 2.6
million files, which would take minutes to ask for: after replacing images by others of the same
names, delete it. `pretrain` and `train` share one.
Checked in tests/test_threediebench.py on folders in this format.
"""
import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from images import Part
from plumbing.cache import cache_path, cached
from plumbing.errors import BadInput
from sources.prepare import Reading, choose, decode, inside, require, require_file

VIEWS = 50                      # renders per object
LATENTS = 7
LARGEST_LATENT = 1e6            # all are angles and hues
OBJECTS_AT_ONCE = 16            # packed between two notes of progress
HINT = ("3DIEBench's split files lie in the folder data/ of github.com/facebookresearch/SIE, "
        "its renders in 3DIEBench.tar.gz")


def read_3diebench(config, split):
    """One split of 3DIEBench.  split: "pretrain", "train" or "val"  ->  prepare.Reading

    Raises: BadInput, naming the file, for anything missing, unreadable or of the wrong size."""
    root = find_root(config)
    name = "val" if split == "val" else "train"
    names, labels, classes = read_split(root, name)
    total = len(names)
    chosen = choose(labels, config.limit)
    names = [names[i] for i in chosen]
    folders = [root / object_name for object_name in names]
    size = config.image_size
    look_at_val(config, root)

    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()
    source = dict(dataset="3diebench", part=name, objects=digest, limit=config.limit)
    # Latents come first: they show faults sooner.
    latents = pack(cache_path(config, f"{name}-latents"), source, (LATENTS,), np.float32,
                   folders, "latent_{}.npy", read_latent,
                   f"packing {name} latents", config.workers)
    source = dict(source, size=size)
    images = pack(cache_path(config, name), source, (3, size, size), np.uint8,
                  folders, "image_{}.jpg", lambda file: decode(file, size),
                  f"packing {name} objects", config.workers)
    rows = None if len(chosen) == total else chosen
    return Reading([Part(images, name, rows, total)], labels[chosen], classes, source, latents)


def pack(path, key, shape, dtype, folders, pattern, read_file, what, workers):
    """Array (N, 50, *shape), kept at `path`: what `read_file` makes of each folder's 50 files.

    pattern: their name, with {} for the number of the view.  key, dtype, what: as cache.cached."""
    def read(job):
        i, view = job
        return read_file(folders[i] / pattern.format(view))

    def fill(array, start):
        with ThreadPoolExecutor(workers or None) as pool:       # decoding runs without the GIL
            for first in range(start, len(folders), OBJECTS_AT_ONCE):
                after = min(first + OBJECTS_AT_ONCE, len(folders))
                jobs = [(i, view) for i in range(first, after) for view in range(VIEWS)]
                for job, row in zip(jobs, pool.map(read, jobs)):
                    array[job] = row
                yield after

    return cached(path, key, (len(folders), VIEWS, *shape), dtype, fill, what, resumable=True)


def find_root(config):
    """Folder of the split files. Raises: BadInput if either is missing, before anything is read."""
    inside = Path(config.data_dir) / "3DIEBench"
    root = inside if inside.is_dir() else Path(config.data_dir)
    for file in ("train_images.npy", "train_labels.npy", "val_images.npy", "val_labels.npy"):
        if not (root / file).exists():
            place = "" if root == inside else f", nor is there a folder {inside}"
            raise BadInput(f"{root / file}: not found{place}; {HINT}: "
                           "put both in one folder, or fix --data-dir")
    return root


def look_at_val(config, root):
    """Raises: BadInput if the validation split could not be packed when its turn comes."""
    names, _, _ = read_split(root, "val")
    if not cache_path(config, "val").exists():
        require(root / names[0], f"the first object of val_images.npy; {HINT}")


def read_split(root, name):
    """Object folders relative to root, labels (N,) int64, and class names.

    A class is named by the synset of its first object.
    Labels are stored as numbers or as names; what is a class is decided by the training split."""
    train_folders, train_labels = load_split_files(root, "train")
    kinds, first, numbers = np.unique(train_labels, return_index=True, return_inverse=True)
    classes = [train_folders[i].split("/")[0] for i in first]
    if name == "train":
        return train_folders, numbers.astype(np.int64), classes
    folders, labels = load_split_files(root, name)
    unknown = sorted(set(labels.tolist()) - set(kinds.tolist()))
    if unknown:
        raise BadInput(f"{root / f'{name}_labels.npy'}: label {unknown[0]} does not occur in "
                       f"train_labels.npy; {HINT}")
    return folders, np.searchsorted(kinds, labels).astype(np.int64), classes


def load_split_files(root, name):
    """{name}_images.npy and {name}_labels.npy: list of N folder names, array of N labels."""
    images_file = root / f"{name}_images.npy"
    labels_file = root / f"{name}_labels.npy"
    folders = load_array(images_file)
    labels = load_array(labels_file)
    if folders.ndim != 1 or folders.dtype.kind != "U" or not len(folders):
        raise BadInput(f"{images_file}: {folders.dtype} {folders.shape}, "
                       f"expected a list of object folders; {HINT}")
    if labels.shape != folders.shape or labels.dtype.kind not in "iufU":
        raise BadInput(f"{labels_file}: {labels.dtype} {labels.shape}, expected one label, "
                       f"a number or a name, for each of {len(folders):,} objects; {HINT}")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        row = int(np.argmin(np.isfinite(labels)))
        raise BadInput(f"{labels_file}: the label of object {row} is {labels[row]}, "
                       f"expected a number or a name; {HINT}")
    folders = [folder.strip("/") for folder in folders.tolist()]
    for folder in folders:
        inside(root, folder, images_file)
    return folders, labels


def load_array(path):
    """A small .npy file. Pickled objects are refused: they can run code."""
    require_file(path, "unpack 3DIEBench.tar.gz again")
    try:
        with open(path, "rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)  # np.load takes .npz, too
        if array.dtype.kind == "U":
            native = array.astype(array.dtype.newbyteorder("="))
            if (np.frombuffer(native.tobytes(), np.uint32) > sys.maxunicode).any():
                raise ValueError("its text is no text")     # Python would make strings of it
        return array
    except Exception as error:          # what NumPy raises on damaged headers has no common type
        if "allow_pickle" in str(error):
            raise BadInput(f"{path}: holds pickled objects, expected plain text or numbers; "
                           "if you trust it, convert it once: np.save(f, np.array("
                           "np.load(f, allow_pickle=True).tolist()))") from None
        raise BadInput(f"{path}: not a readable .npy array ({error}); fetch it again") from None


def read_latent(path):
    """One view's latents (7,) float32."""
    latent = load_array(path)
    fits = latent.shape == (LATENTS,) and latent.dtype.kind == "f"
    if not fits or not (np.abs(latent) < LARGEST_LATENT).all():         # nor NaN
        raise BadInput(f"{path}: {latent.dtype} {latent.shape}, expected {LATENTS} finite numbers "
                       "(rotation x, y, z; floor hue; light theta, phi; light hue); "
                       "unpack 3DIEBench.tar.gz again")
    return latent.astype(np.float32)
