"""All settings of a run: one frozen dataclass, one table of presets, one parser.

The flags of `train.py` are the fields of `Config`. A flag the user leaves out takes the paper's
value for the chosen data set and mode from `PRESETS`; `--quick` then shrinks the run to laptop size.
`python train.py --dataset D --mode m --help` shows the values that would be used.

Sections are those of the seq-JEPA paper; in mode `regions`, those of the DSeq-JEPA paper, whose numbers lost from its text are
I-JEPA's.
"""
import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from augmentations import Augmentations
from encoder import VITS
from plumbing.errors import BadInput
from regions import Crops
from rotations import Rotations
from saccades import Saccades

DATASETS = ("stl10", "cifar10", "cifar100", "tiny-imagenet", "3diebench", "imagenet", "folder", "solids", "clevr-count", "clevr-distance")

# --mode: what a view and an action are.  images.Views says what a class needs to stand here.
MODES = {"saccade": Saccades, "rotation": Rotations, "augment": Augmentations, "regions": Crops}

REGION_METHODS = Crops.methods
ENCODERS = {"seq-jepa": ("resnet18",)} | dict.fromkeys(REGION_METHODS, tuple(VITS))
DEFAULT_EPOCHS, EPOCHS_3DIEBENCH = 2000, 1000                                  # Sec. 4.2

# (data set, mode) -> what differs from the defaults of Config.  The README prints this table.
PRESETS = {
    ("stl10", "saccade"): dict(image_size=96, patch_size=32, views=4),          # Sec. 2.3, Table 3
    ("imagenet", "saccade"): dict(image_size=224, patch_size=84, views=4),      # B.6
    ("folder", "saccade"): dict(image_size=96, patch_size=32, views=4),         # as STL-10
    ("tiny-imagenet", "saccade"): dict(image_size=64, patch_size=24, views=4),  # a ninth, to a multiple of 8
    ("cifar10", "saccade"): dict(image_size=32, patch_size=12, views=4),
    ("cifar100", "saccade"): dict(image_size=32, patch_size=12, views=4),
    ("solids", "saccade"): dict(image_size=96, patch_size=32, views=4),
    ("3diebench", "saccade"): dict(image_size=128, patch_size=40, views=4),
    ("3diebench", "rotation"): dict(image_size=128, views=3, epochs=EPOCHS_3DIEBENCH),  # Sec. 4.2, Table 1
    ("solids", "rotation"): dict(image_size=64, views=3, epochs=EPOCHS_3DIEBENCH),      # as 3DIEBench, half its size
    ("cifar100", "augment"): dict(image_size=32, views=2),                      # Table 2
    ("cifar10", "augment"): dict(image_size=32, views=2),
    ("tiny-imagenet", "augment"): dict(image_size=64, views=2),                 # Table 2
    ("stl10", "augment"): dict(image_size=96, views=2),
    ("imagenet", "augment"): dict(image_size=224, views=2),
    ("folder", "augment"): dict(image_size=64, views=2),                        # as Tiny ImageNet
    ("solids", "augment"): dict(image_size=64, views=2),
    ("imagenet", "regions"): dict(image_size=224, patch_size=16, encoder="vit-base"),                    # 0.A.1.2
    ("folder", "regions"): dict(image_size=224, patch_size=16, encoder="vit-base"),
    ("stl10", "regions"): dict(image_size=96, patch_size=8, encoder="vit-small"),         # ours
    ("tiny-imagenet", "regions"): dict(image_size=64, patch_size=8, encoder="vit-small"),
    ("cifar10", "regions"): dict(image_size=32, patch_size=4, encoder="vit-small"),
    ("cifar100", "regions"): dict(image_size=32, patch_size=4, encoder="vit-small"),
    ("solids", "regions"): dict(image_size=64, patch_size=8, encoder="vit-small"),
    ("3diebench", "regions"): dict(image_size=128, patch_size=8, encoder="vit-small"),
    ("clevr-count", "regions"): dict(image_size=224, patch_size=16, encoder="vit-base"),
    ("clevr-distance", "regions"): dict(image_size=224, patch_size=16, encoder="vit-base"),
}
# Mode `regions` in general.  0.A.1.2; what is lost there is I-JEPA's
REGIONS = dict(method="dseq-jepa", epochs=600, batch_size=2048, lr=1e-3, lr_start=2e-4, lr_end=1e-6, warmup_epochs=15, weight_decay=0.04,
               weight_decay_end=0.4, ema=0.996, ema_shape="linear")
