"""From a Config to the objects of a run. This is the only place where a mode or a method is chosen.

    views = build_views(config, "train", device)     index (B,), M  ->  Batch
    model = build_model(config, views.groups)        Batch          ->  Output

A mode is an object with
    __call__(index, M) -> Batch     sample M+1 views of each sample, on the device
    clean(index)                    image that z is probed on for classification; None: the first view
    to_views(pixels, ...)           the work on pixels, without randomness: what train.py compiles
    relative(first, last)           action between views with these params, however far apart
    __len__, classes                samples; class names
    groups, param_groups            {name: slice} of the columns of Batch.actions and Batch.params
"""
import numpy as np
import torch

from aggregator import Aggregator
from augmentations import Augmentations
from config import BadInput
from crops import Crops
from datasets import load
from dseq_jepa import VICREG_WEIGHT, Discriminative, MultiBlock, RegionJEPA
from encoder import ResNet18, ViT
from jepa import ActionEmbedding, SeqJEPA
from predictor import Predictor, RegionPredictor
from rotations import Rotations
from saccades import Saccades

MODES = {"augment": Augmentations, "rotation": Rotations, "saccade": Saccades, "regions": Crops}


def build_views(config, split, device):
    """The mode's view sampler over one split ("pretrain", "train" or "val")."""
    return MODES[config.mode](load(config, split), config, device)


def build_model(config, groups):
    """Untrained model; the same config gives the same weights.  groups: the mode's action columns."""
    seed_all(config.seed)
    return METHODS[config.method](config, groups)


def build_seq_jepa(config, groups):
    """seq-JEPA: ResNet-18, action embedding, aggregator, MLP predictor."""
    encoder = ResNet18(width=config.width, stem=stem(config), z_norm=config.z_norm)
    embed = ActionEmbedding(conditioned(config.condition, groups), config.action_dim, config.action_embed)
    if (encoder.dim + embed.dim) % 4:
        raise BadInput(f"--action-dim {config.action_dim}: 8 * width + action-dim must be a multiple of the 4 attention heads")
    aggregator = Aggregator(dim=encoder.dim, action_dim=embed.dim, hidden=config.agg_hidden)
    predictor = Predictor(dim=encoder.dim, action_dim=embed.dim)
    return SeqJEPA(encoder, embed, aggregator, predictor, config.action_in)


def build_region_jepa(config, groups):
    """DSeq-JEPA and its relatives: ViT, narrow ViT as predictor, a plan of who predicts whom."""
    encoder = ViT(config.encoder, image_size=config.image_size, patch_size=config.patch_size, cls=config.cls)
    block = config.saliency_block or round(encoder.depth * 10 / 12)             # Sec. 3.2: block 10 of ViT-B's 12
    predictor = RegionPredictor(dim=encoder.dim, width=config.predictor_width, depth=config.predictor_depth, grid=encoder.grid)
    plan = Discriminative(N=config.region_count, source=config.regions, order=config.order, proxy=config.proxy,
                          min_patches=config.min_patches) if "dseq" in config.method else MultiBlock()
    return RegionJEPA(encoder, predictor, plan, block, vicreg=VICREG_WEIGHT if "c-jepa" in config.method else 0.0)


METHODS = {"seq-jepa": build_seq_jepa, "dseq-jepa": build_region_jepa, "i-jepa": build_region_jepa, "c-jepa": build_region_jepa,
           "dseq-c-jepa": build_region_jepa}


def conditioned(condition, groups):
    """Columns of the action that the model is told.  "none" -> [], "all" -> every one, "a+b" -> those of a and b."""
    names = {"none": [], "all": list(groups)}.get(condition, condition.split("+"))
    return [i for name in names for i in range(groups[name].start, groups[name].stop)]


def stem(config):
    """Sec. 4.2: the CIFAR stem for 32-pixel images and patches, the standard one for larger views (48 px is our line)."""
    if config.stem != "auto":
        return config.stem
    return "cifar" if config.view_size <= 48 else "imagenet"


def pick_device(name):
    """torch.device for --device; auto takes CUDA, then MPS, then the CPU."""
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name.split(":")[0], False):
        raise BadInput(f"--device {name}: not available here; use auto, cpu, cuda or mps")
    if name.startswith("cuda:") and not (name[5:].isdigit() and int(name[5:]) < torch.cuda.device_count()):
        raise BadInput(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return torch.device(name)


def seed_all(*where):
    """Seed every generator from integers such as (seed, epoch, step): the owner of all randomness."""
    torch.manual_seed(int(np.random.SeedSequence(where).generate_state(1, np.uint64)[0]))
