"""Random rotation and translation of a whole batch at once, on the computing device."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from vaelab.config import Augment
from vaelab.models import Batch
from vaelab.runtime import Noise


def augment(batch: Batch, how: Augment, noise: Noise) -> Batch:
    """Rotate and shift a random share of the images: angle in +-degrees, shift in +-pixels along each axis, uniform.

    Pixels are resampled bilinearly, which blurs them, and the edge is repeated beyond the border. The images that are
    not chosen stay exact: with grey-level targets the blur is what augmentation costs.

    Args:
        batch: images (B, C, H, W).
        how: the strengths, and the share.
        noise: where the randomness comes from (stream ``"augment"``).
    """
    u = noise.uniform("augment", (len(batch.x), 4))
    chosen = u[:, 0] < how.augment_prob
    angle, right, down = (2 * u[chosen, 1:] - 1).unbind(1)
    if len(angle) == 0:
        return batch
    x = batch.x.clone()
    x[chosen] = move(batch.x[chosen], angle * how.rotate, right * how.shift, down * how.shift)
    return replace(batch, x=x)


def move(x: Tensor, degrees: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Rotate each image counter-clockwise about its centre by ``degrees``, then shift it by ``right, down`` pixels.

    Args:
        x: (B, C, H, W).
        degrees, right, down: (B,).
    """
    height, width = x.shape[2:]
    cos, sin = torch.cos(degrees * (math.pi / 180)), torch.sin(degrees * (math.pi / 180))
    # grid_sample asks, for each target pixel, where it comes from: the inverse motion, in units of half an image.
    tx, ty = right * 2 / width, down * 2 / height
    ratio = height / width
    rows = (
        torch.stack([cos, -sin * ratio, -cos * tx + sin * ratio * ty], 1),
        torch.stack([sin / ratio, cos, -sin / ratio * tx - cos * ty], 1),
    )
    grid = affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
