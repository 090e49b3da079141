"""Weights from outside: whose they are, what they are called there, which of our parts they fit.

    from_file(path)  ->  Weights        recognised by the names inside, under our names
    fill(part, weights)                 into a ViT, a ResNet18 or a whole SeqJEPA, in place

    the file holds                                              of it is taken
    the authors' DSeq-JEPA checkpoint                           target_encoder, a ViT with [CLS]
    I-JEPA's checkpoint                                         target_encoder, a ViT without [CLS]
    a ViT as timm, MAE and DeiT name it, by itself
        or under `model` or `state_dict`                        all but its heads
    the authors' seq-JEPA checkpoint                            ResNet-18, action map, aggregator,
                                                                predictor, target encoder
    a ResNet-18 as torchvision names it                         all but its head

Nothing is resized, guessed or left out in silence: a name that has no place here, one that is
missing and a shape that does not fit are refused, by the name that they have in the file. How many
heads attention has is written in no file: ours is assumed.
Names are those of the released code: hafezgh/seq-jepa 73e0550, SkyShunsuke/DSeq-JEPA 1230823,
facebookresearch/ijepa 52c1ae9. Called by evaluate.py --weights. Checked in tests/test_weights.py.
"""
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

from plumbing.errors import BadInput
from plumbing.runs import FORMAT, is_whole, read_tensors

# Where in a file its weights lie. I-JEPA and DSeq-JEPA evaluate the target encoder.
WRAPPERS = ("target_encoder", "model", "state_dict", "encoder")
# By these names the two kinds of encoders are known, whatever stands before them.
VIT = "patch_embed.proj.weight"
RESNET = "layer1.0.conv1.weight"
# What was put on an encoder to train or to classify, and is no part of it.
HEADS = re.compile(r"(head|fc|mask_token|decoder_\w+|online_\w+|\w+_classifier|\w+_regressor)"
                   r"(\.|$)")
# The authors' seq-JEPA: how names begin here -> and there.
SEQ_JEPA = {"embed.linear.": "action_proj.0.",
            "embed.norm.": "action_proj.1.",
            "aggregator.agg": "agg_token",
            "aggregator.transformer.": "transformer_encoder.transformer_encoder.",
            "aggregator.transformer.norm.": "transformer_encoder.norm.",
            "predictor.mlp.": "predictor."}
# How many numbers their action map reads -> mode, and what the model is told. Units and order of
# these numbers are ours: docs/weights.md says why.
ACTIONS = {2: ("saccade", "position"),
           4: ("rotation", "rotation"),
           6: ("rotation", "rotation+color")}


class Weights(NamedTuple):
    """What a file holds."""
    where: str              # the file
    words: str              # what it holds: "a ViT of width 768 and 12 blocks"
    kind: str               # "vit", "resnet18" or "seq-jepa": what `fill` puts it into
    prefix: str             # what stands before its names in the file
    state: dict             # {name, without the prefix: tensor}; pos_embed is (P, D), row by row
    facts: dict             # {field of config.Config: what it is in the file}
    names: dict = {}        # {how names begin here: how they do there}, where that differs
    size: tuple = ()        # of a ViT: width, blocks
    remarks: tuple = ()     # sentences that a reader of the numbers must know

    def theirs(self, name):
        """What the file calls, or would call, a weight of ours; without the prefix."""
        start = max((ours for ours in self.names if name.startswith(ours)), key=len, default="")
        return self.names.get(start, "") + name.removeprefix(start)

    def remark(self, words):
        """The same, with one thing more to say."""
        return self._replace(remarks=(*self.remarks, words))


# ---------------------------------------------------------------- what a file holds

def from_file(path, encoder_only=False):
    """Weights of a file of torch.save, or of a .safetensors.

    encoder_only: leave out what of seq-JEPA is not its encoder.
    Raises: BadInput, naming the file and what in it is not as it should be."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"--weights {path}: no file there; expected what torch.save wrote")
    if path.suffix == ".safetensors":
        return recognise(read_safetensors(path), str(path), encoder_only)
    try:
        found = read_tensors(path, mmap=True)
    except BadInput as error:
        raise BadInput(f"{error}; expected a file of torch.save with tensors, numbers and text "
                       "alone; of one that you trust, save the state dict anew") from None
    return recognise(found, str(path), encoder_only)


def read_safetensors(path):
    """{name: tensor} of a .safetensors."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise BadInput(f"{path}: takes a package that is not here; pip install safetensors") \
            from None
    try:
        return load_file(path)
    except SafetensorError:
        raise BadInput(f"{path}: is damaged and was not loaded; fetch it again") from None


