"""What all figures share: colours, the light and the dark theme, and pictures made of pixels.

Shapes: N images, C H W image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from torch import Tensor

from vaelab.labels import readable

Theme = Literal["light", "dark", "page"]

# Petroff (2021), Accessible Color Sequences for Data Visualization, the ten-colour sequence. https://arxiv.org/abs/2107.02270
COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")

# Fonts that have letters which matplotlib's own lacks, the first that is there is taken for those alone.
_LETTERS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS", "Noto Sans Devanagari",
    "Noto Sans Thai",
)  # fmt: skip
_INSTALLED = {font.name for font in fontManager.ttflist}

STYLE: Any = {
    "font.family": [*mpl.rcParamsDefault["font.family"], *(name for name in _LETTERS if name in _INSTALLED)],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "font.size": 9,
    "legend.frameon": False,
    "grid.alpha": 0.3,
    "axes.grid": True,
}

# Ink and paper of the theme "page" stand for those of the page that an SVG is put into (``media.inline_svg``).
PAGE_INK, PAGE_PAPER = "#010203", "#fdfcfb"
_COLOURS: dict[Theme, tuple[str, str]] = {"dark": ("#e4e6eb", "#15171c"), "page": (PAGE_INK, PAGE_PAPER)}


@contextlib.contextmanager
def theme(name: Theme) -> Generator[None]:
    """Draw the figures of a ``with`` block for a light page, a dark one, or one that decides when it is looked at."""
    settings: Any = {}
    if name in _COLOURS:
        ink, paper = _COLOURS[name]
        settings = {
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink),
            "grid.color": "#8a8f99",
        }
    with mpl.rc_context(settings):
        yield


def plain(text: str) -> str:
    """Text that is no mathematics, whatever dollar signs it has, and can be written whatever a folder is called."""
    return readable(text).replace("$", r"\$")


def short(name: str, most: int) -> str:
    """A name of at most so many letters, to be drawn where there is no room for more."""
    return plain(name if len(name) <= most else f"{name[: most - 1]}…")


def halo(width: float = 2.5) -> list[withStroke]:
    """An outline in the colour of the paper, for what is written across lines and points."""
    return [withStroke(linewidth=width, foreground=mpl.rcParams["axes.facecolor"])]


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


def padded(images: Tensor, columns: int) -> Tensor:
    """Images (N, C, H, W) on the CPU, and as many grey ones as complete the last of rows of ``columns``."""
    images = images.cpu()
    return torch.cat([images, images.new_full((-len(images) % columns, *images.shape[1:]), 0.5)])


def show(axes: Axes, canvas: NDArray[np.float32]) -> None:
    """Draw pixels (H, W, C) in [0, 1] as they are: 1 is white (MNIST's ink), no interpolation."""
    height, width, channels = canvas.shape
    grey = channels == 1
    axes.imshow(canvas[..., 0] if grey else canvas, cmap="gray" if grey else None, vmin=0, vmax=1,
                interpolation="nearest", extent=(0, width, height, 0))  # fmt: skip


def picture(canvas: NDArray[np.float32], title: str, inches: float = 6.5) -> Figure:
    """A figure, so many inches wide, of nothing but pixels (H, W, C) and a title."""
    height, width = canvas.shape[:2]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(inches, inches * height / width + 0.5), layout="constrained")
        axes = figure.subplots()
        show(axes, canvas)
        axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(title)
    return figure
