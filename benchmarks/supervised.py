"""How much there is to learn: encoder and aggregator of a run, trained on the labels instead.

    python -m benchmarks.supervised --dataset solids --mode saccade --quick
    python -m benchmarks.supervised --dataset solids --mode saccade --quick --condition none

Takes the flags of train.py. Same views, steps, optimiser and rates; the loss is the cross-entropy
of a linear classifier on z_agg of M_tr views. Prints its top-1 on the validation split at several
M_val: an upper bound of sorts for the table of claims.py, not a number of the papers.
Checked in tests/test_supervised.py.
"""
import functools
import sys

import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import config as settings
from build import build_model, build_views
from evaluate import protocol
from plumbing import command
from plumbing.device import pick_device, place
from plumbing.errors import BadInput
from plumbing.loop import next_batch
from probes import accuracy, extract
from train import build_optimizer, rates_at, set_rates


class Classifier(nn.Module):
    """Batch -> logits (B, classes), from z_agg of its observed views."""

    def __init__(self, model, classes):
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.aggregator.dim, classes)

    def forward(self, batch):
        z = self.model.encode(batch.views[:, :-1])
        a = self.model.embed(batch.actions)
        return self.head(self.model.aggregate(z, a[:, :-1]))


def train_on_labels(config, views, device):
    """A Classifier, after as many steps as the run has."""
    model = build_model(config, views.groups)
    classifier = place(Classifier(model, len(views.classes)), device).train()
    optimizer = build_optimizer(classifier, config, device)
    epoch_steps = len(views) // config.batch_size
    if not epoch_steps:
        raise BadInput(f"--batch-size {config.batch_size}: there are {len(views)} samples; "
                       "lower it")
    rates = functools.partial(rates_at, config=config, epoch_steps=epoch_steps)
    for step in tqdm(range(config.epochs * epoch_steps), desc="on labels"):
        batch = next_batch(views, config, step, epoch_steps)
        set_rates(optimizer, rates(step))
        loss = F.cross_entropy(classifier(batch), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return classifier.eval()


def measure(config):
    """Train and print.  -> exit status"""
    if config.method != "seq-jepa":
        raise BadInput(f"--method {config.method}: has no aggregator; only seq-jepa applies")
    device = pick_device(config.device)
    classifier = train_on_labels(config, build_views(config, "train", device), device)
    lengths = protocol(config.mode).lengths
    features = extract(classifier.model, build_views(config, "val", device), lengths, device,
                       fields={"z_agg"}, seed=config.seed + 1)
    for M, z_agg in features.z_agg.items():
        top1 = accuracy(classifier.head.cpu(), z_agg, features.labels)
        print(f"supervised, condition {config.condition}: top-1 {top1:.1f} % on z_agg M={M}")
    return 0


def main(argv=None):
    """Exit status 0, 2 for bad input, 128 + signal if stopped."""
    return command.run(measure, settings.from_command_line, argv, "lower --batch-size")


if __name__ == "__main__":
    sys.exit(main())
