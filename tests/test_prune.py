import copy

import pytest
import torch
import torchinfo

import models
import prune
from engine import rewrite

SIZE = 28


@pytest.fixture(scope="module")
def _masks(_resnet18):
    return prune.all_reachable(_resnet18, SIZE, grey=True)


@pytest.fixture
def live(resnet18, _masks):
    """The model as pruning starts, and the masks of all weights that can matter."""
    prune.merge_grey_input_(resnet18)
    return rewrite.use_matmul_convs_(resnet18), _masks


def torchinfo_count(model):
    return torchinfo.summary(prune.with_masks(model), (1, 3, SIZE, SIZE), verbose=0).total_params


def test_the_count_is_torchinfos(resnet18):
    assert prune.count(resnet18) == torchinfo_count(resnet18) == 11_181_642
    assert prune.count_fixed(resnet18) == 9_610
    resnet18.layer4[1].conv1.weight.data[:, 3] = 0
    assert prune.count(resnet18) == torchinfo_count(resnet18) == 11_181_642 - 512 * 9


@pytest.mark.parametrize("budget", [1_000_000, 99_999, 20_000])
def test_budgets_are_met_exactly_with_useful_weights_only(live, budget):
    model, masks = live
    chosen = prune.choose_masks(model, masks, budget, SIZE, grey=True)
    prune.apply_(model, chosen)
    assert prune.count(model) == torchinfo_count(model) == budget
    again = prune.reachable(model, chosen, SIZE, grey=True)
    for name, mask in chosen.items():
        assert not (mask & ~masks[name]).any() and torch.equal(again[name], mask)
        assert mask.sum() >= prune.MIN_WEIGHTS - 8  # a floor's tap can miss its map


def test_the_smallest_and_largest_budget_are_met_and_no_other(live):
    model, masks = live
    smallest, largest = prune.budget_range(model, SIZE, grey=True)
    for budget in (smallest, largest):
        pruned = copy.deepcopy(model)
        prune.apply_(pruned, prune.choose_masks(model, masks, budget, SIZE, grey=True))
        assert prune.count(pruned) == budget
    for budget in (smallest - 1, largest + 1):
        with pytest.raises(prune.BudgetError):
            prune.choose_masks(model, masks, budget, SIZE, grey=True)


@pytest.mark.parametrize("levels", [0, 2])
def test_ties_and_kept_zeros_do_not_miscount(live, levels):
    """With a few magnitudes only (or all zero), the last weight kept ties with thousands."""
    model, masks = live
    for weight in prune.weights(model).values():
        weight.data.copy_((weight / weight.std() / 3).clamp(-1, 1).mul(levels).round())
    prune.apply_(model, prune.choose_masks(model, masks, 100_000, SIZE, grey=True))
    assert prune.count(model) == torchinfo_count(model) == 100_000


def test_weights_that_only_meet_padding_are_the_known_ones(resnet18):
    """6,946,816 of 11,166,912 convolution weights at 28x28; two thirds of conv1 if grey."""
    color = prune.all_reachable(resnet18, SIZE, grey=False)
    dead = {name: int((~mask).sum()) for name, mask in color.items() if not mask.all()}
    assert dead == {
        "layer4.0.conv1.weight": 512 * 256 * 5,
        "layer4.0.conv2.weight": 512 * 512 * 8,
        "layer4.1.conv1.weight": 512 * 512 * 8,
        "layer4.1.conv2.weight": 512 * 512 * 8,
    }
    assert sum(dead.values()) == 6_946_816
    grey = prune.all_reachable(resnet18, SIZE, grey=True)
    assert grey.pop("conv1.weight").sum() == 64 * 49
    assert all(torch.equal(grey[name], color[name]) for name in grey)


def test_useless_weights_change_no_output_and_useful_ones_do():
    """Against a slow reference: set weights one at a time, on a network with positive values.

    Without BatchNorm's shifts and with positive weights nothing cancels, so that a weight on a
    path must show.
    """
    torch.manual_seed(0)
    model = models.build("resnet18", 10).double().eval()
    masks = {n: torch.rand_like(w) < 0.002 for n, w in prune.weights(model).items()}
    masks["conv1.weight"] = torch.rand_like(model.conv1.weight) < 0.1
    with torch.no_grad():
        for name, weight in prune.weights(model).items():
            weight.copy_(torch.rand_like(weight) * masks[name])
    found = prune.reachable(model, masks, SIZE, grey=True)
    images = torch.rand(1, 1, SIZE, SIZE, dtype=torch.double)
    images = torch.cat((images, torch.zeros(1, 2, SIZE, SIZE)), 1)
    with torch.no_grad():
        logits = model(images)
        seen = {True: 0, False: 0}
        for name in ("conv1.weight", "layer2.0.conv1.weight", "layer4.1.conv2.weight"):
            weight = prune.weights(model)[name]
            for index in masks[name].nonzero()[:40].tolist():
                index = tuple(index)
                old = weight[index].item()
                weight[index] = 1e9
                changed = not torch.equal(model(images), logits)
                weight[index] = old
                assert changed == bool(found[name][index]), (name, index)
                seen[changed] += 1
    assert min(seen.values()) > 10


def test_folding_equal_channels_changes_no_output(resnet18):
    images = models.normalize(torch.randint(256, (4, SIZE, SIZE), dtype=torch.uint8))
    expected = resnet18.eval()(images)
    prune.merge_grey_input_(resnet18)
    assert not resnet18.conv1.weight[:, 1:].any()
    torch.testing.assert_close(resnet18(images), expected, atol=1e-4, rtol=1e-4)


def test_the_largest_are_kept(live):
    """Away from floors and paths, the choice is plain global magnitude."""
    model, masks = live
    chosen = prune.choose_masks(model, masks, 2_000_000, SIZE, grey=True)
    weights = prune.weights(model)
    kept = torch.cat([weights[name][mask].abs() for name, mask in chosen.items()])
    cut = torch.cat([weights[n][masks[n] & ~chosen[n]].abs() for n in masks])
    threshold = kept.sort().values[2_000]
    assert (cut > threshold).sum() < 2_000


def test_masks_of_a_ladder_only_shrink(live):
    model, masks = live
    for budget in prune.geometric_schedule(4_228_570, 100_000, 2):
        smaller = prune.choose_masks(model, masks, budget, SIZE, grey=True)
        assert all(not (smaller[name] & ~masks[name]).any() for name in masks)
        prune.apply_(model, smaller)
        assert prune.count(model) == budget
        masks = smaller


def test_the_ladder_takes_the_same_share_each_time_and_ends_at_the_budget():
    steps = prune.geometric_schedule(1_600_000, 100_000, 4)
    assert steps == [800_000, 400_000, 200_000, 100_000]
    assert prune.geometric_schedule(4_228_570, 99_999, 7)[-1] == 99_999


@pytest.mark.parametrize(
    ("width", "channels"), [(1 / 4, (16, 32, 64, 128)), (3 / 32, (6, 12, 24, 48))]
)
def test_a_narrow_network_has_a_fraction_of_the_channels(width, channels):
    model = models.build("resnet18", 10, stem=1)
    prune.apply_width_(model, width)
    for layer, n in enumerate(channels, 1):
        for name in ("0.conv1", "0.conv2", "1.conv1", "1.conv2"):
            weight = model.get_submodule(f"layer{layer}.{name}").weight
            used = weight.flatten(1).any(1)
            assert used[:n].all() and not used[n:].any()
    assert not model.fc.weight[:, channels[-1] :].any()
