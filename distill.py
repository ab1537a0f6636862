"""One training of one network: what it is, its loss, a step, an epoch, `fit`.

Teacher, student and the rounds of pruning differ by arguments only. Nothing here knows of files: a
training hands its state, and a row of figures for each epoch, to whoever called it.
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
from engine import plan, rewrite, training
from engine.inference import SparseResNet

WARMUP = 0.1  # share of the steps in which the learning rate rises
UNAUGMENTED = 0.25  # fraction of the epochs, the last ones, on images that are only flipped
MAX_GRAD_NORM = 1.0  # largest norm of the gradient
EMA_HORIZON = 0.03  # fraction of a training's steps over which the EMA of the weights looks back
EMA_UPDATES = 10  # updates of the EMA within its horizon
MIN_STEPS = 16  # of a pass over the images: with fewer, batches are halved, ...
MIN_BATCH_SIZE = 32  # ... down to this size
BN_BATCHES = 8  # batches for BatchNorm recalibration after a pruning step


# --- what is trained, and on what ---------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One training of one network, in which the learning rate rises, then falls to 0."""

    epochs: int
    optimizer: str = "adamw"  # or "sgd", with Nesterov momentum 0.9
    learning_rate: float = 2e-3  # at the peak
    weight_decay: float = 0.05
    kd_weight: float = 0.0  # of the distillation loss; the labels have the rest
    temperature: float = 1.0
    cuts: int = 0  # one before each of the first epochs
    share: int = 0  # of the way down to the budget, beside the other rounds'; 0: as many as cuts
    views: int = 0  # epochs after which the same crops and mixtures come again; 0: never


@dataclass(frozen=True)
class Recipe:
    teacher: Stage | None  # None: the dense student teaches what is left of it
    student: Stage | None  # None: a given one is trained on (--student)
    pruned: tuple[Stage, ...]  # rounds of pruning, each from the network before it
    budgets: tuple[int, ...] = ()  # what rounds end with; (): evenly, by their shares, to --budget
    images: int | None = None  # of the training set; None: all
    batch_size: int = 256
    least_steps: int = 36  # of an epoch; fewer images are seen several times in it
    taught_by: str = "first"  # or "last": of the networks that are good enough to teach the next
    width: float = 1.0  # share of the channels that new networks have; the others stay zero
    crop_scale: tuple[float, float] = (0.85, 1.0)  # share of the image's area
    mixup_alpha: float = 0.1
    erased: float = 0.0  # share of the images of which a rectangle is noise


@dataclass(frozen=True)
class Part:
    """One training of a run: the stage `teacher`, `student`, or a round of `pruned`."""

    name: str
    stage: Stage
    number: int  # in the run, from 0
    file: str
    cuts: tuple[int, ...] = ()  # the budgets that the first epochs begin with
    round: int = 1
    rounds: int = 1

    @property
    def title(self) -> str:
        return self.name if self.rounds == 1 else f"{self.name} {self.round}/{self.rounds}"


@dataclass(frozen=True)
class Context:
    """What all trainings of a run share: where they compute, and for which images."""

    device: torch.device
    bf16: bool
    image_size: int
    grey: bool

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def frozen(self, model: nn.Module) -> nn.Module:
        """An inference-only copy: a SparseResNet if skipping zeros is faster, else
        `rewrite.inference_copy` (dense, BatchNorm folded)."""
        # Compared on the trimmed model: the dense path has no empty channels either.
        trimmed = rewrite.trim_channels_(copy.deepcopy(model))
        if plan.sparse_is_faster(trimmed, self.image_size, self.device):
            return SparseResNet(rewrite.untrimmed(model), self.image_size, self.grey)
        return rewrite.inference_copy(model, self.device, self.bf16, self.image_size)


def batch_layout(n: int, recipe: Recipe) -> tuple[int, int, int]:
    """(images of a batch, steps of a pass over `n` images, passes of an epoch).

    What trains a network is steps. Recipes count epochs, so an epoch has a least number of steps.
    """
    batch_size = recipe.batch_size
    while n // batch_size < MIN_STEPS and batch_size >= 2 * MIN_BATCH_SIZE:
        batch_size //= 2
    batch_size = min(batch_size, n)
    steps = n // batch_size
    return batch_size, steps, math.ceil(recipe.least_steps / steps)


