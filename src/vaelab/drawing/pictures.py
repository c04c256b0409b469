"""What is drawn of a run: which figure, of what, under which name.

``DRAW`` names the pictures, each a function of a ``Scene``. The files that a recipe names and the commands that show
something are drawn from here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vaelab import figures
from vaelab.config import Picture, Run
from vaelab.data.datasets import Dataset
from vaelab.drawing import media
from vaelab.drawing.media import Content
from vaelab.drawing.scene import (
    Scene,
    closest,
    codes_of,
    first_of_each_class,
    require_real,
    sums,
    typical_rows,
    weighed,
)
from vaelab.errors import UsageError
from vaelab.figures import How, Way
from vaelab.models import VAE
from vaelab.runs.checkpoint import write_bytes
from vaelab.train import Epoch

log = logging.getLogger("vaelab")

PI = "314159265358979"  # 15 digits: long enough to feel like pi, short enough to watch
ROWS = 10  # of traversals
NAMED = 20  # classes in a message
PROGRESS = "progress"  # the folder of a run's pictures of its training
TRAINING_FPS = 8


# --- figures --------------------------------------------------------------------------------------------------------


def samples(scene: Scene) -> Content:
    """Images that the model makes up: means of p(x|z) for z from the prior."""
    return figures.samples(scene.model, title=scene.title("Samples: z from the prior"))


def reconstructions(scene: Scene) -> Content:
    """Validation images above their reconstructions."""
    x = first_of_each_class(scene.data, 30)
    cost = f": {scene.cost}" if scene.cost else ""
    return figures.reconstructions(scene.model, x, title=scene.title(f"Validation images, reconstructed{cost}"))


def latent(scene: Scene, how: How = "auto") -> Content:
    """Where the codes of validation images lie: two latent dimensions as they are, more by principal components."""
    found = figures.project(scene.means, how)
    words = {"own": "", "pca": ", by principal components", "tsne": ", by t-SNE", "umap": ", by UMAP"}[found.how]
    what = f"Codes of {len(scene.codes):,} validation images{words}"
    return figures.latent_map(found, scene.codes.y, scene.data.classes, title=scene.title(what))


def manifold(scene: Scene) -> Content:
    """What a two-dimensional latent space decodes to, on a grid."""
    what = "Learned manifold: a grid of equal prior probability, decoded"
    return figures.manifold(scene.model, title=scene.title(what))


def traversals(scene: Scene) -> Content:
    """What each latent dimension does, those of the highest rate first, from a typical image."""
    code = scene.typical(1)[0]
    what = f"Traversals of a typical image, {scene.ordered_by}"
    return figures.traversals(scene.model, code, scene.order[:ROWS], scene.rate, title=scene.title(what))


def interpolation(scene: Scene) -> Content:
    """From one typical image to another, along a straight line and along a great circle."""
    what = "Interpolation between codes of validation images"
    return figures.interpolation(scene.model, *scene.pairs(), title=scene.title(what))


def arithmetic(scene: Scene) -> Content:
    """Sums of the mean codes of classes, a - b + c."""
    names, terms = sums(scene)
    return figures.arithmetic(scene.model, terms, names, title=scene.title("Arithmetic of classes' mean codes"))


def kl_bars(scene: Scene) -> Content:
    """How many nats each latent dimension carries."""
    if scene.rate is None:
        raise UsageError("the rate of single dimensions is not known for this posterior and prior")
    what = (f"Rate of each dimension over {len(scene.codes):,} validation images: {scene.rate.sum():.2f} nats in all, "
            f"{scene.used} dimensions with 0.1 or more")  # fmt: skip
    return figures.kl_bars(scene.rate, title=scene.title(what))


def rate_distortion(scene: Scene) -> Content:
    """How rate and distortion of the validation images moved in training."""
    what = "Rate and distortion of the validation images; on a line $-$ELBO is the same" + _under(scene)
    return figures.rate_distortion({"": scene.history}, title=scene.title(what))


def weights(scene: Scene) -> Content:
    """Whether importance sampling of log p(x) has settled, and how many samples count."""
    bounds, ess, pixels = weighed(scene)
    title = scene.title(f"Importance sampling of {len(ess)} validation images, {pixels}")
    return figures.importance_weights(bounds, ess, title=title)


def neighbours(scene: Scene) -> Content:
    """Samples above the training images closest to them: does the model repeat what it has seen?"""
    found = closest(scene)
    what = (f"Samples, and the closest of {found.searched:,} training images\n"
            f"median distance {found.of_samples:.2f}; of reconstructed validation images {found.of_held_out:.2f}; "
            "0 is a copy")  # fmt: skip
    return figures.neighbours(found.samples, found.nearest, found.distances, title=scene.title(what))


def loss_curve(scene: Scene) -> Content:
    """Loss and its two terms over the epochs."""
    return figures.loss_curve(scene.history, title=scene.name + _under(scene))


def training_history(scene: Scene) -> Content:
    """Loss, both its terms, learning rate and beta over the epochs."""
    return figures.training_history(scene.history, title=scene.name + _under(scene))


def _under(scene: Scene) -> str:
    """What a title adds where the curves are of another prior than the one that it names."""
    return "\nthe curves are of the prior that it was trained with" if scene.is_refitted else ""


def progress(scene: Scene) -> Content:
    """One picture of a film of the training: validation images, their reconstructions, samples of the same z."""
    columns = 10
    x = first_of_each_class(scene.data, columns)
    with torch.no_grad():
        x_hat = figures.decode(scene.model, scene.model.center(x))
    made = figures.decode(scene.model, figures.sample_prior(scene.model, 3 * columns, 0))
    rows = [figures.padded(x, columns), figures.padded(x_hat, columns), made]
    return figures.tile(torch.cat(rows), columns, gap=1)


# --- films ----------------------------------------------------------------------------------------------------------


def classes_to_pass(data: Dataset, text: str | None) -> list[str]:
    """The classes that an animation passes through, in order.

    Args:
        data: a data set with classes.
        text: names with commas between them, or names of one character each in a row (``314``); None: 1 and 9, or the
            first two that there are validation images of.
    """
    if text is None:
        y = data.validation.y
        held = [] if y is None or data.classes is None else [data.classes[number] for number in y.unique().tolist()]
        return ["1", "9"] if {"1", "9"} <= set(held) else held[:2]
    return [name.strip() for name in text.split(",")] if "," in text else list(text)


def digits(
    model: VAE, data: Dataset, names: Sequence[str], *, frames: int = 16, hold: int = 6, way: Way = "linear"
) -> Tensor:
    """Frames (F, C, H, W) that move through the codes of real validation images, in the order of ``names``.

    Each step is one image's code (the most typical of its class); a class that comes again is another image of it, so
    that the walk does not stand still.

    Args:
        model: the model.
        data: a data set with classes.
        names: of classes; a string is one of a character each.
        frames: frames from one class to the next.
        hold: frames of rest on each.
        way: along straight lines or great circles.

    Raises:
        UsageError: if the data have no classes or not these.
    """
    split = data.validation
    if split.y is None or not data.classes:
        raise UsageError(f"{data.name} has no classes to move between: move through its images with --of images")
    unknown = [name for name in names if name not in data.classes]
    if unknown or len(names) < 2:
        wrong = f"there is no class {unknown[0]!r}" if unknown else f"{', '.join(names)!r} is too short"
        known = [*data.classes[:NAMED], *["..."] * (len(data.classes) > NAMED)]
        between = "" if all(len(name) == 1 for name in data.classes) else " (names with commas between)"
        raise UsageError(f"{wrong}: an animation passes through two or more of {', '.join(known)}{between}")
    require_real(model, "an animation")
    codes = codes_of(model, split)
    labels = split.y.cpu().numpy()
    seen: dict[str, int] = {}
    path: list[Any] = []
    for name in names:
        rows = typical_rows(codes, labels, data.classes.index(name))
        if len(rows) == 0:
            raise UsageError(f"the validation split has no image of class {name!r}")
        path.append(codes[rows[seen.get(name, 0) % len(rows)]])
        seen[name] = seen.get(name, 0) + 1
    return figures.walk(model, torch.from_numpy(np.stack(path)), frames=frames, hold=hold, way=way)


def wandering(scene: Scene, *, frames: int = 16, hold: int = 6, way: Way = "linear") -> Tensor:
    """Frames that move through typical images, of all classes in turn where there are classes."""
    return figures.walk(scene.model, scene.typical(10), frames=frames, hold=hold, way=way)


def swinging(scene: Scene, *, frames: int = 16, span: float = 3.0) -> Tensor:
    """Frames in which each of the most telling dimensions swings from -span to span and back, all side by side."""
    dimensions = scene.order[:ROWS]
    swing = span * torch.sin(torch.linspace(0, 2 * torch.pi, 4 * frames + 1)[:-1])
    codes = figures.traverse(scene.typical(1)[0], dimensions, swing)  # (R, F, D)
    images = figures.decode(scene.model, codes.flatten(0, 1)).unflatten(0, codes.shape[:2]).transpose(0, 1)
    columns = min(5, len(dimensions))
    return torch.stack([torch.from_numpy(figures.tile(frame, columns, gap=1)).permute(2, 0, 1) for frame in images])


def training_film(folder: Path, suffix: str = ".gif") -> bytes:
    """A GIF or MP4 of how a run's pictures changed over its epochs, made of those in its folder ``progress``.

    Raises:
        UsageError: if there are none.
    """
    files = sorted((folder / PROGRESS).glob("epoch_*.png"))
    if not files:
        raise UsageError(f"{folder / PROGRESS} holds no pictures of the training: its recipe draws none, or "
                         "it is the refit of a run whose folder has them")  # fmt: skip
    frames: list[Image.Image] = []
    for file in files:
        with Image.open(file) as picture:
            frames.append(media.captioned(picture, f"epoch {int(file.stem.split('_')[1])}", scale=2))
    rest = [frames[-1]] * (2 * TRAINING_FPS)
    if suffix == ".mp4":
        return media.mp4_of((np.asarray(frame.convert("RGB")) for frame in [*frames, *rest]), TRAINING_FPS)
    return media.gif_of([*frames, *rest], TRAINING_FPS)


# --- by name --------------------------------------------------------------------------------------------------------

# What can be drawn of any run by its name alone; the doc string says what it shows.
FIGURES: Mapping[str, Callable[[Scene], Content]] = {
    draw.__name__: draw
    for draw in (samples, reconstructions, latent, manifold, traversals, interpolation, arithmetic, kl_bars,
                 rate_distortion, weights, neighbours, loss_curve, training_history)
}  # fmt: skip

DRAW: Mapping[str, Callable[[Scene], Content]] = {
    **FIGURES,
    "progress": progress,
    "animation_1_to_9": lambda scene: digits(scene.model, scene.data, "19"),
    "animation_pi": lambda scene: digits(scene.model, scene.data, PI),
}


def draw_each_epoch(epoch: Epoch) -> None:
    """Draw the pictures that are due after this epoch (an ``on_epoch_end`` function of ``fit``)."""
    if epoch.folder is None:
        return
    due = epoch.run.pictures_due(epoch.number, last=epoch.last)
    _draw(due, Scene(epoch.run, epoch.model, epoch.data, epoch.history, epoch.number), epoch.folder)


def draw_at_end(run: Run, model: VAE, data: Dataset, history: list[dict[str, Any]], epoch: int, folder: Path) -> None:
    """Draw the pictures of a finished run, from its best model, that of this epoch."""
    _draw([p for p in run.pictures if p.every is None], Scene(run, model, data, history, epoch), folder)


def _draw(pictures: list[Picture], scene: Scene, folder: Path) -> None:
    for picture in pictures:
        file = folder / picture.file.format(epoch=scene.epoch)
        try:
            content = media.encode(DRAW[picture.draw](scene), file.suffix)
        except UsageError as error:  # what a recipe draws may not fit these data: that is no reason to lose the rest
            log.info("%s is left out: %s", file.name, error)
        else:
            write_bytes(file, content)
