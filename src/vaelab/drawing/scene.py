"""What pictures of a run are made of: its model, its data, and what is computed of them, once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaelab import figures
from vaelab.config import Run, override
from vaelab.data.datasets import Dataset, Split, load
from vaelab.errors import UsageError
from vaelab.evaluate import importance, latents
from vaelab.evaluate.neighbours import nearest_images
from vaelab.evaluate.pieces import join
from vaelab.evaluate.undefined import why_no_bound
from vaelab.labels import cost
from vaelab.models import SPACES, VAE
from vaelab.runs.folder import RunFolder
from vaelab.runs.loading import data_of, load_model

MAPPED = 5000  # images of a map, at most
WEIGHED = (100, 500)  # images, and importance samples of each
WEIGHED_PIXELS = 3000  # of an image: of larger ones fewer are weighed
COMPARED = 200  # samples whose closest training images are looked for
SHOWN = 10  # of these
SEARCHED = 60_000  # training images that are looked through, at most


@final
@dataclass(frozen=True)
class Scene:
    """What pictures are drawn from. They look at the validation split: the test set is not for looking at.

    Args:
        run, model, data, history: the run.
        epoch: that of the model.
    """

    run: Run
    model: VAE
    data: Dataset
    history: list[dict[str, Any]]
    epoch: int

    def title(self, what: str) -> str:
        """A title that says what is shown, of which run, and when."""
        return f"{what}\n{self.where}"

    @property
    def name(self) -> str:
        """The recipe and the data, and the prior if it is another than the one that was trained with."""
        prior = f", {self.run.prior.word} prior fitted after training" if self.is_refitted else ""
        return figures.plain(f"{self.run.recipe} on {self.data.name}{prior}")

    @property
    def is_refitted(self) -> bool:
        """Whether the history, or a part of it, is of another prior than the one that the run has now."""
        return any(record.get("before_refit") for record in self.history)

    @property
    def where(self) -> str:
        """Of which run, under which protocol, and when."""
        return f"{self.name}, {self.data.pixels}, epoch {self.epoch}"

    @property
    def cost(self) -> str:
        """What the validation images cost at this epoch, in nats; empty if its record is lost, or of another prior."""
        found = [r for r in self.history if r["epoch"] == self.epoch and not r.get("before_refit")]
        return next(map(cost, found), "")

    @cached_property
    def codes(self) -> latents.Codes:
        """Of the first validation images."""
        return latents.encode(self.model, self.data, "validation", limit=MAPPED)

    @property
    def means(self) -> NDArray[np.float32]:
        """(N, D), the codes that stand for the same images: means, where the posterior is normal."""
        return self.codes.center.astype(np.float32)

    @property
    def order(self) -> list[int]:
        """The latent dimensions, the most telling first: by rate, or by how much codes vary where it is unknown."""
        rate = self.codes.rate
        return np.argsort(-(self.codes.center.var(0) if rate is None else rate.mean(0))).tolist()

    @property
    def ordered_by(self) -> str:
        """What ``order`` goes by, in words."""
        return "by rate" if self.codes.rate is not None else "by how much codes vary"

    @property
    def rate(self) -> NDArray[np.float64] | None:
        """(D,), the mean rate of each dimension; None where it is unknown."""
        return None if self.codes.rate is None else self.codes.rate.mean(0)

    @property
    def used(self) -> str:
        """How many latent dimensions carry 0.1 nats or more, of how many; empty where that is unknown."""
        return "" if self.rate is None else f"{int((self.rate >= 0.1).sum())} of {len(self.rate)}"

    def typical(self, count: int) -> Tensor:
        """Codes (N, D) of typical images: the closest to its class's mean, class by class, else the first ones.

        Raises:
            UsageError: if one cannot move from them: see ``require_real``.
        """
        require_real(self.model, "moving through latent space")
        return torch.from_numpy(self.means[typical_of_each(self.means, self.codes.y, count)])

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Codes (N, D) of typical images and of as many others, to go between.

        Raises:
            UsageError: if there are not two images.
        """
        codes = self.typical(8)
        half = len(codes) // 2
        if half < 1:
            raise UsageError("an interpolation needs at least 2 validation images")
        return codes[:half], codes[half : 2 * half]


def scene_of(path: Path) -> Scene:
    """The scene of a run folder: its best model, and the data that it was trained on.

    Raises:
        UsageError: if there is no run.
        FailureError: if files are damaged or the data have changed.
    """
    folder = RunFolder.open(path)
    return Scene(folder.run, load_model(path), data_of(folder), folder.history(), folder.best_epoch())


def require_real(model: VAE, what: str) -> None:
    """Raise a ``UsageError`` for ``what`` if not every vector is a latent of the model."""
    if model.space != "real":
        where = SPACES[model.space]
        raise UsageError(f"{what} needs latents that are any real vectors: those of this model lie in {where}; "
                         "sample, reconstruct and draw show what it does")  # fmt: skip


