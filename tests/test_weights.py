"""Weights from outside, in the layouts of other repositories, give what their own code computes.
And encoder.pt goes out again, by the very lines that docs/weights.md prints.

Files are written here with the names, shapes and wrappers of the released code. ViTs are compared
with torchvision's, seq-JEPA with a model of the authors' names made of torchvision and torch.nn."""
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import compare
import config as settings
import evaluate
from build import build_model, outside_model, outside_settings
from encoder import VITS, ResNet18, ViT
from figures.runs import read_result
from plumbing.errors import BadInput
from sources import weights

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(dataset="folder")


def saved(found, path):
    torch.save(found, path)
    return path


def outside(path, **typed):
    """Config, filled model and remarks of a file, or of what a file x.pth would hold."""
    alone = typed.get("mode") == "augment"
    if isinstance(path, dict):
        found = weights.recognise(path, "x.pth", encoder_only=alone)
    else:
        found = weights.from_file(path, encoder_only=alone)
    config, fill, remarks = outside_model(found, SMALL | typed)
    model = build_model(config, settings.MODES[config.mode].groups).eval()
    fill(model)
    return config, model, remarks


def refusal(path, **typed):
    with pytest.raises(BadInput) as refused:
        outside(path, **typed)
    return str(refused.value)


# ---------------------------------------------------------------- ViTs

def torchvision_vit():
    """An independent ViT of vit-nano's sizes, its [CLS] and all positions learned."""
    theirs = torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=6,
                                                  num_heads=4, hidden_dim=128, mlp_dim=512)
    for p in theirs.parameters():
        p.data.normal_(std=0.1)
    return theirs.eval()


