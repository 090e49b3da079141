"""The memory format follows the width; a seed is a function of its numbers; no device, one line."""
import pytest
import torch

from encoder import ResNet18
from plumbing.device import memory_format, pick_device, place, seed_all
from plumbing.errors import BadInput

CPU = torch.device("cpu")


@pytest.mark.parametrize("width, expected", [
    (2, torch.contiguous_format), (4, torch.contiguous_format), (7, torch.contiguous_format),
    (8, torch.channels_last), (64, torch.channels_last)])
def test_narrow_resnets_are_contiguous_on_a_cpu(width, expected):
    model = ResNet18(width=width)
    assert memory_format(model, CPU) == expected
    assert memory_format(model, torch.device("cuda")) == torch.channels_last
    weight = place(model, CPU).layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=expected)


@pytest.mark.parametrize("width", [2, 4, 6, 8])
def test_backward_of_every_width_lives_and_agrees_with_float64(width):
    """In channels_last oneDNN writes beyond its memory where there are fewer than 8 channels."""
    torch.manual_seed(0)
    model = place(ResNet18(width=width, stem="strided"), CPU).train()
    exact = ResNet18(width=width, stem="strided").double().train()
    exact.load_state_dict(model.state_dict())
    for _ in range(3):
        x = torch.rand(6, 3, 20, 20)
        model(x).square().sum().backward()
        exact(x.double()).square().sum().backward()
    for p, q in zip(model.parameters(), exact.parameters()):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=2e-2, atol=2e-2)


def test_a_seed_is_a_function_of_its_numbers():
    drawn = []
    for where in ((0, 1), (0, 1), (1, 0), (0, 1, 1)):
        seed_all(*where)
        drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "cuda:x"])
def test_devices_that_are_not_there_are_refused(name):
    with pytest.raises(BadInput, match=f"--device {name}"):
        pick_device(name)


def test_cudnn_s_attention_is_off_wherever_a_gpu_is_picked(monkeypatch):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    pick_device("cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    pick_device("auto")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