def recognise(found, where, encoder_only=False):
    """Weights of what torch.load returned.  where: the file, for messages."""
    if not isinstance(found, dict):
        raise BadInput(f"{where}: holds a {type(found).__name__}; expected a dictionary of weights")
    if str(found.get("format")) == FORMAT:
        raise BadInput(f"--weights {where}: a checkpoint of this project; leave out --weights "
                       "before it")
    wrapper = next((name for name in WRAPPERS if isinstance(found.get(name), dict)), None)
    inner = found[wrapper] if wrapper else found
    state = {name: x for name, x in inner.items() if isinstance(name, str) and is_whole(x)}
    if any(name.endswith(VIT) for name in state):
        weights = of_vit(state, where)
    elif any(name.endswith(RESNET) for name in state):
        weights = of_resnet(state, where, encoder_only)
    else:
        some = ", ".join(f"{name:.40}" for name in list(state)[:3]) or "none"
        raise BadInput(f"{where}: holds no ViT (with {VIT}) and no ResNet-18 (with {RESNET}); "
                       f"tensors in it: {some}")
    if wrapper == "encoder":
        weights = weights.remark("the file has no target_encoder: the numbers are its encoder's")
    return weights


def prefix_of(state, mark, wanted, where):
    """What stands before an encoder's names: "module.", "encoder.", "", ...

    wanted: which encoder, where there are several."""
    prefixes = {name.removesuffix(mark) for name in state if name.endswith(mark)}
    if len(prefixes) > 1:
        prefixes = {prefix for prefix in prefixes if prefix.split(".")[-2:-1] == [wanted]}
    if len(prefixes) != 1:
        raise BadInput(f"{where}: holds several encoders; save the one to be probed by itself")
    return prefixes.pop()


def within(state, prefix):
    """The weights whose names have this prefix, without it; no heads."""
    inside = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    return {name: x for name, x in inside.items() if not HEADS.match(name)}


# ---------------------------------------------------------------- whose it is