def timm_names(theirs):
    """Its weights under timm's names."""
    state = theirs.state_dict()
    renamed = {"cls_token": state["class_token"], "pos_embed": state["encoder.pos_embedding"]}
    parts = {"conv_proj": "patch_embed.proj", "encoder.ln": "norm", "heads.head": "head"}
    inner = {"ln_1": "norm1", "self_attention.out_proj": "attn.proj", "ln_2": "norm2",
             "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
    for i in range(6):
        layer = f"encoder.layers.encoder_layer_{i}"
        parts |= {f"{layer}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in inner.items()}
        for kind in ("weight", "bias"):
            attention = state[f"{layer}.self_attention.in_proj_{kind}"]
            renamed[f"blocks.{i}.attn.qkv.{kind}"] = attention
    for theirs, ours in parts.items():
        for kind in ("weight", "bias"):
            renamed[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
    return renamed


def torchvision_tokens(theirs, images):
    patches = theirs._process_input(images)
    cls = theirs.class_token.expand(len(images), -1, -1)
    return theirs.encoder(torch.cat([cls, patches], dim=1))


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_a_timm_vit_gives_the_tokens_of_torchvision_s(wrapper, tmp_path):
    """Its positions are learned, that of [CLS] included; its head is left out."""
    theirs = torchvision_vit()
    state = timm_names(theirs)
    path = saved({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "vit.pth")
    config, model, remarks = outside(path)
    assert (config.encoder, config.image_size, config.patch_size) == ("vit-nano", 32, 8)
    assert config.cls and remarks == ()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.representation(images)[0], torchvision_tokens(theirs, images),
                               atol=1e-4, rtol=1e-4)
    # For whoever makes positions for another grid.
    learned = model.representation.learned_positions
    assert torch.equal(learned, state["pos_embed"][0, 1:])


def test_half_precision_and_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file
    state = timm_names(torchvision_vit())
    half = {name: value.half() for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in half.items()},
              tmp_path / "model.safetensors")
    _, model, _ = outside(tmp_path / "model.safetensors")
    _, same, _ = outside(saved(half, tmp_path / "half.pth"))
    for ours, other in zip(model.representation.parameters(), same.representation.parameters()):
        assert ours.dtype == torch.float32 and torch.equal(ours, other)
    loaded = model.representation.blocks[2].attn.qkv.weight
    assert torch.equal(loaded, state["blocks.2.attn.qkv.weight"].half().float())


def numpy_positions(D, side):
    """2-D sines and cosines as I-JEPA stores them, number by number."""
    table = np.zeros((side * side, D))
    for row in range(side):
        for column in range(side):
            for i in range(D // 4):
                frequency = 1 / 10000 ** (i / (D / 4))
                place = table[row * side + column]
                place[i] = math.sin(column * frequency)
                place[i + D // 4] = math.cos(column * frequency)
                place[i + D // 2] = math.sin(row * frequency)
                place[i + 3 * D // 4] = math.cos(row * frequency)
    return torch.from_numpy(table).float()


def jepa_file(cls, path, **parts):
    """I-JEPA's checkpoint, or DSeq-JEPA's with [CLS]; and the ViT whose target encoder it holds."""
    source, context = (ViT("vit-nano", image_size=32, patch_size=8, cls=cls) for _ in range(2))
    dicts = []
    for vit in (source, context):
        for p in vit.parameters():
            p.data.normal_(std=0.1)
        state = {f"module.{name}": value for name, value in vit.state_dict().items()}
        if cls:
            state["module.cls_token"] = state["module.cls_token"].view(1, 1, -1)
        state["module.pos_embed"] = numpy_positions(128, 4)[None]
        dicts.append(state)
    predictor = {"module.predictor_embed.weight": torch.zeros(64, 128),
                 "module.mask_token": torch.zeros(1, 1, 64)}
    optimizer = dict(state={0: dict(step=torch.tensor(3.0))}, param_groups=[dict(lr=1e-3)])
    found = dict(encoder=dicts[1], predictor=predictor, target_encoder=dicts[0], opt=optimizer,
                 scaler=None, epoch=300, loss=0.1, batch_size=256, world_size=8, lr=1e-3)
    return source.eval(), saved(found | parts, path)


@pytest.mark.parametrize("cls, method", [(True, "dseq-jepa"), (False, "i-jepa")])
def test_of_jepas_checkpoints_the_target_encoder_is_taken(cls, method, tmp_path):
    source, path = jepa_file(cls, tmp_path / "jepa-latest.pth.tar")
    config, model, remarks = outside(path, encoder="vit-nano", image_size=32, patch_size=8)
    assert (config.method, config.cls, remarks) == (method, cls, ())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.representation(images)[0], source(images)[0])
    assert getattr(model.representation, "learned_positions", None) is None


def test_a_jepa_without_target_encoder_says_so(tmp_path):
    _, path = jepa_file(True, tmp_path / "x.pth")
    found = torch.load(path, weights_only=True)
    target = found.pop("target_encoder")
    _, model, remarks = outside(saved(found | dict(encoder=target), path))
    assert "no target_encoder" in remarks[0]
    assert torch.equal(model.representation.norm.weight, target["module.norm.weight"])


@pytest.mark.parametrize("patch_size, image_size", [(14, 224), (16, 448)])
def test_i_jepa_s_largest_are_recognised_by_their_sizes(patch_size, image_size):
    """ViT-H/14 at 224 and ViT-H/16 at 448 pixels, without a byte of them."""
    with torch.device("meta"):
        vit = ViT("vit-huge", image_size=image_size, patch_size=patch_size, cls=False)
        state = {f"module.{name}": value for name, value in vit.state_dict().items()}
        state["module.pos_embed"] = vit.positions[None]
    found = weights.of_vit(state, "x.pth")
    typed = dict(dataset="imagenet", encoder="vit-huge", patch_size=patch_size)
    config = settings.check(settings.Config(**outside_settings(found, typed)))
    assert (config.encoder, config.image_size, config.method) == ("vit-huge", image_size, "i-jepa")
    assert vit.grid == (image_size // patch_size,) * 2
    assert found.state.keys() - {"pos_embed"} == vit.state_dict().keys()


def test_our_own_encoder_pt_takes_its_sizes_from_flags():
    vit = ViT("vit-nano", image_size=64, patch_size=8)
    config, model, remarks = outside(dict(vit.state_dict()), image_size=64)
    assert torch.equal(model.representation.cls_token, vit.cls_token)
    assert config.image_size == 64 and torch.equal(model.representation.positions, vit.positions)
    assert remarks == ()


def test_an_image_size_that_neither_file_nor_flag_tells_is_assumed_and_said():
    state = dict(ViT("vit-nano", image_size=64, patch_size=8).state_dict())
    config, _, remarks = outside(state)
    assert config.image_size == 224 and len(remarks) == 1
    assert "224 pixels are assumed; say another with --image-size" in remarks[0]


def test_of_a_vit_only_what_probes_read_is_built():
    """And its untrained twin is that of a run with the same settings."""
    vit = ViT("vit-nano", image_size=64, patch_size=8)
    config, model, _ = outside(dict(vit.state_dict()), image_size=64)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in vit.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    groups = settings.MODES["regions"].groups
    twin = build_model(config, groups).representation.state_dict()
    whole = build_model(settings.Config(**dataclasses.asdict(config)), groups)
    assert all(torch.equal(x, twin[name]) for name, x in whole.representation.state_dict().items())
    assert sum(p.numel() for p in whole.parameters()) > 2 * sum(x.numel() for x in twin.values())


def test_fc_norm_is_taken_for_the_last_norm_and_said(tmp_path):
    state = timm_names(torchvision_vit())
    for kind in ("weight", "bias"):
        state[f"fc_norm.{kind}"] = state.pop(f"norm.{kind}")
    _, model, remarks = outside(saved(state, tmp_path / "x.pth"))
    assert torch.equal(model.representation.norm.bias, state["fc_norm.bias"])
    assert "fc_norm" in remarks[0]


def add(name, *shape):
    return lambda state: state.update({name: torch.zeros(shape)})


def drop(name):
    return lambda state: state.pop(name)


def put(name, value):
    def change(state):
        state[name] = value(state[name])
    return change


def nan(value):
    value = value.clone()
    value[(0,) * value.dim()] = math.nan
    return value


@pytest.mark.parametrize("change, words", [
    (add("blocks.0.ls1.gamma", 128), "blocks.0.ls1.gamma (128,) has no place here"),
    (add("reg_token", 1, 4, 128), "reg_token (1, 4, 128) has no place here"),
    (add("dist_token", 1, 1, 128), "dist_token (1, 1, 128) has no place here"),
    (add("blocks.3.mlp.w12.weight", 9, 9), "blocks.3.mlp.w12.weight (9, 9) has no place"),
    (add("blocks.1.attn.q_norm.weight", 32), "blocks.1.attn.q_norm.weight (32,) has no place"),
    (add("surprise", 1), "surprise (1,) has no place here"),
    (drop("blocks.0.attn.qkv.bias"), "blocks.0.attn.qkv.bias is missing, expected of shape (384,)"),
    (drop("norm.weight"), "norm.weight is missing"),
    (drop("blocks.5.mlp.fc1.weight"), "blocks.5.mlp.fc1.weight is missing"),
    (put("blocks.2.mlp.fc1.weight", lambda x: x[:-1]),
     "blocks.2.mlp.fc1.weight has shape (511, 128), expected (512, 128)"),
    (put("cls_token", lambda x: x[..., :-1]), "cls_token has shape (127,), expected (128,)"),
    (put("pos_embed", lambda x: x[:, :-2]), "pos_embed has shape (1, 15, 128), expected"),
    (put("pos_embed", lambda x: x[..., :64]), "pos_embed has shape (1, 17, 64), expected"),
    (put("pos_embed", nan), "is not finite"),
    (put("blocks.4.norm2.bias", nan), "blocks.4.norm2.bias is not finite"),
    (put("blocks.4.mlp.fc1.bias", lambda x: x.char()), "fc1.bias is torch.int8, expected torch.f"),
    (put("blocks.4.mlp.fc1.bias", lambda x: x.cfloat()), "fc1.bias is torch.complex64, expected"),
    (put("blocks.4.mlp.fc1.bias", lambda x: x.to_sparse()), "blocks.4.mlp.fc1.bias is missing"),
    (put("blocks.4.mlp.fc1.bias", lambda x: x.expand(1, 512)), "has shape (1, 512), expected (512"),
    (put("patch_embed.proj.weight", lambda x: x[:, :1]), "has shape (128, 1, 8, 8), expected"),
    (put("patch_embed.proj.weight", lambda x: x.flatten(1)), "patch_embed.proj.weight has shape"),
    (add("blocks.6.norm1.weight", 128), "a ViT of width 128 and 7 blocks; encoder.VITS has"),
])
def test_what_does_not_fit_a_vit_is_refused_by_its_name_in_the_file(change, words):
    state = timm_names(torchvision_vit())
    change(state)
    state = {f"module.{name}": value for name, value in state.items()}
    told = refusal(dict(state_dict=state))
    assert told.startswith("x.pth: ") and words in told.replace("module.", "")


@pytest.mark.parametrize("typed, words", [
    (dict(encoder="vit-base"), "--encoder vit-base: FILE holds a ViT of width 128 and 6 blocks; "
                               "say --encoder vit-nano, or leave it out"),
    (dict(encoder="resnet18"), "say --encoder vit-nano"),
    (dict(patch_size=16), "say --patch-size 8"),
    (dict(image_size=64), "say --image-size 32"),
    (dict(mode="saccade"), "say --mode regions"),
    (dict(saliency="uniform"), "--saliency: mode regions does not read it"),
    (dict(dataset="stl10", limit=-1), "--limit -1"),
])
def test_flags_that_contradict_a_vit_are_told_what_to_say(typed, words):
    assert words.replace("FILE", "x.pth") in refusal(timm_names(torchvision_vit()), **typed)


# ---------------------------------------------------------------- seq-JEPA

class Theirs(nn.Module):
    """The authors' model by its names and sizes: what a sequence is turned into, under eval()."""

    def __init__(self, told, E=128, cifar=True):
        super().__init__()
        self.encoder = torchvision.models.resnet18()
        self.encoder.fc = nn.Identity()
        if cifar:
            self.encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            self.encoder.maxpool = nn.Identity()
        D = 512 + E
        self.action_proj = nn.Sequential(nn.Linear(told, E, bias=False),
                                         nn.BatchNorm1d(E, affine=False))
        self.predictor = nn.Sequential(nn.Linear(D + E, 1024, bias=False), nn.BatchNorm1d(1024),
                                       nn.ReLU(), nn.Linear(1024, 512))
        self.agg_token = nn.Parameter(torch.zeros(1, 1, D))
        layer = nn.TransformerEncoderLayer(D, 4, 4 * D, batch_first=True)
        self.transformer_encoder = nn.Module()
        self.transformer_encoder.transformer_encoder = nn.TransformerEncoder(layer, 3)
        self.transformer_encoder.norm = nn.LayerNorm(D)
        self.online_res_probe = nn.Sequential(nn.Linear(512, 10))
        self.online_linprobe = nn.Sequential(nn.Linear(D, 10))
        self.agg_classifier = nn.Linear(D, 10)
        self.pos_regressor = nn.Linear(1024, 2)

    def forward(self, views, actions):
        """views (B, M, 3, H, W), actions (B, M, told)  ->  z (B, M, 512), z_agg, z_hat."""
        B, M = views.shape[:2]
        z = self.encoder(views.flatten(0, 1)).view(B, M, 512)
        a = self.action_proj(actions.flatten(0, 1)).view(B, M, -1)
        between = torch.cat([a[:, :-1], torch.zeros_like(a[:, :1])], dim=1)
        tokens = torch.cat([self.agg_token.expand(B, 1, -1), torch.cat([z, between], dim=2)], dim=1)
        for layer in self.transformer_encoder.transformer_encoder.layers:
            tokens = layer(tokens)
        z_agg = self.transformer_encoder.norm(tokens)[:, 0]
        return z, z_agg, self.predictor(torch.cat([z_agg, a[:, -1]], dim=1))


def shaken(model):
    """Numbers that no initial value can hide behind."""
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.normal_(std=0.05)
    return model.eval()


def checkpoint(theirs, target=True):
    """What their file holds: the model with its probes, and what resuming needs."""
    model = dict(theirs.state_dict())
    if target:
        model |= {f"target_encoder.{name}": value + 0.01 if value.is_floating_point() else value
                  for name, value in theirs.encoder.state_dict().items()}
    optimizer = dict(state={}, param_groups=[dict(lr=4e-4, params=[0, 1])])
    return dict(model=model, optimizer=optimizer, min_loss=0.2, epoch=100,
                run_id="wandbid-x_seq-jepa-pls-stl10")


@pytest.fixture(scope="module")
def saccadic():
    """Their model as of STL-10, told positions."""
    torch.manual_seed(0)
    return shaken(Theirs(2))


def compared(theirs, model, told, size):
    """Both, on the same views and actions; ours may have actions that the model is not told."""
    views = torch.randn(3, 4, 3, size, size)
    actions = torch.randn(3, 4, told)
    with torch.no_grad():
        z, z_agg, z_hat = theirs(views, actions)
        ours = model.encode(views)
        a = model.embed(torch.cat([actions, torch.randn(3, 4, 6 - told)], dim=2))
        aggregate = model.aggregate(ours, a[:, :-1])
        torch.testing.assert_close(ours, z, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(aggregate, z_agg, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.predict(aggregate, a[:, -1]), z_hat, atol=1e-4, rtol=1e-4)


def test_the_authors_saccadic_checkpoint_gives_their_z_agg_and_prediction(saccadic):
    found = checkpoint(saccadic)
    config, model, remarks = outside(found)
    assert (config.mode, config.condition, config.stem) == ("saccade", "position", "cifar")
    assert (config.action_dim, config.agg_hidden, config.aggregates) == (128, 2560, True)
    assert remarks == ()
    compared(saccadic, model, told=2, size=32)
    stored = found["model"]["target_encoder.layer1.0.conv1.weight"]
    assert torch.equal(model.target_encoder.layer1[0].conv1.weight, stored)


@pytest.mark.parametrize("told, condition", [(4, "rotation"), (6, "rotation+color")])
def test_the_authors_3diebench_checkpoint_too(told, condition):
    theirs = shaken(Theirs(told, cifar=False))
    config, model, remarks = outside(checkpoint(theirs, target=told == 4), dataset="3diebench")
    assert (config.mode, config.condition, config.stem) == ("rotation", condition, "imagenet")
    assert config.views == 3 and bool(remarks) == (told == 6)
    compared(theirs, model, told, size=64)
    if told == 6:
        assert "its encoder stands for it" in remarks[0]
        assert torch.equal(model.target_encoder.conv1.weight, theirs.encoder.conv1.weight)


@pytest.mark.parametrize("change, words", [
    (drop("action_proj.0.weight"), "no learned action map"),
    (put("action_proj.0.weight", lambda x: x.repeat(1, 5)), "action_proj.0.weight (128, 10) reads"),
    (drop("agg_token"), None),
])
def test_what_has_no_counterpart_leaves_the_encoder(change, words, saccadic):
    found = checkpoint(saccadic)
    change(found["model"])
    config, model, remarks = outside(found, mode="saccade")
    assert not config.aggregates and [words in text for text in remarks] == [True] * bool(words)
    views = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encoder(views), saccadic.encoder(views))


def test_in_mode_augment_only_z_is_taken(saccadic):
    config, model, _ = outside(checkpoint(saccadic), mode="augment")
    assert not config.aggregates
    assert torch.equal(model.encoder.bn1.running_var, saccadic.encoder.bn1.running_var)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_a_plain_resnet18_is_an_encoder_alone(stem):
    theirs = shaken(torchvision.models.resnet18())
    if stem == "cifar":                                 # encoder.pt of a run of ours
        theirs = shaken(ResNet18(stem="cifar"))
    config, model, _ = outside(dict(theirs.state_dict()), mode="augment")
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert config.stem == stem and not config.aggregates
    torch.testing.assert_close(model.encoder(images), theirs(images))


@pytest.mark.parametrize("change, words", [
    (drop("transformer_encoder.norm.bias"), "transformer_encoder.norm.bias is missing"),
    (drop("predictor.3.weight"), "predictor.3.weight is missing, expected of shape (512, 1024)"),
    (drop("encoder.layer4.1.bn2.bias"), "encoder.layer4.1.bn2.bias is missing"),
    (drop("action_proj.1.running_var"), "action_proj.1.running_var is missing"),
    (add("transformer_encoder.transformer_encoder.layers.3.linear1.bias", 9),
     "transformer_encoder.transformer_encoder.layers.3.linear1.bias (9,) has no place"),
    (add("projector.weight", 4), "projector.weight (4,) has no place"),
    (put("predictor.0.weight", lambda x: x[:512]),
     "predictor.0.weight has shape (512, 768), expected (1024, 768)"),
    (put("agg_token", lambda x: x[..., :512]), "agg_token has shape (512,), expected (640,)"),
    (put("encoder.conv1.weight", lambda x: x[:16]), "encoder.conv1.weight has shape (16, 3, 3, 3)"),
    (put("encoder.layer1.0.conv1.weight", lambda x: x[:, :, :1, :1]),
     "encoder.layer1.0.conv1.weight has shape (64, 64, 1, 1), expected (64, 64, 3, 3)"),
    (put("encoder.bn1.weight", nan), "encoder.bn1.weight is not finite"),
])
def test_what_does_not_fit_seq_jepa_is_refused_by_its_name_in_the_file(change, words, saccadic):
    found = checkpoint(saccadic)
    change(found["model"])
    assert refusal(found).startswith(f"x.pth: {words}")


@pytest.mark.parametrize("typed, words", [
    (dict(mode="rotation", dataset="3diebench"), "holds seq-JEPA that is told position"),
    (dict(mode="regions"), "say --mode saccade"),
    (dict(encoder="vit-base"), "say --encoder resnet18"),
])
def test_flags_that_contradict_seq_jepa_are_told_what_to_say(typed, words, saccadic):
    assert words in refusal(checkpoint(saccadic), **typed)


# ---------------------------------------------------------------- the command

def test_one_command_probes_a_vit_beside_its_file(photos, tmp_path, capsys):
    _, path = jepa_file(True, tmp_path / "vit.pth.tar")
    command = ["--weights", str(path), "--dataset", "folder", "--data-dir", str(photos),
               "--probe", "knn", "cls", "linear", "--samplings", "1", "--probe-epochs", "1",
               "--device", "cpu"]
    assert evaluate.main(command) == 0
    file = tmp_path / "vit.pth-probes-knn-cls-linear-folder-epochs1.json"
    result = read_result(file)
    assert [row["probe"] for row in result["rows"]] == ["knn", "knn", "cls", "linear"]
    assert all(row["paper"] is None and row["untrained"] is not None for row in result["rows"])
    assert (result["weights"], result["step"]) == ("vit.pth.tar", None)
    assert "vit-nano" in json.dumps(result["config"])
    before = file.read_bytes()
    capsys.readouterr()
    assert evaluate.main(command) == 2                  # an earlier result is never replaced ...
    assert "say with --json" in capsys.readouterr().err and file.read_bytes() == before
    other = tmp_path / "other.json"
    other.write_text(before.decode().replace("vit.pth.tar", "other.pth"))
    assert compare.main([str(file), str(other)]) == 0   # ... and two files are two rows
    table = capsys.readouterr().out
    assert "weights vit.pth.tar" in table and "weights other.pth" in table


def test_one_command_probes_the_authors_seq_jepa(saccadic, photos, tmp_path, capsys):
    path = saved(checkpoint(saccadic), tmp_path / "ckpt_wandb-no-id_epoch_100.pth")
    command = ["--weights", str(path), "--dataset", "folder", "--data-dir", str(photos),
               "--image-size", "48", "--patch-size", "16", "--limit", "16", "--views", "2",
               "--samplings", "1", "--probe-epochs", "1", "--no-untrained", "--device", "cpu"]
    assert evaluate.main([*command, "--json", str(tmp_path / "x.json")]) == 0
    rows = read_result(tmp_path / "x.json")["rows"]
    assert {row["from"] for row in rows if row["probe"] == "classify"} == {"z", "z_agg M=2"}
    assert {"knn", "action", "path"} <= {row["probe"] for row in rows}


def test_an_encoder_alone_says_what_is_left_out(photos, tmp_path, capsys):
    path = saved(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    command = ["--weights", str(path), "--mode", "augment", "--dataset", "folder", "--data-dir",
               str(photos), "--limit", "16", "--samplings", "1", "--probe-epochs", "1",
               "--image-size", "32", "--no-untrained", "--device", "cpu"]
    assert evaluate.main(command) == 0
    out = capsys.readouterr().out
    assert "note: left out, for the file gathers no views into z_agg: rows of z_agg" in out
    assert "z_agg M" not in out and "classify" in out
    assert (tmp_path / "resnet18-probes-augment.json").exists() is False
    assert evaluate.main([*command, "--views", "1", "--json", str(tmp_path / "y.json")]) == 2
    assert "the file gathers no views into z_agg; leave it out" in capsys.readouterr().err


# ---------------------------------------------------------------- out again, by the docs' lines

def printed(mark):
    """The block of Python in docs/weights.md that has these words in it."""
    text = (ROOT / "docs" / "weights.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found, = [block for block in blocks if mark in block]
    return found


RUNS = {"quick": ("solids", "rotation", dict(quick=True)),
        "saccades": ("folder", "saccade", dict(width=8, condition="none")),
        "augment": ("folder", "augment", dict(width=8)),
        "vit": ("folder", "regions", dict(encoder="vit-nano", image_size=32, patch_size=8)),
        "no [CLS]": ("folder", "regions", dict(encoder="vit-nano", image_size=32, patch_size=8,
                                               method="i-jepa"))}


@pytest.fixture(params=RUNS)
def run(request, tmp_path, monkeypatch):
    """(Config, encoder) of a run whose files lie in ./runs/NAME."""
    dataset, mode, changes = RUNS[request.param]
    values = settings.preset(dataset, mode, quick=changes.get("quick", False))
    config = settings.check(settings.Config(**values | changes))
    model = shaken(build_model(config, settings.MODES[mode].groups))
    folder = tmp_path / "runs" / "NAME"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    torch.save(model.representation.state_dict(), folder / "encoder.pt")
    monkeypatch.chdir(tmp_path)
    return config, model.representation


def features(output):
    return output[-1] if isinstance(output, list) else output


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_lines_that_build_an_encoder_and_export_it_to_onnx(run):
    import onnxruntime
    config, encoder = run
    names = {}
    exec(printed("config.json"), names)
    exec(printed("torch.onnx.export"), names)
    images = torch.rand(5, 3, config.view_size, config.view_size)       # another batch size
    expected = features(encoder(images)).detach()
    assert torch.equal(features(names["encoder"](images)), expected)
    session = onnxruntime.InferenceSession("encoder.onnx")
    exported, = session.run(["features"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(exported), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("run", ["vit", "no [CLS]"], indirect=True)
def test_the_lines_that_give_a_vit_timm_s_shapes(run):
    _, encoder = run
    names = dict(torch=torch, encoder=encoder)
    exec(printed("pos_embed"), names)
    C = int(encoder.cls_token is not None)
    assert names["state"]["pos_embed"].shape == (1, C + 16, 128)
    assert "cls_token" not in names["state"] or names["state"]["cls_token"].shape == (1, 1, 128)
    _, model, _ = outside(names["state"])
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.representation(images)[0], encoder(images)[0])


def test_every_width_and_depth_has_one_name():
    sizes = [size[:2] for size in VITS.values()]
    assert len(set(sizes)) == len(sizes)
