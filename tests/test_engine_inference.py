import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import checkpoint
import models
import prune
from bench import tables
from engine import inference, llvm_source, plan

WEIGHTS = tables.SHIPPED[0]


def images(n, size=28, grey=True):
    x = torch.randn(n, 1 if grey else 3, size, size, generator=torch.Generator().manual_seed(n))
    return x.expand(-1, 3, -1, -1)


@torch.inference_mode()
def differs(engine, model, x):
    """The largest difference of logits, against float64, for all images and for the first two."""
    expected = model.double()(x.double())
    return max(float((engine(x[:n]) - expected[:n]).abs().max()) for n in (len(x), 2))


def prune_to(model, budget, size=28):
    masks = prune.all_reachable(model, size, grey=True)
    prune.merge_grey_input_(model)
    prune.apply_(model, prune.choose_masks(model, masks, budget, size, grey=True))
    return model.eval()


@pytest.mark.parametrize("n, tile", [(1, 1), (3, 2), (7, 4), (16, 8), (17, 16), (250, 16)])
def test_the_shipped_network_in_batches_of_all_sizes(n, tile):
    model, _ = checkpoint.load(WEIGHTS)
    engine = inference.SparseResNet(model, 28)
    engine.threads = 2
    assert differs(engine, model, images(n)) < 1e-4
    assert min(tile, engine.lanes) in engine._runners


def test_parts_of_the_input_channels_are_added_up(pruned, monkeypatch):
    x, logits = images(40), []
    for l1_bytes, split in ((1e12, False), (plan.L1_BYTES, True), (5_000, True)):
        monkeypatch.setattr(plan, "L1_BYTES", l1_bytes)
        engine = inference.SparseResNet(pruned, 28)
        assert any(product.split for product in engine.largest.products) == split
        logits.append(engine(x))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[2], logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size, stride, most, expected", [
    (28, 1, 28, 1), (14, 1, 28, 1), (14, 2, 28, 1), (7, 1, 28, 2), (4, 1, 28, 1), (28, 1, 12, 66),
])  # fmt: skip
def test_runs_have_all_vectors_in_order(size, stride, most, expected):
    source, target = (plan.FeatureMap(0, 1, side, 1) for side in (stride * size, size))
    vectors = plan._vectors(source, target, stride, positions=1)
    runs = llvm_source.equal_pieces(vectors, most)
    assert [
        v._replace(read=v.read + i * run.read, write=v.write + i * run.write)
        for run in runs
        for i in range(run.count)
        for v in run.vectors
    ] == list(vectors)
    assert max(len(run.vectors) for run in runs) <= most
    assert len(runs) <= expected


@pytest.mark.parametrize("budget", [10_970, 1_000_000])
def test_budgets_down_to_the_protected_weights(budget, resnet18):
    engine = inference.SparseResNet(prune_to(resnet18, budget), 28)
    assert differs(engine, resnet18, images(20)) < 1e-4


def test_dense_weights_other_sizes_color_and_resnet50(narrow_resnet18):
    for size, grey in ((28, True), (32, False), (40, False)):
        engine = inference.SparseResNet(narrow_resnet18, size, grey)
        assert differs(engine, narrow_resnet18.eval(), images(17, size, grey)) < 1e-4
    model = models.build("resnet50", 3).eval()
    engine = inference.SparseResNet(model, 32, grey=False)
    assert differs(engine, model, images(17, 32, grey=False)) < 1e-4


def test_all_channels_of_a_color_network_are_read(narrow_resnet18):
    model = narrow_resnet18.eval()
    with torch.no_grad():
        model.conv1.weight[:, 1:] = 0
    engine, x = inference.SparseResNet(model, 32), torch.randn(17, 3, 32, 32)
    assert engine.largest.image.channels == 1
    assert differs(engine, copy.deepcopy(model), x) < 1e-4
    with torch.no_grad():
        model.conv1.weight[3, 2, 1, 1] = 0.5
    engine = inference.SparseResNet(model, 32)
    assert engine.largest.image.channels == 3
    assert differs(engine, model, x) < 1e-4


@pytest.mark.parametrize("stem", [2, 1])
def test_stems_of_smaller_stride(stem, narrow):
    torch.manual_seed(0)
    model = prune_to(models.build("resnet18", 10, stem=stem), 50_000)
    engine = inference.SparseResNet(model, 28)
    assert differs(engine, model, images(20)) < 1e-4


def test_a_product_of_one_row(narrow):
    model = models.build("resnet18", 1).eval()
    engine = inference.SparseResNet(model, 28)
    assert not engine.largest.products[-1].split
    assert differs(engine, model, images(20)) < 1e-4


def test_the_number_of_threads_is_read_at_each_call(pruned):
    engine, x = inference.SparseResNet(pruned, 28), images(70)
    for engine.threads in (1, 3, 2, 1):
        assert differs(engine, copy.deepcopy(pruned), x) < 1e-4


def test_dead_channels_and_empty_layers(narrow_resnet18):
    resnet18 = narrow_resnet18
    with torch.no_grad():
        resnet18.conv1.weight[5] = 0  # constant after ReLU, and seen by what pads its maps
        resnet18.layer1[0].conv1.weight.zero_()
        resnet18.layer2[0].downsample[0].weight.zero_()
        resnet18.layer4[1].conv2.weight[:, 7] = 0
        resnet18.fc.weight[3] = 0
    engine = inference.SparseResNet(resnet18, 28)
    assert differs(engine, resnet18.eval(), images(20)) < 1e-4


