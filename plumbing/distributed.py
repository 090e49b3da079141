"""Several processes train one model: what differs between one and many, so that nothing else asks.

    torchrun --nproc-per-node 8 train.py ...        8 GPUs, one process each
                                                    (gloo and the CPU where there are none)

Every process ("rank") has the whole model and its share of every global batch; DDP averages the
gradients. With one process nothing here does anything: `world_size()` is 1, `rank()` 0, `gather`
the identity, `on_main` a call.

Two kinds of traffic. Between processes, through gloo: who is first, who failed, when to stop.
Between devices: gradients, batch statistics, metrics; none of that makes a host wait for its
device.
Checked in tests/test_distributed.py: two processes give the gradients of one.
"""
import atexit
import contextlib
import datetime
import os
import sys
import time
import uuid
import warnings

import torch
import torch.distributed as dist
from torch import nn

from plumbing.errors import BadInput

PATIENCE = datetime.timedelta(days=7)       # how long ranks wait while one prepares data or probes


def world_size():
    """Number of processes that train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """This process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main():
    """Whether this is rank 0: the one that prints, probes and writes files."""
    return rank() == 0


def local_rank():
    """This process among those of its node."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else 0


def start():
    """Join the other ranks, if torchrun started several. Only rank 0 keeps its standard output.

    Raises: BadInput if the environment speaks of several processes without saying where they are,
    as on some clusters where torchrun was forgotten."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
            value = os.environ.get(name, "")
            if not (value.isdecimal() or name == "MASTER_ADDR" and value):
                raise BadInput(f"{name} {value!r} in the environment, where WORLD_SIZE is "
                               f"{os.environ['WORLD_SIZE']!r}: start with torchrun, or unset "
                               "WORLD_SIZE")
        store, rank, size = _fresh_store()
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
        if not is_main():
            sys.stdout = open(os.devnull, "w")


def _fresh_store():
    """(torchrun's key-value store under a prefix that only living ranks know, rank, world size).

    After --max-restarts torchrun's store still holds the addresses of dead ranks, and nodes may
    count restarts differently. So rank 0 names the session: it answers whoever greets it, dead or
    alive, until every living rank has heard the name."""
    store, rank, size = next(dist.rendezvous("env://"))
    me = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello {rank}", me)
        session = store.get(f"welcome {me}").decode()           # waits for it
        store.set(f"heard {session} {rank}", "")
    else:
        session = me
        _tell(session, store, set(range(1, size)))
    return dist.PrefixStore(session, store), rank, size


def _tell(session, store, deaf):
    """Rank 0: answer greetings with the session's name until the `deaf` ranks have heard it."""
    while deaf:
        for rank in deaf:
            if store.check([f"hello {rank}"]):
                greeter = store.get(f"hello {rank}").decode()
                store.set(f"welcome {greeter}", session)
        deaf = {rank for rank in deaf if not store.check([f"heard {session} {rank}"])}
        time.sleep(0.01)


def finish():
    """Leave the other ranks in good order."""
    if world_size() > 1:
        # Torch 2.6 waits for gloo's threads while it holds the interpreter's lock, which a thread
        # that has just gathered needs to free a tensor: the pause lets it have it.
        time.sleep(0.5)
        dist.destroy_process_group()


def own_device(device):
    """This rank's device when the user asked for `device`: of a node's GPUs, one each."""
    if world_size() == 1:
        return device
    if device.type == "mps" or device.index is not None:
        raise BadInput(f"--device {device}: cannot be shared by {world_size()} processes; "
                       "use cuda, one GPU each, or cpu")
    if device.type == "cuda":
        if local_rank() >= torch.cuda.device_count():
            raise BadInput("--nproc-per-node: more processes than this node's "
                           f"{torch.cuda.device_count()} GPUs; lower it, or --device cpu")
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    return device


_device_group = None        # between devices; None is torch's default group, between processes


def connect(device):
    """Open the way between the ranks' devices. Once, by all ranks together."""
    global _device_group
    if world_size() > 1 and device.type == "cuda":
        _device_group = dist.new_group(backend="nccl")


# ---------------------------------------------------------------- between processes

