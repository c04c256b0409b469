"""What figures are drawn of: images encoded, latents decoded, and ways through latent space.

Shapes: N images or codes, C H W image, D latent dimensions, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaelab.data.datasets import BATCH
from vaelab.models import VAE
from vaelab.runtime import seeded

Way = Literal["linear", "spherical"]


def encode(model: VAE, x: Tensor) -> NDArray[np.float32]:
    """The codes (N, D) that stand for images in [0, 1]: posterior means, for normal posteriors."""
    with torch.no_grad():
        return torch.cat([model.center(rows) for rows in x.split(BATCH)]).cpu().numpy()


def decode(model: VAE, z: Tensor) -> Tensor:
    """Means (N, C, H, W) of p(x|z), on the CPU, where figures are drawn."""
    with torch.no_grad():
        return torch.cat([model.likelihood(rows.to(model.device)).mean.cpu() for rows in z.split(BATCH)])


def sample_prior(model: VAE, count: int, seed: int) -> Tensor:
    """Latents (N, D) from the prior: the same for a seed on one kind of device, and no global generator is moved."""
    with seeded(seed, model.device), torch.no_grad():
        return model.prior().sample((count,))


def between(a: Tensor, b: Tensor, t: Tensor, way: Way = "linear") -> Tensor:
    r"""Codes (..., F, D) between a and b (..., D) at the shares t (F,) of the way.

    ``linear``: :math:`(1 - t)\, a + t\, b`. ``spherical``: along the great circle at the angle :math:`\omega` between
    them, :math:`\frac{\sin (1-t)\omega}{\sin \omega} a + \frac{\sin t\omega}{\sin \omega} b`, whose lengths stay
    between those of a and b, as those of a normal prior's draws do; codes in one direction are joined by a line.

    Reference:
        Shoemake (1985), Animating Rotation with Quaternion Curves, https://doi.org/10.1145/325334.325242
        White (2016), Sampling Generative Networks, section 2.1. https://arxiv.org/abs/1609.04468

    Example:
        >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> between(a, b, torch.tensor([0.5]), "spherical")
        tensor([[0.7071, 0.7071]])
    """
    a, b, t = a[..., None, :], b[..., None, :], t[:, None].to(a)
    line = (1 - t) * a + t * b
    if way == "linear":
        return line
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)[..., None].clamp(-1, 1)
    omega = torch.arccos(cosine)
    sine = torch.sin(omega)
    flat = sine < 1e-4  # one direction, or opposite ones, between which there are many great circles
    sine = torch.where(flat, torch.ones_like(sine), sine)
    return torch.where(flat, line, (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / sine)


def traverse(code: Tensor, dimensions: Sequence[int], values: Tensor) -> Tensor:
    """Codes (R, V, D): for each of R dimensions the code (D,) with that dimension at each of V values."""
    codes = code.expand(len(dimensions), len(values), -1).clone()
    for row, dimension in enumerate(dimensions):
        codes[row, :, dimension] = values.to(code)
    return codes


def walk(model: VAE, codes: Tensor, *, frames: int = 16, hold: int = 6, way: Way = "linear") -> Tensor:
    """Decode a closed walk through latent codes: frames (F, C, H, W) that end where they began.

    Between two codes the walk goes along a straight line or a great circle, slow at both ends (half a cosine), and
    rests on each code.

    Args:
        model: the model.
        codes: (N, D), in the order of the walk.
        frames: frames from one code to the next.
        hold: frames of rest on each code.
        way: ``linear`` or ``spherical``.
    """
    ease = (1 - torch.cos(torch.linspace(0, torch.pi, frames + 2)[1:-1])) / 2
    legs: list[Tensor] = []
    for here, there in zip(codes, codes.roll(-1, 0), strict=True):
        legs += [here.expand(hold, -1), between(here, there, ease, way)]
    return decode(model, torch.cat(legs))
