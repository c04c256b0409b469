"""Figures made of images: samples, reconstructions, the manifold, and ways through latent space.

Shapes: N images, C H W image, D latent dimensions, V values, F frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from vaelab.errors import UsageError
from vaelab.figures.decoding import Way, between, decode, sample_prior, traverse
from vaelab.figures.style import padded, picture, short, tile
from vaelab.models import VAE
from vaelab.priors import UnitNormal


def samples(model: VAE, count: int = 100, *, seed: int = 0, title: str = "") -> Figure:
    """Means of p(x|z) for z drawn from the prior."""
    pictures = decode(model, sample_prior(model, count, seed))
    columns = int(np.ceil(np.sqrt(count)))
    return picture(tile(pictures, columns), title or "Samples: z ~ p(z), mean of p(x|z)")


def reconstructions(model: VAE, x: Tensor, *, columns: int = 10, title: str = "") -> Figure:
    """Images and, below each, the mean of p(x|z) at the z that stands for it (of a normal q(z|x), the mean)."""
    with torch.no_grad():
        x_hat = decode(model, model.center(x))
    columns = min(columns, len(x))
    pairs = torch.stack([padded(images, columns).unflatten(0, (-1, columns)) for images in (x, x_hat)], 1)
    return _named(pairs.flatten(0, 2), columns, title or "Reconstructions", ["x", r"$\hat{x}$"] * len(pairs))


def manifold_images(model: VAE, side: int) -> tuple[Tensor, Tensor]:
    """What a latent plane decodes to on a grid of side x side points, from the top left, and the grid's ticks.

    Raises:
        UsageError: if the model does not have exactly two latent dimensions, with a standard normal prior.
    """
    if model.latent_dim != 2:
        raise UsageError(f"a manifold needs 2 latent dimensions: this model has {model.latent_dim}")
    if not isinstance(model.prior(), UnitNormal):
        raise UsageError("a manifold is a grid of equal probability under a standard normal prior: this is another")
    ticks = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    down, right = torch.meshgrid(ticks.flip(0), ticks, indexing="ij")
    return decode(model, torch.stack([right, down], -1).reshape(-1, 2)), ticks


def manifold(model: VAE, side: int = 20, *, title: str = "") -> Figure:
    r"""What a two-dimensional latent space decodes to, on a grid of equal probability under the prior.

    A linear grid on the unit square is mapped through the inverse Gaussian CDF, so each picture stands for the same
    prior mass.

    Reference:
        Kingma & Welling (2014), figure 4. https://arxiv.org/abs/1312.6114

    Raises:
        UsageError: if the model does not have exactly two latent dimensions, with a standard normal prior.
    """
    pictures, ticks = manifold_images(model, side)
    figure = picture(tile(pictures, side, gap=0), title or "Learned manifold")
    axes = figure.axes[0]
    shown = sorted({0, side // 4, side - 1 - side // 4, side - 1})  # symmetric about 0, as the grid is
    height, width = model.shape[1:]
    labels = [f"{ticks[i]:.1f}" for i in shown]
    axes.set_xticks([(i + 0.5) * width for i in shown], labels)
    axes.set_yticks([(side - i - 0.5) * height for i in shown], labels)
    axes.tick_params(left=True, bottom=True, labelleft=True, labelbottom=True)
    axes.set_xlabel("$z_1$")
    axes.set_ylabel("$z_2$")
    return figure


# --- ways through latent space --------------------------------------------------------------------------------------


def traversals(
    model: VAE,
    code: Tensor,
    dimensions: Sequence[int],
    rate: NDArray[np.float64] | None = None,
    *,
    span: float = 3.0,
    steps: int = 11,
    title: str = "",
) -> Figure:
    """What each latent dimension does: a row a dimension, its value from -span to span, all others as in ``code``.

    Args:
        model: the model.
        code: (D,), where the rows pass through.
        dimensions: the rows, from the top; by falling rate the most telling ones come first.
        rate: (D,), the rate of each dimension in nats, written beside its row; None where it is not known.
        span: the largest value.
        steps: images a row.
        title: above the picture.
    """
    values = torch.linspace(-1, 1, steps, dtype=torch.float64) * span
    images = decode(model, traverse(code, dimensions, values).flatten(0, 1))
    names = [f"$z_{{{d + 1}}}$" + ("" if rate is None else f"  {rate[d]:.2f} nats") for d in dimensions]
    shown = sorted({0, steps // 2, steps - 1})
    ticks = {i: f"{values[i]:+.1f}" if abs(values[i]) > 1e-9 * span else "0" for i in shown}
    return _named(images, steps, title or "Traversals: one latent dimension a row", names, ticks)


def interpolation(model: VAE, a: Tensor, b: Tensor, *, steps: int = 12, title: str = "") -> Figure:
    """From codes a to codes b (N, D): for each pair a row along the straight line and one along the great circle."""
    t = torch.linspace(0, 1, steps)
    ways: tuple[Way, ...] = ("linear", "spherical")
    codes = torch.stack([between(a, b, t, way) for way in ways], 1)  # (N, 2, F, D)
    images = decode(model, codes.flatten(0, 2))
    return _named(images, steps, title or "Interpolation", list(ways) * len(a))


def arithmetic(
    model: VAE, terms: tuple[Tensor, Tensor, Tensor], names: Sequence[tuple[str, str, str]], *, title: str = ""
) -> Figure:
    r"""Sums of codes: a, b and c (N, D), and the image of :math:`a - b + c`, a row each.

    Args:
        model: the model.
        terms: a, b and c, such as the mean codes of classes or codes of single images.
        names: what a, b and c of each row are.
        title: above the picture.
    """
    a, b, c = terms
    images = torch.stack([decode(model, codes) for codes in (a, b, c, a - b + c)], 1)
    rows = [f"{x} \u2212 {y} + {z}" for x, y, z in ([short(name, 12) for name in row] for row in names)]
    below = dict(enumerate(["a", "\u2212 b", "+ c", "="]))
    return _named(images.flatten(0, 1), 4, title or "Arithmetic of codes: a - b + c", rows, below, inches=3.6)


def neighbours(samples: Tensor, nearest: Tensor, distances: NDArray[np.float64], *, title: str = "") -> Figure:
    """Samples, and below each the training images closest to it: does the model repeat what it has seen?

    Args:
        samples: (N, C, H, W).
        nearest: (N, K, C, H, W), the closest training images, the closest first.
        distances: (N, K), their Euclidean distances from the sample, in pixels of [0, 1].
        title: above the picture.
    """
    rows = torch.cat([samples[:, None].cpu(), nearest.cpu()], 1).transpose(0, 1)  # (1 + K, N, ...)
    title = title or "Samples and the closest training images"
    ranks = ["closest" if k == 0 else f"{k + 1}" for k in range(nearest.shape[1])]
    below = {i: f"{d:.1f}" for i, d in enumerate(distances[:, 0])}
    figure = _named(rows.flatten(0, 1), len(samples), title, ["sample", *ranks], below)
    figure.axes[0].set_xlabel("distance of the closest")
    return figure


def _named(
    images: Tensor, columns: int, title: str, rows: Sequence[str], below: Mapping[int, str] | None = None,
    inches: float = 6.5,
) -> Figure:  # fmt: skip
    """A picture of images in rows of ``columns``: a name beside each row, and below the columns that have one."""
    figure = picture(tile(images, columns), title, inches)
    height, width = (side + 2 for side in images.shape[2:])  # with the gap between two
    axes, below = figure.axes[0], below or {}
    axes.set_yticks([height * (i + 0.5) - 1 for i in range(len(rows))], rows)
    axes.set_xticks([width * (i + 0.5) - 1 for i in below], list(below.values()))
    axes.tick_params(labelleft=True, labelbottom=bool(below))
    return figure
