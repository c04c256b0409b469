"""Figures of the latent space: where codes lie, and what each dimension carries.

Shapes: N images, D latent dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vaelab.figures.projections import Projection, project
from vaelab.figures.style import COLOURS, STYLE, halo, short


def latent_map(
    codes: NDArray[np.float32] | Projection,
    labels: NDArray[np.int64] | None = None,
    classes: Sequence[str] | None = None,
    *,
    title: str = "",
) -> Figure:
    """Posterior means in the plane, coloured by class.

    Args:
        codes: (N, D), shown as they are for D = 2, by principal components for more, and class by class for D = 1; or
            a projection of them.
        labels: (N,) class numbers, or None.
        classes: the names of the classes.
        title: above the map.
    """
    found = codes if isinstance(codes, Projection) else project(codes)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(7, 6), layout="constrained")
        axes = figure.subplots()
        groups = [None] if labels is None else list(np.unique(labels))
        known = {} if classes is None else dict(enumerate(classes))
        names = ["" if group is None else known.get(int(group), str(group)) for group in groups]
        size = float(np.clip(20_000 / len(found.points), 4, 40))  # of a marker, in square points
        points = found.points if found.axes[1] else _in_rows(found.points, labels)
        for i, (group, name) in enumerate(zip(groups, names, strict=True)):
            rows = points if labels is None else points[labels == group]
            axes.scatter(rows[:, 0], rows[:, 1], s=size, alpha=0.5, linewidths=0, color=COLOURS[i % len(COLOURS)],
                         label=short(name, 24), rasterized=True)  # fmt: skip
            if group is not None:  # a name on each cloud: nobody should have to match ten colours with a legend
                x, y = np.median(rows, 0)
                letters = 13 if max(map(len, names)) <= 4 and len(groups) <= 12 else 9
                axes.text(x, y, short(name, 16), fontsize=letters, weight="bold", ha="center", va="center",
                          path_effects=halo(3))  # fmt: skip
        if 1 < len(groups) <= 2 * len(COLOURS):
            legend = axes.legend(
                markerscale=(64 / size) ** 0.5, title="class", loc="center left", bbox_to_anchor=(1, 0.5)
            )
            for handle in legend.legend_handles:
                if handle is not None:
                    handle.set_alpha(1)
        if not found.axes[1]:  # heights say nothing
            axes.set_yticks([])
        axes.set_xlabel(found.axes[0])
        axes.set_ylabel(found.axes[1])
        axes.set_title(title or "Posterior means")
    return figure


def _in_rows(points: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.float32]:
    """Codes of one dimension, each class in a row of its own, the points of a row scattered over its height."""
    rows = 0 if labels is None else np.unique(labels, return_inverse=True)[1]
    height = rows + np.random.default_rng(0).uniform(-0.35, 0.35, len(points))
    return np.stack([points[:, 0], height], 1).astype(np.float32)


def kl_bars(rate: NDArray[np.float64], *, used: float = 0.1, title: str = "") -> Figure:
    """The rate of each latent dimension (D,) in nats per image, the largest first; grey where it is below ``used``."""
    order = np.argsort(-rate, kind="stable")
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = figure.subplots()
        colours = [COLOURS[4] if rate[d] >= used else COLOURS[3] for d in order]
        axes.bar(np.arange(len(rate)), rate[order], color=colours)
        few = len(rate) <= 40
        axes.set_xlabel("latent dimension" if few else "latent dimensions, by rate")
        if few:
            axes.set_xticks(np.arange(len(rate)), [str(d + 1) for d in order], fontsize=9 if len(rate) <= 24 else 7)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("rate, nats per image")
        in_use = int((rate >= used).sum())
        axes.set_title(
            title or f"{in_use} of {len(rate)} dimensions carry {used:g} nats or more; {rate.sum():.2f} in all"
        )
    return figure
