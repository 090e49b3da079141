"""t-SNE (van der Maaten & Hinton, 2008), exact, for the few thousand points that a map shows.

    tsne(x)     (n, d) -> (n, 2): points that are close in x stay close

The papers' maps are UMAPs, and if umap-learn is installed so are ours; this stands in for it
without another package. Checked in tests/test_figures.py against scikit-learn.
"""
import torch

PERPLEXITY = 30.0           # about how many neighbours count
EXAGGERATION = 12.0         # of attraction, in the first steps: clusters form before they settle
EXAGGERATED_STEPS = 150
STEPS = 500
DIMENSIONS = 50             # of x that are kept, its principal ones


def tsne(x):
    """Points (n, 2) for features (n, d), n > 3 PERPLEXITY; the same for the same x."""
    x = x - x.mean(0)
    U, S, _ = torch.linalg.svd(x, full_matrices=False)
    x = (U * S)[:, :DIMENSIONS]
    n = len(x)
    P = neighbourhood(torch.cdist(x, x).square())
    P = ((P + P.T) / (2 * n)).clamp(min=1e-12)
    y = x[:, :2] / x[:, :1].std() * 1e-4
    gains = torch.ones_like(y)
    moved = torch.zeros_like(y)
    rate = max(n / EXAGGERATION / 4, 50.0)
    for step in range(STEPS):
        early = step < EXAGGERATED_STEPS
        gradient = slope(P * EXAGGERATION if early else P, y)
        against = gradient * moved < 0                  # still downhill: go faster
        gains = torch.where(against, gains + 0.2, gains * 0.8).clamp(min=0.01)
        moved = (0.5 if early else 0.8) * moved - rate * gains * gradient
        y = y + moved
    return y - y.mean(0)


def neighbourhood(distance):
    """Squared distances (n, n) -> p(j|i) (n, n): Gaussians, each as wide as gives PERPLEXITY.

    The width is found by bisection on the entropy, for all rows at once."""
    n = len(distance)
    distance = distance / distance.mean()
    low = torch.zeros(n, 1)
    high = torch.full((n, 1), torch.inf)
    beta = torch.ones(n, 1, dtype=distance.dtype)                           # 1 / (2 sigma^2)
    itself = torch.eye(n, dtype=torch.bool)
    for _ in range(50):
        p = (-beta * distance).masked_fill(itself, -torch.inf).softmax(1)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(1, keepdim=True)
        too_wide = entropy > torch.tensor(PERPLEXITY).log()
        low = torch.where(too_wide, beta, low)
        high = torch.where(too_wide, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    return p


def slope(P, y):
    """Gradient (n, 2) of KL(P || Q), Q the Student-t similarities of points y (n, 2)."""
    near = 1 / (1 + torch.cdist(y, y).square())
    near.fill_diagonal_(0)
    pull = (P - near / near.sum()) * near
    return 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
