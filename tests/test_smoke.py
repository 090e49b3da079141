"""smoke.py runs; and what it says of a GPU, as far as that can be known without one.

PyTorch can run a program on a GPU that is not there: fake tensors have shape, type and device, and
no content. Reading a content
fails, and so does mixing devices. Only backward passes want the real device."""
import collections
import json
import traceback
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import config as settings
import dseq_jepa
from benchmarks import bench, smoke
from build import build_model
from plumbing.device import place, seed_all
from plumbing.health import Meters
from train import build_optimizer

GPU, BATCH = torch.device("cuda", 0), 16
# what a baseline does with views is the same in every mode: it is tried on one mode's
TRIED = [c for c in smoke.CASES if not c.startswith("augment, ") or c == "augment, seq-jepa"]


def test_smoke_says_what_it_saw(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smoke, "STEPS", smoke.WARM_UP + 1)
    assert (
        smoke.main(["--device", "cpu", "--only", "augment, seq-jepa", "--out", str(tmp_path)]) == 0
    )
    result = json.loads((tmp_path / "smoke.json").read_text())["cases"]["augment, seq-jepa"]
    assert result["wrong"] == "" and len(result["loss"]) == smoke.STEPS
    assert (
        smoke.main(["--device", "cpu", "--batch-size", "1"]) == 2
        and "--batch-size 1: must be at least 2" in capsys.readouterr().err
    )
    assert "augment" in smoke.verdict(
        result | dict(waits_per_step=0.5, waits_at=["augmentations.py:1"]), smoke.settings.Config()
    )


# ---------------------------------------------------------------- on a GPU that is not there

class Waits(TorchDispatchMode):
    """Counts in `places` {file: n} what makes the host wait for the GPU without reading a fake
    tensor's content in Python."""

    def __init__(self):
        super().__init__()
        self.places = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **kwargs or {}), function.overloadpacket.__name__
        if (
            name == "multinomial"
            or name in ("_to_copy", "copy_")
            and copied_at_once(name, out, *args, **kwargs or {})
        ):
            self.note()
        return out

    def note(self):
        ours = [Path(f.filename) for f in traceback.extract_stack()]
        self.places[[f.name for f in ours if f.parent == Path(dseq_jepa.__file__).parent][-1]] += 1


def copied_at_once(name, out, first, second=None, non_blocking=False, **others):
    """Whether a copy is one between devices that the host waits for."""
    source = second if name == "copy_" else first
    return source.device.type != out.device.type and not non_blocking


@pytest.fixture
def fake_gpu(monkeypatch):
    """Waits, while every tensor is fake and PyTorch takes a GPU to be there."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *args: (2 ** 36, 2 ** 36))
    waits = Waits()

    # what attention.sizes reads cannot be read here
    def sizes(*present):
        waits.note()
        return [(p.numel() // 2, p.shape[1] // 16 * 8) for p in present]

    monkeypatch.setattr(dseq_jepa, "sizes", sizes)
    # Grad-CAM's
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, x: [torch.zeros_like(x)])
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    # a fake parameter cannot take a real one's place
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield waits
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


@pytest.mark.skipif(
    torch.__version__ < "2.11",
    reason="fake tensors of PyTorch 2.6 move to a GPU only where its driver is",
)
@pytest.mark.parametrize("case", TRIED)
def test_a_step_mixes_no_devices_and_waits_for_the_gpu_only_where_it_says(case, fake_gpu):
    mode, changes = smoke.CASES[case]
    preset = settings.preset(smoke.DATASETS[mode], mode, method=changes["method"])
    values = preset | dict(batch_size=BATCH)
    # weights are real, and ViT-B's take a while to draw
    small = dict(encoder="vit-nano", image_size=64) if mode == "regions" else {}
    config = settings.check(settings.Config(**values | changes | small))
    views, _ = bench.make_views(config, BATCH, GPU)
    with unset_fake_temporarily():
        model = build_model(config, views.groups)
    model = place(model, GPU).train()
    optimizer, meters = build_optimizer(model, config, GPU), Meters(GPU, when=None)
    with fake_gpu:
        seed_all(0)
        batch = views(torch.arange(BATCH), config.views)._replace(
            progress=torch.full((), 0.5, device=GPU)
        )
        with torch.autocast("cuda", torch.bfloat16):
            out = model(batch)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        model.update_target(0.996)
        meters.add(0, loss=out.loss, **out.logs)
    assert {
        x.device for x in [*batch, out.loss, *meters.sums.values(), *model.state_dict().values()]
    } == {GPU}
    assert fake_gpu.places == (
        {"dseq_jepa.py": smoke.waits_allowed(config)} if mode == "regions" else {}
    )
