"""The encoder against torchvision's ResNet-18."""
import pytest
import torch
import torchvision
from torch import nn

from encoder import Block, ResNet18


def torchvision_twin(encoder):
    """torchvision's ResNet-18 without classifier, with our weights, as README tells users to load encoder.pt."""
    twin = torchvision.models.resnet18()
    twin.fc = nn.Identity()
    twin.load_state_dict(encoder.state_dict(), strict=True)
    return twin


def shaken(encoder):
    """Random norms, so that zero-initialised branches and unit statistics cannot hide a difference."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return encoder


@pytest.mark.parametrize("size", [64, 75, 33])
@pytest.mark.parametrize("training", [True, False])
def test_standard_stem_equals_torchvision(size, training):
    encoder = shaken(ResNet18()).train(training)
    twin = torchvision_twin(encoder).train(training)
    x = torch.randn(3, 3, size, size)
    torch.testing.assert_close(encoder(x), twin(x), atol=1e-4, rtol=1e-4)


def test_cifar_stem_equals_torchvision_with_its_stem_replaced():
    encoder = shaken(ResNet18(stem="cifar")).eval()
    twin = torchvision.models.resnet18()
    twin.conv1, twin.maxpool, twin.fc = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity(), nn.Identity()
    twin.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(x), twin.eval()(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stem", ["cifar", "imagenet", "strided"])
def test_width_and_any_size(stem):
    encoder = ResNet18(width=4, stem=stem).eval()
    for size in ((32, 32), (17, 40), (96, 96)):
        assert encoder(torch.randn(2, 3, *size)).shape == (2, 32)


def test_blocks_start_as_the_identity():
    block = ResNet18(width=8).layer1[0].eval()
    x = torch.rand(2, 8, 5, 5)
    assert torch.equal(block(x), x)
    assert all((m.bn2.weight == 0).all() for m in ResNet18(width=4).modules() if isinstance(m, Block))


def test_z_norm_standardises_and_is_off_by_default():
    x = torch.randn(16, 3, 32, 32)
    z = ResNet18(width=4, stem="cifar", z_norm=True)(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    plain = ResNet18(width=4, stem="cifar")
    assert (plain(x) >= 0).all() and not any("norm" in key for key in plain.state_dict())
