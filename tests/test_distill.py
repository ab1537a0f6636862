import copy
from dataclasses import replace

import pytest
import tiny as shrunk
import torch
import torch.nn.functional as F
from torch import Generator

import augment
import data
import distill
import models
import prune
import train
from engine import plan

CONTEXT = distill.Context(torch.device("cpu"), bf16=False, image_size=28, grey=True)


def test_the_distillation_loss_is_its_formula():
    generator = Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 10, generator=generator, dtype=torch.double)
    targets = torch.rand(6, 10, generator=generator, dtype=torch.double).softmax(1)
    weight, temperature = 0.7, 3.0
    expected = 0.0
    for s, t, y in zip(student, teacher, targets, strict=True):
        p, q = (t / temperature).softmax(0), (s / temperature).softmax(0)
        divergence = (p * (p / q).log()).sum()
        labels = -(y * s.softmax(0).log()).sum()
        expected += weight * temperature**2 * divergence + (1 - weight) * labels
    loss = distill.distillation_loss(student, teacher, targets, weight, temperature)
    torch.testing.assert_close(loss, expected / 6)
    equal = distill.distillation_loss(teacher, teacher, targets, 1.0, temperature)
    torch.testing.assert_close(equal, torch.zeros_like(equal))


def test_the_learning_rate_rises_for_a_tenth_and_ends_at_zero():
    rates = [distill.learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[:9] == sorted(rates[:9]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert 0.09 < max(rates) <= 0.1 and rates[-1] == pytest.approx(0)


def test_the_last_epochs_see_whole_images(monkeypatch):
    generator = Generator().manual_seed(0)
    images_u8 = torch.randint(0, 256, (300, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (300,), generator=generator)
    monkeypatch.setattr(distill, "MIN_STEPS", 1)
    batches = distill.Batches(batch_size=100, min_steps=1)
    images = distill.TrainingData(images_u8, labels, 10, batches)
    whole = models.normalize(images_u8).flatten(1)
    mirrored = models.normalize(images_u8.flip(2)).flatten(1)
    known = torch.cat([whole, mirrored])
    for epoch in range(7):
        seen, plain = [], epoch == 6
        for batch, targets in images.epoch(epoch, distill.Training(7), generator):
            distance, nearest = torch.cdist(batch.flatten(1), known, p=1).min(1)
            assert (distance.max() < 1e-2) == plain
            if plain:
                torch.testing.assert_close(targets.argmax(1), labels[nearest % 300])
                assert targets.max(1).values.eq(1).all()
                seen += nearest.tolist()
        if plain:
            assert sorted(n % 300 for n in seen) == list(range(300))
            assert 100 < sum(n < 300 for n in seen) < 200


def stage_of(training):
    return distill.Stage("student", "resnet18", 4, 1.0, training, 0, "student.pth")


@pytest.mark.parametrize("n", [55_000, 50_000, 8_000])
def test_many_images_are_seen_once_an_epoch_in_the_same_batches_as_ever(n, monkeypatch):
    seen = []
    monkeypatch.setattr(
        augment, "random_resized_crop", lambda images, *_, **__: seen.append(images)
    )
    monkeypatch.setattr(augment, "mixup", lambda images, targets, *_: (images, targets))
    monkeypatch.setattr(models, "normalize", lambda images: images)
    batches = distill.Batches(batch_size=256 if n > 9_000 else 100, erasing=0.0)
    images = distill.TrainingData(torch.arange(n), torch.zeros(n, dtype=torch.long), 2, batches)
    assert images.passes == 1 and images.batch_size == batches.batch_size
    list(images.epoch(0, distill.Training(10), Generator().manual_seed(7)))
    expected = list(augment.batches(n, batches.batch_size, Generator().manual_seed(7)))
    assert len(seen) == images.steps
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("batch_size", [256, 128])
@pytest.mark.parametrize("n", [1, 20, 33, 160, 1_150, 2_000, 5_000, 10_000, 20_000])
def test_few_images_are_seen_several_times_in_smaller_batches(n, batch_size):
    batches = distill.Batches(batch_size=batch_size, min_steps=70)
    batch, steps, passes = distill.batch_layout(n, batches)
    assert batch <= min(n, batch_size) and steps == n // batch
    assert batches.min_steps <= passes * steps < batches.min_steps + steps
    assert batch >= min(n, distill.MIN_BATCH_SIZE)
    assert batch in (batch_size, n) or (batch_size / batch).is_integer()
    assert steps >= distill.MIN_STEPS or batch < 2 * distill.MIN_BATCH_SIZE


def test_each_pass_of_an_epoch_is_shuffled_anew():
    images_u8 = torch.arange(100, dtype=torch.uint8)[:, None, None].expand(-1, 8, 8)
    batches = distill.Batches(batch_size=50, min_steps=75)
    images = distill.TrainingData(images_u8, torch.arange(100), 100, batches)
    assert (images.batch_size, images.steps, images.passes) == (50, 2, 38)
    epoch = images.epoch(9, distill.Training(10), Generator().manual_seed(0))
    seen = [targets.argmax(1) for _, targets in epoch]
    assert len(seen) == 76
    passes = torch.cat(seen).view(38, 100)
    assert torch.equal(passes.sort(1).values, torch.arange(100).expand(38, 100))
    assert len(passes.unique(dim=0)) == 38


def test_the_average_counts_the_steps_of_the_training_not_of_the_epoch(monkeypatch):
    """80 epochs of four steps: every 10 steps, though an epoch is over before."""
    taken, steps = [], []
    monkeypatch.setattr(distill, "MIN_STEPS", 1)
    monkeypatch.setattr(distill, "EMA_HORIZON", 10 * distill.EMA_UPDATES / 320)
    monkeypatch.setattr(distill, "validate", lambda *_: None)
    monkeypatch.setattr(
        torch.optim.swa_utils.AveragedModel,
        "update_parameters",
        lambda self, model: taken.append(len(steps)),
    )

    def step(self, images, targets, teacher, rate):
        steps.append(rate)
        return torch.zeros(()), targets

    monkeypatch.setattr(distill.TrainState, "step", step)
    batches = distill.Batches(batch_size=2, min_steps=4)
    images = distill.TrainingData(torch.zeros(8, 28, 28), torch.arange(8), 10, batches)
    distill.fit(
        stage_of(distill.Training(80)), models.build("resnet18", 10), [], images, CONTEXT, seed=0
    )
    assert taken == list(range(10, 321, 10))


def test_pruned_weights_stay_zero_through_momentum_decay_and_averaging(narrow):
    torch.manual_seed(0)
    stage = distill.Training(9, 0.01, 0.1, temperature=2)
    network = distill.TrainState(models.build("resnet18", 10), stage, CONTEXT)
    images, targets = torch.randn(8, 1, 28, 28).expand(-1, 3, -1, -1), torch.eye(10)[:8]
    teacher_logits = torch.randn(8, 10)

    def steps():
        network.model.train()
        for _ in range(3):
            network.step(images, targets, teacher_logits, rate=0.01)
            network.average.update_parameters(network.model)

    steps()  # fills the momenta of weights that are pruned next
    for budget in (150_000, 50_000):
        network.prune_to(budget, [images])
        before = prune.weights(network.model)["layer1.0.conv1.weight"].clone()
        steps()
        after = prune.weights(network.model)["layer1.0.conv1.weight"]
        assert not torch.equal(before, after)
        assert prune.count(network.model) == prune.count(network.average.module) == budget
        for model in (network.model, network.average.module):
            for name, weight in prune.weights(model).items():
                assert not weight[~network.masks[name]].any()


def test_channels_without_weights_cost_no_work_and_change_no_weight(narrow, monkeypatch):
    images, targets = torch.randn(8, 1, 28, 28).expand(-1, 3, -1, -1), torch.eye(10)[:8]
    stage, trained = distill.Training(9, 0.01), []
    for trim in (distill.rewrite.trim_channels_, lambda model: model):
        monkeypatch.setattr(distill.rewrite, "trim_channels_", trim)
        torch.manual_seed(0)
        model = models.build("resnet18", 10)
        prune.apply_width_(model, 0.5)
        for budget in (None, 40_000, 20_000):
            network = distill.TrainState(copy.deepcopy(model), stage, CONTEXT)
            if budget:
                network.prune_to(budget, [images])
            network.model.train()
            for _ in range(3):
                network.step(images, targets, None, rate=0.01)
            network.average.update_parameters(network.model)
            model = distill.rewrite.untrimmed(network.average.module)
            trained.append(model)
            assert budget is None or prune.count(model) == budget
    for fast, slow in zip(trained[:3], trained[3:], strict=True):
        assert prune.count(fast) == prune.count(slow)
        for (name, a), b in zip(
            prune.weights(fast).items(), prune.weights(slow).values(), strict=True
        ):
            torch.testing.assert_close(a, b, msg=name)
        torch.testing.assert_close(fast.eval()(images), slow.eval()(images), atol=1e-4, rtol=1e-4)
    assert network.left_out == 0 and network.model.layer4[0].conv1.weight.shape[0] == 128


def test_validation_that_skips_the_zeros_is_validation(narrow, monkeypatch):
    torch.manual_seed(0)
    network = distill.TrainState(models.build("resnet18", 10), distill.Training(1), CONTEXT)
    network.prune_to(30_000, [torch.randn(8, 3, 28, 28)])
    network.model.eval()
    images_u8 = torch.randint(0, 256, (300, 28, 28), dtype=torch.uint8)
    labels = models.infer(network.model, images_u8).argmax(1)
    labels[:90] = (labels[:90] + 1) % 10
    assert isinstance(CONTEXT.inference_copy(network.model), distill.SparseResNet)
    accuracies = [distill.validate(network.model, (images_u8, labels), CONTEXT)]
    monkeypatch.setattr(plan, "few_multiply_adds", lambda *_: False)
    accuracies.append(distill.validate(network.model, (images_u8, labels), CONTEXT))
    assert accuracies == pytest.approx([0.7, 0.7], abs=0.01)


def test_a_cut_refreshes_batchnorm_on_the_images_it_is_given(narrow):
    torch.manual_seed(0)
    stage = distill.Training(1)
    network = distill.TrainState(models.build("resnet18", 10), stage, CONTEXT)
    images = torch.randn(4, 1, 28, 28).expand(-1, 3, -1, -1)
    network.prune_to(100_000, [images])
    out = network.model.conv1(images)
    torch.testing.assert_close(network.model.bn1.running_mean, out.mean((0, 2, 3)))
    torch.testing.assert_close(network.average.module.bn1.running_mean, out.mean((0, 2, 3)))


def test_the_loop_learns(tiny, tiny_data, tmp_path):
    """The real loop brings a network from chance to order on images with an easy pattern."""
    batches = replace(shrunk.CHAIN.batches, images=None, mixup_alpha=0.0)
    source = data.find(tiny_data)
    loaded = data.load_train(source, False)
    images, context = train.prepare(source, loaded, batches, torch.device("cpu"), flip=False)
    torch.manual_seed(0)
    rows = []
    model = distill.fit(
        stage_of(distill.Training(6, learning_rate=0.05)),
        models.build("resnet18", 10),
        [],
        images,
        context,
        seed=0,
        save=lambda state, row: rows.append(row),
    )
    assert models.accuracy(models.infer(model, images.val[0]), images.val[1]) > 0.6
    losses = [row["loss"] for row in rows]
    assert losses[-1] < losses[0] - 0.5


def test_augmented_and_unaugmented_batches_repeat_equally_often():
    stage = distill.Training(12, augment_period=4)
    drawn = [distill.drawn_epoch(epoch, stage) for epoch in range(12)]
    assert drawn == [0, 1, 2, 3, 0, 1, 2, 3, 0, 9, 9, 9]
    assert (distill.distinct_epochs(stage), distill.distinct_epochs(stage, 8)) == (5, 2)
    drawn = [
        distill.drawn_epoch(epoch, distill.Training(60, augment_period=15)) for epoch in range(60)
    ]
    assert drawn == 3 * list(range(15)) + 3 * list(range(45, 50))
    for epochs in range(1, 80):  # the last ones, and no other, are unaugmented
        stage = distill.Training(epochs, augment_period=15)
        for epoch in range(epochs):
            drawn = distill.drawn_epoch(epoch, stage)
            assert drawn <= epoch
            augmented = distill.augmented_epochs(stage)
            assert (drawn < augmented) == (epoch < augmented)
    assert [distill.drawn_epoch(epoch, distill.Training(12)) for epoch in range(12)] == list(
        range(12)
    )


def test_missing_channels_are_no_zeros_that_pay_to_skip():
    """But products of few channels are slow in PyTorch, in fp32."""
    torch.manual_seed(0)
    generator = Generator().manual_seed(0)
    dense, sparse, narrow = (models.build("resnet18", 10).eval() for _ in range(3))
    for weight in prune.weights(sparse).values():
        weight.data *= torch.rand(weight.shape, generator=generator) < 0.05
    prune.apply_width_(narrow, 1 / 4)  # few weights, but no zeros among its channels
    assert not plan.sparse_is_faster(narrow, 28, CONTEXT.device)
    frozen = [CONTEXT.inference_copy(model) for model in (dense, sparse, narrow)]
    assert [isinstance(network, distill.SparseResNet) for network in frozen] == [False, True, False]
    prune.apply_width_(narrow, 1 / 16)
    frozen[2] = CONTEXT.inference_copy(narrow)
    assert isinstance(frozen[2], distill.SparseResNet)
    assert not plan.sparse_is_faster(narrow, 28, CONTEXT.device, bf16=True)
    images = torch.randn(8, 1, 28, 28, generator=generator).expand(-1, 3, -1, -1)
    with torch.no_grad():
        for fast, model in zip(frozen, (dense, sparse, narrow), strict=True):
            expected = model(images)
            error = (fast(images) - expected).abs().max()
            assert error < 1e-4 * expected.abs().max()


def test_batches_that_come_again_ask_the_teacher_once_and_train_the_same(tiny, tiny_data):
    """Kept answers change no weight, and a training that was stopped needs none of them."""
    batches = replace(shrunk.CHAIN.batches, images=None)
    source = data.find(tiny_data)
    loaded = data.load_train(source, False)
    images, context = train.prepare(source, loaded, batches, torch.device("cpu"))
    torch.manual_seed(0)
    model, teacher = (
        models.build("resnet18", 10),
        context.inference_copy(models.build("resnet18", 10)),
    )
    asked = []
    teacher.register_forward_hook(lambda module, args, out: asked.append(args[0].clone()))
    stage = stage_of(distill.Training(8, augment_period=2))
    states = []

    def fit(saved=None):
        asked.clear()
        done = distill.fit(
            stage, copy.deepcopy(model), [teacher], images, context, seed=0, saved=saved,
            save=lambda state, row: states.append(copy.deepcopy(state)),
        )  # fmt: skip
        return done.state_dict()

    whole, steps = fit(), images.passes * images.steps
    assert len(asked) == 3 * steps  # two epochs of augmented batches, one of unaugmented ones
    assert len({tuple(batch.flatten().tolist()) for batch in asked}) == 3 * steps
    again = fit(states[3])
    assert len(asked) == 3 * steps  # asked anew: nothing of it is in the state
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_on_mps_images_and_networks_are_not_in_channels_last(monkeypatch):
    """Its gradients are wrong there."""
    known = models.memory_format
    assert known(torch.device("cpu")) == torch.channels_last
    monkeypatch.setattr(models, "memory_format", lambda _: known(torch.device("mps")))
    images = models.normalize(torch.zeros(2, 28, 28))
    state = distill.TrainState(models.build("resnet18", 10), distill.Training(1), CONTEXT)
    for tensor in (images, *prune.weights(state.model).values()):
        assert tensor.is_contiguous()


def test_cross_entropy_of_the_teacher_uses_the_mixed_targets():
    stage = distill.Training(1)
    torch.manual_seed(0)
    network = distill.TrainState(models.build("resnet18", 10), stage, CONTEXT)
    images, targets = torch.randn(4, 3, 28, 28), torch.rand(4, 10).softmax(1)
    loss, logits = network.step(images, targets, None, rate=0.0)
    torch.testing.assert_close(loss, -(targets * F.log_softmax(logits, 1)).sum(1).mean())


def test_several_teachers_answer_with_the_mean_of_their_logits():
    torch.manual_seed(0)
    networks = [models.build("resnet18", 10, stem=stem).eval() for stem in (4, 2)]
    images = models.normalize(torch.randint(256, (4, 28, 28), dtype=torch.uint8))
    with torch.no_grad():
        expected = (networks[0](images) + networks[1](images)) / 2
    teacher = distill.Teacher(networks)
    torch.testing.assert_close(teacher.logits(images), expected)
    torch.testing.assert_close(teacher.logits(images, batch="again"), expected)
    assert teacher.logits(images[:1], batch="again") is teacher.cache["again"]


def test_no_more_logits_are_cached_than_memory_is_set_aside_for(monkeypatch):
    monkeypatch.setattr(distill, "CACHE_BYTES", 2 * 4 * 10 * 4)  # of two batches
    teacher = distill.Teacher([models.build("resnet18", 10).eval()])
    images = torch.randn(5, 4, 3, 28, 28)
    answers = [teacher.logits(images[i], batch=i) for i in range(5)]
    assert list(teacher.cache) == [0, 1]
    for i in range(5):
        assert torch.equal(teacher.logits(images[i], batch=i), answers[i])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_steps_as_a_cuda_graph_are_the_plain_steps(monkeypatch):
    context = distill.Context(torch.device("cuda"), False, 28, True)

    def trained(first: int) -> tuple[list[float], int]:
        monkeypatch.setattr(distill.CudaGraphed, "WARMUP_CALLS", first)
        torch.manual_seed(0)
        stage = distill.Training(1)
        network = distill.TrainState(models.build("resnet18", 10), stage, context)
        network.model.train()
        teacher = distill.Teacher(
            [context.inference_copy(models.build("resnet18", 10)) for _ in range(2)]
        )
        generator, losses = torch.Generator("cuda").manual_seed(0), []
        for step in range(15):
            if step in (5, 10):
                network.prune_to({5: 2_000_000, 10: 1_000_000}[step], [])
            images = torch.randn(32, 1, 28, 28, generator=generator, device="cuda")
            images = images.expand(-1, 3, -1, -1)
            targets = torch.eye(10, device="cuda")[torch.arange(32, device="cuda") % 10]
            rate = (step + 1) * 1e-3  # above, noise decides
            loss, _ = network.step(images, targets, teacher.logits(images), rate)
            losses.append(loss.item())
        assert (network._graphed.graph is None) == (first > 15)
        return losses, prune.count(network.model)

    recorded, left = trained(2)
    plain, as_many = trained(100)
    assert left == as_many and recorded == pytest.approx(plain, rel=0.03)
    assert len(set(recorded)) == 15
