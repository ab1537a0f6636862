import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distill
import models
import prune
from engine import layers, rewrite


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_trimmed_and_sped_up_networks_compute_the_same_logits_and_gradients(arch, monkeypatch):
    monkeypatch.setattr(rewrite, "UNFOLDED", 2**20)  # in several pieces, the last one smaller
    torch.manual_seed(0)
    plain = models.build(arch, 10).double()
    fast = rewrite.use_matmul_convs_(rewrite.trim_(copy.deepcopy(plain), 28))
    images = torch.randn(6, 3, 28, 28, dtype=torch.double)
    labels = torch.arange(6)
    for model in (plain, fast):
        torch.nn.functional.cross_entropy(model(images), labels).backward()
    torch.testing.assert_close(fast(images), plain(images))
    trimmed = []
    for (name, a), (_, b) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        if b.shape == a.shape:
            torch.testing.assert_close(b.grad, a.grad, msg=lambda m, name=name: f"{name}: {m}")
        else:  # the gradient is whole, what was left out had none
            trimmed.append(name)
            torch.testing.assert_close(b.grad.norm(), a.grad.norm())
            assert b.grad.count_nonzero() == a.grad.count_nonzero()
    assert trimmed and all(name.startswith("layer4") for name in trimmed)


@pytest.mark.parametrize("stem", models.STEMS)
def test_weight_gradients_are_onednns_on_large_feature_maps_only(stem, narrow):
    """On small ones its threads spin while they wait for each other: one busy process slows a step
    30 times."""
    setup = distill.Context(torch.device("cpu"), bf16=False, image_size=28, grey=True)
    network = distill.TrainState(
        models.build("resnet18", 10, stem=stem), distill.Training(1), setup
    )
    images, targets = models.normalize(torch.zeros(16, 28, 28)), torch.eye(10).repeat(2, 1)[:16]
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution_backward.default:
                asked.append((args[0].shape[-1] > rewrite.MATMUL_SIZE, args[-1][1]))
            return function(*args, **(kwargs or {}))

    with Watch():
        network.step(images, targets, None, 0.0)
    assert asked and all(large == weights for large, weights in asked)


@pytest.mark.parametrize("kernel, stride", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_gradients_keep_the_memory_order_of_feature_maps(kernel, stride):
    """A gradient in another order than the map that it is added to or masked by costs 5 times as
    long there."""
    conv = rewrite.MatmulConv2d(8, 4, kernel, stride, kernel // 2, bias=False)
    x = torch.randn(2, 8, 14, 14).to(memory_format=torch.channels_last).requires_grad_()
    y = conv.to(memory_format=torch.channels_last)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [20, 28, 32, 40, 65])
def test_trimming_is_exact_for_any_image_size_and_can_be_undone(narrow_resnet18, size):
    resnet18 = narrow_resnet18
    images = torch.randn(2, 3, size, size)
    expected = resnet18.eval()(images)
    state = resnet18.state_dict()
    trimmed = rewrite.trim_(copy.deepcopy(resnet18), size)
    again = rewrite.trim_(trimmed, size)
    whole = rewrite.untrimmed(trimmed)
    assert {k: t.shape for k, t in whole.state_dict().items()} == {
        k: t.shape for k, t in state.items()
    }
    for model in (trimmed, rewrite.use_matmul_convs_(trimmed), whole, again):
        torch.testing.assert_close(model.eval()(images), expected, atol=1e-4, rtol=1e-4)
    live = prune.all_reachable(resnet18, size, grey=False)
    left = sum(weight.numel() for weight in prune.weights(trimmed).values())
    assert left == sum(int(mask.sum()) for mask in live.values())
    assert size != 28 or left < 0.4 * sum(mask.numel() for mask in live.values())
    for name, weight in prune.weights(whole).items():
        torch.testing.assert_close(weight, prune.weights(resnet18)[name] * live[name])


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_channels_without_weights_are_left_out_and_can_be_brought_back(arch, narrow):
    torch.manual_seed(0)
    plain = models.build(arch, 10).double()
    prune.apply_width_(plain, 0.5)
    first = plain.layer2[0]  # here some more, in the middle of the others
    with torch.no_grad():
        first.conv1.weight[1], first.conv2.weight[:, 1] = 0, 0
        plain.layer3[0].conv1.weight[0] = 0  # read, but not written: its BatchNorm's bias goes on
        plain.layer3[0].conv2.weight[:, 1] = 0  # written, but not read
    fast = rewrite.trim_channels_(copy.deepcopy(plain))
    again = rewrite.trim_channels_(copy.deepcopy(fast))
    images, labels = torch.randn(6, 3, 28, 28, dtype=torch.double), torch.arange(6)
    for model in (plain, fast, again):
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        torch.testing.assert_close(model.eval()(images), plain.eval()(images))
    for (name, a), (_, b) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        if name in prune.weights(plain):
            assert b.count_nonzero() == a.count_nonzero() and b.numel() < a.numel()
            a.grad[a == 0], b.grad[b == 0] = 0, 0  # of a channel whose BatchNorm has a bias
        torch.testing.assert_close(b.grad.norm(), a.grad.norm(), msg=name)
    for whole in (rewrite.untrimmed(fast), rewrite.untrimmed(again)):
        assert prune.count(whole) == prune.count(plain)
        for (name, a), (_, b) in zip(
            plain.state_dict().items(), whole.state_dict().items(), strict=True
        ):
            assert b.shape == a.shape
            if name in prune.weights(plain):
                torch.testing.assert_close(b, a, msg=name)
        torch.testing.assert_close(whole.eval()(images), plain(images))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "live"),
    [(1, 3, 1, 1, (1, 2)), (2, 3, 2, 1, (1, 3)), (2, 3, 1, 1, (0, 3)), (28, 7, 2, 3, (0, 7))],
)
def test_live_kernel_positions(size, kernel, stride, padding, live):
    assert layers.live_positions(size, kernel, stride, padding) == slice(*live)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("stem", models.STEMS)
