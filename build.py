"""From a Config to the objects of a run. The only place where a mode or a method is chosen.

    views = build_views(config, "train", device)     index (B,), M  ->  Batch       images.Views
    model = build_model(config, views.groups)        Batch          ->  Output      jepa.Output

And, for evaluate.py --weights, from a file of others to a Config and what fills such a model:
`outside_model`, checked in tests/test_weights.py.
"""
from functools import partial

import torch

import baselines
import config as settings
import saliency
from aggregator import Aggregator
from config import MODES
from datasets import load, part_names
from dseq_jepa import VICREG_WEIGHT, Discriminative, MultiBlock, RegionJEPA
from encoder import VITS, ResNet18, ViT
from jepa import ActionEmbedding, SeqJEPA
from plumbing import flags
from plumbing.device import seed_all
from plumbing.errors import BadInput
from predictor import Predictor, RegionPredictor
from regions import PictureCrops
from sources import weights


def build_views(config, split, device):
    """The mode's view sampler over one split ("pretrain", "train" or "val")."""
    mode = MODES[config.mode]
    if "saliency" in mode.reads:
        saliency.check(config, part_names(config, split))
    return views_of(load(config, split), config, device)


def views_of(split, config, device):
    """The mode's view sampler over an images.Split."""
    if split.parts[0].sizes is not None:                    # whole pictures: of mode regions alone
        return PictureCrops(split, config, device)
    return MODES[config.mode](split, config, device)


def build_model(config, groups):
    """Untrained model; the same config gives the same weights.

    groups: {name: slice} of the columns of the mode's actions."""
    seed_all(config.seed)
    return METHODS[config.method](config, groups)


def build_seq_jepa(config, groups):
    """seq-JEPA: ResNet-18, action embedding, aggregator, MLP predictor."""
    encoder = ResNet18(width=config.width, stem=stem(config), z_norm=config.z_norm)
    columns = conditioned(config.condition, groups)
    embed = ActionEmbedding(columns, config.action_dim, config.action_embed)
    if (encoder.dim + embed.dim) % 4:
        raise BadInput(f"--action-dim {config.action_dim}: 8 * width + action-dim must be a "
                       "multiple of the 4 attention heads")
    aggregator = Aggregator(dim=encoder.dim, action_dim=embed.dim, hidden=config.agg_hidden)
    predictor = Predictor(dim=encoder.dim, action_dim=embed.dim)
    return SeqJEPA(encoder, embed, aggregator, predictor, config.action_in)


def build_baseline(method, config, groups):
    """A method of baselines.py: ResNet-18, how it is told actions, an MLP or the aggregator as
    projector."""
    encoder = ResNet18(width=config.width, stem=stem(config), z_norm=config.z_norm)
    embed = ActionEmbedding(conditioned(config.condition, groups), config.action_dim,
                            method.embedding)
    projectors = {"mlp": baselines.MLP,
                  "transformer": partial(baselines.Transformer, feed_forward=config.agg_hidden)}
    return method(encoder, embed, projectors[config.projector])


def build_region_jepa(config, groups):
    """DSeq-JEPA and its relatives: ViT, narrow ViT as predictor, a plan of who predicts whom."""
    encoder = ViT(config.encoder, image_size=config.image_size, patch_size=config.patch_size,
                  cls=config.cls)
    if isinstance(config, EncoderAlone):
        return Alone(encoder)
    predictor = RegionPredictor(dim=encoder.dim, width=config.predictor_width,
                                depth=config.predictor_depth, grid=encoder.grid)
    if "dseq" in config.method:
        plan = Discriminative(N=config.region_count, source=config.regions, order=config.order,
                              proxy=config.proxy, min_patches=config.min_patches,
                              max_patches=config.max_patches, polarity=config.polarity)
    else:
        plan = MultiBlock()
    block = config.saliency_block or round(encoder.depth * 10 / 12)     # Sec. 3.2: 10 of 12
    vicreg = VICREG_WEIGHT if "c-jepa" in config.method else 0.0
    return RegionJEPA(encoder, predictor, plan, block, vicreg)


