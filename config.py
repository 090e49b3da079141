"""All settings of a run: one frozen dataclass, one table of presets, one table of modes.

The flags of `train.py` are the fields of `Config`. A flag the user leaves out takes the paper's
value for the chosen data set and mode from `PRESETS`; `--quick` then shrinks it to laptop size.
`python train.py --dataset D --mode m --help` shows the values that would be used.

Sections are those of the seq-JEPA paper; in mode `regions`, those of the DSeq-JEPA paper, whose
numbers lost from its text are I-JEPA's. Checked in tests/test_config.py.
"""
import dataclasses
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from augmentations import Augmentations
from encoder import VITS
from images import INVARIANT_METHODS, PAIR_METHODS
from plumbing import flags
from plumbing.errors import BadInput
from plumbing.flags import flag
from regions import Crops
from rotations import Rotations
from saccades import Saccades
from sources.solids import MATERIALS

# --mode: what a view and an action are.  images.Views says what a class needs to stand here.
MODES = {"saccade": Saccades, "rotation": Rotations, "augment": Augmentations, "regions": Crops}

DATASETS = ("stl10", "cifar10", "cifar100", "tiny-imagenet", "3diebench", "imagenet", "folder",
            "solids", "clevr-count", "clevr-distance", "cub", "cars", "inat21")

# --method, and the encoders it can train.
BASELINES = (*PAIR_METHODS, "conv-jepa")
SEQ_METHODS = ("seq-jepa", *BASELINES)
NEEDS_ACTION = ("sie",)                     # predicts nothing where it is told nothing
REGION_METHODS = ("dseq-jepa", "i-jepa", "c-jepa", "dseq-c-jepa")
ENCODERS = dict.fromkeys(SEQ_METHODS, ("resnet18",)) | dict.fromkeys(REGION_METHODS, tuple(VITS))

DEFAULT_EPOCHS = 2000                       # Sec. 4.2
EPOCHS_3DIEBENCH = 1000
VIT_BASE_224 = dict(image_size=224, patch_size=16, encoder="vit-base")          # 0.A.1.2
VIT_SMALL_64 = dict(image_size=64, patch_size=8, encoder="vit-small")           # ours
VIT_SMALL_32 = dict(image_size=32, patch_size=4, encoder="vit-small")

# (data set, mode) -> what differs from the defaults of Config.  In words: docs/experiments.md
PRESETS = {
    ("stl10", "saccade"): dict(image_size=96, patch_size=32, views=4),          # Sec. 2.3, Table 3
    ("imagenet", "saccade"): dict(image_size=224, patch_size=84, views=4),      # B.6
    ("folder", "saccade"): dict(image_size=96, patch_size=32, views=4),         # as STL-10
    ("tiny-imagenet", "saccade"): dict(image_size=64, patch_size=24, views=4),  # a ninth, to 8 px
    ("cifar10", "saccade"): dict(image_size=32, patch_size=12, views=4),
    ("cifar100", "saccade"): dict(image_size=32, patch_size=12, views=4),
    ("solids", "saccade"): dict(image_size=96, patch_size=32, views=4),
    ("3diebench", "saccade"): dict(image_size=128, patch_size=40, views=4),
    ("3diebench", "rotation"): dict(image_size=128, views=3, epochs=EPOCHS_3DIEBENCH),  # Table 1
    ("solids", "rotation"): dict(image_size=64, views=3, epochs=EPOCHS_3DIEBENCH),      # half size
    ("cifar100", "augment"): dict(image_size=32, views=2),                      # Table 2
    ("cifar10", "augment"): dict(image_size=32, views=2),
    ("tiny-imagenet", "augment"): dict(image_size=64, views=2),                 # Table 2
    ("stl10", "augment"): dict(image_size=96, views=2),
    ("imagenet", "augment"): dict(image_size=224, views=2),
    ("folder", "augment"): dict(image_size=64, views=2),                        # as Tiny ImageNet
    ("solids", "augment"): dict(image_size=64, views=2),
    ("imagenet", "regions"): VIT_BASE_224,
    ("folder", "regions"): VIT_BASE_224,
    ("clevr-count", "regions"): VIT_BASE_224,
    ("clevr-distance", "regions"): VIT_BASE_224,
    ("cub", "regions"): VIT_BASE_224,                       # these three: to probe on, Table 1
    ("cars", "regions"): VIT_BASE_224,
    ("inat21", "regions"): VIT_BASE_224,
    ("stl10", "regions"): dict(image_size=96, patch_size=8, encoder="vit-small"),
    ("tiny-imagenet", "regions"): VIT_SMALL_64,
    ("solids", "regions"): VIT_SMALL_64,
    ("cifar10", "regions"): VIT_SMALL_32,
    ("cifar100", "regions"): VIT_SMALL_32,
    ("3diebench", "regions"): dict(image_size=128, patch_size=8, encoder="vit-small"),
}
# Mode `regions` in general.  0.A.1.2; what is lost there is I-JEPA's
REGIONS = dict(epochs=600, batch_size=2048, lr=1e-3, lr_start=2e-4, lr_end=1e-6, warmup_epochs=15,
               weight_decay=0.04, weight_decay_end=0.4, ema=0.996, ema_shape="linear",
               max_region=0.2)