# The predictor's width and blocks for each encoder.  0.A.1.1: as I-JEPA; half as wide as the two small ones
PREDICTORS = {"vit-nano": (64, 3), "vit-tiny": (96, 6), "vit-small": (192, 6), "vit-base": (384, 6), "vit-large": (384, 12), "vit-huge": (384, 12)}

# --quick: minutes on two CPU cores.  Chosen by measurement, see results/README.md.
QUICK = dict(width=16, stem="strided", batch_size=64, lr=1e-3, warmup_epochs=1, ema=0.99, z_norm=True, action_dim=32, agg_hidden=512,
             limit=10_000)
QUICK_MODE = {
    "saccade": dict(image_size=48, patch_size=16, epochs=8),
    "rotation": dict(image_size=48, stem="imagenet", epochs=36),
    "augment": dict(image_size=32, epochs=4),
    "regions": dict(image_size=64, patch_size=8, encoder="vit-nano", epochs=8, warmup_epochs=1, lr_start=1e-4, lr_end=1e-5),
}
# Embedded solids: fewer renders, and less that varies between them than in 3DIEBench, so that minutes suffice to learn something.
QUICK_SOLIDS = {
    "saccade": dict(limit=4000, object_views=2, rotation_range=0.4, hue_range=0.0, patch_size=24),
    "rotation": dict(limit=2400, object_views=8, rotation_range=0.7853982, hue_range=0.2),
    "augment": dict(limit=4000, object_views=2, rotation_range=0.4),
    "regions": dict(limit=4000, object_views=2),
}


def _flag(default, help, **kwargs):
    return dataclasses.field(default=default, metadata=dict(help=help, **kwargs))


