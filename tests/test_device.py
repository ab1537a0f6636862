"""The whole chain on a device that is not the CPU, without having one.

A stand-in for a GPU: its tensors are on "meta" as far as they and all code that asks can tell, and
compute on the CPU. As on a GPU, an operation on tensors of both sides is an error (but for numbers
without dimensions), and so is a tensor drawn there by a generator from here. As on Apple's, there
is no float64, and no copy into one elsewhere.
"""

import contextlib
import signal
from dataclasses import replace

import pytest
import tiny as shrunk
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import checkpoint
import distill
import hubconf
import models
import train
from runlog import estimate

FAR = torch.device("meta")  # whose name PyTorch lets pass anywhere, without a driver
FAR_GENERATORS: set[int] = set()
CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class FarTensor(Tensor):
    """A tensor on FAR, whose values are in `near`, on the CPU."""

    @staticmethod
    def __new__(cls, near: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype, device=FAR
        )

    def __init__(self, near: Tensor):
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with Far():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        return torch.nn.Parameter(copy) if isinstance(self, torch.nn.Parameter) else copy

    def __reduce_ex__(self, protocol):  # read again with map_location="cpu"
        return self.near.detach().__reduce_ex__(protocol)


class FarGenerator(torch.Generator):
    """A generator on FAR. PyTorch forgets subclasses of generators, not where they are."""

    def __new__(cls, device=None):
        generator = super().__new__(cls, "cpu")
        FAR_GENERATORS.add(generator._cdata)
        return generator

    def __init__(self, device=None):
        pass

    def __del__(self):
        FAR_GENERATORS.discard(self._cdata)

    @property
    def device(self):
        return FAR


class Far(TorchDispatchMode):
    """Within: FAR exists."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat = tree_flatten((args, kwargs))[0]
        far = any(isinstance(x, FarTensor) for x in flat)
        mixed = far and any(
            x.dim() for x in flat if isinstance(x, Tensor) and not isinstance(x, FarTensor)
        )
        if mixed and func not in CROSSING:
            raise RuntimeError(f"{func}: tensors on {FAR} and on the CPU")
        if far and any(isinstance(x, Tensor) and x.dtype == torch.double for x in flat):
            raise RuntimeError(f"{func}: there is no float64 on {FAR}")
        device = kwargs.get("device")
        to_far = far if device is None else torch.device(device).type == FAR.type
        for x in flat:
            if isinstance(x, torch.Generator) and (x._cdata in FAR_GENERATORS) != to_far:
                raise RuntimeError(f"{func}: a generator on the other side")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        if func is torch.ops.aten.copy_.default:
            to_far = isinstance(args[0], FarTensor)
        unwrap = lambda x: x.near if isinstance(x, FarTensor) else x  # noqa: E731
        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if func._schema.name.endswith("_") and isinstance(args[0], Tensor):
            return args[0]
        wrap = lambda x: FarTensor(x) if to_far and isinstance(x, Tensor) else x  # noqa: E731
        return tree_map(wrap, out)


@pytest.fixture
def far(monkeypatch):
    monkeypatch.setattr(models, "choose_device", lambda wanted: FAR)
    monkeypatch.setattr(models, "bf16_is_faster", lambda device: False)
    # Inference tensors cannot be views of others' values.
    monkeypatch.setattr(models, "infer", torch.no_grad()(models.infer.__wrapped__))
    monkeypatch.setattr(distill.Context, "autocast", lambda self: contextlib.nullcontext())
    for module in (distill, estimate):
        monkeypatch.setattr(module, "Generator", FarGenerator)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # keeps FarTensor's type
    with Far():
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_the_stand_in_tells_the_sides_apart(far):
    there, here = torch.ones(3, device=FAR), torch.ones(3)
    assert (there + 1).device == FAR and (there + 1).cpu().tolist() == [2, 2, 2]
    assert (there * torch.tensor(2.0)).device == FAR
    for wrong in (
        lambda: there + here,
        lambda: here[torch.zeros(1, dtype=torch.long, device=FAR)],
        lambda: torch.rand(3, generator=torch.Generator(), device=FAR),
        lambda: torch.rand(3, generator=FarGenerator(), device="cpu"),
        lambda: here.double().copy_(there),
    ):
        with pytest.raises(RuntimeError, match=r"and on the CPU|a generator on|no float64"):
            wrong()


@pytest.mark.parametrize("shape", [(28, 28), (30, 40), (2, 3, 28, 28)])
def test_pixels_from_another_device_go_back_there(shape, far):
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    transform = hubconf._transform(28, True)
    images = transform(pixels.to(FAR))
    assert images.device == FAR and torch.equal(images.cpu(), transform(pixels))


@pytest.mark.filterwarnings("ignore:.*to a meta parameter")  # for which PyTorch takes FarTensor
def test_the_whole_chain_on_another_device_than_the_cpu(far, tiny, tmp_path, monkeypatch, capsys):
    """In spite of two stops, and channels that die in every pruning step."""
    seen = []
    step = distill.TrainState.step

    def spy(self, images, targets, teacher, rate):
        tensors = [*self.model.parameters(), *self.model.buffers(), images, targets]
        seen.append({tensor.device for tensor in tensors})
        if len(seen) == 7:  # in the second epoch of what is left
            raise KeyboardInterrupt
        if len(seen) == 10:  # in the second round
            signal.raise_signal(signal.SIGTERM)  # the step is finished, and all saved
        return step(self, images, targets, teacher, rate)

    batches = replace(shrunk.CHAIN.batches, images=32)
    monkeypatch.setattr(train, "QUICK", replace(shrunk.CHAIN, batches=batches))
    monkeypatch.setattr(distill.TrainState, "step", spy)
    flags = [*tiny, "--width", "0.5", "--budget", "12000", "9000"]
    assert train.main(flags) == 130
    assert train.main(flags) == 130
    assert train.main(flags) == 0
    assert set().union(*seen) == {FAR}
    (weights,) = tmp_path.glob("runs/*/pruned_resnet18.pth")
    assert checkpoint.load(weights)[1]["parameters"] == 9_000
