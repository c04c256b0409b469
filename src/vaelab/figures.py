"""Figures: pure functions of a model and arrays, which return a matplotlib figure or frames and write nothing.

Shapes: N images, C H W image, D latent dimensions, F frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from vaelab.data.datasets import BATCH
from vaelab.errors import UsageError
from vaelab.models import VAE

# Petroff (2021), Accessible Color Sequences for Data Visualization, the ten-colour sequence. https://arxiv.org/abs/2107.02270
COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")

STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "font.size": 9,
    "legend.frameon": False,
    "grid.alpha": 0.3,
    "axes.grid": True,
}


# --- images ---------------------------------------------------------------------------------------------------------


def tile(images: Tensor, columns: int, gap: int = 2) -> NDArray[np.float32]:
    """Lay images (N, C, H, W) out in rows of ``columns``, with a grey gap between; returns (H', W', C) in [0, 1]."""
    x = images.detach().cpu().float().clamp(0, 1).numpy()
    count, channels, height, width = x.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 0.5, np.float32)
    for i, image in enumerate(x):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return canvas


def samples(model: VAE, count: int = 100, *, seed: int = 0, title: str = "") -> Figure:
    """Means of p(x|z) for z drawn from the prior."""
    pictures = decode(model, sample_prior(model, count, seed))
    columns = int(np.ceil(np.sqrt(count)))
    return _picture(tile(pictures, columns), title or "Samples: z ~ p(z), mean of p(x|z)")


def reconstructions(model: VAE, x: Tensor, *, columns: int = 10, title: str = "") -> Figure:
    """Images and, below each, the mean of p(x|z) at z = mean of q(z|x)."""
    with torch.no_grad():
        x_hat = decode(model, model.posterior(x).mean)
    pairs: list[Tensor] = []
    for start in range(0, len(x), columns):
        for images in (x, x_hat):
            row = images[start : start + columns].cpu()
            empty = row.new_full((columns - len(row), *row.shape[1:]), 0.5)
            pairs.append(torch.cat([row, empty]))
    canvas = tile(torch.cat(pairs), min(columns, len(x)) if len(x) < columns else columns)
    figure = _picture(canvas, title or "Reconstructions")
    axes = figure.axes[0]
    height = x.shape[2] + 2
    axes.set_yticks([height * (i + 0.5) for i in range(len(pairs))], ["x", r"$\hat{x}$"] * (len(pairs) // 2))
    axes.tick_params(left=False, labelleft=True)
    return figure


def manifold(model: VAE, side: int = 20, *, title: str = "") -> Figure:
    r"""What a two-dimensional latent space decodes to, on a grid of equal probability under the prior.

    A linear grid on the unit square is mapped through the inverse Gaussian CDF, so each picture stands for the same
    prior mass.

    Reference:
        Kingma & Welling (2014), figure 4. https://arxiv.org/abs/1312.6114
    Raises:
        UsageError: if the model does not have exactly two latent dimensions.
    """
    if model.latent_dim != 2:
        raise UsageError(f"a manifold needs 2 latent dimensions: this model has {model.latent_dim}")
    u = (torch.arange(side) + 0.5) / side
    ticks = torch.special.ndtri(u)
    down, right = torch.meshgrid(ticks.flip(0), ticks, indexing="ij")
    pictures = decode(model, torch.stack([right, down], -1).reshape(-1, 2))
    figure = _picture(tile(pictures, side, gap=0), title or "Learned manifold")
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


# --- curves ---------------------------------------------------------------------------------------------------------


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
        epochs = [record["epoch"] for record in history]
        axes = panels[3]
        axes.plot(epochs, [record["learning_rate"] for record in history], color=COLOURS[6], label="learning rate")
        axes.set_title("Learning rate and weight on the KL")
        axes.set_xlabel("epoch")
        axes.set_ylabel("learning rate")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.set_ylim(bottom=0)
        weight = axes.twinx()
        weight.plot(epochs, [record["beta"] for record in history], color=COLOURS[8], linestyle=":", label=r"$\beta$")
        weight.set_ylabel(r"$\beta$")
        weight.set_ylim(bottom=0)
        weight.grid(visible=False)
        weight.spines["right"].set_visible(True)
        lines = [*axes.get_lines(), *weight.get_lines()]
        axes.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")
        figure.suptitle(title)
    return figure


def _curve(axes: Axes, history: Sequence[Mapping[str, Any]], term: str, name: str, colour: str) -> None:
    epochs = [record["epoch"] for record in history]
    prefix = f"{name}, " if name else ""
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, [r[term] for r in history], color=colour, alpha=0.55, label=f"{prefix}training", marker=marker)
    validation = [r[f"validation_{term}"] for r in history]
    # The monitored loss weighs the KL as at the end of the annealing, whatever the epoch.
    ending = r" (at the final $\beta$)" if term == "loss" and history[0]["beta"] != history[-1]["beta"] else ""
    axes.plot(epochs, validation, color=colour, linestyle="--", label=f"{prefix}validation{ending}", marker=marker)
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per image")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


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
        models: the model of each run; models of as many latent dimensions get the same z at the same place.
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
            axes.set_title(f"Validation: {name}")
        grid = right.subplots(rows, columns, squeeze=False).ravel().tolist()
        for axes, (name, model) in zip(grid, models.items(), strict=False):
            canvas = tile(decode(model, sample_prior(model, side * side, seed)), side)
            grey = canvas.shape[2] == 1
            axes.imshow(canvas[..., 0] if grey else canvas, cmap="gray" if grey else None, vmin=0, vmax=1,
                        interpolation="nearest")  # fmt: skip
            axes.set(xticks=[], yticks=[], anchor="N")
            axes.spines[:].set(color=colours[name], linewidth=3)  # the colour of its curve
            axes.set_title(f"{name} (D = {model.latent_dim})")
        for axes in grid[len(models) :]:
            axes.set_axis_off()
        sizes = {model.latent_dim for model in models.values()}
        which = "the same z at the same place" + (", where the latent size D is the same" if len(sizes) > 1 else "")
        if len(sizes) == len(models):
            which = "each its own z, as the latent sizes D differ"
        right.suptitle(f"Samples: {which}", fontsize=10)
        figure.suptitle(title)
    return figure


def _validation(axes: Axes, histories: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, str]) -> None:
    r"""-ELBO on the validation images over the epochs; comparable whatever :math:`\beta` the loss was weighed with."""
    for name, history in histories.items():
        values = [record["validation_distortion"] + record["validation_rate"] for record in history]
        marker = "o" if len(history) == 1 else None
        axes.plot([r["epoch"] for r in history], values, color=colours[name], label=name, marker=marker)
    axes.spines[["right", "top"]].set_visible(False)
    axes.tick_params(labelbottom=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("-ELBO, nats per image")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


# --- the latent space -----------------------------------------------------------------------------------------------


def latent_map(
    codes: NDArray[np.float32],
    labels: NDArray[np.int64] | None = None,
    classes: Sequence[str] | None = None,
    *,
    title: str = "",
) -> Figure:
    """Posterior means (N, D) in the plane, coloured by class: as they are for D = 2, else by PCA."""
    names = ("$z_1$", "$z_2$")
    if codes.shape[1] == 1:
        codes = np.concatenate([codes, np.zeros_like(codes)], 1)
    if codes.shape[1] > 2:
        if len(codes) < 2:
            raise UsageError("a map by principal components needs at least 2 images")
        from sklearn.decomposition import PCA

        pca = PCA(2, svd_solver="full").fit(codes)
        codes = pca.transform(codes)
        names = tuple(
            f"principal component {i + 1} ({r:.0%} of the variance)"
            for i, r in enumerate(pca.explained_variance_ratio_)
        )
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(7, 6), layout="constrained")
        axes = figure.subplots()
        groups = [None] if labels is None else list(np.unique(labels))
        for i, group in enumerate(groups):
            rows = codes if labels is None else codes[labels == group]
            label = "" if group is None else (classes[group] if classes else str(group))
            axes.scatter(
                rows[:, 0], rows[:, 1], s=4, alpha=0.5, linewidths=0, color=COLOURS[i % len(COLOURS)], label=label
            )
            if group is not None:  # a name on each cloud: nobody should have to match ten colours with a legend
                x, y = np.median(rows, 0)
                outline = [withStroke(linewidth=3, foreground="white")]
                axes.text(x, y, label, fontsize=13, weight="bold", ha="center", va="center", path_effects=outline)
        if len(groups) > 1:
            legend = axes.legend(markerscale=4, title="class", loc="center left", bbox_to_anchor=(1, 0.5))
            for handle in legend.legend_handles:
                if handle is not None:
                    handle.set_alpha(1)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_title(title or "Posterior means")
    return figure


def encode(model: VAE, x: Tensor, batch_size: int = BATCH) -> NDArray[np.float32]:
    """Posterior means (N, D) of images in [0, 1]."""
    with torch.no_grad():
        return torch.cat([model.posterior(rows).mean for rows in x.split(batch_size)]).cpu().numpy()


def decode(model: VAE, z: Tensor, batch_size: int = BATCH) -> Tensor:
    """Means (N, C, H, W) of p(x|z)."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model.likelihood(rows.to(device)).mean for rows in z.split(batch_size)])