@dataclass(frozen=True)
class Config:
    """Settings of one run; stored in `config.json` and in every checkpoint."""
    # What is seen
    dataset: str = _flag("stl10", "which images", choices=DATASETS)
    mode: str = _flag("saccade", "what a view and an action are", choices=tuple(MODES))
    condition: str = _flag("position", "actions the model is told; the rest are only probed")
    views: int = _flag(4, "M, observed views of a training sequence; view M+1 is predicted", flag_metavar="M")
    data_dir: str = _flag("data", "where the data is, or is put", flag_metavar="DIR")
    image_size: int = _flag(96, "side of the stored image, pixels")
    patch_size: int = _flag(32, "side of a foveal patch (saccade) or of a ViT's patch (regions), pixels")
    saliency: str = _flag("signature", "signature | uniform | deepgaze | a folder of saliency_SPLIT.npy (saccade)")
    ior: bool = _flag(True, "inhibition of return (saccade)")
    rotation_range: float = _flag(1.5707964, "largest rotation angle of the embedded solids, radians")
    hue_range: float = _flag(1.0, "spread of floor and light hues of the embedded solids: 1 = any hue, 0 = always the same")
    object_views: int = _flag(50, "renders per object of the embedded solids")
    limit: int = _flag(0, "use N images or objects of each split, a seeded class-balanced choice; 0 = all", flag_metavar="N")
    download: bool = _flag(True, "fetch STL-10 and CIFAR when absent")
    # The model, Sec. 4.2 and A.3
    method: str = _flag("seq-jepa", "what is trained", choices=("seq-jepa", *REGION_METHODS))
    encoder: str = _flag("resnet18", "f_theta: resnet18, in mode regions a vit", choices=("resnet18", *ENCODERS["dseq-jepa"]))
    width: int = _flag(64, "channels of the ResNet's first stage; z has 8 times as many")
    stem: str = _flag("auto", "cifar: 3x3; imagenet: 7x7 and pooling; strided: 3x3 with stride 2; auto: cifar up to 48 px, else imagenet",
                      choices=("auto", "cifar", "imagenet", "strided"))
    z_norm: bool = _flag(False, "BatchNorm without affine on z (ours, for short runs; see README)")
    action_dim: int = _flag(128, "E, width of an action embedding")
    agg_hidden: int = _flag(2048, "feed-forward width of the aggregator (PyTorch's default)")
    action_in: str = _flag("both", "which parts see the actions (Table 4)",
                           choices=("both", "predictor", "aggregator", "none"))
    action_embed: str = _flag("linear", "linear: learned; raw: the numbers themselves; noise: random numbers (Table 4)",
                              choices=("linear", "raw", "noise"))
    # DSeq-JEPA, Secs. 3.2, 0.A.1 (mode regions)
    regions: str = _flag("otsu", "otsu: the paper's rule; otsu-refill: threshold what is left again until there are enough; "
                         "random: blocks (Table 4)", choices=("otsu", "otsu-refill", "random"))
    region_count: int = _flag(5, "N, regions of an image, the rest included (Table 9)")
    order: str = _flag("discriminative", "in which regions are predicted (Table 5)",
                       choices=("discriminative", "random", "spatial", "truncated", "flat"))
    min_patches: int = _flag(0, "smaller regions are dropped; 0 = 10 of 14 x 14 patches or more, in proportion on smaller grids")
    proxy: str = _flag("cls", "where saliency comes from: cls, similarity to [CLS]; grad-cam (Eq. 8)", choices=("cls", "grad-cam"))
    saliency_block: int = _flag(0, "l, the block whose tokens give the saliency, from 1 up; 0 = 10 of 12, scaled to the encoder's depth")
    cls: bool = _flag(True, "a [CLS] token (Table 6)")
    predictor_width: int = _flag(0, "width of the region predictor; 0 = as I-JEPA for this encoder")
    predictor_depth: int = _flag(0, "its blocks; 0 = as I-JEPA for this encoder")
    crop_scale: float = _flag(0.3, "least area of a random resized crop, as a share of the image")
    # Optimisation, Sec. 4.2
    epochs: int = _flag(DEFAULT_EPOCHS, "passes over the data")
    batch_size: int = _flag(512, "sequences per step")
    lr: float = _flag(4e-4, "peak learning rate")
    lr_start: float = _flag(1e-5, "learning rate at the first step")
    lr_end: float = _flag(1e-5, "learning rate at the last step")
    weight_decay: float = _flag(1e-3, "AdamW; none on biases and norms")
    weight_decay_end: float = _flag(-1.0, "weight decay at the last step, on a cosine; -1 = constant")
    warmup_epochs: int = _flag(20, "linear warm-up")
    ema: float = _flag(0.996, "tau at the first step; rises to 1")
    ema_shape: str = _flag("cosine", "how it rises", choices=("cosine", "linear"))
    # The run
    workers: int = _flag(0, "threads that decode image files; 0 = one per core")
    resident: str = _flag("auto", "images on the device: yes, all; no, batch by batch, read ahead; auto: yes if they fit in half its free memory",
                          choices=("auto", "yes", "no"))
    keep_every: int = _flag(0, "keep the checkpoint of every K-th epoch as epoch-K.pt; 0 = none", flag_metavar="K")
    seed: int = _flag(0, "of weights, order and views; splits are the same for every seed")
    quick: bool = _flag(False, "a laptop-sized run: smaller encoder, images and data, minutes on a CPU")
    device: str = _flag("auto", "auto | cpu | cuda | mps")
    amp: bool = _flag(True, "bfloat16 autocast, on CUDA")
    compile: bool = _flag(None, "torch.compile; default: on CUDA only")
    probe_every: int = _flag(0, "online probes every K epochs; 0 = never", flag_metavar="K")
    out: str = _flag("runs", "folder of runs", flag_metavar="DIR")
    name: str = _flag("", "folder of this run inside --out; default: DATASET-MODE[-CONDITION]")
    resume: bool = _flag(False, "continue the run of this name exactly where it stopped; begin it if it has no checkpoint yet")

    @property
    def view_size(self):
        """Side of what the encoder sees, pixels."""
        return self.patch_size if self.mode == "saccade" else self.image_size

    @property
    def views_per_sample(self):
        """Images that the encoders see per sample."""
        return 1 if self.mode == "regions" else self.views + 1

    @property
    def run_dir(self):
        return Path(self.out) / self.name


