"""Bit-equality of nested checkpoints, for the tests of runs, resumption and several processes."""
import torch


def same(a, b):
    """Tensors by every bit, dicts and lists by their members, NaN equal to NaN."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)
