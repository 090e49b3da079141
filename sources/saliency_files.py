"""Published saliency maps: which file holds those of which images, and whether they are densities.

    DIR/saliency_SPLIT.npy or DIR/SPLIT/saliency_SPLIT.npy, (N, 1, S, S) or (N, S, S) floats

SPLIT is the name of an images.Part. Checked in tests/test_saliency.py and, on bad files, in
tests/test_hostile_data.py.
"""
import numpy as np

from plumbing.cache import open_array
from plumbing.errors import BadInput

MAPS_AT_ONCE = 256
LOWEST_PEAK = 1e-20     # what float32 can tell from saccades.FLOOR, the mass of impossible pixels
HIGHEST_PEAK = 1e30     # what it can still add up over an image


def published(folder, part, size):
    """Maps from a file, for the images that part.rows selects: (n, S, S).

    Raises: BadInput if the file is absent, damaged, of another count or size, or no densities."""
    path, maps = open_maps(folder, part.name, size)
    if len(maps) != part.total:
        raise BadInput(f"{path}: {len(maps):,} maps for {part.total:,} images; "
                       "there must be one map per image of this data set, in its order")
    if part.rows is not None:
        maps = maps[part.rows]
    check_densities(maps, path, part.rows)
    return maps


def first_look(folder, name, size):
    """Type of the numbers of a part's maps.

    Raises: BadInput for what can be seen before the images are there: all but their count."""
    path, maps = open_maps(folder, name, size)
    check_densities(maps[:MAPS_AT_ONCE], path)
    return maps.dtype


def open_maps(folder, name, size):
    """Path and memory-mapped array (N, S, S) of the maps of the part of this name."""
    path = folder / f"saliency_{name}.npy"
    if not path.exists():
        path = folder / name / path.name
    if not path.exists():
        raise BadInput(f"--saliency {folder}: expected signature, uniform, deepgaze, "
                       f"or a folder with {path.name}")
    maps = open_array(path)
    if maps.ndim == 4 and maps.shape[1] == 1:
        maps = maps[:, 0]
    if maps.shape[1:] != (size, size) or maps.dtype not in (np.float16, np.float32, np.float64):
        raise BadInput(f"{path}: maps are {maps.dtype} {maps.shape}, expected floats "
                       f"(N, {size}, {size}) or (N, 1, {size}, {size}): one map per image, "
                       "at --image-size")
    return path, maps


def check_densities(maps, path, rows=None):
    """Raises: BadInput, naming the first map that is not finite, >= 0 and somewhere above 0.

    rows: which of the file's maps these are, if not all.
    Read as unsigned integers, floats lie in this order: zero, positive, infinite, NaN, negative. So
    a map is sound if its largest integer is a positive finite float: half a second for 100,000
    maps, where comparing float16 takes ten."""
    integer = f"u{maps.dtype.itemsize}"
    for start in range(0, len(maps), MAPS_AT_ONCE):
        some = np.ascontiguousarray(maps[start:start + MAPS_AT_ONCE])
        some = some.reshape(len(some), -1)
        with np.errstate(invalid="ignore"):                         # a NaN may say so
            peaks = some.view(integer).max(1).view(maps.dtype).astype(np.float64)
        sound = (peaks >= LOWEST_PEAK) & (peaks <= HIGHEST_PEAK)
        for i in np.flatnonzero(~sound):
            low = float(some[i].min())
            high = float(some[i].max())
            if low >= 0 and LOWEST_PEAK <= high <= HIGHEST_PEAK:    # a -0.0 in it does no harm
                continue
            row = start + i if rows is None else rows[start + i]
            raise BadInput(f"{path}: map {row} has values from {low:.3g} to {high:.3g}, expected "
                           "densities: finite, none below 0, some above (log densities? take exp)")