def preset(dataset, mode, quick=False):
    """Settings of (data set, mode) that differ from Config's own defaults."""
    if (dataset, mode) not in PRESETS:
        known = sorted({m for d, m in PRESETS if d == dataset})
        raise BadInput(f"--mode {mode} does not apply to --dataset {dataset}; choose {' or '.join(known)}")
    values = dict(dataset=dataset, mode=mode, condition=MODES[mode].conditions[0]) | (REGIONS if mode == "regions" else {}) | PRESETS[dataset, mode]
    if quick:
        values |= QUICK | QUICK_MODE[mode] | (QUICK_SOLIDS[mode] if dataset == "solids" else {}) | dict(quick=True)
    return values


def parser(defaults):
    """One flag a field: `--image-size N`; booleans get `--x` and `--no-x`."""
    p = argparse.ArgumentParser(prog="train.py", description="Pre-train a seq-JEPA or DSeq-JEPA world model.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(Config):
        meta, flag = field.metadata, "--" + field.name.replace("_", "-")
        kwargs = dict(help=meta["help"], default=getattr(defaults, field.name))
        if field.type is bool or field.type == "bool":
            p.add_argument(flag, action=argparse.BooleanOptionalAction, **kwargs)
        else:
            metavar = meta.get("flag_metavar", {int: "N", float: "X"}.get(field.type, "S"))
            choices = meta.get("choices")
            p.add_argument(flag, type=field.type, choices=choices, metavar=None if choices else metavar, **kwargs)
    return p


def from_command_line(argv=None):
    """Config from flags: Config's defaults, then the preset, then --quick, then what was typed."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--dataset", default="stl10")
    first.add_argument("--mode", default="saccade")
    first.add_argument("--quick", action="store_true")
    chosen, _ = first.parse_known_args(argv)
    known = chosen.dataset in DATASETS and chosen.mode in MODES    # if not, the full parser says so
    defaults = Config(**preset(chosen.dataset, chosen.mode, chosen.quick)) if known else Config()
    return check(Config(**vars(parser(defaults).parse_args(argv))))


def check(config):
    """Refuse impossible settings before anything is loaded; fill in the run's name.

    Raises: BadInput, naming the flag, what was expected and what to do."""
    c = config
    if c.condition not in MODES[c.mode].conditions:
        raise BadInput(f"--condition {c.condition}: mode {c.mode} offers {', '.join(MODES[c.mode].conditions)}")
    if c.method not in MODES[c.mode].methods:
        raise BadInput(f"--method {c.method}: mode {c.mode} offers {', '.join(MODES[c.mode].methods)}")
    if c.encoder not in ENCODERS[c.method]:
        raise BadInput(f"--encoder {c.encoder}: method {c.method} offers {', '.join(ENCODERS[c.method])}")
    if c.mode == "regions":
        c = check_regions(c)
    at_least = dict(views=1, image_size=8, patch_size=4, width=1, action_dim=1, agg_hidden=1, epochs=1, batch_size=2, object_views=1,
                    limit=0, warmup_epochs=0, probe_every=0, keep_every=0, seed=0, workers=0)
    for field, low in at_least.items():
        if getattr(c, field) < low:
            raise BadInput(f"--{field.replace('_', '-')} {getattr(c, field)}: must be at least {low}")
    if c.mode == "saccade" and c.patch_size > c.image_size:
        raise BadInput(f"--patch-size {c.patch_size} is larger than the image ({c.image_size}); lower it or raise --image-size")
    if c.dataset == "solids" and c.mode == "rotation" and c.views + 1 > c.object_views:
        raise BadInput(f"--views {c.views}: a sequence needs {c.views + 1} distinct renders and an object has {c.object_views}; "
                       "lower --views or raise --object-views")
    if c.dataset == "3diebench" and c.views + 1 > 50:
        raise BadInput(f"--views {c.views}: 3DIEBench has 50 renders per object, so at most 49 views")
    if not (0 <= c.hue_range <= 1 and 0 <= c.rotation_range <= 3.1416):
        raise BadInput("--hue-range must be from 0 to 1, --rotation-range from 0 to pi (the embedded solids)")
    if not 0 <= c.ema <= 1:
        raise BadInput(f"--ema {c.ema}: expected a number from 0 to 1")
    if not (0 < c.lr < 1e3 and 0 <= c.lr_start < 1e3 and 0 <= c.lr_end < 1e3 and 0 <= c.weight_decay < 1e3 and -1 <= c.weight_decay_end < 1e3):        # refuses nan too
        raise BadInput("--lr must be above 0, --lr-start, --lr-end and --weight-decay at least 0, --weight-decay-end too or -1")
    if c.name and Path(c.name).name != c.name:
        raise BadInput(f"--name {c.name}: expected a plain folder name; use --out for the folder it goes in")
    quick = "quick-" if c.quick else ""
    suffix = "" if c.condition == MODES[c.mode].conditions[0] else f"-{c.condition}"
    suffix += "" if c.method == MODES[c.mode].methods[0] else f"-{c.method}"
    return dataclasses.replace(c, name=c.name or f"{quick}{c.dataset}-{c.mode}{suffix}")


def check_regions(c):
    """The settings of mode `regions`: refuses impossible ones, fills in the predictor's size."""
    if c.patch_size < 1 or c.image_size % c.patch_size or c.patch_size > c.image_size:
        raise BadInput(f"--image-size {c.image_size}: not a multiple of --patch-size {c.patch_size}; change one of them")
    if c.image_size // c.patch_size < 4:
        raise BadInput(f"--patch-size {c.patch_size}: gives {c.image_size // c.patch_size} patches a side, at least 4 are needed for regions; "
                       "lower it or raise --image-size")
    if not 2 <= c.region_count <= 9:
        raise BadInput(f"--region-count {c.region_count}: expected 2, one to see and one to predict, to 9")
    P = (c.image_size // c.patch_size) ** 2
    if not 0 <= c.min_patches <= int(0.15 * P):
        raise BadInput(f"--min-patches {c.min_patches}: random blocks of {P} patches have as few as {int(0.15 * P)}; lower it")
    depth = VITS[c.encoder][1]
    if not 0 <= c.saliency_block <= depth:
        raise BadInput(f"--saliency-block {c.saliency_block}: {c.encoder} has blocks 1 to {depth}; 0 = the default")
    if "dseq" in c.method and not c.cls and c.proxy == "cls" and c.regions != "random":
        raise BadInput("--no-cls: regions come from [CLS]; add --proxy grad-cam or --regions random")
    if not 0 < c.crop_scale <= 1:
        raise BadInput(f"--crop-scale {c.crop_scale}: expected a share of the image, above 0 and at most 1")
    width, depth = PREDICTORS[c.encoder]
    c = dataclasses.replace(c, predictor_width=c.predictor_width or width, predictor_depth=c.predictor_depth or depth,
                            min_patches=c.min_patches or max(2, min(10, round(10 * P / 196))))
    if c.predictor_width % 32 or min(c.predictor_width, c.predictor_depth) < 1:
        raise BadInput(f"--predictor-width {c.predictor_width}: expected a multiple of 32, and --predictor-depth at least 1")
    return c
