"""Curves over the epochs, of one run and of several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vaelab.figures.decoding import decode, sample_prior
from vaelab.figures.style import COLOURS, STYLE, plain, show, tile
from vaelab.models import VAE


def loss_curve(history: Sequence[Mapping[str, Any]], *, title: str = "") -> Figure:
    """Loss and distortion, and the rate beside them, over the epochs, in nats per image."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _curve(left, history, "loss", "loss", COLOURS[0])
        _curve(left, history, "distortion", "reconstruction (distortion)", COLOURS[1])
        _curve(right, history, "rate", "KL (rate)", COLOURS[4])
        left.set_title("Loss and reconstruction")
        right.set_title("KL divergence")
        figure.suptitle(title)
    return figure


def training_history(history: Sequence[Mapping[str, Any]], *, title: str = "") -> Figure:
    """Four panels over the epochs: total loss, reconstruction, KL (with its weight), learning rate."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.4), layout="constrained")
        panels = figure.subplots(2, 2).ravel()
        for axes, term, colour, name in zip(
            panels,
            ("loss", "distortion", "rate"),
            (COLOURS[0], COLOURS[1], COLOURS[4]),
            ("Total loss", "Reconstruction", "KL divergence"),
            strict=False,
        ):
            _curve(axes, history, term, "", colour)
            axes.set_title(name)
        axes = panels[3]
        _plot(axes, history, "learning_rate", color=COLOURS[6], label="learning rate")
        axes.set_title("Learning rate and weight on the KL")
        axes.set_ylabel("learning rate")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.set_ylim(bottom=0)
        weight = axes.twinx()
        _plot(weight, history, "beta", color=COLOURS[8], linestyle=":", label=r"$\beta$")
        weight.set_ylabel(r"$\beta$")
        weight.set_ylim(bottom=0)
        weight.grid(visible=False)
        weight.spines["right"].set_visible(True)
        lines = [*axes.get_lines(), *weight.get_lines()]
        axes.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")
        figure.suptitle(title)
    return figure


def _curve(axes: Axes, history: Sequence[Mapping[str, Any]], term: str, name: str, colour: str) -> None:
    if term not in history[0]:
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"this objective has no {term}", ha="center", va="center", transform=axes.transAxes)
        return
    prefix = f"{name}, " if name else ""
    _plot(axes, history, term, color=colour, alpha=0.55, label=f"{prefix}training")
    # The monitored loss weighs the KL as at the end of the annealing, whatever the epoch.
    ending = r" (at the final $\beta$)" if term == "loss" and history[0]["beta"] != history[-1]["beta"] else ""
    _plot(axes, history, f"validation_{term}", color=colour, linestyle="--", label=f"{prefix}validation{ending}")
    axes.set_ylabel("nats per image")
    axes.legend()


def _plot(axes: Axes, history: Sequence[Mapping[str, Any]], *terms: str, **style: Any) -> None:
    """The sum of some terms over the epochs; a single epoch is a dot, as no line would show it."""
    values = [sum(record[term] for term in terms) for record in history]
    axes.plot([r["epoch"] for r in history], values, marker="o" if len(history) == 1 else None, **style)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


# --- runs side by side ----------------------------------------------------------------------------------------------


def comparison(
    panels: Sequence[tuple[str, Mapping[str, Sequence[Mapping[str, Any]]]]],
    models: Mapping[str, VAE],
    *,
    side: int = 6,
    seed: int = 0,
    title: str = "",
) -> Figure:
    """Runs side by side: on the left their validation curves, on the right samples from the same latent draws.

    Args:
        panels: a title and the histories by run, for each set of runs whose validation losses may share axes.
        models: the model of each run; from priors that are alike, the same z are drawn at the same place.
        side: images a side of each run's square of samples.
        seed: another seed draws other images.
        title: what to write above.
    """
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(models)}
    square = 2.7 * max(model.shape[1] / model.shape[2] for model in models.values()) + 0.3  # inches, with its title
    rows = max(2 if len(models) == 4 else -(-len(models) // 3), int(2.6 * len(panels) / square))
    columns = -(-len(models) // rows)
    height = max(square * rows + 0.3, 2.6 * len(panels))
    with mpl.rc_context({**STYLE, "axes.spines.right": True, "axes.spines.top": True}):
        figure = Figure(figsize=(4.6 + 2.7 * columns, height + (0.3 if title else 0)), layout="constrained")
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[4.6, 2.7 * columns])[0]
        curves = left.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (name, histories) in zip(curves, panels, strict=True):
            _validation(axes, histories, colours)
            axes.set_title(f"Validation: {plain(name)}")
        drawn = {name: sample_prior(model, side * side, seed) for name, model in models.items()}
        grid = right.subplots(rows, columns, squeeze=False).ravel().tolist()
        for axes, (name, model) in zip(grid, models.items(), strict=False):
            show(axes, tile(decode(model, drawn[name]), side))
            axes.set(xticks=[], yticks=[], anchor="N")
            axes.spines[:].set(color=colours[name], linewidth=3)  # the colour of its curve
            axes.set_title(f"{plain(name)} (D = {model.latent_dim})")
        for axes in grid[len(models) :]:
            axes.set_axis_off()
        right.suptitle(f"Samples: {_shared(list(drawn.values()))}", fontsize=10)
        figure.suptitle(title)
    return figure


def _shared(drawn: Sequence[Tensor]) -> str:
    """Which models decode the same latents."""
    alike = [sum(torch.equal(z, other) for other in drawn) for z in drawn]
    if min(alike) == len(drawn):
        return "the same z at the same place"
    of_size = [sum(z.shape == other.shape for other in drawn) for z in drawn]
    causes = ["prior"] * (alike != of_size) + ["latent size D"] * (min(of_size) < len(drawn))
    what = " or ".join(causes)
    if max(alike) > 1:
        return f"the same z at the same place, but where the {what} differs"
    return f"each its own z, as the {what} differs"


def _validation(axes: Axes, histories: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, str]) -> None:
    r"""-ELBO on the validation images over the epochs; comparable whatever :math:`\beta` the loss was weighed with."""
    for name, history in histories.items():
        if "validation_rate" not in history[0]:  # its distortion alone would look like a better bound
            axes.plot([], [], color=colours[name], label=f"{plain(name)}: no bound")
            continue
        terms = "validation_distortion", "validation_rate"
        under = " (before the refit)" if history[-1].get("before_refit") else ""
        _plot(axes, history, *terms, color=colours[name], label=f"{plain(name)}{under}")
    axes.spines[["right", "top"]].set_visible(False)
    axes.tick_params(labelbottom=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("-ELBO, nats per image")
    axes.legend()