class CudaGraphed:
    """A function of tensors that a GPU of CUDA's is asked for with one launch.

    A step of these networks is hundreds of kernels, most of them sooner done than launched. The
    first calls run as they are, so that all that is made on first use is there; the next is
    recorded as a CUDA graph, and replayed from then on. So shapes stay, and all that the function
    reads but its arguments changes in place only. What is returned is overwritten by the next call.
    On other devices, and if several processes share a step, it is the function itself.
    """

    FIRST = 3  # calls

    def __init__(self, function: Callable):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *inputs: Tensor):
        if not inputs[0].is_cuda or runtime.world_size() > 1:
            return self.function(*inputs)
        self.calls += 1
        if self.calls <= self.FIRST:  # on another stream, as recording will be
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
        for kept, tensor in zip(self.inputs, inputs, strict=True):
            kept.copy_(tensor)
        self.graph.replay()
        return self.outputs


class Teacher:
    """The mean of networks' logits for batches, of which those that come again are computed once.

    Resampled crops cost little, a teacher's forward pass up to half of a step (as in FKD, arXiv
    2112.01528, where crops and logits are kept on disk). The mean of logits is that of several
    networks' answers which Hinton et al. call geometric (arXiv 1503.02531). `networks` as from
    `Context.frozen`.
    """

    def __init__(self, networks: list[nn.Module]):
        self.networks = networks
        self.answer = CudaGraphed(self._answer)
        self.kept: dict[Hashable, Tensor] = {}

    def logits(self, images: Tensor, batch: Hashable = None) -> Tensor:
        """float32 (N, classes) for `images` as networks see them; `batch`: its name, if it comes
        again."""
        if batch is not None and batch in self.kept:
            return self.kept[batch]
        logits = self.answer(images)
        if batch is not None:
            self.kept[batch] = logits.clone()
        return logits

    @torch.no_grad()
    def _answer(self, images: Tensor) -> Tensor:
        answers = [n(images.to(next(n.parameters()).dtype)).float() for n in self.networks]
        return torch.stack(answers).mean(0)


