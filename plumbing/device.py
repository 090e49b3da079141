"""The device a run computes on, the memory format of its weights, and the seeds of its randomness.

Checked in tests/test_device.py.
"""
import numpy as np
import torch
from torch import nn

from plumbing.errors import BadInput

NARROW = 8          # channels; see `memory_format`


def pick_device(name):
    """torch.device for --device; auto takes CUDA, then MPS, then the CPU."""
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name.split(":")[0], False):
        raise BadInput(f"--device {name}: not available here; use auto, cpu, cuda or mps")
    if name.startswith("cuda:") and not (name[5:].isdigit() and int(name[5:]) < torch.cuda.device_count()):
        raise BadInput(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return torch.device(name)


def seed_all(*where):
    """Seed every generator from integers such as (seed, epoch, step): the owner of all randomness."""
    torch.manual_seed(int(np.random.SeedSequence(where).generate_state(1, np.uint64)[0]))


def set_up(device):
    """Switch off what does not suit our shapes on this device.

    cuDNN's attention, PyTorch's first choice on Hopper, plans anew for every length of rows, and the
    rows of mode `regions` change their length from step to step."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def place(model, device):
    """Move a model to its device, in the memory format that is fast and safe there. Returns it."""
    return model.to(device, memory_format=memory_format(model, device))


def memory_format(model, device):
    """channels_last, in which convolutions are fastest; contiguous for a narrow ResNet on a CPU.

    There oneDNN's backward pass of a channels_last convolution with fewer than 8 output channels
    writes beyond its memory (torch 2.14 and 2.15, AVX2): `--width 4` would kill the interpreter."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    narrow = any(convolution.out_channels < NARROW for convolution in convolutions)
    if device.type == "cpu" and narrow:
        return torch.contiguous_format
    return torch.channels_last
