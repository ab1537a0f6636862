"""The parameter budget: the count, the reachable weights, and masks that meet the budget exactly.

The count is what torchinfo prints as "Total params" while `torch.nn.utils.prune` masks are on the
model: the unpruned weights of convolutions and linear layers, and every other parameter (BatchNorm
weights and biases, linear biases). Buffers such as running statistics do not count.
"""

import copy

import torch
from torch import Tensor, nn

import runtime

MIN_CHANNELS = 8  # channels of a layer among which weights are protected, see `protected`
MIN_WEIGHTS = 64  # protected weights of a layer

Masks = dict[str, Tensor]  # bool, by the names and in the shapes of `weights`


class BudgetError(runtime.UserError):
    """The budget cannot be met."""


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The prunable parameters by name: the weights of all convolutions and linear layers."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def nonzero(weight: Tensor) -> Tensor:
    """Where a float32 copy of `weight` is not zero. Denormal numbers are: elsewhere, whether they
    are depends on a flag of the processor, which scripts set (`runtime`) and notebooks do not."""
    return ~(weight.float().abs() < torch.finfo(torch.float32).tiny)  # NaN is not zero


def count(model: nn.Module) -> int:
    """THE parameter count: non-zero prunable weights plus every other parameter."""
    kept = sum(int(nonzero(weight).sum()) for weight in weights(model).values())
    return kept + count_fixed(model)