class TrainingData:
    """The resident images of a run, and the batches that training sees of them.

    `images_u8` as in `models.normalize`, `labels` int64 (N,); `val` such a pair, or None; `flip`:
    whether a mirrored image still is of its class.
    """

    def __init__(
        self,
        images_u8: Tensor,
        labels: Tensor,
        classes: int,
        recipe: Recipe,
        val: tuple[Tensor, Tensor] | None = None,
        flip: bool = True,
    ):
        self.images_u8, self.labels, self.classes = images_u8, labels, classes
        self.recipe, self.val, self.flip = recipe, val, flip
        self.batch_size, self.steps, self.passes = batch_layout(len(labels), recipe)

    def epoch(
        self, epoch: int, epochs: int, generator: Generator
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of one of `epochs`, of which the last see whole images."""
        plain = is_unaugmented(epoch, epochs)
        return chain.from_iterable(self.batches(generator, plain) for _ in range(self.passes))

    def batches(self, generator: Generator, plain: bool = False) -> Iterable[tuple[Tensor, Tensor]]:
        """One pass of (images, targets) for the networks: cropped, erased and mixed unless
        `plain`."""
        recipe = self.recipe
        if plain:
            recipe = replace(recipe, crop_scale=(1.0, 1.0), mixup_alpha=0.0, erased=0.0)
        for index in augment.batches(len(self.labels), self.batch_size, generator):
            images = augment.random_resized_crop(
                self.images_u8[index], generator, recipe.crop_scale, flip=self.flip
            )
            images = augment.random_erasing(images, recipe.erased, generator)
            targets = F.one_hot(self.labels[index], self.classes).float()
            images, targets = augment.mixup(images, targets, recipe.mixup_alpha, generator)
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


def is_unaugmented(epoch: int, epochs: int) -> bool:
    return epoch >= (1 - UNAUGMENTED) * epochs


def augment_epoch(epoch: int, stage: Stage) -> int:
    """The first epoch that shows the batches of `epoch`."""
    first = (
        math.ceil((1 - UNAUGMENTED) * stage.epochs) if is_unaugmented(epoch, stage.epochs) else 0
    )
    return first + (epoch - first) % (stage.views or stage.epochs)


def distinct_epochs(stage: Stage, done: int = 0) -> int:
    """How many of a training's epochs show batches not seen before, after `done` epochs."""
    return len({augment_epoch(epoch, stage) for epoch in range(done, stage.epochs)})


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear rise over the first tenth of the steps, then half a cosine down to 0."""
    rise = min(1.0, (step + 1) / (WARMUP * steps))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * (step + 1) / steps))


class TrainState:
    """A network in training, with all that a step changes: what a checkpoint must hold.

    The average takes the weights in after each `average_every` steps of the training.
    """

    def __init__(self, model: nn.Module, stage: Stage, setup: Context, average_every: int = 16):
        self.stage, self.setup, self.average_every = stage, setup, average_every
        fixed = prune.count_fixed(model)
        model = rewrite.trim_channels_(rewrite.trim_(model, setup.image_size))
        self.left_out = fixed - prune.count_fixed(model)  # parameters, which count nevertheless
        model = rewrite.use_matmul_convs_(model)
        self.model = model.to(setup.device, memory_format=torch.channels_last)
        self.trained = self.model
        if runtime.world_size() > 1:
            runtime.synchronize_batchnorm_(self.model)
            self.trained = DistributedDataParallel(self.model)
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / EMA_UPDATES), use_buffers=True
        )
        self.masks: prune.Masks | None = None
        self._recorded = CudaGraphed(self._step)
        self.sparse: training.SparseForward | None = None  # without the zeros, if faster
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[stage.optimizer]
        sgd, cuda = stage.optimizer == "sgd", setup.device.type == "cuda"
        extra = {"momentum": 0.9, "nesterov": True} if sgd else {"capturable": cuda}
        self.optimizer = kind(
            self.model.parameters(),
            lr=stage.learning_rate,
            weight_decay=stage.weight_decay,
            fused=cuda or setup.device.type == "cpu",
            **extra,
        )

    def set_masks(self, masks: prune.Masks) -> None:
        """From now on, only these weights are not zero, in the average as well."""
        changed = masks is not self.masks
        weights = prune.weights(self.model)
        if self.masks is None:
            self._masked = [weights[name] for name in masks]
            self._factors = {name: torch.empty_like(weights[name]) for name in masks}
            self._recorded = CudaGraphed(self._step)  # to which masks are new
        for name, mask in masks.items():
            self._factors[name].copy_(mask)
        self.masks = masks
        prune.apply_(self.model, masks)
        prune.apply_(self.average.module, masks)
        if changed and runtime.world_size() == 1:
            self.sparse = training.sparse_forward_if_faster(
                self.model, self.setup.image_size, self.setup.bf16
            )

    def cut(self, budget: int, images: Iterable[Tensor]) -> None:
        """Prune to `budget`, refresh BatchNorm's statistics on `images`, restart the average."""
        masks, kind = self.masks, (self.setup.image_size, self.setup.grey)
        if masks is None:
            if self.setup.grey:
                prune.merge_grey_input_(self.model)
            masks = prune.all_reachable(self.model, *kind)
        self.set_masks(prune.choose_masks(self.model, masks, budget - self.left_out, *kind))
        with self.setup.autocast():
            update_bn(images, self.model)
        self.average.n_averaged.zero_()
        self.average.update_parameters(self.model)

    def step(self, images: Tensor, targets: Tensor, teacher_logits: Tensor | None, rate: float):
        """One update; returns loss and logits, without waiting for the device.

        `teacher_logits` float (N, classes), or None: from labels only.
        """
        if images.is_cuda:  # from where a recorded step reads it
            rate = torch.full((), rate, device=images.device)
        answers = [] if teacher_logits is None else [teacher_logits]
        return self._recorded(images, targets, rate, *answers)

    def _step(
        self,
        images: Tensor,
        targets: Tensor,
        rate: float | Tensor,
        teacher_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        stage = self.stage
        whole = self.sparse is not None and len(images) % self.sparse.images == 0
        with self.setup.autocast():
            logits = (self.sparse if whole else self.trained)(images)
        if teacher_logits is None:
            loss = F.cross_entropy(logits.float(), targets)
        else:
            loss = distillation_loss(
                logits.float(), teacher_logits, targets, stage.kd_weight, stage.temperature
            )
        self.optimizer.zero_grad()
        loss.backward()
        if self.masks is not None:  # what was pruned must not decide how much is clipped
            factors = list(self._factors.values())
            torch._foreach_mul_([weight.grad for weight in self._masked], factors)
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.masks is not None:  # momentum and weight decay must not revive what was pruned
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
        for group in self.optimizer.param_groups:  # perhaps from another device
            if "capturable" in group:
                group["capturable"] = self.setup.device.type == "cuda"
        if state["masks"] is not None:
            self.set_masks(
                {name: mask.to(self.setup.device) for name, mask in state["masks"].items()}
            )


# --- one training -------------------------------------------------------------------------------


class Stop:
    """Within: Ctrl-C and SIGTERM only set `asked`, so that the step can be finished and saved.

    A second one stops at once, as does the first if several processes would have to agree.
    """

    def __init__(self):
        self.asked = False
        self.handlers: dict = {}

    def __enter__(self) -> "Stop":
        if runtime.world_size() > 1 or threading.current_thread() != threading.main_thread():
            return self  # only the main thread gets signals, and may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Progress:
    """How far an epoch is: steps done, their losses, and the accuracy, which stay on the device."""

    def __init__(self, steps: int, classes: int, device: torch.device):
        from torchmetrics.classification import MulticlassAccuracy  # and all of matplotlib

        self.step = 0
        self.losses = torch.zeros(steps, device=device)
        self.accuracy = MulticlassAccuracy(
            classes, average="micro", validate_args=False, sync_on_compute=False
        ).to(device)
        self.accuracy.persistent(True)

    def state_dict(self) -> dict:
        accuracy = self.accuracy.state_dict()
        return {"step": self.step, "losses": self.losses, "accuracy": accuracy}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.losses.copy_(state["losses"])
        self.accuracy.load_state_dict(state["accuracy"])

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
    view: int | None = None,
) -> None:
    """One pass over `batches` of images and targets, with a learning rate for each step.

    All processes are given the same batches, and each takes its share. `view`: a number for these
    batches, if they come again. `before` are the steps of the training before these, which the
    average of weights counts. Goes on after `progress.step` steps (batches before are drawn again
    and left out), and returns before the end if it is asked to. Under mixup an answer is right if
    it is the class with the larger share. The bar, if there is a terminal, reads loss and accuracy
    ten times.
    """
    network.model.train()
    hidden = True if runtime.rank() else None  # None: unless there is a terminal
    bar = tqdm(batches, title, len(rates), leave=False, disable=hidden)
    for step, (images, targets) in enumerate(bar):
        if step < progress.step:
            continue
        if stop.asked:
            bar.close()
            return
        images, targets = runtime.local_shard(images), runtime.local_shard(targets)
        teacher_logits = None
        if teacher is not None:
            teacher_logits = teacher.logits(images, None if view is None else (view, step))
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
        network.set_masks(network.masks)  # a kept weight that just is 0.0 would be miscounted


def fit(
    part: Part,
    model: nn.Module,
    teachers: list[nn.Module],
    images: TrainingData,
    setup: Context,
    *,
    seed: int,
    saved: dict | None = None,
    save: Callable[[dict, dict | None], None] = lambda state, row: None,
    stop: Stop | None = None,
) -> nn.Module:
    """Train `model`; returns a copy with the weights that validation chose.

    `teachers` as `Teacher` has them; none: from labels only.
    After each epoch `save` is called with all that the next one needs and a row of figures; `saved`
    is such a state to go on from. Each epoch draws from a generator of its own, seeded by run, part
    and epoch, so that it can be repeated. If `stop` is asked for, the step is finished, `save`
    called without a row, and KeyboardInterrupt raised. Raises ArithmeticError if the loss is not
    finite.
    """
    stop, stage, steps = stop or Stop(), part.stage, images.passes * images.steps
    answers = Teacher(teachers) if teachers else None
    average_every = max(1, round(EMA_HORIZON * stage.epochs * steps / EMA_UPDATES))
    network = TrainState(model, stage, setup, average_every)
    first, within, best = 0, None, {"score": -1.0}
    if saved is not None:
        network.load_state_dict(saved["network"])
        first, within, best = saved["epoch"], saved["progress"], saved["best"]
        runtime.print_rank0(
            f"{part.title}: going on after {first} epochs{' and a part' if within else ''}"
        )

    def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        generator = Generator(setup.device)
        view = augment_epoch(epoch, stage)
        generator.manual_seed((seed * 100 + part.number) * 100_000 + view)
        return images.epoch(view, stage.epochs, generator)

    def state(epoch: int, progress: Progress | None = None) -> dict:
        return {
            "epoch": epoch,
            "network": network.state_dict(),
            "best": best,
            "progress": None if progress is None else progress.state_dict(),
        }

    for epoch in range(first, stage.epochs):
        began = time.perf_counter()
        progress = Progress(steps, images.classes, setup.device)
        if within:
            progress.load_state_dict(within)
            within = None
        elif epoch < len(part.cuts):
            few = zip(range(BN_BATCHES), batches(epoch), strict=False)
            network.cut(part.cuts[epoch], [images for _, (images, _) in few])
        rates = [
            learning_rate(epoch * steps + step, stage.epochs * steps, stage.learning_rate)
            for step in range(steps)
        ]
        title = f"{part.title}, {epoch + 1}/{stage.epochs}"
        before, view = epoch * steps, augment_epoch(epoch, stage) if stage.views else None
        train_epoch(network, batches(epoch), answers, rates, progress, stop, title, before, view)
        if progress.step < steps:
            save(state(epoch, progress), None)
            raise KeyboardInterrupt
        losses, accuracy = progress.result()
        _check_finite(losses, part.title, epoch)
        val, val_average = (
            validate(m, images.val, setup) for m in (network.model, network.average.module)
        )
        if epoch + 1 >= len(part.cuts):
            best = _better(best, epoch + 1, network, val, val_average)
        row = {
            "stage": part.name,
            "round": part.round,
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
        _say(part, row)
        if stop.asked:
            raise KeyboardInterrupt
    network.model.load_state_dict(best["model"])
    return rewrite.untrimmed(network.model)


def _better(
    best: dict, epoch: int, network: TrainState, val: float | None, val_average: float | None
) -> dict:
    """`best`, or this epoch's weights or their average if validation prefers them.

    Without validation images the schedule decides: the average after the last epoch.
    """
    averaged = val is None or val_average >= val
    score = float(epoch) if val is None else max(val, val_average)
    if score <= best["score"]:
        return best
    chosen = network.average.module if averaged else network.model
    weights = {name: tensor.clone() for name, tensor in chosen.state_dict().items()}
    return {"score": score, "epoch": epoch, "averaged": averaged, "model": weights}


def _check_finite(losses: Tensor, title: str, epoch: int) -> None:
    """Raises ArithmeticError with the first step whose loss is not finite."""
    if len(bad := losses.isfinite().logical_not().nonzero()):
        step = bad[0].item()
        raise ArithmeticError(
            f"stage {title}, epoch {epoch + 1}, step {step + 1}: the loss is {losses[step].item()}"
        )


def _say(part: Part, row: dict) -> None:
    """An epoch's line in the terminal."""
    shown = ""
    if row["val_accuracy"] != "":
        val, average = row["val_accuracy"], row["val_accuracy_average"]
        shown = f"  val {val:.2%}  averaged {average:.2%}"
    epochs = f"{row['epoch']:4}/{part.stage.epochs}"
    runtime.print_rank0(
        f"{part.title:11}{epochs}  {row['parameters']:>10,} parameters  "
        f"loss {row['loss']:.4f}{shown}  {row['seconds']:.0f} s"
    )


def validate(model: nn.Module, val: tuple[Tensor, Tensor] | None, setup: Context) -> float | None:
    """Accuracy on (images, labels) in the precision of training; None without images."""
    if val is None:
        return None
    images_u8, labels = val
    return models.accuracy(models.infer(setup.frozen(model), images_u8), labels)
