"""The device a run computes on, the memory format of its weights, and the seeds of its randomness.

Nothing in here is about JEPA. Checked in tests/test_device.py.
"""
import errno
import os

import numpy as np
import torch
from torch import nn

from plumbing.errors import BadInput

TRAINED = 16        # bytes a trained number takes: itself, its gradient, AdamW's two moments
NARROW = 8          # channels; see `memory_format`


def pick_device(name):
    """torch.device for --device; auto takes CUDA, then MPS, then the CPU."""
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(),
                     cpu=True)
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    kind, colon, number = name.partition(":")
    if not available.get(kind, False) or colon and kind != "cuda":
        raise BadInput(f"--device {name}: not available here; use auto, cpu, cuda or mps")
    numbers = [str(i) for i in range(torch.cuda.device_count())]
    if colon and number not in numbers:
        raise BadInput(f"--device {name}: there are {len(numbers)} CUDA devices, "
                       f"cuda:0 to cuda:{len(numbers) - 1}")
    device = torch.device(name)
    set_up(device)
    return device


def set_up(device):
    """Switch off what does not suit our shapes on this device.

    cuDNN's attention, PyTorch's first choice on Hopper, plans anew for every length of rows, and
    the rows of mode `regions` change their length from step to step."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def seed_all(*where):
    """Seed every generator from integers such as (seed, epoch, step); nothing else seeds."""
    seed = np.random.SeedSequence(where).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed))


# ---------------------------------------------------------------- memory

def refuse_giant(build, device_name):
    """Raises BadInput if the model that build() returns cannot be trained in the memory there is.

    It is built without memory, on PyTorch's device "meta". Activations come on top: nobody knows
    before a step how much they take."""
    with torch.device("meta"):
        model = build()
    size = sum(buffer.nbytes for buffer in model.buffers())
    for weights in model.parameters():
        size += weights.numel() * TRAINED if weights.requires_grad else weights.nbytes
    device = pick_device(device_name)
    room = memory_of(device)
    if size > room:
        raise BadInput(f"a model of this size takes {size / 1e9:,.1f} GB to train and {device} has "
                       f"{room / 1e9:,.1f} GB; lower the widths and depths")


def memory_of(device):
    """Bytes of memory that a device has, used or not; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def is_out_of_memory(error):
    """Whether an exception says that the memory of the device or of the machine does not suffice.

    PyTorch has a type for it on CUDA only; elsewhere there are words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("DefaultCPUAllocator", "can't allocate memory", "out of memory", "ALLOC_FAILED",
             "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


# ---------------------------------------------------------------- models on a device

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


def under_autocast(model, device, enabled):
    """The model as a function of a batch, in bfloat16 where that is exact enough if `enabled`."""
    def forward(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            return model(batch)

    if hasattr(model, "no_sync"):                   # of several processes, for accumulation
        forward.no_sync = model.no_sync
    return forward


def compile_all(model, views, **options):
    """torch.compile the model and the pixel work of a mode, in place: parameter names stay.

    The pixel work of mode augment at 64 px launches 254 kernels a view when eager and 38 when
    compiled (counted under torch 2.11), which read and write the images less often."""
    model.compile(**options)
    views.compile(**options)