def test_channels_without_weights_take_neither_memory_nor_time(resnet18):
    prune.apply_width_(resnet18, 1 / 4)
    for norm in (m for m in resnet18.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.bias)  # where no weight is, a constant that nothing reads
    model = resnet18.eval()
    engine = inference.SparseResNet(model, 28)
    sizes = [(p.source.channels, p.target.channels) for p in engine.largest.products[1:]]
    assert sizes[:2] == [(16, 16)] * 2 and sizes[-2:] == [(128, 128), (128, 10)]
    assert differs(engine, model, images(20)) < 1e-4


def test_narrow_vectors_and_few_registers_compute_the_same(narrow_resnet18, monkeypatch):
    model = prune_to(narrow_resnet18, 50_000)
    for lanes, registers in ((8, 16), (4, 32), (4, 16)):
        monkeypatch.setattr(llvm_source, "host", lambda host=(lanes, registers): host)
        engine = inference.SparseResNet(model, 28)
        assert differs(engine, model, images(21)) < 1e-4


def test_networks_of_one_shape_share_their_code(resnet18, pruned, monkeypatch):
    engine, batch = inference.SparseResNet(prune_to(resnet18, 90_000), 28), images(20)
    before = engine(batch)
    engine(batch[:2])  # another kind of code
    monkeypatch.setattr(llvm_source, "MachineCode", None)
    assert differs(inference.SparseResNet(pruned, 28), pruned, batch[:18]) < 1e-4
    assert torch.equal(engine(batch), before)
    with pytest.raises(TypeError):  # another shape
        inference.SparseResNet(pruned, 27)(batch[:, :, 1:, 1:])


def test_any_layout_of_images_and_none_at_all():
    engine = inference.SparseResNet(checkpoint.load(WEIGHTS)[0], 28, grey=False)
    x = images(19, grey=False).contiguous()
    expected = engine(x)
    assert torch.equal(engine(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(engine(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)), expected)
    assert engine(x[:0]).shape == (0, 10)
    meta = images(2).to("meta")  # the memory of another device
    for bad in (images(2, 32), images(2).double(), images(2)[:, :1], meta):
        with pytest.raises(ValueError, match="expected float32"):
            engine(bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_of_the_caller_changes_nothing(dtype):
    x = images(19)
    engine = inference.SparseResNet(checkpoint.load(WEIGHTS)[0], 28)
    expected = engine(x), engine(x[:1])
    try:
        torch.set_default_dtype(dtype)
        fresh = inference.SparseResNet(checkpoint.load(WEIGHTS)[0], 28)
        for network in (engine, fresh):
            assert torch.equal(network(x), expected[0]) and torch.equal(network(x[:1]), expected[1])
            assert network(x).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_multiply_adds_are_weights_times_positions():
    model, _ = checkpoint.load(WEIGHTS)
    counted = []

    def count(module, _, output):
        positions = output[0, 0].numel()  # a classifier's output has none, and is used once
        counted.append(int(module.weight.count_nonzero()) * positions)

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.inference_mode():
        model(images(1))
    network = plan.sparse_copy(model, grey=True)
    assert plan.Plan(network, 28, 16, 1).multiply_adds == sum(counted)


def test_threads_that_share_an_engine_get_what_one_gets():
    engine = inference.SparseResNet(checkpoint.load(WEIGHTS)[0], 28)
    engine.threads = 2  # each call shares its work, however many threads PyTorch has
    parts = [images(2500), -images(2501)[:2500]]
    batches = (250, 1, 7)  # several kinds of code, compiled while the other thread waits

    def run(x):
        few = [engine(batch) for n in batches[1:] for batch in x[:300].split(n)]
        return torch.cat([engine(batch) for batch in x.split(batches[0])] + few)

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, parts))
    for logits, x in zip(together, parts, strict=True):
        assert torch.equal(logits, run(x))


@pytest.mark.parametrize("n", [5, 40])
def test_copies_and_pickles_compute_the_same(n):
    engine = inference.SparseResNet(checkpoint.load(WEIGHTS)[0], 28)
    x, file = images(n), io.BytesIO()
    expected = engine(x)
    torch.save(engine, file)
    file.seek(0)
    for again in (
        copy.deepcopy(engine),
        pickle.loads(pickle.dumps(engine)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(again(x), expected)
        assert sum(p.numel() for p in again.parameters()) > 0


@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("pixel", [torch.nan, torch.inf])
def test_a_pixel_that_is_not_finite_makes_nan_of_its_image_only(n, pixel):
    model, _ = checkpoint.load(WEIGHTS)
    engine = inference.SparseResNet(model, 28)
    for place in ((0, 0), (13, 14), (27, 27)):
        x = images(n).clone()
        x[3, :, place[0], place[1]] = pixel
        with torch.inference_mode():
            expected = model(x)
        assert expected[3].isnan().all()
        torch.testing.assert_close(engine(x), expected, atol=1e-4, rtol=0, equal_nan=True)


def test_feature_maps_share_memory_whose_borders_are_cleared(narrow_resnet18, monkeypatch):
    model = prune_to(narrow_resnet18, 50_000)
    network = plan.sparse_copy(model, grey=True)
    shared, alone = (plan.Plan(network, 28, 16, 1, reuse) for reuse in (True, False))
    assert shared.cells < 0.7 * alone.cells
    assert any(shared.cleared) and not any(alone.cleared)
    engine, x = inference.SparseResNet(model, 28), images(40)
    expected = engine(x)
    assert torch.equal(engine(x), expected)
    assert differs(engine, copy.deepcopy(model), x) < 1e-4
    engine = inference.SparseResNet(model, 28)
    engine.largest.cleared = [[] for _ in shared.cleared]
    monkeypatch.setattr(llvm_source, "_cache", {})
    assert differs(engine, model, x) > 1e-2
