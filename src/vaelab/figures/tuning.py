"""The picture of a tuning: what each latent size and beta costs, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from vaelab.figures.planes import diagonals
from vaelab.figures.style import COLOURS, STYLE, halo

Rows = Sequence[Mapping[str, Any]]


def tuning(rows: Rows, chosen: tuple[int, float] | None = None, *, title: str = "") -> Figure:
    """Rate against distortion; over the latent size -log p(x) above the lowest and, where known, the active units.

    On a diagonal of the first panel distortion + rate, -ELBO, is the same: down and left is better. In the second a bar
    is 2 standard errors of the difference from the lowest: where it reaches 0 the setting is as good, for all that is
    known.

    Args:
        rows: one a latent size and beta, as in ``tuning.json``: latent_dim, beta, nll, above, above_stderr, distortion,
            rate, and active_units where they are defined.
        chosen: the latent size and beta to mark.
        title: above the panels.
    """
    with mpl.rc_context(STYLE):
        has_units = all("active_units" in r for r in rows)
        figure = Figure(figsize=(12.5 if has_units else 8.8, 4.4), layout="constrained")
        widths = (1.35, 1, 1) if has_units else (1.35, 1)
        plane, likelihood, *rest = figure.subplots(1, len(widths), width_ratios=widths)
        _plane(plane, rows, chosen)
        _likelihood(likelihood, rows, chosen)
        for active in rest:
            _active(active, rows, chosen)
        if not has_units:
            likelihood.legend()  # of the betas, which the panel of active units names else
        figure.suptitle(title)
    return figure


def _plane(axes: Axes, rows: Rows, chosen: tuple[int, float] | None) -> None:
    """Distortion against rate: one line a size, along its betas."""
    sizes, betas = _values(rows, "latent_dim"), _values(rows, "beta")
    for size, colour in zip(sizes, _shades(len(sizes)), strict=True):
        line = sorted((r for r in rows if r["latent_dim"] == size), key=lambda r: r["beta"])
        axes.plot([r["rate"] for r in line], [r["distortion"] for r in line], color=colour, marker="o", markersize=5,
                  label=f"{size}", zorder=3)  # fmt: skip
    _ring(axes, rows, chosen, "rate", "distortion")
    axes.margins(0.12)
    diagonals(axes)
    if len(betas) > 1:
        _name_betas(axes, rows, chosen)
    axes.set_title("Rate and distortion; grey: equal -ELBO")
    axes.set_xlabel("rate, KL(q(z|x) || p(z)), nats per image")
    axes.set_ylabel(r"distortion, $-\log p(x|z)$, nats per image")
    axes.legend(title="latent dimensions", loc="best", frameon=True, edgecolor="none", framealpha=1).set_zorder(6)


def _name_betas(axes: Axes, rows: Rows, chosen: tuple[int, float] | None) -> None:
    """Write beta at every point that has room, at those of the chosen size first: surplus sizes lie on one another."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float]] = []
    for r in sorted(rows, key=lambda r: (chosen is None or r["latent_dim"] != chosen[0], r["latent_dim"])):
        at = (r["rate"] - left) / (right - left), (r["distortion"] - bottom) / (top - bottom)
        if all(abs(at[0] - x) > 0.11 or abs(at[1] - y) > 0.05 for x, y in taken):
            taken.append(at)
            axes.annotate(rf"$\beta$ {r['beta']:g}", (r["rate"], r["distortion"]), (8, 5), fontsize=8, zorder=4,
                          textcoords="offset points", path_effects=halo())  # fmt: skip


def _likelihood(axes: Axes, rows: Rows, chosen: tuple[int, float] | None) -> None:
    betas = _values(rows, "beta")
    for beta, colour in zip(betas, _shades(len(betas)), strict=True):
        line = [r for r in rows if r["beta"] == beta]
        bars = [2 * r["above_stderr"] for r in line]
        axes.errorbar([r["latent_dim"] for r in line], [r["above"] for r in line], bars, color=colour, marker="o",
                      markersize=4, capsize=3, label=rf"$\beta$ = {beta:g}")  # fmt: skip
    _ring(axes, rows, chosen, "latent_dim", "above")
    axes.axhline(0, color=COLOURS[8], linewidth=0.8)
    # Sizes that are too small are off by tens of nats, and those to choose from by tenths.
    axes.set_yscale("symlog", linthresh=1, linscale=1)
    axes.yaxis.set_major_locator(FixedLocator([-1, -0.5, 0, 0.5, *(d * 10**e for e in range(5) for d in (1, 2, 5))]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    ends = [r["above"] + sign * 2 * r["above_stderr"] for r in rows for sign in (-1, 1)]
    axes.set_ylim(min(ends) - 0.2, 1.3 * max(ends) + 0.2)
    _over_sizes(axes, rows)
    axes.set_title(rf"$-\log p(x)$ above the lowest, {min(r['nll'] for r in rows):.2f}")
    axes.set_ylabel("nats per image; bars: 2 standard errors")


def _active(axes: Axes, rows: Rows, chosen: tuple[int, float] | None) -> None:
    sizes, betas = _values(rows, "latent_dim"), _values(rows, "beta")
    for beta, colour in zip(betas, _shades(len(betas)), strict=True):
        line = [r for r in rows if r["beta"] == beta]
        axes.plot([r["latent_dim"] for r in line], [r["active_units"] for r in line], color=colour, marker="o",
                  markersize=4, label=rf"$\beta$ = {beta:g}")  # fmt: skip
    _ring(axes, rows, chosen, "latent_dim", "active_units")
    all_of_them = np.geomspace(sizes[0], sizes[-1], 100)
    axes.plot(all_of_them, all_of_them, color=COLOURS[8], linestyle=":", label="all active")
    _over_sizes(axes, rows)
    axes.set_ylim(0, max(1.0, 1.3 * max(r["active_units"] for r in rows)))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Active units")
    axes.set_ylabel("dimensions")
    axes.legend(loc="upper left")


def _over_sizes(axes: Axes, rows: Rows) -> None:
    sizes = _values(rows, "latent_dim")
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("latent dimensions")


def _ring(axes: Axes, rows: Rows, chosen: tuple[int, float] | None, x: str, y: str) -> None:
    at = [(r[x], r[y]) for r in rows if (r["latent_dim"], r["beta"]) == chosen]
    for point in at:
        axes.plot(*point, "o", markersize=13, markerfacecolor="none", linestyle="none", markeredgecolor=COLOURS[2],
                  markeredgewidth=1.5, label="recommended", zorder=5)  # fmt: skip


def _values(rows: Rows, key: str) -> list[Any]:
    return sorted({r[key] for r in rows})


def _shades(count: int) -> list[Any]:
    """Sizes and betas are ordered, and so are these colours: dark to light, none too light to be seen."""
    return [mpl.colormaps["viridis"](value) for value in np.linspace(0.0, 0.82, count)]
