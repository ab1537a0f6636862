"""One training of one network: its settings, loss, step, epoch, and `fit`.

Teacher, student and pruned network differ by arguments only. Nothing here reads or writes files:
`fit` passes its state, and a row of figures for each epoch, to its caller.
"""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from tqdm import tqdm

import augment
import models
import prune
import runtime
from engine import plan, rewrite
from engine.inference import SparseResNet
from engine.training import SparseForward, sparse_forward_if_faster

WARMUP = 0.1  # fraction of the steps in which the learning rate rises
MOMENTUM = 0.9
MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm
EMA_HORIZON = 0.03  # fraction of a training's steps over which the EMA of the weights looks back
EMA_UPDATES = 10  # updates of the EMA within its horizon
MIN_STEPS = 16  # of a pass over the images: with fewer, batches are halved, ...
MIN_BATCH_SIZE = 32  # ... down to this size
CACHE_BYTES = 2**31  # of teacher logits, which other batches get anew
BN_BATCHES = 8  # batches for BatchNorm recalibration after a pruning step


# --- settings and data ---------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """Hyperparameters of one training by SGD with Nesterov momentum; the learning rate rises, then
    falls to 0."""

    epochs: int
    learning_rate: float = 0.1  # at the peak
    weight_decay: float = 5e-4
    kd_weight: float = 0.5  # of the distillation loss, if there is a teacher; labels have the rest
    temperature: float = 4.0
    unaugmented: float = 0.25  # fraction of the epochs, the last ones, on images only flipped
    # Augmented batches repeat after so many epochs (0: never), so that the teacher's logits can be
    # cached. Unaugmented batches repeat so that each comes about as often.
    augment_period: int = 0


@dataclass(frozen=True)
class Batches:
    """The training images of a run, and their augmentation."""

    images: int | None = None  # of the training set; None: all
    batch_size: int = 256
    min_steps: int = 36  # of an epoch; it makes several passes over a small data set
    crop_scale: tuple[float, float] = (0.8, 1.0)  # of the image's area
    mixup_alpha: float = 0.2
    erasing: float = 0.5  # probability that a rectangle of an image is replaced by noise


@dataclass(frozen=True)
class Stage:
    """One training of a run: `teacher`, `student`, or `pruned` (one round for each budget)."""

    name: str
    arch: str
    stem: int  # its total stride
    width: float  # fraction of the channels
    training: Training
    number: int  # teacher 0, student 1, pruned 2 and more: seeds and saved states use it
    file: str
    budgets: tuple[int, ...] = ()  # of the pruning steps, one before each of the first epochs
    round: int = 1
    rounds: int = 1

    @property
    def title(self) -> str:
        return self.name if self.rounds == 1 else f"{self.name} {self.round}/{self.rounds}"


@dataclass(frozen=True)
class Context:
    """What all trainings of a run share: device, precision, and the kind of images."""

    device: torch.device
    bf16: bool
    image_size: int
    grey: bool

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def inference_copy(self, model: nn.Module) -> nn.Module:
        """An inference-only copy: a SparseResNet if skipping zeros is faster, else
        `rewrite.inference_copy` (dense, BatchNorm folded)."""
        if plan.sparse_is_faster(model, self.image_size, self.device, self.bf16):
            return SparseResNet(rewrite.untrimmed(model), self.image_size, self.grey)
        return rewrite.inference_copy(model, self.device, self.bf16, self.image_size)

    def logits(self, model: nn.Module, images_u8: Tensor) -> Tensor:
        """As `models.infer`, of an inference-only copy: unused channels and zeros are skipped."""
        return models.infer(self.inference_copy(model), images_u8)


def batch_layout(n: int, batches: Batches) -> tuple[int, int, int]:
    """(batch size, steps of a pass over `n` images, passes of an epoch).

    Trainings are counted in epochs, but optimizer steps are what improves a network. So an epoch
    has a minimum number of steps: on small data sets batches are smaller, and it makes several
    passes.
    """
    batch_size = batches.batch_size
    while n // batch_size < MIN_STEPS and batch_size >= 2 * MIN_BATCH_SIZE:
        batch_size //= 2
    batch_size = min(batch_size, n)
    steps = n // batch_size
    return batch_size, steps, math.ceil(batches.min_steps / steps)


class CudaGraphed:
    """Wrap a function of tensors in a CUDA graph: warm up on a side stream, capture, then replay.

    A training step of these networks is hundreds of kernels, most of which take less time than
    their launch. Input shapes must not change; any other tensor that the function reads may only be
    modified in place. The returned tensors are overwritten by the next call. On other devices, and
    with several processes, the function is called directly.
    """

    WARMUP_CALLS = 3

    def __init__(self, function: Callable):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *inputs: Tensor):
        if not inputs[0].is_cuda or runtime.world_size() > 1:
            return self.function(*inputs)
        self.calls += 1
        if self.calls <= self.WARMUP_CALLS:  # on a side stream, as the capture will be
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                outputs = self.function(*inputs)
            current.wait_stream(stream)
            return outputs
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        for static, tensor in zip(self.inputs, inputs, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.outputs


class Teacher:
    """The teacher: one network, or an ensemble whose logits are averaged.

    The mean of logits is the geometric mean of the softmax outputs (Hinton et al., arXiv
    1503.02531). Logits are cached for batches that repeat (`Training.augment_period`), as in FKD
    (arXiv 2112.01528), but in memory: crops are cheap to recompute, while a teacher's forward pass
    takes up to half of a step. `networks` as from `Context.inference_copy`.
    """

    def __init__(self, networks: list[nn.Module]):
        self.networks = networks
        self.forward = CudaGraphed(self._forward)
        self.cache: dict[Hashable, Tensor] = {}

    def logits(self, images: Tensor, batch: Hashable = None) -> Tensor:
        """float32 (N, classes) for normalized `images`; `batch`: its cache key, if it repeats."""
        if batch is not None and batch in self.cache:
            return self.cache[batch]
        logits = self.forward(images)
        if batch is not None and len(self.cache) * logits.nbytes < CACHE_BYTES:
            self.cache[batch] = logits.clone()
        return logits

    @torch.no_grad()
    def _forward(self, images: Tensor) -> Tensor:
        logits = [n(images.to(next(n.parameters()).dtype)).float() for n in self.networks]
        return torch.stack(logits).mean(0)


class TrainingData:
    """The images of a run, all on the device, and their augmented batches.

    `images_u8` as in `models.normalize`, `labels` int64 (N,); `val` such a pair, or None; `flip`:
    whether images are mirrored at random.
    """

    def __init__(
        self,
        images_u8: Tensor,
        labels: Tensor,
        classes: int,
        settings: Batches,
        val: tuple[Tensor, Tensor] | None = None,
        flip: bool = True,
    ):
        self.images_u8, self.labels, self.classes = images_u8, labels, classes
        self.settings, self.val, self.flip = settings, val, flip
        self.batch_size, self.steps, self.passes = batch_layout(len(labels), settings)

    def epoch(
        self, epoch: int, training: Training, generator: Generator
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of one epoch of `training`, whose last ones are unaugmented."""
        augmented = epoch < augmented_epochs(training)
        return chain.from_iterable(self.batches(generator, augmented) for _ in range(self.passes))

    def batches(
        self, generator: Generator, augmented: bool = True
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """One pass of (images, targets): normalized float32 (N, 3, H, W) and probabilities (N,
        classes), flipped and, if `augmented`, cropped, erased and mixed."""
        settings = self.settings
        if not augmented:
            settings = replace(settings, crop_scale=(1.0, 1.0), mixup_alpha=0.0, erasing=0.0)
        for index in augment.batches(len(self.labels), self.batch_size, generator):
            images = augment.random_resized_crop(
                self.images_u8[index], generator, settings.crop_scale, flip=self.flip
            )
            images = augment.random_erasing(images, settings.erasing, generator)
            targets = F.one_hot(self.labels[index], self.classes).float()
            images, targets = augment.mixup(images, targets, settings.mixup_alpha, generator)
            yield models.normalize(images), targets


# --- one step -----------------------------------------------------------------------------------


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, kd_weight: float, temperature: float
) -> Tensor:
    """kd_weight * T^2 * KL(teacher || student at temperature T) + (1 - kd_weight) * cross-entropy.

    Hinton et al., arXiv 1503.02531; the mean is over the batch. All (N, classes) float; `targets`
    are probabilities.
    """
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(teacher_logits / temperature, 1),
        log_target=True,
        reduction="batchmean",
    )
    labels = F.cross_entropy(logits, targets)
    return kd_weight * temperature**2 * divergence + (1 - kd_weight) * labels