def count_fixed(model: nn.Module) -> int:
    """Parameters that are never pruned: 9,610 in a ResNet18 with 10 classes."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - sum(weight.numel() for weight in weights(model).values())


def merge_grey_input_(model: nn.Module) -> None:
    """Sum the first convolution's weights over its input channels into the first; the others become
    zero.

    Gray images have three equal channels, so the output stays the same up to rounding, and two
    thirds of the weights are no longer needed.
    """
    first = next(weight for weight in weights(model).values() if weight.dim() == 4)
    with torch.no_grad():
        first[:, 0] = first.sum(1)
        first[:, 1:] = 0


def apply_width_(model: nn.Module, width: float) -> None:
    """Make a new network narrower: zero all but the first `width` of each layer's channels.

    The rest is a network with fewer channels (a multiple of 8; of 2 below an eighth of the width),
    initialized as such (He et al., arXiv 1502.01852). Training leaves the zero channels out of its
    computation (`rewrite.trim_channels_`), so multiply-adds fall with width^2 (the time of a step
    falls less); their BatchNorm parameters still count.
    """
    if width == 1:
        return
    step = 8 if width >= 1 / 8 else 2
    with torch.no_grad():
        for weight in weights(model).values():
            outputs, inputs = (max(1, round(width * n / step)) * step for n in weight.shape[:2])
            if weight.dim() == 4:
                weight[outputs:] = 0
            if weight.shape[1] > 3:  # not the image
                weight[:, inputs:] = 0
            weight.div_(width**0.5)


def path_gradients(
    model: nn.Module, values: dict[str, Tensor], image_size: int, grey: bool
) -> dict[str, Tensor]:
    """For each weight, the gradient of the summed logits; positive if it is on a path from an input
    pixel to a logit, else 0.

    The network is run on an image of ones with the non-negative `values` as its weights (by name),
    without BatchNorm and with average pooling for max-pooling. No term can cancel, so the gradient
    is positive exactly if all other weights of some path through the weight are (cf. SynFlow, arXiv
    2006.05467). Returns float64 tensors by name and in the shapes of the weights, on the CPU unless
    the model is on a CUDA GPU.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        device = torch.device("cpu")  # others may know no float64
    paths = copy.deepcopy(model).to(device).double().eval()  # path counts overflow fp32
    for name, module in list(paths.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.BatchNorm2d):
            setattr(paths.get_submodule(parent), child, nn.Identity())
        elif isinstance(module, nn.MaxPool2d):
            average = nn.AvgPool2d(module.kernel_size, module.stride, module.padding)
            setattr(paths.get_submodule(parent), child, average)
    parameters = weights(paths)
    with torch.no_grad():
        for name, weight in parameters.items():
            weight.copy_(values[name].to(device))  # no other type on the way: MPS has no float64
    image = torch.ones(1, 3, image_size, image_size, dtype=torch.double, device=device)
    if grey:
        image[:, 1:] = 0  # see `merge_grey_input_`
    gradients = torch.autograd.grad(paths(image).sum(), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def reachable(model: nn.Module, masks: Masks, image_size: int, grey: bool) -> Masks:
    """The weights of `masks` that are on a path of such weights from an input pixel to a logit.

    All others cannot change an output: kernel positions that only see padding, input channels that
    are merged for gray images, filters whose output is unused, weights of channels without input.
    """
    gradients = path_gradients(model, masks, image_size, grey)
    return {name: mask & (gradients[name] > 0).to(mask.device) for name, mask in masks.items()}


def all_reachable(model: nn.Module, image_size: int, grey: bool) -> Masks:
    """Masks of all reachable weights of the unpruned network, where pruning starts."""
    dense = {name: torch.ones_like(weight, dtype=bool) for name, weight in weights(model).items()}
    return reachable(model, dense, image_size, grey)


def protected(model: nn.Module, masks: Masks) -> Masks:
    """Weights that are never pruned, so that no layer is cut off.

    In each layer, only the first 8 input and 8 output channels are considered (in the classifier:
    all outputs). Every such channel pair keeps its largest kernel weight; if that is fewer than 64
    weights, the largest others in the block are added. Using the same 8 channels everywhere makes
    the protected weights a connected network.
    """
    found = {}
    for name, weight in weights(model).items():
        block = torch.zeros_like(masks[name])
        outputs = MIN_CHANNELS if weight.dim() == 4 else len(weight)  # every class keeps its share
        block[:outputs, :MIN_CHANNELS] = masks[name][:outputs, :MIN_CHANNELS]
        scores = weight.detach().abs().masked_fill(~block, -1).reshape(*weight.shape[:2], -1)
        best = torch.zeros_like(scores, dtype=bool)
        best.scatter_(2, scores.argmax(2, keepdim=True), True)
        best = best.reshape(block.shape) & block
        rest = MIN_WEIGHTS - int(best.sum())
        found[name] = best | _largest(weight.detach().abs(), block & ~best, max(rest, 0))
    return found


def budget_range(model: nn.Module, image_size: int, grey: bool) -> tuple[int, int]:
    """Smallest and largest budget of `choose_masks`, from the weights that are not zero."""
    masks = all_reachable(model, image_size, grey)
    masks = {name: masks[name] & (weight != 0) for name, weight in weights(model).items()}
    smallest, largest = (
        count_fixed(model) + sum(int(mask.sum()) for mask in part.values())
        for part in (protected(model, masks), masks)
    )
    return smallest, largest


def choose_masks(model: nn.Module, masks: Masks, budget: int, image_size: int, grey: bool) -> Masks:
    """Subsets of `masks` that leave exactly `budget` parameters, all of them reachable.

    Start from the per-layer minimum (`protected`) and the largest magnitudes over all layers. Some
    of these weights may be disconnected (on no path from input to logit). Drop them, and refill
    with the largest weights that complete a path of those that are left. If there are too few such
    weights, which takes magnitudes unlike any trained network's, the selection stays as it is.
    Raises BudgetError if `budget` is below the per-layer minimum or above the number of reachable
    parameters.
    """
    keep = budget - count_fixed(model)
    magnitudes = {name: weight.detach().abs() for name, weight in weights(model).items()}
    chosen = _fill(magnitudes, protected(model, masks), masks, keep)
    kept = reachable(model, chosen, image_size, grey)
    if all(torch.equal(kept[name], chosen[name]) for name in chosen):
        return chosen
    addable = {
        name: masks[name] & (gradient > 0).to(masks[name].device)
        for name, gradient in path_gradients(model, kept, image_size, grey).items()
    }
    if sum(int((kept[name] | addable[name]).sum()) for name in kept) < keep:
        return chosen
    return _fill(magnitudes, kept, addable, keep)


def _largest(scores: Tensor, candidates: Tensor, n: int) -> Tensor:
    """Mask of the `n` highest-scoring candidates, or of all if there are fewer. `scores` >= 0."""
    scores = scores.masked_fill(~candidates, -1).flatten()
    chosen = torch.zeros_like(scores, dtype=bool)
    n = min(n, int(candidates.sum()))
    chosen[scores.topk(n).indices] = True  # indices, not a threshold, because of ties
    return chosen.view_as(candidates)


def _fill(scores: dict[str, Tensor], kept: Masks, candidates: Masks, keep: int) -> Masks:
    """`kept`, and the highest-scoring candidates over all tensors up to `keep` weights."""
    scores = torch.cat([scores[name].flatten() for name in kept])
    flat_kept = torch.cat([mask.flatten() for mask in kept.values()])
    flat_candidates = torch.cat([candidates[name].flatten() for name in kept]) & ~flat_kept
    missing = keep - int(flat_kept.sum())
    if not 0 <= missing <= int(flat_candidates.sum()):
        most = int((flat_kept | flat_candidates).sum())
        raise BudgetError(f"{keep} weights to keep, but only {keep - missing} to {most} can be")
    chosen = flat_kept | _largest(scores, flat_candidates, missing)
    parts = chosen.split([mask.numel() for mask in kept.values()])
    return {n: part.view_as(mask) for (n, mask), part in zip(kept.items(), parts, strict=True)}


def apply_(model: nn.Module, masks: Masks) -> None:
    """Set pruned weights to zero, and kept weights that are exactly 0.0 to 1e-12.

    A kept weight of 0.0 would be missing in `count` and in the file; 1e-12 changes no output.
    """
    with torch.no_grad():
        for name, weight in weights(model).items():
            weight.masked_fill_(masks[name] & (weight == 0), 1e-12)
            weight.masked_fill_(~masks[name], 0)


def geometric_schedule(start: int, budget: int, steps: int) -> list[int]:
    """Budgets of `steps` pruning steps from `start` to exactly `budget`, by equal factors."""
    return [round(start * (budget / start) ** (step / steps)) for step in range(1, steps + 1)]


def with_masks(model: nn.Module) -> nn.Module:
    """A copy with `torch.nn.utils.prune` masks for its zeros, so that torchinfo counts the rest."""
    from torch.nn.utils import prune as torch_prune

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            torch_prune.custom_from_mask(module, "weight", module.weight != 0)
    return model
