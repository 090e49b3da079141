"""Small heads on stored features, and scores: what a probe trains and what it reports.

    batches = shuffled(x, y, device)    features (S, N, d) and what they should tell, as batches
    train_head(head, batches, ...)      trained on these
    outputs(head, x)                    what it says of others; accuracy and R^2 of that
    knn_accuracy(x, y, x_val, y_val)    nearest neighbours instead of a head

S samplings of N samples, d features. x may be larger than memory (scratch.py): no function here
holds more of it than a block.
Nothing in here is about JEPA. Checked in tests/test_heads.py, against scikit-learn, closed-form
solutions and slow loops.
"""
import torch
import torch.nn.functional as F

from plumbing import scratch
from plumbing.device import seed_all

BLOCK = 4096            # samples of which scores or similarities are held at once
CPU = torch.device("cpu")


# ---------------------------------------------------------------- heads

def rows_of(x, s, rows):
    """Rows (b, d) of sampling s.  x: (S, N, d), or a list of such tensors, which are joined"""
    if isinstance(x, list):
        return torch.cat([scratch.read(part[s], rows) for part in x], dim=1)
    return scratch.read(x[s], rows)


def shuffled(x, y, device, *, batch_size=256, least=1):
    """What a head is trained on: a function of the epoch e, to (x (b, d), y (b, ...)) in a random
    order. Epoch e sees sampling e mod S.

    x (S, N, d) or a list of such, y (S, N, ...) or (N, ...); moved to the device at once, or batch
    by batch if they are too large for that.  least: a shorter last batch is left out"""
    parts = x if isinstance(x, list) else [x]
    S, N, _ = parts[0].shape
    y = y if y.shape[:2] == (S, N) else y.expand(S, *y.shape)
    size = sum(part.numel() * part.element_size() for part in parts)
    if size <= scratch.IN_MEMORY:
        parts = [part.to(device) for part in parts]
        y = y.to(device)

    def batches(epoch):
        s = epoch % S
        for rows in torch.randperm(N).to(y.device).split(batch_size):
            if len(rows) >= least:
                yield rows_of(parts, s, rows).to(device), y[s].index_select(0, rows).to(device)

    return batches


def train_head(head, batches, loss, epochs, optimizer, rate=None, *, seed=0):
    """Train `head`, in place.

    batches: epoch -> iterator of (x, y).  loss: (output, target) -> scalar.
    rate: epoch -> learning rate; None: the optimiser's"""
    seed_all(seed)
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()               # so that its start depends on `seed` alone
    head.train()
    for epoch in range(epochs):
        for group in optimizer.param_groups if rate else ():
            group["lr"] = rate(epoch)
        for x, y in batches(epoch):
            optimizer.zero_grad(set_to_none=True)
            loss(head(x), y).backward()
            optimizer.step()
    return head.eval()


@torch.inference_mode()
def outputs(head, x):
    """Outputs of a head on the CPU, block after block: (b, k) of all rows of x, S * N in all."""
    S, N = (x[0] if isinstance(x, list) else x).shape[:2]
    for s in range(S):
        for rows in torch.arange(N).split(BLOCK):
            yield head(rows_of(x, s, rows))


# ---------------------------------------------------------------- scores

def accuracy(head, x, y):
    """Top-1 in per cent, averaged over samplings; NaN if the head diverged.  x (S, N, d), y (N,)"""
    chosen = []
    for scores in outputs(head, x):
        if not scores.isfinite().all():
            return float("nan")
        chosen.append(scores.argmax(1))
    return 100 * (torch.cat(chosen).view(len(x), -1) == y).float().mean().item()


def r2(prediction, target):
    """R^2 per output dimension: 1 - SSE/SST, (n, k), (n, k) -> (k,).  The paper reports its mean.

    As scikit-learn: a constant target scores 1 if predicted exactly, else 0. Constant is also what
    varies by no more than float32 rounds."""
    target = target.double()            # in float32 the mean of equal numbers is not quite theirs
    sse = (target - prediction).square().sum(0)
    sst = (target - target.mean(0)).square().sum(0)
    rounding = torch.finfo(torch.float32).eps * target.abs().amax(0)
    score = 1 - sse / sst.clamp_min(torch.finfo(sst.dtype).tiny)
    return torch.where(sst > len(target) * rounding.square(), score, (sse == 0).to(score))


@torch.inference_mode()
def knn_accuracy(x, y, x_val, y_val, k=20, temperature=0.07, device=CPU):
    """Top-1 in per cent of k nearest neighbours by cosine similarity, votes exp(similarity / T).

    x (N, d), y (N,), x_val (n, d), y_val (n,).  No head is trained, so nothing can overfit."""
    classes = int(y.max()) + 1
    correct = 0
    for rows in torch.arange(len(x_val)).split(BLOCK):
        similarity, nearest = neighbours(scratch.read(x_val, rows).to(device), x, k)
        weight = (similarity / temperature).softmax(1)
        votes = weight.new_zeros(len(rows), classes).scatter_add(1, y[nearest], weight)
        correct += (votes.argmax(1) == y_val[rows]).sum().item()
    return 100 * correct / len(y_val)


def neighbours(rows, x, k):
    """The k nearest of x (N, d) to each of rows (b, d), by cosine: similarity, index (b, k), CPU.

    x is gone through block by block, and the best so far are kept."""
    rows = F.normalize(rows, dim=1)
    best = rows.new_empty(len(rows), 0)
    index = best.long()
    for some in torch.arange(len(x)).split(BLOCK):
        block = F.normalize(scratch.read(x, some).to(rows.device), dim=1)
        similarity, place = (rows @ block.T).topk(min(k, len(some)), dim=1)
        best = torch.cat([best, similarity], dim=1)
        index = torch.cat([index, place + some[0]], dim=1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, kept)
    return best.cpu(), index.cpu()
