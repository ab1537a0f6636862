"""Augmentation on the device: random crops, flips, erasing, mixup as pure functions of a batch.

They run on the device of the batch; all randomness comes from the generator passed in.
"""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor


def batches(n: int, batch_size: int, generator: Generator) -> Iterator[Tensor]:
    """Shuffled index batches of equal size; the remainder of n is left out of this epoch."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    return iter(order[: n - n % batch_size].split(batch_size))


def crop_boxes(
    n: int, size: int, generator: Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """`n` boxes (top, left, height, width), int64 (n, 4), as torchvision's RandomResizedCrop draws.

    The area is uniform in `scale`, the aspect ratio log-uniform in `ratio`. The first of ten boxes
    that fits is used, or, if none does, the whole (square) image of `size` pixels a side.
    """
    device = generator.device
    u, v, top, left = torch.rand(4, 10, n, generator=generator, device=device)
    area = size * size * (scale[0] + (scale[1] - scale[0]) * u)
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * v)
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width >= 1) & (width <= size) & (height >= 1) & (height <= size)
    width, height = width.where(fits, size), height.where(fits, size)
    first = fits.int().argmax(0, keepdim=True)  # the first that fits; row 0, made whole, if none
    top, left = (top * (size - height + 1)).floor(), (left * (size - width + 1)).floor()
    return (
        torch.stack((top, left, height, width)).gather(1, first.expand(4, 1, n)).squeeze(1).T.long()
    )


def resized_crop(images: Tensor, boxes: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Cut a box out of each image and stretch it bilinearly to the full size, in one batch.

    `images` (N, H, W) or (N, C, H, W), `boxes` (N, 4) as from `crop_boxes`, `mirrored` bool (N,).
    Returns float32 of the shape of `images`: torchvision's `resized_crop` (bilinear) for boxes
    inside the image. Bilinear resampling is separable: one small matrix per axis and image.
    """
    top, left, height, width = boxes.T[:, :, None].float()

    def weights(start: Tensor, length: Tensor, size: int, reverse: Tensor | None) -> Tensor:
        pixel = torch.arange(size, device=images.device)
        source = ((pixel + 0.5) * length / size - 0.5).clamp(min=0).minimum(length - 1) + start
        if reverse is not None:
            source = torch.where(reverse[:, None], source.flip(1), source)
        return (1 - (source[:, :, None] - pixel).abs()).clamp(min=0)  # (N, out, in)

    rows = weights(top, height, images.shape[-2], None)
    columns = weights(left, width, images.shape[-1], mirrored)
    if images.dim() == 4:
        rows, columns = rows[:, None], columns[:, None]
    return rows @ images.float() @ columns.mT


def random_resized_crop(
    images: Tensor,
    generator: Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
) -> Tensor:
    """RandomResizedCrop with its own box for each (square) image; `flip` mirrors each with p = 0.5.

    Shapes and dtypes as in `resized_crop`.
    """
    n, size = len(images), images.shape[-1]
    boxes = crop_boxes(n, size, generator, scale, ratio)
    coin = torch.rand(n, generator=generator, device=generator.device) < 0.5 if flip else None
    return resized_crop(images, boxes, coin)


def mixup(
    images: Tensor, targets: Tensor, alpha: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """mixup (arXiv 1710.09412): blend each image and target with its neighbor in the batch.

    `images` float (N, ...), `targets` float (N, classes), whose rows sum to 1. Each pair has its
    own weight from Beta(alpha, alpha); alpha 0 returns the batch unchanged. Batches are shuffled,
    so the neighbor is a random partner.
    """
    if alpha == 0:
        return images, targets
    # Joehnk (1964): for uniform u, v, given u^(1/a) + v^(1/a) <= 1, u^(1/a) / (u^(1/a) + v^(1/a))
    # is Beta(a, a). Sixteen tries; at a = 1 one pair in 65,536 is a rejected one, below fewer.
    u, v = torch.rand(2, 16, len(images), generator=generator, device=generator.device).pow(
        1 / alpha
    )
    first = (u + v <= 1).int().argmax(0, keepdim=True)
    u, v = u.gather(0, first).squeeze(0), v.gather(0, first).squeeze(0)
    weight = (u / (u + v)).nan_to_num(1.0)
    shape = (-1,) + (1,) * (images.dim() - 1)
    mixed = torch.lerp(images.roll(1, 0), images, weight.view(shape))
    return mixed, torch.lerp(targets.roll(1, 0), targets, weight[:, None])


def random_erasing(
    images: Tensor,
    probability: float,
    generator: Generator,
    scale: tuple[float, float] = (0.02, 0.25),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """Random erasing (arXiv 1708.04896): a rectangle of noise, in each image with `probability`.

    `images` float (N, H, W) or (N, C, H, W) in 0..255, square. Rectangles are drawn as by
    `crop_boxes`, their pixels uniformly.
    """
    if probability == 0:
        return images
    n, size, device = len(images), images.shape[-1], generator.device
    boxes = crop_boxes(n, size, generator, scale, ratio).T[:, :, None]
    top, left, height, width = boxes
    pixel = torch.arange(size, device=device)
    rows = (top <= pixel) & (pixel < top + height)
    columns = (left <= pixel) & (pixel < left + width)
    chosen = torch.rand(n, 1, 1, generator=generator, device=device) < probability
    erased = rows[:, :, None] & columns[:, None] & chosen
    if images.dim() == 4:
        erased = erased[:, None]
    noise = 255 * torch.rand(images.shape, generator=generator, device=device)
    return torch.where(erased, noise, images)