def largest_budget(model: nn.Module, image_size: int, grey: bool) -> int:
    """The largest budget of a first pruning step of `model`, whose unused channels stay unused."""
    slim = rewrite.trim_channels_(rewrite.trim_(copy.deepcopy(model), image_size))
    live = prune.all_reachable(slim, image_size, grey)
    most = prune.count_fixed(model) + sum(int(mask.sum()) for mask in live.values())
    return min(most, prune.count(model))


def augmented_epochs(training: Training) -> int:
    """How many of its epochs, the first ones, are augmented."""
    return math.ceil((1 - training.unaugmented) * training.epochs)


def drawn_epoch(epoch: int, training: Training) -> int:
    """The first epoch with the same batches as `epoch`."""
    if not training.augment_period:
        return epoch
    augmented = augmented_epochs(training)
    if epoch < augmented:
        return epoch % training.augment_period
    times = math.ceil(augmented / training.augment_period)
    return augmented + (epoch - augmented) % math.ceil((training.epochs - augmented) / times)


def distinct_epochs(training: Training, done: int = 0) -> int:
    """How many different epochs of batches a training has, after `done` epochs."""
    return len({drawn_epoch(epoch, training) for epoch in range(done, training.epochs)})


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warmup over the first tenth of the steps, times half a cosine down to 0."""
    rise = min(1.0, (step + 1) / (WARMUP * steps))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * (step + 1) / steps))


class TrainState:
    """A network in training and all that a step changes: model, EMA, masks, optimizer.

    The EMA of the weights is updated after each `average_every` steps.
    """

    def __init__(
        self, model: nn.Module, training: Training, context: Context, average_every: int = 16
    ):
        self.training, self.context, self.average_every = training, context, average_every
        fixed = prune.count_fixed(model)
        model = rewrite.trim_channels_(rewrite.trim_(model, context.image_size))
        self.left_out = fixed - prune.count_fixed(model)  # parameters that count all the same
        model = rewrite.use_matmul_convs_(model)
        layout = models.memory_format(context.device)
        self.model = model.to(context.device, memory_format=layout)
        self.trained = self.model
        if runtime.world_size() > 1:
            runtime.synchronize_batchnorm_(self.model)
            self.trained = DistributedDataParallel(self.model)
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / EMA_UPDATES), use_buffers=True
        )
        self.masks: prune.Masks | None = None
        self._graphed = CudaGraphed(self._step)
        self.sparse: SparseForward | None = None  # instead of the model, if that is faster
        self._choose_forward()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=training.learning_rate,
            momentum=MOMENTUM,
            weight_decay=training.weight_decay,
            nesterov=True,
            fused=context.device.type in ("cpu", "cuda"),
        )

    def set_masks(self, masks: prune.Masks) -> None:
        """From now on all other weights are zero, in the EMA as well."""
        weights = prune.weights(self.model)
        if self.masks is None:
            self._masked = [weights[name] for name in masks]
            self._factors = {name: torch.empty_like(weights[name]) for name in masks}
            self._graphed = CudaGraphed(self._step)  # a graph without masks is of no use
        for name, mask in masks.items():
            self._factors[name].copy_(mask)
        self.masks = masks
        self.apply_masks()
        self._choose_forward()

    def _choose_forward(self) -> None:
        """Skip the weights that are zero from now on, if that is faster."""
        if runtime.world_size() == 1:
            kind = self.context.image_size, self.context.bf16
            self.sparse = sparse_forward_if_faster(self.model, *kind)

    def apply_masks(self) -> None:
        """Make pruned weights 0 and kept ones not exactly 0, in the EMA as well."""
        for model in (self.model, self.average.module):
            prune.apply_(model, self.masks)

    def prune_to(self, budget: int, images: Iterable[Tensor]) -> None:
        """One pruning step: masks for `budget`, BatchNorm recalibrated on `images` (Li et al.,
        arXiv 2007.02491), the EMA restarted."""
        masks, kind = self.masks, (self.context.image_size, self.context.grey)
        if masks is None:
            if self.context.grey:
                prune.merge_grey_input_(self.model)
            masks = prune.all_reachable(self.model, *kind)
        self.set_masks(prune.choose_masks(self.model, masks, budget - self.left_out, *kind))
        with self.context.autocast():
            update_bn(images, self.model)
        self.average.n_averaged.zero_()
        self.average.update_parameters(self.model)

    def step(
        self, images: Tensor, targets: Tensor, teacher_logits: Tensor | None, rate: float
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns loss and logits (N, classes), without a synchronization.

        `images` float32 (N, 3, H, W), `targets` float (N, classes). `teacher_logits` float (N,
        classes), or None: cross-entropy only.
        """
        if images.is_cuda:  # a graph reads it from the device
            rate = torch.full((), rate, device=images.device)
        extra = [] if teacher_logits is None else [teacher_logits]
        return self._graphed(images, targets, rate, *extra)

    def _step(
        self,
        images: Tensor,
        targets: Tensor,
        rate: float | Tensor,
        teacher_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        training = self.training
        sparse = self.sparse is not None and len(images) % self.sparse.images == 0
        with self.context.autocast():
            logits = (self.sparse if sparse else self.trained)(images)
        if teacher_logits is None:
            loss = F.cross_entropy(logits.float(), targets)
        else:
            loss = distillation_loss(
                logits.float(), teacher_logits, targets, training.kd_weight, training.temperature
            )
        self.optimizer.zero_grad()
        loss.backward()
        if self.masks is not None:  # pruned weights must not count in the norm
            factors = list(self._factors.values())
            torch._foreach_mul_([weight.grad for weight in self._masked], factors)
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.masks is not None:  # momentum and weight decay must not revive pruned weights
            with torch.no_grad():
                torch._foreach_mul_(self._masked, factors)
        return loss.detach(), logits.detach()

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "masks": self.masks,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["masks"] is not None:
            self.set_masks(
                {name: mask.to(self.context.device) for name, mask in state["masks"].items()}
            )


# --- one training -------------------------------------------------------------------------------


class Stop:
    """Within: Ctrl-C and SIGTERM only set `requested`, so that the step can be finished and saved.

    Raises KeyboardInterrupt at the end if `requested` came after the last look at it. A second
    signal stops at once, as does the first with several processes, which cannot agree.
    """

    def __init__(self):
        self.requested = False
        self.handlers: dict = {}

    def __enter__(self) -> "Stop":
        if runtime.world_size() > 1 or threading.current_thread() != threading.main_thread():
            return self  # only the main thread gets signals, and may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, error: type | None, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.requested and error is None:
            raise KeyboardInterrupt


class Progress:
    """Progress within an epoch: steps done, their losses and the accuracy, kept on the device."""

    def __init__(self, steps: int, classes: int, device: torch.device):
        from torchmetrics.classification import MulticlassAccuracy  # and all of matplotlib

        self.step, self.seconds = 0, 0.0
        self.losses = torch.zeros(steps, device=device)
        self.accuracy = MulticlassAccuracy(
            classes, average="micro", validate_args=False, sync_on_compute=False
        ).to(device)
        self.accuracy.persistent(True)

    def state_dict(self) -> dict:
        accuracy = self.accuracy.state_dict()
        figures = {"losses": self.losses, "accuracy": accuracy}
        return {"step": self.step, "seconds": self.seconds, **figures}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses.copy_(state["losses"])
        if runtime.rank() == 0:  # its counts are summed over all processes
            self.accuracy.load_state_dict(state["accuracy"])
            self.accuracy.to(self.losses.device)  # torchmetrics takes the tensors that it is given

    def result(self) -> tuple[Tensor, float]:
        """Losses of all steps (steps,), on the CPU, and accuracy, over all processes."""
        if runtime.world_size() > 1:
            dist.all_reduce(self.losses)
            self.losses /= runtime.world_size()
            self.accuracy.sync()
        return self.losses.cpu(), self.accuracy.compute().item()


def train_epoch(
    network: TrainState,
    batches: Iterable[tuple[Tensor, Tensor]],
    teacher: Teacher | None,
    rates: list[float],
    progress: Progress,
    stop: Stop,
    title: str = "",
    before: int = 0,
    cache_key: int | None = None,
) -> None:
    """Train on `batches` of (images, targets) for one epoch, with one learning rate per step.

    `before`: optimizer steps of earlier epochs, for the EMA's interval. `cache_key`: of these
    batches' teacher logits, if the batches repeat. Resumes at `progress.step` by skipping batches;
    returns early if `stop` is requested. With several processes each trains on its shard of every
    batch. The training accuracy under mixup counts the class with the larger weight.
    """
    network.model.train()
    hidden = True if runtime.rank() else None  # None: unless there is a terminal
    bar = tqdm(batches, title, len(rates), leave=False, disable=hidden)
    for step, (images, targets) in enumerate(bar):
        if step < progress.step:
            continue
        if stop.requested:
            bar.close()
            return
        images, targets = runtime.local_shard(images), runtime.local_shard(targets)
        teacher_logits = None
        if teacher is not None:
            teacher_logits = teacher.logits(
                images, None if cache_key is None else (cache_key, step)
            )
        loss, logits = network.step(images, targets, teacher_logits, rates[step])
        progress.losses[step] = loss
        progress.accuracy.update(logits, targets.argmax(1))
        progress.step = done = step + 1
        if (before + done) % network.average_every == 0:
            network.average.update_parameters(network.model)
        if not bar.disable and done % (len(rates) // 10 + 1) == 0 and done < len(rates):
            mean, right = progress.losses[:done].mean().item(), progress.accuracy.compute().item()
            bar.set_postfix_str(f"loss {mean:.3f} accuracy {right:.1%}")
    if network.masks is not None:
        network.apply_masks()


def fit(
    stage: Stage,
    model: nn.Module,
    teachers: list[nn.Module],
    images: TrainingData,
    context: Context,
    *,
    seed: int,
    saved: dict | None = None,
    save: Callable[[dict, dict | None], None] = lambda state, row: None,
    stop: Stop | None = None,
) -> nn.Module:
    """Train `model`; returns a copy with the weights that validation accuracy selected.

    `teachers` as in `Teacher`; none: cross-entropy only. After each epoch `save` is called with all
    that the next one needs and a row of figures; `saved` is such a state to resume from. Each epoch
    has a generator of its own, seeded by run, stage and epoch, so that it can be repeated. If
    `stop` is requested, the step is finished, `save` called without a row, and KeyboardInterrupt
    raised. Raises FloatingPointError if the loss is not finite.
    """
    stop, training, steps = stop or Stop(), stage.training, images.passes * images.steps
    teacher = Teacher(teachers) if teachers else None
    average_every = max(1, round(EMA_HORIZON * training.epochs * steps / EMA_UPDATES))
    network = TrainState(model, training, context, average_every)
    first, within, best = 0, None, {"score": -1.0}
    if saved is not None:
        network.load_state_dict(saved["network"])
        first, within, best = saved["epoch"], saved["progress"], saved["best"]
        part = " and a part of the next" if within else ""
        epochs = f"{first} epoch{'s' * (first != 1)}"
        runtime.print_rank0(f"{stage.title}: resuming after {epochs}{part}")

    def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        generator = Generator(context.device)
        drawn = drawn_epoch(epoch, training)
        generator.manual_seed((seed * 100 + stage.number) * 100_000 + drawn)
        return images.epoch(drawn, training, generator)

    def state(epoch: int, progress: Progress | None = None) -> dict:
        return {
            "epoch": epoch,
            "network": network.state_dict(),
            "best": best,
            "progress": None if progress is None else progress.state_dict(),
        }

    for epoch in range(first, training.epochs):
        progress = Progress(steps, images.classes, context.device)
        if within:
            progress.load_state_dict(within)
        began = time.perf_counter() - progress.seconds
        if within:
            within = None
        elif epoch < len(stage.budgets):
            few = zip(range(BN_BATCHES), batches(epoch), strict=False)
            network.prune_to(stage.budgets[epoch], [images for _, (images, _) in few])
        rates = [
            learning_rate(epoch * steps + step, training.epochs * steps, training.learning_rate)
            for step in range(steps)
        ]
        train_epoch(
            network,
            batches(epoch),
            teacher,
            rates,
            progress,
            stop,
            title=f"{stage.title}, {epoch + 1}/{training.epochs}",
            before=epoch * steps,
            cache_key=drawn_epoch(epoch, training) if training.augment_period else None,
        )
        if progress.step < steps:
            progress.seconds = time.perf_counter() - began
            save(state(epoch, progress), None)
            raise KeyboardInterrupt
        losses, accuracy = progress.result()
        _check_finite(losses, stage.title, epoch)
        val, val_average = (
            validate(m, images.val, context) for m in (network.model, network.average.module)
        )
        if epoch + 1 >= len(stage.budgets):  # earlier networks have too many parameters
            best = _better(best, epoch + 1, network, val, val_average)
        row = {
            "stage": stage.name,
            "round": stage.round,
            "epoch": epoch + 1,
            "parameters": prune.count(network.model) + network.left_out,
            "loss": round(losses.mean().item(), 5),
            "train_accuracy": round(accuracy, 5),
            "val_accuracy": "" if val is None else round(val, 5),
            "val_accuracy_average": "" if val is None else round(val_average, 5),
            "learning_rate": float(f"{rates[-1]:.3g}"),
            "seconds": round(time.perf_counter() - began, 1),
        }
        save(state(epoch + 1), row)
        _log_epoch(stage, row)
        if stop.requested:
            raise KeyboardInterrupt
    network.model.load_state_dict(best["model"])
    return rewrite.untrimmed(network.model)


def _better(
    best: dict, epoch: int, network: TrainState, val: float | None, val_average: float | None
) -> dict:
    """`best`, or this epoch's weights or their EMA if their validation accuracy is higher.

    Without validation images: the EMA after the last epoch.
    """
    averaged = val is None or val_average >= val
    score = float(epoch) if val is None else max(val, val_average)
    if score <= best["score"]:
        return best
    chosen = network.average.module if averaged else network.model
    weights = {name: tensor.clone() for name, tensor in chosen.state_dict().items()}
    return {"score": score, "epoch": epoch, "averaged": averaged, "model": weights}


def _check_finite(losses: Tensor, title: str, epoch: int) -> None:
    """Raises FloatingPointError with the first step whose loss is not finite."""
    if len(bad := losses.isfinite().logical_not().nonzero()):
        step = bad[0].item()
        raise FloatingPointError(
            f"stage {title}, epoch {epoch + 1}, step {step + 1}: the loss is {losses[step].item()}"
        )


def _log_epoch(stage: Stage, row: dict) -> None:
    """An epoch's line in the terminal."""
    shown = ""
    if row["val_accuracy"] != "":
        val, average = row["val_accuracy"], row["val_accuracy_average"]
        shown = f"  val {val:.2%}  EMA {average:.2%}"
    epochs = f"{row['epoch']:4}/{stage.training.epochs}"
    runtime.print_rank0(
        f"{stage.title:11}{epochs}  {row['parameters']:>10,} parameters  "
        f"loss {row['loss']:.4f}{shown}  {row['seconds']:.0f} s"
    )


def validate(model: nn.Module, val: tuple[Tensor, Tensor] | None, context: Context) -> float | None:
    """Accuracy on (images, labels) in the context's precision; None without images."""
    if val is None:
        return None
    return models.accuracy(context.logits(model, val[0]), val[1])
