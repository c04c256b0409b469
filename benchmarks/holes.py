"""Holes of a latent space to which no prior was held: an autoencoder beside the VAE on the same networks.

    python benchmarks/holes.py RUN_OF_MLP_2D RUN_OF_AE_2D [OUT.png]

For each run: where the codes of validation images lie, with the circles that hold 50 and 95 % of a standard normal's
mass, and what a grid over these codes decodes to. Both panels of a run span one square, which holds 96 % of the codes
along the dimension that spreads wider.
Writes ``docs/images/holes.png``.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from vaelab import figures
from vaelab.drawing import media
from vaelab.drawing.scene import Scene, scene_of
from vaelab.figures.style import COLOURS, STYLE, halo
from vaelab.runs.checkpoint import write_bytes

SIDE = 18  # pictures to a row of the grid
INNER = (2, 98)  # percentiles of the codes that the panels span
OUT = Path(__file__).parent.parent / "docs" / "images" / "holes.png"


def main(vae: str, autoencoder: str, out: str = str(OUT)) -> None:
    """Draw both runs."""
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(10, 10.6), layout="constrained")
        rows = figure.subplots(2, 2)
        for (left, right), path in zip(rows, (vae, autoencoder), strict=True):
            scene = scene_of(Path(path))
            extent = span(scene)
            codes(left, scene, extent)
            grid(right, scene, extent)
            spread = scene.means.std(0)
            left.set_title(f"{scene.run.recipe}: codes, of deviation {spread[0]:.1f} and {spread[1]:.1f}")
            right.set_title("What the same square decodes to")
        figure.suptitle("Codes of validation images; circles: 50 and 95 % of a standard normal's mass")
        png = media.png(figure, dpi=110)
    write_bytes(Path(out), png)


def span(scene: Scene) -> tuple[float, float, float, float]:
    """The square that holds the inner codes: left, right, bottom, top."""
    low, high = np.percentile(scene.means, INNER, axis=0)
    (x, y), half = (low + high) / 2, float((high - low).max()) / 2
    return x - half, x + half, y - half, y + half


def codes(axes: Axes, scene: Scene, extent: tuple[float, float, float, float]) -> None:
    """The codes, coloured by class, and the prior."""
    labels, classes = scene.codes.y, scene.data.classes
    if labels is None or classes is None:
        raise SystemExit("the codes are told apart by their classes: data without labels cannot be drawn here")
    for i, label in enumerate(np.unique(labels)):
        points = scene.means[labels == label]
        axes.scatter(*points.T, s=4, alpha=0.5, linewidths=0, color=COLOURS[i % len(COLOURS)])
        x, y = np.median(points, 0)
        axes.text(x, y, classes[label], fontsize=13, weight="bold", ha="center", va="center",
                  path_effects=halo(3), clip_on=True)  # fmt: skip
    for mass in (0.5, 0.95):  # of a normal in the plane: 1 - exp(-r^2 / 2)
        radius = math.sqrt(-2 * math.log(1 - mass))
        axes.add_patch(Circle((0, 0), radius, fill=False, linestyle="--", linewidth=1.5, color="black"))
    axes.set_xlim(extent[:2])
    axes.set_ylim(extent[2:])
    axes.set_aspect("equal")


def grid(axes: Axes, scene: Scene, extent: tuple[float, float, float, float]) -> None:
    """What the middles of SIDE x SIDE equal cells of the square decode to."""
    left, right, bottom, top = extent
    share = (torch.arange(SIDE) + 0.5) / SIDE
    across, down = left + (right - left) * share, top - (top - bottom) * share
    points = torch.stack(torch.meshgrid(down, across, indexing="ij")[::-1], -1).reshape(-1, 2)
    images = figures.decode(scene.model, points).unflatten(0, (SIDE, SIDE))  # (row, column, 1, H, W)
    whole = images[:, :, 0].transpose(1, 2).flatten(2).flatten(0, 1)
    axes.imshow(whole.numpy(), cmap="gray_r", vmin=0, vmax=1, extent=extent, interpolation="nearest")


if __name__ == "__main__":
    main(*sys.argv[1:])