def sample_prior(model: VAE, count: int, seed: int) -> Tensor:
    """Latents (N, D) from the prior: the same for the same seed, and torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too
        return model.prior().sample((count,))


# --- animation ------------------------------------------------------------------------------------------------------


def walk(model: VAE, codes: Tensor, *, frames: int = 16, hold: int = 6) -> Tensor:
    """Decode a closed walk through latent codes: frames (F, C, H, W) that end where they began.

    Between two codes the walk goes along a straight line, slow at both ends (half a cosine), and rests on each code.

    Args:
        model: the model.
        codes: (N, D), in the order of the walk.
        frames: frames from one code to the next.
        hold: frames of rest on each code.
    """
    ease = (1 - torch.cos(torch.linspace(0, torch.pi, frames + 2)[1:-1])) / 2
    legs: list[Tensor] = []
    for here, there in zip(codes, codes.roll(-1, 0), strict=True):
        legs += [here.expand(hold, -1), here + ease[:, None] * (there - here)]
    return decode(model, torch.cat(legs))


def _picture(canvas: NDArray[np.float32], title: str) -> Figure:
    """A figure that shows pixels as they are: 1 is white (MNIST's ink), no interpolation, no axes."""
    height, width = canvas.shape[:2]
    inches = 6.5
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(inches, inches * height / width + 0.5), layout="constrained")
        axes = figure.subplots()
        grey = canvas.shape[2] == 1
        axes.imshow(canvas[..., 0] if grey else canvas, cmap="gray" if grey else None, vmin=0, vmax=1,
                    interpolation="nearest", extent=(0, width, height, 0))  # fmt: skip
        axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(title)
    return figure