METHODS = {             # name: (config, groups) -> model
    "seq-jepa": build_seq_jepa,
    "simclr": partial(build_baseline, baselines.SimCLR),
    "byol": partial(build_baseline, baselines.BYOL),
    "vicreg": partial(build_baseline, baselines.VICReg),
    "sen": partial(build_baseline, baselines.SEN),
    "equimod": partial(build_baseline, baselines.EquiMod),
    "sie": partial(build_baseline, baselines.SIE),
    "cond-byol": partial(build_baseline, baselines.ConditionalBYOL),
    "conv-jepa": partial(build_baseline, baselines.ConditionalBYOL),
    "dseq-jepa": build_region_jepa,
    "i-jepa": build_region_jepa,
    "c-jepa": build_region_jepa,
    "dseq-c-jepa": build_region_jepa,
}


def conditioned(condition, groups):
    """Columns of the action that the model is told.

    "none" -> [], "all" -> every one, "a+b" -> those of a and of b."""
    names = {"none": [], "all": list(groups)}.get(condition, condition.split("+"))
    columns = []
    for name in names:
        columns += range(groups[name].start, groups[name].stop)
    return columns


def stem(config):
    """Sec. 4.2: the CIFAR stem for 32-pixel images and patches, the standard one for larger views.

    48 pixels is our line between them."""
    if config.stem != "auto":
        return config.stem
    return "cifar" if config.view_size <= 48 else "imagenet"


# ---------------------------------------------------------------- weights from outside

class EncoderAlone(settings.Config):
    """Settings for a file that has f_theta and nothing that would gather views or predict."""
    aggregates = False


class Alone(torch.nn.Module):
    """A ViT without context encoder and predictor, which no probe of mode `regions` reads."""

    def __init__(self, encoder):
        super().__init__()
        self.representation = encoder.requires_grad_(False)


def outside_model(found, typed):
    """What probes need of weights from outside: (Config, fill, remarks on the numbers).

    fill: model of this Config -> None.  found: sources.weights.Weights.
    typed: {field of Config: what the user says}; what the file tells must agree, the rest is the
    preset's.
    Raises: BadInput for what does not agree or does not fit, before any data is read."""
    kind = settings.Config if found.kind == "seq-jepa" else EncoderAlone
    config = settings.check(kind(**outside_settings(found, typed)))
    flags.refuse_ignored(typed, config, settings.readers)
    with torch.device("meta"):
        weights.check(part_of(build_model(config, MODES[config.mode].groups), found), found)
    if found.kind == "vit" and "image_size" not in found.facts | typed:
        found = found.remark("the file does not say for images of which size its ViT is (it has no "
                             f"pos_embed): {config.image_size} pixels are assumed; say another "
                             "with --image-size")
    return config, lambda model: weights.fill(part_of(model, found), found), found.remarks


def outside_settings(found, typed):
    """{field of Config: value} of sources.weights.Weights, and of what was typed."""
    facts = dict(found.facts)
    if found.kind == "vit":
        names = [name for name, sizes in VITS.items() if sizes[:2] == found.size]
        if not names:
            known = ", ".join(f"{name} ({D}, {blocks})" for name, (D, blocks, _) in VITS.items())
            raise BadInput(f"{found.where}: holds {found.words}; encoder.VITS has {known}")
        facts["encoder"] = names[0]
    for name in typed:
        if facts.get(name, typed[name]) != typed[name]:
            flag = flags.name_of(name)
            raise BadInput(f"{flag} {typed[name]}: {found.where} holds {found.words}; "
                           f"say {flag} {facts[name]}, or leave it out")
    chosen = facts | typed
    if "dataset" not in chosen:
        raise BadInput("--weights: needs --dataset, what to probe on, and mostly --data-dir")
    if chosen.get("mode", "regions") == "regions" and found.kind != "vit":
        raise BadInput(f"--weights {found.where}: holds {found.words}; say --mode saccade, "
                       "rotation or augment")
    values = settings.preset(chosen["dataset"], chosen["mode"], method=chosen.get("method"))
    return values | chosen


def part_of(model, found):
    """Where the weights belong: in the whole of a seq-JEPA, else in what is evaluated."""
    return model if found.kind == "seq-jepa" else model.representation