# --recipe -> what differs from that.  "authors": in the settings that come with the authors' code,
# which are of ViT-B/16 and count blocks from 0.  For the rest they agree.
RECIPES = {
    "paper": {},
    "authors": dict(recipe="authors", lr=8e-4, lr_end=1e-4, predictor_width=768,
                    saliency_block=11),
}
# --projector of a baseline -> what differs from the defaults of Config.  Sec. 4.2.  With an MLP:
# Adam, which AdamW is where nothing decays, at a constant rate
PROJECTORS = {
    "mlp": dict(projector="mlp", lr=1e-3, lr_start=1e-3, lr_end=1e-3, warmup_epochs=0,
                weight_decay=0.0),
    "transformer": dict(projector="transformer"),
}
# The predictor's width and blocks for each encoder.  0.A.1.1: as I-JEPA; half as wide as the two
# small encoders
PREDICTORS = {"vit-nano": (64, 3), "vit-tiny": (96, 6), "vit-small": (192, 6), "vit-base": (384, 6),
              "vit-large": (384, 12), "vit-huge": (384, 12)}

# --quick: minutes on two CPU cores.  Chosen by measurement, see results/README.md.
QUICK = dict(epochs=8, width=16, stem="strided", batch_size=64, lr=1e-3, warmup_epochs=1, ema=0.99,
             z_norm=True, action_dim=32, agg_hidden=512, limit=10_000)
QUICK_MODE = {
    "saccade": dict(image_size=48, patch_size=16, epochs=8),
    "rotation": dict(image_size=48, stem="imagenet", epochs=36),
    "augment": dict(image_size=32, epochs=4),
    "regions": dict(image_size=64, patch_size=8, encoder="vit-nano", epochs=8, warmup_epochs=1,
                    lr_start=1e-4, lr_end=1e-5),
}
# Embedded solids: fewer renders, and less that varies between them than in 3DIEBench, so that
# minutes suffice to learn something.
QUICK_SOLIDS = {
    "saccade": dict(limit=4000, object_views=2, rotation_range=0.4, hue_range=0.0, material="plain",
                    image_size=72, patch_size=24, inside=True, epochs=20),
    "rotation": dict(limit=4800, object_views=8, rotation_range=0.7853982, hue_range=0.0,
                     material="plain", image_size=32, stem="strided", epochs=30),
    "augment": dict(limit=4000, object_views=2, rotation_range=0.4),
    "regions": dict(limit=4000, object_views=2),
}

# Upper bounds of flags lie far above what the papers do and what trains within a lifetime: a slip
# of the finger is refused before anything is read, rendered or built.
MOST_PIXELS = 4096              # side of an image: 50 MB each
MOST_EPOCHS = 1_000_000
MOST_IMAGES = 1_000_000_000
LONGEST_NAME = 200              # bytes; file systems take 255
MOST_PATCHES = 128              # a side of a ViT's grid, attention then has 16,384 tokens

