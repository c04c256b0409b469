"""Figures of what a model costs: rate against distortion, and how well its likelihood is estimated."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vaelab.errors import UsageError
from vaelab.figures.style import COLOURS, STYLE, halo, short


def rate_distortion(histories: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str = "") -> Figure:
    """The way of each run through the plane of rate and distortion: a point an epoch, of the validation images.

    On a diagonal distortion + rate, -ELBO, is the same: down and left is better. A way begins where the -ELBO has come
    down to near its end: the first epochs lie so far up that nothing else could be seen.

    Args:
        histories: the records of each run's epochs.
        title: above the figure.

    Raises:
        UsageError: if a run has no rate.
    """
    if any("validation_rate" not in history[0] for history in histories.values()):
        raise UsageError("a plane of rate and distortion needs a rate, and this objective has none")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.subplots()
        for (name, history), colour in zip(histories.items(), itertools.cycle(COLOURS), strict=False):
            rate, distortion, epochs = _settled(history)
            axes.plot(rate, distortion, color=colour, marker=".", markersize=4, linewidth=1, alpha=0.8)
            axes.plot(rate[-1], distortion[-1], "o", color=colour, markersize=9, label=short(name, 40))
            for i in (0, -1)[: len(epochs)]:
                axes.annotate(f"epoch {epochs[i]}", (rate[i], distortion[i]), (6, 4), textcoords="offset points",
                              fontsize=8, path_effects=halo(), zorder=5)  # fmt: skip
        axes.margins(0.12)
        diagonals(axes)
        axes.set_xlabel("rate, KL(q(z|x) || p(z)), nats per image")
        axes.set_ylabel(r"distortion, $-\log p(x|z)$, nats per image")
        if any(histories):  # a run alone needs no name
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_title(title or "Rate and distortion of the validation images; on a line $-$ELBO is the same")
    return figure


def _settled(history: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float], list[int]]:
    """Rate, distortion and epoch from where the -ELBO is above its end by a quarter of that, or 2 % of its range."""
    rate = [record["validation_rate"] for record in history]
    distortion = [record["validation_distortion"] for record in history]
    total = np.add(rate, distortion)
    limit = total[-1] + max(0.25 * abs(total[-1]), 0.02 * float(np.ptp(total)))
    first = int(np.argmax(total <= limit))
    return rate[first:], distortion[first:], [record["epoch"] for record in history][first:]


def diagonals(axes: Axes) -> None:
    """Lines on which distortion + rate is a round number, named where they enter the panel."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for total in MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(left + bottom, right + top):
        if left + bottom < total < right + top:
            axes.plot(
                [left, right], [total - left, total - right], color=COLOURS[3], linewidth=0.8, alpha=0.6, zorder=1
            )
            x = max(left, total - top)
            offset, vertical = ((3, 1), "bottom") if x == left else ((4, -2), "top")
            axes.annotate(f"{total:g}", (x, total - x), offset, textcoords="offset points", fontsize=7, va=vertical,
                          color=COLOURS[8], path_effects=halo())  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.grid(visible=False)


def importance_weights(
    bounds: Mapping[int, NDArray[np.float64]], ess: NDArray[np.float64], *, title: str = ""
) -> Figure:
    """Whether an importance-sampled likelihood can be trusted: has it settled, and how many samples count?

    Args:
        bounds: (N,) for each number of samples k, the bound on log p(x) of each image in nats.
        ess: (N,), the effective sample size of each image's weights.
        title: above both panels.
    """
    counts = sorted(bounds)
    nll = np.array([-bounds[k].mean() for k in counts])
    size = len(ess)
    error = np.array([bounds[k].std(ddof=1) / size**0.5 for k in counts]) if size > 1 else None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(counts, nll, color=COLOURS[0], marker="o", markersize=4)
        if error is not None:
            left.fill_between(counts, nll - 2 * error, nll + 2 * error, color=COLOURS[0], alpha=0.2, linewidth=0,
                              label="2 standard errors over images")  # fmt: skip
            left.legend()
        left.set_xscale("log")
        left.set_xlabel("importance samples $k$")
        left.set_ylabel(r"bound on $-\log p(x)$, nats per image")
        spread = "" if error is None else f" ± {error[-1]:.2f}"
        of = f"{size:,} image{'s' * (size != 1)}"
        left.set_title(f"{nll[-1]:.2f}{spread} nats at $k$ = {counts[-1]:,}, {of}")
        bins = np.geomspace(1, counts[-1], 31) if counts[-1] > 1 else 10
        right.hist(ess, bins=bins, color=COLOURS[1])
        right.set_xscale("log")
        right.set_xlabel(f"effective sample size, of {counts[-1]:,}")
        right.set_ylabel("images")
        few = float((ess < 10).mean())
        right.set_title(f"median {np.median(ess):.0f}; below 10 for {few:.0%} of the images")
        figure.suptitle(title)
    return figure
