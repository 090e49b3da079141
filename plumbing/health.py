"""What is watched while a model trains: mean losses, speed, and whether features are alive.

    Meters              sums over an epoch, on the device: no step waits for them
    Stopwatch           images per second
    health(out)         spread and effective rank of an epoch's last features
    collapsed(row)      a warning, if these say that features have lost their content

Nothing in here is about JEPA. Checked in tests/test_health.py.
"""
import time

import torch
import torch.nn.functional as F

from plumbing import distributed
from plumbing.errors import BadInput

HEALTH_ROWS = 4096          # features that spread and rank are computed from
COLLAPSED_STD = 0.05        # below either, features have lost their content
COLLAPSED_RANK = 1.5


class Meters:
    """Sums over an epoch, of means over ranks. They stay on the device: no step waits for them."""

    def __init__(self, device, when, saved=None):
        """when: step -> words on the learning rate then and the last good checkpoint, for the
        message on a bad loss.  saved: what `saved()` of an earlier Meters returned."""
        self.when = when
        self.sums = dict(count=torch.zeros((), device=device),
                         first_bad=torch.zeros((), device=device))
        for name, value in (saved or {}).items():
            self.sums[name] = torch.tensor(value, device=device)
        # A sum that the checkpoint lacks would begin in the middle of the epoch.
        self.resumed = self.sums.keys() - {"count", "first_bad"}

    def add(self, step, **values):
        """Add a step's numbers; remember the first step whose loss was not finite.

        Raises: BadInput if the checkpoint's sums were of other numbers."""
        if self.resumed and self.resumed != values.keys():
            raise BadInput("the checkpoint's meters are not those of this model; "
                           "use the code it was made with")
        values = distributed.average(values)
        bad = self.sums["first_bad"]
        is_first = (bad == 0) & ~values["loss"].isfinite()
        self.sums["first_bad"] = torch.where(is_first, step + 1.0, bad)
        for name, value in dict(values, count=1.0).items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def saved(self):
        """{name: sum} as plain numbers, for a checkpoint. Waits for the device."""
        return {name: total.item() for name, total in self.sums.items()}

    def means(self):
        """{name: mean so far}. Waits for the device. Raises BadInput if a loss was not finite."""
        sums = self.saved()
        count = sums.pop("count")
        bad_step = int(sums.pop("first_bad")) - 1
        if bad_step >= 0:
            raise BadInput(f"the loss was not finite at step {bad_step} {self.when(bad_step)}: "
                           "lower --lr, or look at the data")
        return {name: total / count for name, total in sums.items()}


class Stopwatch:
    """Images per second since it was made."""

    def __init__(self):
        self.start = time.monotonic()
        self.count = 0

    def lap(self):
        """Images per second."""
        return round(self.count / (time.monotonic() - self.start), 1)


def health(out):
    """Spread and effective rank of z and z_agg over a batch (low = collapse): {column: number}."""
    rows = HEALTH_ROWS // distributed.world_size()
    z = distributed.gather(out.z.detach().flatten(0, 1)[:rows])
    z_agg = distributed.gather(out.z_agg.detach())
    return dict(z_std=feature_std(z), z_rank=effective_rank(z),
                z_agg_std=feature_std(z_agg), z_agg_rank=effective_rank(z_agg))


def collapsed(row):
    """One line of warning if features are nearly the same for every input; else None."""
    for name in ("z", "z_agg"):
        std = row[f"{name}_std"]
        rank = row[f"{name}_rank"]
        if std < COLLAPSED_STD or rank < COLLAPSED_RANK:
            return (f"warning: {name} has collapsed at epoch {row['epoch']} (spread {std:.3f}, "
                    f"effective rank {rank:.1f}): a low loss means nothing now; lower --lr, "
                    "raise --ema, or, but in mode regions, try --z-norm")
    return None


def feature_std(z):
    """Spread of features (n, D): std per dimension of the L2-normalised z, times sqrt(D).

    1 is healthy, 0 collapsed."""
    z = F.normalize(z.detach().float(), dim=1)
    return (z.std(0).mean() * z.shape[1] ** 0.5).item()


def effective_rank(z):
    """RankMe (Garrido et al., 2023) of features (n, D): exp of their singular values' entropy."""
    s = torch.linalg.svdvals(z.detach().float())
    p = s / s.sum().clamp_min(1e-12)
    return torch.exp(-(p * torch.log(p + 1e-12)).sum()).item()