# Under which settings a flag is read; of modes, the classes themselves say it (`reads`).
SEQ = dict(method=SEQ_METHODS)
SEQ_JEPA = dict(method=("seq-jepa",))
BASELINE = dict(method=BASELINES)
EMBEDDED = dict(method=("seq-jepa", "sen", "equimod", "cond-byol", "conv-jepa"))
EMA = dict(method=("seq-jepa", "byol", "cond-byol", "conv-jepa", *REGION_METHODS))
VIT = dict(method=REGION_METHODS)
DSEQ = dict(method=("dseq-jepa", "dseq-c-jepa"))
SALIENT = DSEQ | dict(regions=("otsu", "otsu-refill"))      # regions come from saliency
# Where parts of a batch add up to the batch: no BatchNorm, no statistics of a batch in the loss.
ADDITIVE = dict(method=("dseq-jepa", "i-jepa"))
SOLIDS = dict(dataset=("solids",))
FETCHED = dict(dataset=("stl10", "cifar10", "cifar100"))
FILES = dict(dataset=("tiny-imagenet", "3diebench", "imagenet", "folder", "clevr-count",
                      "clevr-distance", "cub", "cars", "inat21"))


@dataclass(frozen=True)
class Config:
    """Settings of one run; stored in `config.json` and in every checkpoint."""
    dataset: str = flag("stl10", "which images", choices=DATASETS, section="What is seen")
    mode: str = flag("saccade", "what a view and an action are", choices=MODES)
    condition: str = flag("position", "actions the model is told; the rest are only probed")
    views: int = flag(4, "M, observed views of a training sequence; view M+1 is predicted",
                      low=1, high=100, metavar="M", of=SEQ)
    data_dir: str = flag("data", "where the data is, or is put", metavar="DIR")
    image_size: int = flag(96, "side of the stored image, pixels", low=8, high=MOST_PIXELS)
    patch_size: int = flag(32, "side of a foveal patch or of a ViT's patch, pixels", low=4,
                           high=MOST_PIXELS)
    saliency: str = flag("signature",
                         "signature | uniform | deepgaze | a folder of saliency_SPLIT.npy")
    ior: bool = flag(True, "inhibition of return")
    inside: bool = flag(False, "fixate only where the whole patch lies inside the image (ours)")
    rotation_range: float = flag(1.5707964, "largest rotation angle, radians",
                                 low=0, high=3.1416, of=SOLIDS)
    hue_range: float = flag(1.0, "spread of floor and light hues: 1 = any hue, 0 = always the same",
                            low=0, high=1, of=SOLIDS)
    material: str = flag("free", "of solids; free: colours of its own for each object, which say "
                                 "nothing of its class; plain: the same for all", of=SOLIDS,
                         choices=MATERIALS)
    object_views: int = flag(50, "renders per object", low=1, high=1000, of=SOLIDS)
    limit: int = flag(0, "use N images or objects of each split, a seeded class-balanced choice; "
                         "0 = all", low=0, high=MOST_IMAGES)
    download: bool = flag(True, "fetch the data when absent", of=FETCHED)

    method: str = flag("seq-jepa", "what is trained", choices=SEQ_METHODS + REGION_METHODS,
                       section="The model (seq-JEPA Secs. 4.2, A.3)")
    encoder: str = flag("resnet18", "f_theta: resnet18, in mode regions a vit",
                        choices=("resnet18", *VITS))
    width: int = flag(64, "channels of the ResNet's first stage; z has 8 times as many",
                      low=1, high=1024, of=SEQ)
    stem: str = flag("auto", "cifar: 3x3; imagenet: 7x7 and pooling; strided: 3x3 with stride 2; "
                             "auto: cifar up to 48 px, else imagenet",
                     choices=("auto", "cifar", "imagenet", "strided"), of=SEQ)
    z_norm: bool = flag(False, "BatchNorm without affine on z (ours, for short runs; see "
                               "docs/experiments.md)", of=SEQ)
    action_dim: int = flag(128, "E, width of an action embedding", low=1, high=8192, of=EMBEDDED)
    projector: str = flag("transformer", "of the baselines (Sec. 4.2), each with its own "
                                         "optimisation; seq-JEPA has its aggregator there",
                          choices=tuple(PROJECTORS), of=BASELINE)
    agg_hidden: int = flag(2048, "feed-forward width of the aggregator (PyTorch's default)",
                           low=1, high=65_536, of=SEQ | dict(projector=("transformer",)))
    action_in: str = flag("both", "which parts see the actions (Table 4)",
                          choices=("both", "predictor", "aggregator", "none"), of=SEQ_JEPA)
    action_embed: str = flag("linear", "linear: learned; raw: the numbers themselves; "
                                       "noise: random numbers (Table 4)",
                             choices=("linear", "raw", "noise"), of=SEQ_JEPA)

    regions: str = flag("otsu-refill", "otsu: one threshold, the paper's words; otsu-refill: "
                                       "threshold what is left again, until there are enough; "
                                       "random: blocks (Table 4)",
                        choices=("otsu", "otsu-refill", "random"), of=DSEQ,
                        section="DSeq-JEPA and its relatives (Secs. 3.2, 0.A.1), mode regions")
    region_count: int = flag(5, "N, regions of an image, the rest included (Table 9)")
    order: str = flag("discriminative", "in which regions are predicted (Table 5)",
                      choices=("discriminative", "random", "spatial", "inverse", "truncated",
                                "flat"), of=DSEQ)
    min_patches: int = flag(0, "smaller regions are dropped; 0 = 10 of 14 x 14 patches or more, "
                               "in proportion on smaller grids")
    max_region: float = flag(1.0, "a region's largest share of the image: larger ones are cut, "
                                  "most salient patches first; 1 = no bound",
                             low=0, above=True, high=1, of=SALIENT)
    proxy: str = flag("cls", "source of saliency: cls, similarity to [CLS]; grad-cam (Eq. 8)",
                      choices=("cls", "grad-cam"), of=SALIENT)
    polarity: str = flag("paper", "sign of saliency; paper: as it comes; border: the one by which "
                                  "the border is less salient (ours)",
                         choices=("paper", "border"), of=SALIENT | dict(proxy=("cls",)))
    saliency_block: int = flag(0, "l, the block whose tokens give the saliency, from 1 up; "
                                  "0 = 10 of 12, scaled to the encoder's depth",
                              of=SALIENT | dict(proxy=("cls",)))
    cls: bool = flag(None, "a [CLS] token (Table 6); None: of dseq-jepa and dseq-c-jepa, whose "
                           "saliency comes from it", of=VIT)
    predictor_width: int = flag(0, "width of the region predictor; 0 = as I-JEPA for this encoder",
                                low=0, high=8192, of=VIT)
    predictor_depth: int = flag(0, "its blocks; 0 = as I-JEPA for this encoder",
                                low=0, high=100, of=VIT)
    crop_scale: float = flag(0.3, "least area of a random resized crop, as a share of the image",
                             low=0, above=True, high=1)

    epochs: int = flag(DEFAULT_EPOCHS, "passes over the data", low=1, high=MOST_EPOCHS,
                       section="Optimisation (Sec. 4.2)")
    recipe: str = flag("paper", "whose numbers are the defaults of mode regions: the paper's, with "
                                "I-JEPA's where they are lost; or those of the authors' settings",
                       choices=tuple(RECIPES), of=VIT | dict(encoder=("vit-base",)))
    batch_size: int = flag(512, "sequences per step", low=2, high=1_000_000)
    accumulate: int = flag(1, "a step goes through the model in K parts, whose gradients add up to "
                              "those of the batch: less memory", low=1, high=1_000_000,
                           metavar="K", of=ADDITIVE)
    lr: float = flag(4e-4, "peak learning rate", low=0, above=True, high=1000)
    lr_start: float = flag(1e-5, "learning rate at the first step", low=0, high=1000)
    lr_end: float = flag(1e-5, "learning rate at the last step", low=0, high=1000)
    weight_decay: float = flag(1e-3, "AdamW; none on biases and norms", low=0, high=1000)
    weight_decay_end: float = flag(-1.0, "decay at the last step, on a cosine; -1 = constant",
                                   low=-1, high=1000)
    warmup_epochs: int = flag(20, "linear warm-up", low=0, high=MOST_EPOCHS)
    ema: float = flag(0.996, "tau at the first step; rises to 1", low=0, high=1, of=EMA)
    ema_shape: str = flag("cosine", "how it rises", choices=("cosine", "linear"), of=EMA)

    workers: int = flag(0, "threads that decode image files; 0 = one per core", low=0, high=1024,
                        of=FILES, section="The run")
    resident: str = flag("auto", "images on the device: yes, all; no, batch by batch, read ahead; "
                                 "auto: yes if they fit in half its free memory",
                         choices=("auto", "yes", "no"))
    keep_every: int = flag(0, "keep the checkpoint of every K-th epoch as epoch-K.pt; 0 = none",
                           low=0, high=MOST_EPOCHS, metavar="K")
    seed: int = flag(0, "of weights, order and views; splits are the same for every seed", low=0,
                     high=2**64 - 1)
    quick: bool = flag(False, "a laptop-sized run: smaller encoder, images and data")
    device: str = flag("auto", "auto | cpu | cuda | mps")
    amp: bool = flag(True, "bfloat16 autocast, on CUDA")
    compile: bool = flag(None, "torch.compile; None: on CUDA only")
    probe_every: int = flag(0, "online probes every K epochs; 0 = never",
                            low=0, high=MOST_EPOCHS, metavar="K")
    out: str = flag("runs", "folder of runs", metavar="DIR")
    name: str = flag("", "folder of this run inside --out; '': DATASET-MODE[-CONDITION]")
    resume: bool = flag(False, "continue the run of this name exactly where it stopped; begin it "
                               "if it has no checkpoint yet")

    @property
    def view_size(self):
        """Side of what the encoder sees, pixels."""
        return self.patch_size if self.mode == "saccade" else self.image_size

    @property
    def max_patches(self):
        """The most patches that a region may have, in mode regions; None: any number."""
        if not 0 < self.max_region < 1:             # what makes no sense is refused elsewhere
            return None
        patches = (self.image_size // self.patch_size) ** 2
        return int(self.max_region * patches + 1e-9)        # 0.29 * 100 is 28.999...

    @property
    def views_per_sample(self):
        """Images that the encoders see per sample."""
        return 1 if self.mode == "regions" else self.views + 1

    @property
    def aggregates(self):
        """Whether the model gathers several views into z_agg, for probes and figures to look at."""
        return self.method == "seq-jepa"

    def reads(self, field):
        """Whether a run with these settings reads this one of them."""
        wanted = readers(field).items()
        return all(getattr(self, setting) in values for setting, values in wanted)

    @property
    def run_dir(self):
        return Path(self.out) / self.name


# ---------------------------------------------------------------- from flags to a Config

def preset(dataset, mode, quick=False, method=None, projector="mlp", recipe="paper"):
    """Settings of (data set, mode) that differ from Config's own defaults.

    method: None takes the mode's first.  projector: of the baselines.  recipe: of mode regions."""
    if mode not in {m for _, m in PRESETS}:
        raise BadInput(f"mode {mode} has no row in config.PRESETS; add one for each data set")
    if (dataset, mode) not in PRESETS:
        known = sorted({m for d, m in PRESETS if d == dataset})
        raise BadInput(f"--mode {mode} does not apply to --dataset {dataset}; "
                       f"choose {' or '.join(known)}")
    method = method or MODES[mode].methods[0]
    values = dict(dataset=dataset, mode=mode, method=method,
                  condition=default_condition(mode, method))
    if mode == "regions":
        values |= REGIONS | RECIPES.get(recipe, {})         # if there is none, the parser says so
    values |= PRESETS[dataset, mode]
    if method in BASELINES:
        values |= PROJECTORS.get(projector, {})
    if method in PAIR_METHODS:
        values["views"] = 1
    if quick:
        values |= QUICK | QUICK_MODE.get(mode, {}) | dict(quick=True)
    if quick and dataset == "solids":
        values |= QUICK_SOLIDS.get(mode, dict(limit=4000, object_views=2))
    return values


def from_command_line(argv=None):
    """Config from flags: Config's defaults, then the preset, then --quick, then what was typed."""
    first = flags.Parser(add_help=False)
    first.add_argument("--dataset", default="stl10")
    first.add_argument("--mode", default="saccade")
    first.add_argument("--method")
    first.add_argument("--projector", default="mlp")
    first.add_argument("--recipe", default="paper")
    first.add_argument("--quick", action="store_true")
    chosen, _ = first.parse_known_args(argv)
    values = {}
    if chosen.dataset in DATASETS and chosen.mode in MODES:     # if not, the full parser says so
        values = preset(chosen.dataset, chosen.mode, chosen.quick, chosen.method, chosen.projector,
                        chosen.recipe)
    about = ("Pre-train a seq-JEPA or DSeq-JEPA world model, or a baseline. The defaults shown are "
             "those of the --dataset, --mode, --method, --projector, --recipe and --quick that are "
             "typed with --help.")
    if values:
        mode = MODES[chosen.mode]
        about += (f" Mode {chosen.mode} offers --condition {', '.join(mode.conditions)} and "
                  f"--method {', '.join(mode.methods)}.")
    parser = flags.parser(Config(**values), readers, prog="train.py", description=about,
                          usage="python train.py [--dataset NAME] [--mode NAME] [OPTION ...]")
    typed = vars(parser.parse_args(argv))
    config = check(Config(**values | typed))
    flags.refuse_ignored(typed, config, readers)
    if config.regions == "random" and config.order in ("random", "inverse"):
        raise BadInput(f"--order {config.order}: random blocks come in random order anyway; leave "
                       "it out with --regions random")
    if config.regions == "otsu" and typed.keys() & {"region_count", "order"}:
        print("note: with --regions otsu few images have all their regions (without --max-region "
              "most have one), so that --region-count and --order hardly matter; otsu-refill "
              "finds more")
    return config


def config_of(checkpoint, **changes):
    """The Config stored in a checkpoint, with `changes`.

    Raises: BadInput if it has settings that this code does not know, or no flag gives."""
    try:
        stored = flags.restored(Config, checkpoint["config"])
    except BadInput as error:
        raise BadInput(f"the checkpoint has {error}") from None
    return dataclasses.replace(stored, **changes)


def readers(field):
    """Settings under which a field of Config is read, {"mode": (...)} for example; {} = always."""
    modes = tuple(mode for mode, views in MODES.items() if field in views.reads)
    of_mode = dict(mode=modes) if modes else {}
    return of_mode | Config.__dataclass_fields__[field].metadata["of"]


def check(config):
    """Refuse impossible settings before anything is loaded; fill in what follows from others.

    Raises: BadInput, naming the flag, what was expected and what to do."""
    check_mode(config)
    check_told(config)
    if config.mode == "regions":
        config = check_regions(config)
    flags.check_bounds(config)
    check_views(config)
    check_paths(config)
    return dataclasses.replace(config, name=config.name or default_name(config))


def check_paths(c):
    """Names can be shown and written, and the run lies in --out, in a folder of its own."""
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if field.type is str and any(unicodedata.category(x) in ("Cc", "Cs") for x in value):
            raise BadInput(f"{flags.name_of(field.name)} {value!r}: has control characters or is "
                           "no UTF-8; give it another name")
    for name in ("data_dir", "out"):
        if not getattr(c, name):
            raise BadInput(f"{flags.name_of(name)} '': expected a folder; . is the present one")
    if c.name and (Path(c.name).name != c.name or c.name == ".."):
        raise BadInput(f"--name {c.name}: expected a plain folder name; "
                       "use --out for the folder it goes in")
    if len(c.name.encode()) > LONGEST_NAME:
        raise BadInput(f"--name {c.name:.20}...: {len(c.name.encode())} bytes long, expected at "
                       f"most {LONGEST_NAME}; choose a shorter one")


def check_mode(c):
    """The mode is whole, and offers the condition, the method and the encoder."""
    views = MODES[c.mode]
    missing = [member for member in ("__call__", "to_views") if member not in dir(views)]
    if missing:
        raise BadInput(f"mode {c.mode}: {views.__name__} lacks {missing[0]}; "
                       "images.Views says what a mode needs")
    if c.condition not in views.conditions:
        raise BadInput(f"--condition {c.condition}: mode {c.mode} offers "
                       f"{', '.join(views.conditions)}")
    if c.method not in views.methods:
        raise BadInput(f"--method {c.method}: mode {c.mode} offers {', '.join(views.methods)}")
    if c.encoder not in ENCODERS[c.method]:
        raise BadInput(f"--encoder {c.encoder}: method {c.method} offers "
                       f"{', '.join(ENCODERS[c.method])}")


def check_told(c):
    """A method is told what it can use, and given as many views."""
    if c.method in INVARIANT_METHODS and c.condition != "none":
        raise BadInput(f"--condition {c.condition}: method {c.method} is told no action; "
                       "leave it out")
    if c.method in NEEDS_ACTION and c.condition == "none":
        told = [condition for condition in MODES[c.mode].conditions if condition != "none"]
        raise BadInput(f"--condition none: method {c.method} predicts by the action alone; "
                       f"choose from {', '.join(told)}")
    if c.method in PAIR_METHODS and c.views != 1:
        raise BadInput(f"--views {c.views}: method {c.method} learns from pairs of views, M = 1; "
                       "leave it out")


def check_views(c):
    """A patch fits the image, and an object has renders enough for a sequence."""
    if c.mode == "saccade" and c.patch_size > c.image_size:
        raise BadInput(f"--patch-size {c.patch_size} is larger than the image ({c.image_size}); "
                       "lower it or raise --image-size")
    needed = max(2, c.views) + 1                        # probes look at two views and the next
    if c.dataset == "solids" and c.mode == "rotation" and needed > c.object_views:
        raise BadInput(f"--views {c.views}: a sequence needs {needed} distinct renders and an "
                       f"object has {c.object_views}; lower --views or raise --object-views")
    if c.dataset == "3diebench" and c.views + 1 > 50:
        raise BadInput(f"--views {c.views}: 3DIEBench has 50 renders per object, "
                       "so at most 49 views")


def check_regions(c):
    """The settings of mode `regions`: refuses impossible ones, fills in the predictor's size."""
    check_grid(c)
    if c.cls is None:
        c = dataclasses.replace(c, cls="dseq" in c.method)
    depth = VITS[c.encoder][1]
    if c.saliency_block > depth and c.saliency_block == RECIPES[c.recipe].get("saliency_block"):
        raise BadInput(f"--recipe {c.recipe}: is of vit-base, and the encoder is {c.encoder}; "
                       "leave it out, or add --encoder vit-base")
    if not 0 <= c.saliency_block <= depth:
        raise BadInput(f"--saliency-block {c.saliency_block}: {c.encoder} has blocks 1 to {depth}; "
                       "0 = the default")
    if "dseq" in c.method and not c.cls and c.proxy == "cls" and c.regions != "random":
        raise BadInput("--no-cls: regions come from [CLS]; "
                       "add --proxy grad-cam or --regions random")
    P = (c.image_size // c.patch_size) ** 2
    width, depth = PREDICTORS[c.encoder]
    c = dataclasses.replace(c, predictor_width=c.predictor_width or width,
                            predictor_depth=c.predictor_depth or depth,
                            min_patches=c.min_patches or max(2, min(10, round(10 * P / 196))))
    if c.predictor_width % 32 or min(c.predictor_width, c.predictor_depth) < 1:
        raise BadInput(f"--predictor-width {c.predictor_width}: expected a multiple of 32, "
                       "and --predictor-depth at least 1")
    if c.max_patches is not None and c.max_patches < c.min_patches:
        raise BadInput(f"--max-region {c.max_region:g}: of {P} patches that is {c.max_patches}, "
                       f"and --min-patches is {c.min_patches}; raise the one or lower the other")
    return c


def check_grid(c):
    """The grid of patches is whole and large enough for the regions asked for."""
    if c.patch_size < 1 or c.image_size % c.patch_size or c.patch_size > c.image_size:
        raise BadInput(f"--image-size {c.image_size}: not a multiple of --patch-size "
                       f"{c.patch_size}; change one of them")
    side = c.image_size // c.patch_size
    if side < 4:
        raise BadInput(f"--patch-size {c.patch_size}: gives {side} patches a side, at least 4 are "
                       "needed for regions; lower it or raise --image-size")
    if side > MOST_PATCHES:
        raise BadInput(f"--patch-size {c.patch_size}: gives {side:,} patches a side, at most "
                       f"{MOST_PATCHES} can be attended to; raise it or lower --image-size")
    if not 2 <= c.region_count <= 9:
        raise BadInput(f"--region-count {c.region_count}: expected 2, one to see and one to "
                       "predict, to 9")
    smallest = int(0.15 * side ** 2)
    if not 0 <= c.min_patches <= smallest:
        raise BadInput(f"--min-patches {c.min_patches}: random blocks of {side ** 2} patches have "
                       f"as few as {smallest}; lower it")


def default_name(c):
    """DATASET-MODE, and what is not the default of the mode."""
    parts = ["quick"] if c.quick else []
    parts += [c.dataset, c.mode]
    if c.condition != default_condition(c.mode, c.method):
        parts.append(c.condition)
    if c.method != MODES[c.mode].methods[0]:
        parts.append(c.method)
    if c.method in BASELINES and c.projector != "mlp":
        parts.append(c.projector)
    if c.recipe != "paper":
        parts.append(c.recipe)
    return "-".join(parts)


def default_condition(mode, method):
    """What a method is told unless --condition says otherwise."""
    return "none" if method in INVARIANT_METHODS else MODES[mode].conditions[0]