def of_vit(state, where):
    """Weights of a state dict that holds a ViT: I-JEPA's, DSeq-JEPA's, or as timm names them."""
    prefix = prefix_of(state, VIT, "target_encoder", where)
    own = within(state, prefix)
    shape = tuple(own[VIT].shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise BadInput(f"{where}: {prefix}{VIT} has shape {shape}, expected "
                       "(width, 3, patch size, patch size)")
    width, _, _, patch_size = shape
    numbers = [int(name.split(".")[1]) for name in own if re.match(r"blocks\.\d{1,4}\.", name)]
    size = width, 1 + max(numbers, default=-1)
    cls = "cls_token" in own
    facts = dict(mode="regions", method="dseq-jepa" if cls else "i-jepa", cls=cls,
                 patch_size=patch_size)
    if cls:
        own["cls_token"] = own["cls_token"].float().flatten()
    if "pos_embed" in own:
        split_positions(own, f"{where}: {prefix}")
        facts["image_size"] = math.isqrt(len(own["pos_embed"])) * patch_size
    words = "a ViT of width {} and {} blocks".format(*size)
    weights = Weights(where, words, "vit", prefix, own, facts, size=size)
    if "norm.weight" not in own and {"fc_norm.weight", "fc_norm.bias"} <= own.keys():
        weights = weights._replace(names={"norm.": "fc_norm."}).remark(
            "the file's last norm, fc_norm, is meant for the mean patch token; here it comes "
            "before the mean. linear does not read it, knn and cls do")
    return weights


def split_positions(own, where):
    """Leave of a ViT's pos_embed the (P, D) of its patches, in place.

    If [CLS] has a position too, cls_token becomes their sum: ours has none."""
    found = own["pos_embed"]
    D = own[VIT].shape[0]
    for of_cls in (1, 0) if "cls_token" in own else (0,):
        P = found.numel() // D - of_cls
        if found.shape[-1:] == (D,) and P > 0 and math.isqrt(P) ** 2 == P:
            rows = found.float().reshape(-1, D)
            if of_cls and len(own["cls_token"]) == D:
                own["cls_token"] = own["cls_token"] + rows[0]
            own["pos_embed"] = rows[of_cls:]
            return
    raise BadInput(f"{where}pos_embed has shape {tuple(found.shape)}, expected (1, P, {D}) for a "
                   "square grid of P patches, one more if [CLS] has one")


def of_resnet(state, where, encoder_only=False):
    """Weights of a state dict that holds a ResNet-18: that of seq-JEPA, or one by itself."""
    prefix = prefix_of(state, RESNET, "encoder", where)
    own = within(state, prefix)
    shape = tuple(own["conv1.weight"].shape) if "conv1.weight" in own else "none"
    stem = {(64, 3, 7, 7): "imagenet", (64, 3, 3, 3): "cifar"}.get(shape)
    if stem is None:
        raise BadInput(f"{where}: {prefix}conv1.weight has shape {shape}, expected (64, 3, 7, 7) "
                       "or, for CIFAR's stem, (64, 3, 3, 3); of a --quick run probe the last.pt, "
                       "without --weights")
    facts = dict(encoder="resnet18", stem=stem)
    alone = Weights(where, "a ResNet-18", "resnet18", prefix, own, facts)
    root = prefix.removesuffix("encoder.")
    if encoder_only or root + "agg_token" not in state:
        return alone
    action_map = state.get(root + "action_proj.0.weight")
    if action_map is None:
        return alone.remark("the file's aggregator has no learned action map, and here there is "
                            "none without: only z is probed")
    if action_map.dim() != 2 or action_map.shape[1] not in ACTIONS:
        return alone.remark(f"the file's {root}action_proj.0.weight {tuple(action_map.shape)} "
                            "reads the actions of no mode here: only z is probed")
    return of_seq_jepa(within(state, root), facts, root, where)


def of_seq_jepa(own, facts, root, where):
    """Weights of the authors' whole model.  own: it, without probes.  root: its prefix."""
    own["agg_token"] = own["agg_token"].flatten()
    action_dim, told = own["action_proj.0.weight"].shape
    mode, condition = ACTIONS[told]
    facts = facts | dict(mode=mode, condition=condition, action_dim=action_dim)
    wide = own.get("transformer_encoder.transformer_encoder.layers.0.linear1.weight")
    if wide is not None:
        facts["agg_hidden"] = wide.shape[0]
    words = f"seq-JEPA that is told {condition}"
    weights = Weights(where, words, "seq-jepa", root, own, facts, SEQ_JEPA)
    if not any(name.startswith("target_encoder.") for name in own):         # trained without --ema
        weights = weights._replace(names=SEQ_JEPA | {"target_encoder.": "encoder."}).remark(
            "the file has no target encoder: its encoder stands for it")
    return weights


# ---------------------------------------------------------------- into a model

def fill(part, weights):
    """Fill a ViT, a ResNet18 or a SeqJEPA of the right sizes, in place: all of it, or nothing.

    Positions of a ViT that are not our sines and cosines are kept as `learned_positions` too.
    Raises: BadInput, as `check`."""
    check(part, weights)
    part.load_state_dict({name: weights.state[weights.theirs(name)] for name in part.state_dict()})
    positions = weights.state.get("pos_embed")
    if positions is not None and not torch.allclose(positions, part.positions, atol=1e-4):
        part.positions.copy_(positions)
        part.learned_positions = positions.clone()


def check(part, weights):
    """Whether `fill` would succeed; the part may be on the meta device.

    Raises: BadInput, naming what the file has too much, what it lacks, what has another shape or is
    not finite."""
    state = weights.state
    before = f"{weights.where}: {weights.prefix}"
    own = {weights.theirs(name): value for name, value in part.state_dict().items()}
    if weights.kind == "vit" and "pos_embed" in state:
        own["pos_embed"] = part.positions
    for name, value in state.items():
        if name not in own:
            raise BadInput(f"{before}{name} {tuple(value.shape)} has no place here")
    for name, value in own.items():
        shape = tuple(value.shape)
        if name not in state:
            raise BadInput(f"{before}{name} is missing, expected of shape {shape}")
        found = state[name]
        if found.shape != shape:
            advice = "; leave out --image-size" if name == "pos_embed" else ""
            raise BadInput(f"{before}{name} has shape {tuple(found.shape)}, expected {shape}"
                           f"{advice}")
        if found.is_floating_point() != value.is_floating_point():
            raise BadInput(f"{before}{name} is {found.dtype}, expected {value.dtype}")
        if not found.isfinite().all():
            raise BadInput(f"{before}{name} is not finite; fetch the file again")
