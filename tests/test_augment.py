import pytest
import torch
from torch import Generator
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import InterpolationMode, resized_crop

import augment

RATIO = (3 / 4, 4 / 3)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_resized_crop_is_torchvisions(channels):
    generator = Generator().manual_seed(0)
    images = torch.randint(256, (64, *channels, 28, 28), dtype=torch.uint8, generator=generator)
    boxes = augment.crop_boxes(64, 28, generator, (0.1, 1), RATIO)
    boxes[0] = torch.tensor([27, 27, 1, 1])
    boxes[1] = torch.tensor([0, 0, 28, 28])
    expected = [
        resized_crop(i.float().view(-1, 28, 28), *box, [28, 28], InterpolationMode.BILINEAR)
        for i, box in zip(images, boxes.tolist(), strict=True)
    ]
    out = augment.resized_crop(images, boxes)
    torch.testing.assert_close(out, torch.stack(expected).view(out.shape), atol=2e-3, rtol=0)
    mirrored = augment.resized_crop(images, boxes, torch.ones(64, dtype=bool))
    torch.testing.assert_close(mirrored, out.flip(-1), atol=2e-3, rtol=0)


def test_crop_boxes_are_drawn_as_torchvisions():
    torch.manual_seed(0)
    n, image = 20_000, torch.empty(1, 28, 28)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.3, 1.0], list(RATIO)) for _ in range(n)]
    )
    ours = augment.crop_boxes(n, 28, Generator().manual_seed(0), (0.3, 1.0), RATIO)
    top, left, height, width = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= 28).all() and (left + width <= 28).all()
    for moment in (lambda b: b.float().mean(0), lambda b: b.float().std(0)):
        torch.testing.assert_close(moment(ours), moment(theirs), atol=0.15, rtol=0)


def test_a_box_that_never_fits_is_the_whole_image():
    boxes = augment.crop_boxes(5, 28, Generator().manual_seed(0), (1, 1), (1.5, 1.5))
    assert boxes.tolist() == [[0, 0, 28, 28]] * 5


def test_crops_differ_within_a_batch_and_follow_the_generator():
    image = torch.arange(784, dtype=torch.float).view(1, 28, 28).expand(32, 28, 28)

    def crop(seed):
        return augment.random_resized_crop(
            image, Generator().manual_seed(seed), (0.5, 1), flip=True
        )

    assert len(crop(0).flatten(1).unique(dim=0)) == 32
    assert torch.equal(crop(0), crop(0)) and not torch.equal(crop(0), crop(1))


def test_flip_mirrors_about_half_of_the_images():
    image = torch.arange(28.0).expand(1000, 28, 28)
    out = augment.random_resized_crop(image, Generator().manual_seed(0), (1, 1), (1, 1), flip=True)
    mirrored = out[:, 0, 0] > out[:, 0, -1]
    assert 430 < mirrored.sum() < 570
    assert torch.equal(out[mirrored], image[mirrored].flip(-1))


def test_mixup_blends_images_and_targets_with_the_same_weights():
    generator = Generator().manual_seed(0)
    images = torch.rand(64, 28, 28, generator=generator)
    targets = torch.eye(64)
    mixed, soft = augment.mixup(images, targets, 0.2, generator)
    torch.testing.assert_close(soft.sum(1), torch.ones(64))
    for i in range(64):
        weight = soft[i, i]
        torch.testing.assert_close(mixed[i], weight * images[i] + (1 - weight) * images[i - 1])
        torch.testing.assert_close(soft[i, i - 1], 1 - weight)
    assert augment.mixup(images, targets, 0, generator)[0] is images


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0])
def test_mixup_weights_follow_the_beta_distribution(alpha):
    targets = torch.eye(2).repeat(20_000, 1)
    _, soft = augment.mixup(torch.zeros(40_000, 1), targets, alpha, Generator().manual_seed(0))
    weight = soft[::2, 0].double()
    quantiles = torch.linspace(0.1, 0.9, 9, dtype=torch.double)
    torch.manual_seed(0)
    expected = torch.distributions.Beta(*torch.tensor([alpha, alpha]).double()).sample((40_000,))
    torch.testing.assert_close(
        weight.quantile(quantiles), expected.quantile(quantiles), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("channels", [(), (3,)])
def test_random_erasing_puts_noise_in_one_rectangle_of_its_share_of_the_images(channels):
    images = torch.full((2000, *channels, 28, 28), -1.0)
    out = augment.random_erasing(images, 0.3, Generator().manual_seed(0))
    changed = (out != images).view(2000, -1, 28, 28).all(1)  # all channels, the same place
    assert torch.equal(changed, (out != images).view(2000, -1, 28, 28).any(1))
    erased = changed.flatten(1).any(1)
    assert 0.27 < erased.float().mean() < 0.33
    rows, columns = changed.any(2), changed.any(1)
    assert torch.equal(changed, rows[:, :, None] & columns[:, None])
    for side in (rows, columns):  # one piece: it begins once
        assert (side.int().diff(dim=1, prepend=torch.zeros(2000, 1)) == 1).sum(1).le(1).all()
    areas = changed.flatten(1).sum(1)[erased] / 28**2
    assert 0.01 < areas.min() < 0.03 and 0.24 < areas.max() < 0.28
    noise = out[out != images]
    assert noise.min() >= 0 and noise.max() <= 255 and 125 < noise.mean() < 130
    assert augment.random_erasing(images, 0, Generator()) is images


def test_batches_show_each_image_at_most_once():
    seen = torch.cat(list(augment.batches(100, 16, Generator().manual_seed(0))))
    assert len(seen) == 96 == len(seen.unique())
    assert seen.tolist() != sorted(seen.tolist())
