"""MAE's fine-tuning with parts of it switched off: what made 2026-11-24-finetune.txt.

    python results/finetune_parts.py runs/NAME/last.pt random 2000 mixing randaugment

Arguments: the last.pt of a run of mode `regions`, "random" or "trained" weights, steps, and what is
switched off. Batches of 64, rate 1e-3; top-1 on validation and training images is printed.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))
import config as settings  # noqa: E402
from build import build_model, build_views  # noqa: E402
from dense import finetune, loop  # noqa: E402
from plumbing.device import seed_all  # noqa: E402
from plumbing.runs import load_checkpoint, restore  # noqa: E402
from probes import Setup  # noqa: E402

path, weights, steps, *off = sys.argv[1:]
device = torch.device("cpu")
checkpoint = load_checkpoint(Path(path))
config = settings.config_of(checkpoint)
views = {split: build_views(config, split, device) for split in ("train", "val")}
classes = len(views["train"].classes)

if "randaugment" in off:
    finetune.augment = lambda images, mean, std, operation: images
if "mixing" in off:
    def unmixed(transforms):
        return lambda images, labels: (images, F.one_hot(labels, classes).float())
    finetune.v2 = SimpleNamespace(**vars(v2) | dict(RandomChoice=unmixed))

seed_all(0)
model = build_model(config, {})
if weights == "trained":
    restore(model, checkpoint)
seed_all(0)
net = finetune.Classifier(model.representation, classes)
recipe = loop.Recipe(int(steps), 64, lr=1e-3, lr_end=1e-6, warmup=int(steps) // 10,
                     weight_decay=0.05, layer_decay=0.75)
batches = finetune.augmented_batches(views["train"], recipe, 0)
loop.train(net, net.vit, recipe, batches, Setup(views, device, 0, 1), "finetune")
for split in ("val", "train"):
    print(f"{split}: {finetune.top1(net, views[split]):.1f} %")