def typical_rows(means: NDArray[np.float32], y: NDArray[np.int64], label: int) -> NDArray[np.int64]:
    """The rows of a class, the closest to its mean first."""
    rows = np.flatnonzero(y == label)
    if len(rows) == 0:
        return rows
    return rows[((means[rows] - means[rows].mean(0)) ** 2).sum(1).argsort(kind="stable")]


def typical_of_each(means: NDArray[np.float32], y: NDArray[np.int64] | None, count: int) -> NDArray[np.int64]:
    """Rows of typical images, at most so many: of each class the closest to its mean, then the second ones and so on.

    Where there are no classes, the first images.
    """
    if y is None:
        return np.arange(min(count, len(means)))
    by_class = [typical_rows(means, y, label)[:count] for label in np.unique(y)]
    ranked = [row for rank in itertools.zip_longest(*by_class) for row in rank if row is not None]
    return np.array(ranked[:count])


def first_of_each_class(data: Dataset, count: int) -> Tensor:
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


def codes_of(model: VAE, split: Split) -> NDArray[np.float32]:
    """Posterior means of a whole split, a batch at a time: its pixels as floats may not fit in memory."""
    return np.concatenate([figures.encode(model, x) for x in split.pieces()])


def sums(scene: Scene) -> tuple[list[tuple[str, str, str]], tuple[Tensor, Tensor, Tensor]]:
    """Which classes a, b and c of some sums are, and their mean codes (N, D) each.

    Raises:
        UsageError: if there are not three classes.
    """
    require_real(scene.model, "arithmetic of codes")
    classes, y = scene.data.classes, scene.codes.y
    present = [] if y is None or not classes else np.unique(y).tolist()
    if len(present) < 3 or not classes:
        raise UsageError("arithmetic adds and subtracts the mean codes of classes, and there are no three among the "
                         f"validation images of {scene.data.name}")  # fmt: skip
    count = len(present)
    triples = [[present[i % count], present[(i + 3) % count], present[(i + 7) % count]] for i in range(min(6, count))]
    triples = [triple for triple in triples if len(set(triple)) == 3] or [present[:3]]
    mean = {label: scene.means[y == label].mean(0) for label in present}
    a, b, c = (torch.from_numpy(np.stack([mean[triple[k]] for triple in triples])) for k in range(3))
    return [(classes[x], classes[y], classes[z]) for x, y, z in triples], (a, b, c)


def weighed(scene: Scene) -> tuple[dict[int, NDArray[np.float64]], NDArray[np.float64], str]:
    """Bounds on log p(x) by number of samples, effective sample sizes, and what was done to the pixels.

    Where the likelihood of the run's own pixels is none, they are binarized.

    Raises:
        UsageError: if the model has no such bounds.
    """
    if (why := why_no_bound(scene.model)) is not None:
        raise UsageError(f"no importance sampling of this model: {why}")
    data = scene.data
    if not scene.model.is_density(binary_data=data.binary):
        data = load(override(scene.run, protocol="dynamic").data).to(data.train.device)
    images, count = WEIGHED
    # Fewer of large images: what half a minute allows.
    images = max(10, min(images, images * WEIGHED_PIXELS // int(np.prod(scene.model.shape))))
    values = join(importance.importance_rows(scene.model, data, "validation", num_samples=count, rows=images))
    return {int(name[2:]): value for name, value in values.items() if name.startswith("k=")}, values["ess"], data.pixels


@final
@dataclass(frozen=True)
class Closest:
    """Samples and the training images closest to them.

    Args:
        samples, nearest, distances: some samples (N, C, H, W), the closest images (N, K, C, H, W), their distances.
        of_samples: the median distance of many samples from their closest image.
        of_held_out: that of reconstructions of validation images, which are as smooth as samples.
        searched: how many training images were looked through.
    """

    samples: Tensor
    nearest: Tensor
    distances: NDArray[np.float64]
    of_samples: float
    of_held_out: float
    searched: int


def closest(scene: Scene) -> Closest:
    """Look for the training images closest to samples of the model."""
    made = figures.decode(scene.model, figures.sample_prior(scene.model, COMPARED, 0))
    smooth = figures.decode(scene.model, torch.from_numpy(scene.means[:COMPARED]))
    searched = scene.data.train.first(SEARCHED)
    (rows, distances), (_, held_out) = nearest_images(made, searched, 4), nearest_images(smooth, searched)
    shown = torch.from_numpy(rows[:SHOWN]).flatten().to(searched.device)
    nearest = searched.rows(shown).x.unflatten(0, (SHOWN, -1))
    of_samples, of_held_out = (float(np.median(found[:, 0])) for found in (distances, held_out))
    return Closest(made[:SHOWN], nearest, distances[:SHOWN], of_samples, of_held_out, len(searched))
