"""What the papers report, for the last column of evaluate.py's table.

Only rows that a run with the paper's own settings can be put beside: a --quick run, another saliency or an ablation without
a row gets none.
"""
import dataclasses

import config as settings
from config import Config

# The paper's numbers: (data set, mode, condition, M_tr) -> {(probe, predicts, from): value}.  Tables 1, 2, 3, 6; B.2
SEQ_JEPA = {
    ("stl10", "saccade", "position", 4): {("classify", "class", "z"): 81.20, ("classify", "class", "z_agg M=1"): 71.45,
                                          ("classify", "class", "z_agg M=4"): 83.44, ("classify", "class", "z_agg M=6"): 84.12},
    ("stl10", "saccade", "none", 4): {("classify", "class", "z"): 61.38, ("classify", "class", "z_agg M=1"): 62.21,
                                      ("classify", "class", "z_agg M=4"): 70.45},
    ("3diebench", "rotation", "rotation", 3): {
        ("classify", "class", "z"): 82.49, ("classify", "class", "z_agg M=1"): 81.72, ("classify", "class", "z_agg M=3"): 86.14,
        ("classify", "class", "z_agg M=5"): 87.41, ("action", "rotation", "z_1, z_2"): 0.71, ("parameters", "rotation", "z_1"): 0.74,
        ("invariance", "rotation", "z_agg M=3, no actions"): 0.141},
    ("3diebench", "rotation", "none", 3): {
        ("classify", "class", "z"): 80.91, ("classify", "class", "z_agg M=1"): 81.61, ("classify", "class", "z_agg M=3"): 86.05,
        ("classify", "class", "z_agg M=5"): 87.36, ("action", "rotation", "z_1, z_2"): 0.29, ("parameters", "rotation", "z_1"): 0.37},
    ("cifar100", "augment", "all", 2): {
        ("classify", "class", "z"): 52.07, ("classify", "class", "z_agg M=1"): 53.07, ("classify", "class", "z_agg M=3"): 59.34,
        ("classify", "class", "z_agg M=5"): 60.17, ("action", "crop", "z_1, z_2"): 0.78, ("action", "jitter", "z_1, z_2"): 0.64,
        ("action", "blur", "z_1, z_2"): 0.88},
    ("tiny-imagenet", "augment", "all", 1): {
        ("classify", "class", "z"): 33.03, ("classify", "class", "z_agg M=1"): 32.34, ("classify", "class", "z_agg M=3"): 36.14,
        ("classify", "class", "z_agg M=5"): 37.10, ("action", "crop", "z_1, z_2"): 0.64, ("action", "jitter", "z_1, z_2"): 0.49,
        ("action", "blur", "z_1, z_2"): 0.89},
    ("tiny-imagenet", "augment", "all", 2): {
        ("classify", "class", "z"): 27.20, ("classify", "class", "z_agg M=1"): 30.57, ("classify", "class", "z_agg M=3"): 34.99,
        ("classify", "class", "z_agg M=5"): 35.56, ("action", "crop", "z_1, z_2"): 0.69, ("action", "jitter", "z_1, z_2"): 0.42,
        ("action", "blur", "z_1, z_2"): 0.93},
}

# Top-1 on ImageNet: (method, encoder) -> linear, fine-tuned.  Table 1; ViT-H/16 at 448 px
REGIONS = {
    ("dseq-jepa", "vit-base"): (73.5, 84.0), ("i-jepa", "vit-base"): (72.4, 83.5), ("c-jepa", "vit-base"): (73.5, 84.2), ("dseq-c-jepa", "vit-base"): (73.8, 84.3),
    ("dseq-jepa", "vit-large"): (77.9, 86.8), ("i-jepa", "vit-large"): (77.1, 86.6), ("c-jepa", "vit-large"): (78.0, 86.9), ("dseq-c-jepa", "vit-large"): (78.4, 87.2),
    ("dseq-jepa", "vit-huge"): (82.4, 87.8), ("i-jepa", "vit-huge"): (81.1, 87.1),
}


AS_PUBLISHED = ("image_size", "patch_size", "epochs", "batch_size", "limit", "width", "ior", "action_in", "action_embed", "region_count", "order", "proxy",
                "crop_scale")


def paper_numbers(config):
    """{(probe, predicts, from): value} if the run has the settings of a row of the papers' tables, else {}."""
    preset = Config(**settings.preset(config.dataset, config.mode))
    if config.encoder == "vit-huge":
        preset = dataclasses.replace(preset, image_size=448, epochs=300)
    differs = [name for name in AS_PUBLISHED if getattr(config, name) != getattr(preset, name)]
    if differs or config.saliency == "uniform" or config.regions == "random":
        return {}
    if config.mode != "regions":
        return SEQ_JEPA.get((config.dataset, config.mode, config.condition, config.views), {})
    linear, tuned = REGIONS.get((config.method, config.encoder), (None, None)) if config.dataset == "imagenet" else (None, None)
    return {("linear", "class", "last 4 blocks, mean patch"): linear, ("finetune", "class", "mean patch token, all weights"): tuned}
