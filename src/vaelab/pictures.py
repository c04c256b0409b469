"""The files that a run draws into its folder: which figure, of what, under which name."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from vaelab import figures
from vaelab.checkpoint import write_bytes
from vaelab.config import Picture, Run
from vaelab.data.datasets import BATCH, Dataset, Split
from vaelab.errors import UsageError
from vaelab.models import VAE
from vaelab.train import Epoch

log = logging.getLogger("vaelab")

PI = "314159265358979"  # 15 digits: long enough to feel like pi, short enough to watch
GIF_SIDE = 140
GIF_LEVELS = 32  # shades: a GIF of all 256 is three times the size and looks the same
FRAMES_PER_SECOND = 25


@dataclass(frozen=True)
class Scene:
    """What a picture is drawn from. Pictures look at the validation split: the test set is not for looking at."""

    run: Run
    model: VAE
    data: Dataset
    history: list[dict[str, Any]]
    epoch: int

    def title(self, what: str) -> str:
        """A title that says what is shown, of which run, and when."""
        return f"{what}\n{self.run.recipe} on {self.data.name}, epoch {self.epoch}"


def draw_each_epoch(epoch: Epoch) -> None:
    """Draw the pictures that are due after this epoch (an ``on_epoch_end`` function of ``fit``)."""
    if epoch.folder is None:
        return
    due = [p for p in epoch.run.pictures if p.every is not None and (epoch.last or epoch.number % p.every == 0)]
    _draw(due, Scene(epoch.run, epoch.model, epoch.data, epoch.history, epoch.number), epoch.folder)


def draw_at_end(run: Run, model: VAE, data: Dataset, history: list[dict[str, Any]], epoch: int, folder: Path) -> None:
    """Draw the pictures of a finished run, from its best model, that of this epoch."""
    _draw([p for p in run.pictures if p.every is None], Scene(run, model, data, history, epoch), folder)


def _draw(pictures: list[Picture], scene: Scene, folder: Path) -> None:
    for picture in pictures:
        name = picture.file.format(epoch=scene.epoch)
        try:
            content = DRAW[picture.draw](scene)
        except UsageError as error:  # what a recipe draws may not fit these data: that is no reason to lose the rest
            log.info("%s is left out: %s", name, error)
        else:
            write_bytes(folder / name, content)


def _samples(scene: Scene) -> bytes:
    return png(figures.samples(scene.model, title=scene.title("Samples: z from the prior")))


def _reconstructions(scene: Scene) -> bytes:
    x = _first_of_each_class(scene.data, 30)
    return png(
        figures.reconstructions(scene.model, x, title=scene.title("Validation images and their reconstructions"))
    )


def _first_of_each_class(data: Dataset, count: int) -> Tensor:
    """Images for people to judge by: all classes in turn, ten to a row, always the same ones."""
    split = data.validation
    count = min(count, len(split))
    rows = torch.arange(count)
    if split.y is not None:
        labels = split.y.cpu().numpy()
        rank = np.zeros(len(labels), np.int64)
        for label in np.unique(labels):
            rank[labels == label] = np.arange((labels == label).sum())
        rows = torch.from_numpy(np.lexsort((labels, rank))[:count])
    return split.rows(rows.to(split.device)).x


def _latent(scene: Scene) -> bytes:
    split = scene.data.validation
    codes = _codes(scene.model, split)
    labels = None if split.y is None else split.y.cpu().numpy()
    what = "Posterior means of the validation images"
    return png(figures.latent_map(codes, labels, scene.data.classes, title=scene.title(what)))


def _manifold(scene: Scene) -> bytes:
    what = "Learned manifold: a grid of equal prior probability, decoded"
    return png(figures.manifold(scene.model, title=scene.title(what)))


def _loss_curve(scene: Scene) -> bytes:
    return png(figures.loss_curve(scene.history, title=f"{scene.run.recipe} on {scene.data.name}"))


def _training_history(scene: Scene) -> bytes:
    return png(figures.training_history(scene.history, title=f"{scene.run.recipe} on {scene.data.name}"))


def _animation(digits: str) -> Callable[[Scene], bytes]:
    return lambda scene: animation(scene.model, scene.data, digits)


DRAW: dict[str, Callable[[Scene], bytes]] = {
    "samples": _samples,
    "reconstructions": _reconstructions,
    "latent": _latent,
    "manifold": _manifold,
    "loss_curve": _loss_curve,
    "training_history": _training_history,
    "animation_1_to_9": _animation("19"),
    "animation_pi": _animation(PI),
}


# --- animation ------------------------------------------------------------------------------------------------------


def animation(model: VAE, data: Dataset, digits: str, *, frames: int = 16, hold: int = 6) -> bytes:
    """A looping GIF that moves through the codes of real validation images, in the order of ``digits``.

    Each digit is one image's code (the most typical of its class); a digit that comes again is another image of its
    class, so that the walk does not stand still.

    Args:
        model: the model.
        data: a data set with classes.
        digits: class names of one character each.
        frames: frames from one digit to the next.
        hold: frames of rest on each digit.

    Raises:
        UsageError: if the data have no classes or not these.
    """
    split = data.validation
    if split.y is None or not data.classes:
        raise UsageError(f"{data.name} has no classes: an animation moves between classes of images")
    unknown = [digit for digit in digits if digit not in data.classes]
    if unknown or len(digits) < 2:
        wrong = f"there is no class {unknown[0]!r}" if unknown else f"{digits!r} is too short"
        raise UsageError(f"{wrong}: an animation passes through two or more of {', '.join(data.classes)}")
    codes = _codes(model, split)
    labels = split.y.cpu().numpy()
    seen: dict[str, int] = {}
    path: list[Any] = []
    for digit in digits:
        of_class = codes[labels == data.classes.index(digit)]
        if len(of_class) == 0:
            raise UsageError(f"the validation split has no image of class {digit!r}")
        nearest = ((of_class - of_class.mean(0)) ** 2).sum(1).argsort()
        path.append(of_class[nearest[seen.get(digit, 0) % len(nearest)]])
        seen[digit] = seen.get(digit, 0) + 1
    return gif(figures.walk(model, torch.from_numpy(np.stack(path)), frames=frames, hold=hold))


def _codes(model: VAE, split: Split) -> NDArray[np.float32]:
    """Posterior means of a whole split, a batch at a time: its pixels as floats may not fit in memory."""
    starts = range(0, len(split), BATCH)
    return np.concatenate([figures.encode(model, split.rows(slice(at, at + BATCH)).x) for at in starts])


# --- encoding -------------------------------------------------------------------------------------------------------


def png(figure: Figure, dpi: int = 144) -> bytes:
    """Encode a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def gif(frames: Tensor) -> bytes:
    """Encode frames (F, C, H, W) in [0, 1] as a GIF that loops forever, enlarged so that it can be looked at."""
    height, width = frames.shape[2:]
    scale = max(1, round(GIF_SIDE / max(height, width)))
    large = interpolate(frames.float(), size=(height * scale, width * scale), mode="bicubic").clamp(0, 1)
    shades = (large * (GIF_LEVELS - 1)).round() * (255 / (GIF_LEVELS - 1))
    pixels = shades.byte().cpu().permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(p[..., 0] if p.shape[2] == 1 else p) for p in pixels]
    buffer = io.BytesIO()
    duration = 1000 // FRAMES_PER_SECOND
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=False)
    return buffer.getvalue()
