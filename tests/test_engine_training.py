"""Training without the zeros against training with them."""

import copy

import pytest
import tiny as shrunk
import torch
import torch.nn.functional as F

import distill
import models
import prune
from engine import rewrite, training


def pruned(stem, size, keep=0.05, images=32):
    """A narrow network in training that has a share of `keep` of its weights, and not all
    channels within and between the blocks; and a batch."""
    torch.manual_seed(0)
    with shrunk.narrow():
        model = models.build("resnet18", 10, stem=stem)
    model = rewrite.trim_(model, size).train()
    with torch.no_grad():
        for weight in prune.weights(model).values():
            weight.mul_(torch.rand_like(weight) < keep).mul_(keep**-0.5)
        within, (first, second) = model.layer2[0], model.layer4
        within.conv1.weight[3:8], within.conv2.weight[:, 3:8] = 0, 0
        for layer in (first.conv2, first.downsample[0], second.conv2):
            layer.weight[5:9] = 0
        second.conv1.weight[:, 5:9], model.fc.weight[:, 5:9] = 0, 0
    model = rewrite.trim_channels_(model)
    batch = torch.randn(images, 3, size, size)
    batch[..., : size // 2] = -1  # a flat background, where all of a window are the largest
    return model, batch, torch.randint(10, (images,))


@pytest.mark.parametrize(("stem", "size"), [(4, 28), (2, 28), (1, 12), (4, 40), (2, 17)])
def test_gradients_are_those_of_the_dense_network(stem, size):
    model, images, labels = pruned(stem, size)
    dense, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    logits, expected = training.SparseForward(model, size)(images), exact(images.double())
    torch.testing.assert_close(logits, expected.float(), rtol=1e-3, atol=1e-4)
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()
    F.cross_entropy(dense(images), labels).backward()
    networks = (network.named_parameters() for network in (model, dense, exact))
    for (name, ours), (_, theirs), (_, best) in zip(*networks, strict=True):
        kept = ours != 0 if ours.dim() == 4 else torch.ones_like(ours, dtype=bool)
        assert not ours.grad[~kept].any()
        grad = best.grad.float() * kept
        # Rounding decides who is below zero, in the dense network as well.
        rounding = 2 * (theirs.grad * kept - grad).norm() + 1e-5 * grad.norm() + 1e-6
        assert (ours.grad - grad).norm() <= rounding, name
    for (name, ours), theirs in zip(model.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-3, atol=1e-5, msg=name)


def test_the_same_bits_with_any_number_of_threads(monkeypatch):
    gradients = []
    for threads in (1, 2, 3):
        model, images, labels = pruned(4, 28, images=64)
        forward = training.SparseForward(model, 28)
        monkeypatch.setattr(forward, "threads", threads)
        for _ in range(2):  # memories are used again
            model.zero_grad()
            F.cross_entropy(forward(images), labels).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))


def test_weights_that_changed_are_used():
    model, images, _ = pruned(4, 28)
    forward = training.SparseForward(model, 28)
    before = forward(images)
    with torch.no_grad():
        model.layer4[1].conv2.weight.mul_(3)
    after = forward(images)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(images), rtol=1e-3, atol=1e-4)


def test_it_is_used_for_a_narrow_network_that_is_not_pruned():
    setup = distill.Context(torch.device("cpu"), False, 28, True)
    networks = []
    for width in (0.25, 0.09375):
        torch.manual_seed(0)
        model = models.build("resnet18", 10, stem=1)
        prune.apply_width_(model, width)
        networks.append(distill.TrainState(model, distill.Training(1, 0.01), setup))
        networks[-1].model.train()
    assert networks[0].sparse is None  # its PyTorch step is as fast
    images, targets = torch.randn(32, 3, 28, 28), torch.eye(10)[torch.randint(10, (32,))]
    state, losses = copy.deepcopy(networks[1].state_dict()), []
    for sparse in (True, False):
        network = distill.TrainState(model, distill.Training(1, 0.01), setup)
        network.load_state_dict(state)
        network.model.train()
        assert network.sparse is not None
        network.sparse = network.sparse if sparse else None
        losses.append([network.step(images, targets, None, 0.01)[0].item() for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0][-1] < losses[0][0]


def test_it_is_used_where_few_weights_are_not_zero():
    model, _, _ = pruned(4, 28, keep=0.8)
    assert training.sparse_forward_if_faster(model, 28, bf16=False) is None
    model, images, labels = pruned(4, 28)
    setup = distill.Context(torch.device("cpu"), False, 28, True)
    steps = []
    for sparse in (True, False):
        network = distill.TrainState(copy.deepcopy(model), distill.Training(1, 0.003), setup)
        network.model.train()
        network.set_masks({n: w != 0 for n, w in prune.weights(network.model).items()})
        assert network.sparse is not None
        network.sparse = network.sparse if sparse else None
        targets = F.one_hot(labels, 10).float()
        losses = [network.step(images, targets, None, 0.003)[0].item() for _ in range(5)]
        network.step(images[:31], targets[:31], None, 0.01)  # no whole tiles: the model itself
        steps.append((losses, prune.count(network.model)))
    assert steps[0][0] == pytest.approx(steps[1][0], rel=2e-3)
    assert steps[0][1] == steps[1][1]
    assert steps[0][0][-1] < steps[0][0][0]