def everyone(value):
    """[value of rank 0, value of rank 1, ...], on every rank. Any object that pickles."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def highest(*numbers):
    """For each number the largest that any rank has: ranks decide as one.

    Called at every step, so nothing is pickled."""
    if world_size() == 1:
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def on_main(call, *args):
    """call(*args) on rank 0 while the others wait: its result, or its error, on every rank."""
    return everyone(_attempt(is_main(), call, args))[0]


def in_turn(call, *args):
    """call(*args) on every rank: rank 0, then the first rank of each other node, then the rest.

    Each gets its own result. What the first ones download, decode or render the later ones find.
    An error of one is raised on all."""
    if is_main():
        mine = 0
    elif local_rank() == 0:
        mine = 1
    else:
        mine = 2
    results = [_attempt(turn == mine, call, args) for turn in range(3)]
    return results[mine]


def _attempt(mine, call, args):
    """call(*args) where `mine`, else None. An error on one rank is raised on all."""
    result = None
    error = None
    try:
        result = call(*args) if mine else None
    except (Exception, SystemExit) as caught:           # SystemExit: argparse's, or a signal's
        error = caught
    for failure in everyone(error):
        if failure is not None:
            raise failure
    return result


def first_failure(status):
    """Told by a rank that is about to fail: (whether it is the first, the first one's exit status).

    status: the exit status of this rank. The first one alone says why. The others fail too, at the
    latest when they find that they cannot reach it any more. None tears down what it has with the
    others: see `skip_teardown`."""
    if world_size() == 1:
        return True, status
    claim = f"{rank()} {status}"
    try:
        store = dist.distributed_c10d._get_default_store()
        first = store.compare_set("failed", "", claim).decode()
    except RuntimeError:                # the store is gone, and with it whoever was first
        first = f"unknown {status}"
    status = int(first.split()[1])
    skip_teardown(status)
    return first == claim, status


def skip_teardown(status):
    """Have a rank that fails end without Python's teardown, after all it still has to say.

    Its gloo threads may have a tensor to free, as when another rank has just gone. One that waits
    for the interpreter's lock when the teardown begins aborts the process: its exit status is lost.
    To call `finish` instead could wait for ever, for ranks that wait for this one."""
    atexit.register(_end, status)


def _end(status):
    if world_size() > 1:                # else `finish` was called after all
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def has_lost_a_rank(error):
    """Whether an exception says that another rank cannot be reached: it was killed, say."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
             "NCCL communicator was aborted", "remote process exited")
    return (world_size() > 1 and isinstance(error, RuntimeError)
            and any(word in str(error) for word in words))


# ---------------------------------------------------------------- between devices

# Torch 2.14 renames it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Gather(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x):
        ctx.rows = len(x)
        ctx.group = _device_group
        everything = x.new_empty(world_size() * len(x), *x.shape[1:])
        _all_gather(everything, x.contiguous(), group=ctx.group)
        return everything

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[rank() * ctx.rows:][:ctx.rows]


def gather(x):
    """Rows of all ranks, in the order of the global batch: (b, ...) -> (B, ...), with gradient.

    For what is not a mean over samples, such as batch statistics or covariances. The gradient of x
    is that of the *sum* of all ranks' losses: another rank's loss depends on our x too. DDP then
    divides by the number of ranks, so what is minimised is the mean of the ranks' losses; a term
    that all ranks compute alike counts once, as with one process."""
    return x if world_size() == 1 else _Gather.apply(x)


def average(values):
    """Mean over ranks of {name: scalar tensor on the device}, in one message."""
    if world_size() == 1:
        return values
    total = torch.stack([v.float() for v in values.values()])
    dist.all_reduce(total, group=_device_group)
    return dict(zip(values, total / world_size()))


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d and 2d with the statistics of the global batch, in train mode.

    torch.nn.SyncBatchNorm refuses CPU tensors, so this could not be tested without several GPUs;
    nor does torch.compile fuse it."""

    @classmethod
    def of(cls, norm):
        """In place of a BatchNorm: with its very parameters and buffers, under the same names."""
        ours = cls(norm.num_features, norm.eps, norm.momentum, norm.affine,
                   norm.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(ours, name, getattr(norm, name))
        return ours.train(norm.training)

    def forward(self, x):
        """x (b, C, ...), this rank's share of the global batch -> the same shape and dtype."""
        if not self.training:
            return super().forward(x)
        over = [d for d in range(x.dim()) if d != 1]
        moments = torch.stack(torch.var_mean(x.float(), over, correction=0))
        variances, means = gather(moments[None]).unbind(1)      # (ranks, C); equally large shares
        mean = means.mean(0)
        # Stable, unlike E[x^2] - E[x]^2.
        variance = variances.mean(0) + (means - mean).square().mean(0)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        # Both are fp32 under autocast too.
        scale = (variance + self.eps).rsqrt() * (self.weight if self.affine else 1)
        shift = (self.bias if self.affine else 0) - mean * scale
        per_channel = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(per_channel), x, scale.view(per_channel)).to(x.dtype)

    def _check_input_dim(self, x):
        assert x.dim() >= 2, f"expected (B, C, ...), got {tuple(x.shape)}"


def globalise_batchnorm(model):
    """The model, its BatchNorms replaced by ones that see the global batch. Alone: as it is.

    They are replaced in the modules that hold them. Parameters and buffers stay the same objects
    under the same names."""
    if world_size() == 1:
        return model
    if isinstance(model, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return GlobalBatchNorm.of(model)
    for name, child in model.named_children():
        setattr(model, name, globalise_batchnorm(child))
    return model


def data_parallel(model):
    """The model as a callable whose output's backward() averages gradients over ranks.

    It does so as long as the callable lives. Parameters and state dict remain `model`'s, without a
    prefix."""
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)      # torch 2.15 renames broadcast_buffers
        # Buffers are equal on all ranks, as GlobalBatchNorm keeps them.
        return nn.parallel.DistributedDataParallel(model, process_group=_device_group,
                                                   broadcast_buffers=False)


def unaveraged(forward):
    """A context: backward() adds up a rank's own gradients. The next one outside averages them all.

    forward: what plumbing.loop.Run.begin returned. Alone, or for any other function: nothing."""
    return getattr(forward, "no_sync", contextlib.nullcontext)()