def test_the_described_layers_are_those_that_a_forward_pass_goes_through(arch, stem, narrow):
    model, size = models.build(arch, 3, stem=stem).eval(), 33
    found, sizes = layers.layers(model), layers.map_sizes(model, size)
    for layer in found:
        layer.norm.running_mean.normal_()
    x = torch.randn(1, 3, size, size)
    maps = [x]
    for layer in found:
        y = layer.norm(layer.conv(maps[layer.reads]))
        y = y if layer.adds is None else y + maps[layer.adds]
        y = y.relu() if layer.relu else y
        assert layer.writes == len(maps) and layer.conv is model.get_submodule(layer.name)
        maps.append(model.maxpool(y) if layer.pool else y)
    assert [m.shape[-1] for m in maps] == sizes
    torch.testing.assert_close(model.fc(maps[-1].mean((2, 3))), model(x))
    assert {layer.conv for layer in found} == {
        module for module in model.modules() if isinstance(module, torch.nn.Conv2d)
    }


def test_fold_batchnorm_keeps_the_function(narrow_resnet18):
    resnet18 = narrow_resnet18
    images = torch.randn(4, 3, 28, 28)
    folded = rewrite.fold_batchnorm(resnet18)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    expected = resnet18.eval()(images)
    torch.testing.assert_close(folded(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        rewrite.use_matmul_convs_(folded)(images), expected, atol=1e-4, rtol=1e-4
    )


def test_channels_are_removed_in_blocks_until_none_is_unused(narrow):
    torch.manual_seed(0)
    model = rewrite.fold_batchnorm(models.build("resnet18", 4))
    model.requires_grad_(False)
    inner = model.layer3[0]
    inner.conv1.weight[1:] = 0  # 1 channel is left, one more has a bias
    inner.conv1.bias.fill_(-1)
    inner.conv1.bias[5] = 1
    model.layer4[1].conv2.weight[:, 2:] = 0  # so that layer4.1.conv1 has unused outputs
    images = torch.randn(3, 3, 28, 28)
    expected = model(images)
    channels = len(inner.conv1.weight)
    rewrite.remove_channels_(model)
    assert len(inner.conv1.weight) == inner.conv2.weight.shape[1] == rewrite.BLOCK < channels
    assert len(model.layer4[1].conv1.weight) == rewrite.BLOCK
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
