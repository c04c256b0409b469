"""Splits and protocols: which images are trained on, which are held out, and what is done to their pixels.

A data set that fits in memory lives as one tensor on the computing device; one that does not is mapped from a file, of
which each batch takes its rows. There is no ``DataLoader`` on either path.

Shapes: N images, B batch, C H W image.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaelab.config import Data, data_from
from vaelab.data.readers import Range
from vaelab.data.sources import IN_MEMORY, Factors, Pool, find, in_memory, source_of
from vaelab.errors import UsageError, did_you_mean
from vaelab.labels import pixels
from vaelab.models import Batch
from vaelab.runtime import Noise, RowNoise
from vaelab.specs import Shape

log = logging.getLogger("vaelab")

Protocol = Literal["grey", "dynamic", "static", "threshold"]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")

# Constants of the protocols, never a run's seed: every run and every user scores the same binary images, and splits a
# data set that has no test set of its own in the same way.
BINARIZATION_SEED = 784
SPLIT_SEED = 1998
EVALUATION_SEED = 1312_6114

BATCH = 500  # images at a time, where nothing is learned from them


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Args:
        x: (M, C, H, W), uint8 in 0..255 or float32 in 0..1, on the computing device; or mapped from a file.
        y: (N,) class numbers, or None.
        index: (N,) row numbers in the source's files.
        where: (N,) which rows of x these are; None: all. Images that stay on disk are not copied apart.
    """

    x: Tensor
    y: Tensor | None
    index: Tensor
    where: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def device(self) -> torch.device:
        """Where its batches are."""
        return self.index.device

    def mean(self) -> Tensor:
        """The mean image (C, H, W), in [0, 1]."""
        total = sum(part.sum(0, dtype=torch.float64) for part in self.pieces())
        return (torch.as_tensor(total) / len(self)).float()

    def pieces(self) -> Iterator[Tensor]:
        """All images in order, some hundreds at a time, in [0, 1]."""
        for start in range(0, len(self), BATCH):
            yield self.rows(slice(start, start + BATCH)).x

    def first(self, count: int) -> Split:
        """Its first images, at most so many."""
        y = None if self.y is None else self.y[:count]
        if self.where is None:
            return Split(self.x[:count], y, self.index[:count])
        return Split(self.x, y, self.index[:count], self.where[:count])

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device; images that stay on disk follow batch by batch."""
        x = self.x.to(device) if self.where is None else self.x
        return Split(x, None if self.y is None else self.y.to(device), self.index.to(device), self.where)

    def rows(self, rows: Tensor | slice) -> Batch:
        """A batch of these rows, with pixels as floats in [0, 1]."""
        batch = self.raw(rows)
        return replace(batch, x=unit(batch.x))

    def raw(self, rows: Tensor | slice) -> Batch:
        """A batch of these rows, with pixels as they are kept."""

        def take(values: Tensor, rows: Tensor | slice = rows) -> Tensor:
            return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)

        y, index = None if self.y is None else take(self.y), take(self.index)
        if self.where is None:
            return Batch(take(self.x), y, index, len(self))
        on_disk = take(self.where, rows if isinstance(rows, slice) else rows.cpu())
        return Batch(take(self.x, on_disk).to(self.device, non_blocking=True), y, index, len(self))


@dataclass(frozen=True)
class Dataset:
    """A data set, split and put under a protocol.

    Args:
        name: what it is called in results.
        protocol: what is done to the pixels. ``grey``: nothing. ``threshold``: x > 0.5. ``static``: one binary draw,
            fixed for all splits. ``dynamic``: a new draw each time in training, a fixed one for validation and test.
        train, validation, test: the splits; they never overlap.
        binary: every pixel that a model sees is 0 or 1.
        classes: names of the classes, or None.
        factors: what made images (N, F), by their row numbers (N,), the ``index`` of a batch; None: that is not known.
        asked: what ``load`` was asked for, as a run records it; None: it was put together otherwise.
    """

    name: str
    protocol: Protocol
    train: Split
    validation: Split
    test: Split
    binary: bool
    classes: tuple[str, ...] | None
    factors: Factors | None = None
    asked: Data | None = None

    def require_images(self) -> None:
        """Refuse a data set that was put together by hand, and cannot be trained on.

        Raises:
            UsageError: naming the split, and what it should hold.
        """
        for name in SPLITS:
            split, x = self.split(name), self.split(name).x
            if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise UsageError(f"the {name} split holds no tensor but {type(x).__name__}: torch.from_numpy makes one")
            if x.ndim != 4 or x.dtype not in (torch.uint8, torch.float32) or x.shape[1:] != self.train.x.shape[1:]:
                raise UsageError(f"the {name} split holds {x.dtype} of shape {tuple(x.shape)}: images are uint8 or "
                                 "float32 (N, C, H, W), of one shape in all splits")  # fmt: skip
            if split.where is not None:  # on disk: they were looked at when they were found
                continue
            counts = {"images": len(x)}
            for what, numbers in (("row numbers", split.index), ("labels", split.y)):
                if what == "row numbers" or numbers is not None:
                    counts[what] = _count_of_whole_numbers(numbers, f"the {name} split's {what}")
            if len(set(counts.values())) > 1 or (len(x) == 0 and name != "test"):
                shown = ", ".join(f"{count} {what}" for what, count in counts.items())
                raise UsageError(f"the {name} split holds {shown}: give as many of each, and one at least")
            if x.dtype == torch.float32 and not bool(((x >= 0) & (x <= 1)).all()):
                raise UsageError(f"the {name} split holds values from {x.min():g} to {x.max():g}: pixels in float32 "
                                 "lie in 0..1")  # fmt: skip

    @property
    def shape(self) -> Shape:
        """(C, H, W) of one image."""
        channels, height, width = self.train.x.shape[1:]
        return channels, height, width

    @property
    def pixels(self) -> str:
        """What was done to the pixels, in the words of a protocol."""
        if self.binary and self.protocol == "grey":
            return "binary pixels"
        return pixels(self.protocol, self.shape[0]) + " (fixed draw)" * (self.protocol == "dynamic")

    def split(self, name: str) -> Split:
        """The split of this name.

        Raises:
            UsageError: if there is none.
        """
        if name not in SPLITS:
            raise UsageError(f"no split {name!r}: choose one of {', '.join(SPLITS)}")
        return getattr(self, name)

    def scored(self, name: str, rows: slice) -> Batch:
        """Rows of a split as they are scored.

        Under ``dynamic`` the training split is kept grey, to be drawn anew each time; scored, it is drawn from the
        rows' noise. (A draw from pixels that are binary already changes nothing.)
        """
        batch = self.split(name).rows(rows)
        if self.protocol == "dynamic" and name == "train":
            batch = binarize_batch(batch, RowNoise(EVALUATION_SEED, rows.start, batch.x.device))
        return batch

    def batches(self, name: str, batch_size: int) -> Iterator[tuple[Batch, Noise]]:
        """A split as it is scored: every row in order, the last partial batch too, and the noise of its rows."""
        for start in range(0, len(self.split(name)), batch_size):
            noise = RowNoise(EVALUATION_SEED, start, self.train.device)
            yield self.scored(name, slice(start, start + batch_size)), noise

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on another device."""
        return replace(self, **{name: self.split(name).to(device) for name in SPLITS})

    def sha256(self, name: str) -> str:
        """The hash of a split's images, all bytes in order."""
        if name in self._digests:
            return self._digests[name]
        split, digest = self.split(name), hashlib.sha256()
        for start in range(0, len(split), BATCH):
            digest.update(np.ascontiguousarray(split.raw(slice(start, start + BATCH)).x.cpu().numpy()).data)
        return self._digests.setdefault(name, digest.hexdigest())

    @cached_property
    def _digests(self) -> dict[str, str]:
        """Hashes that were asked for: of a large file each costs a reading of it."""
        return {}

    def record(self) -> dict[str, Any]:
        """What must stand beside every number: sizes, pixels, and hashes of the images as they are scored."""
        hashes = {f"{name}_sha256": self.sha256(name) for name in SPLITS}
        sizes = {name: len(self.split(name)) for name in SPLITS}
        return {"data": self.name, "protocol": self.protocol, **sizes, "shape": list(self.shape), **hashes}


def load(
    source: str | Path | Data | NDArray[Any] | Tensor,
    *,
    labels: NDArray[Any] | Tensor | Sequence[int] | None = None,
    protocol: Protocol = "grey",
    validation_size: float | None = None,
    test_size: float | None = None,
    image_size: tuple[int, int] | None = None,
    channels: Literal[1, 3] | None = None,
    value_range: Range = "auto",
) -> Dataset:
    """Find, read and split a data set.

    Args:
        source: ``mnist``, ``digits``, ``freyfaces``, ``sprites``, or a path; a run's ``Data``, as it is; or the images
            themselves, an array or tensor that is read as one of a file is.
        labels: (N,) class numbers of such images.
        protocol: see ``Dataset``.
        validation_size, test_size: a number of images, or below 1 a fraction. None: what is customary (MNIST: the last
            5,000 training images, and its own test set), else a tenth each.
        image_size, channels, value_range: how to read a path or an array, as in ``config.Data``.

    Raises:
        UsageError: if there are no such data, or a setting cannot be had of them.
        FailureError: if the data are there and cannot be read.

    Example:
        >>> data = load("digits")
        >>> len(data.train), len(data.validation), len(data.test), data.shape
        (1437, 180, 180, (1, 28, 28))
    """
    asked = _asked(source, {
        "protocol": protocol, "validation_size": validation_size, "test_size": test_size,
        "image_size": image_size, "channels": channels, "value_range": value_range,
    })  # fmt: skip
    if isinstance(source, np.ndarray | Tensor):
        pool = in_memory(_array(source), None if labels is None else _array(labels), asked)
    elif labels is None:
        pool = find(asked)
    else:
        raise UsageError("labels are of images that are given as an array: those of files are read with them")
    protocol = asked.protocol
    on_disk = isinstance(pool.train.x, np.memmap)
    if on_disk and protocol != "grey":
        raise UsageError(f"--protocol {protocol} needs the images in memory, and those of {pool.name} are read from "
                         "disk as they are used: leave it out, or binarize the file itself")  # fmt: skip
    if on_disk:
        log.info("%s: %s images stay on disk and are read as they are used", pool.name, f"{len(pool.train.x):,}")
    binary = pool.train.binary and (pool.test is None or pool.test.binary)
    splits: list[Split] = []
    for number, rows in enumerate(_rows(pool, asked.validation_size, asked.test_size)):
        images = pool.test if pool.test is not None and number == 2 else pool.train
        index, y = torch.from_numpy(rows), None if images.y is None else torch.from_numpy(images.y[rows])
        x = images.x if on_disk else under(protocol, images.x[rows], number, binary=binary)
        splits.append(Split(torch.from_numpy(x), y, index, index if on_disk else None))
    binary = binary or protocol != "grey"
    return Dataset(
        pool.name, protocol, *splits, binary=binary, classes=pool.train.classes, factors=pool.factors, asked=asked
    )


def _count_of_whole_numbers(values: object, name: str) -> int:
    if not isinstance(values, Tensor) or values.ndim != 1 or values.is_floating_point():
        raise UsageError(f"{name} are no tensor (N,) of whole numbers")
    return len(values)


def _asked(source: object, settings: dict[str, Any]) -> Data:
    """What ``load`` is asked for.

    Raises:
        UsageError: if that cannot be meant.
    """
    for name, known in (("protocol", get_args(Protocol)), ("value_range", get_args(Range))):
        if (word := settings[name]) not in known:
            raise UsageError(f"no {name} {word!r}{did_you_mean(str(word), known)}")
    if isinstance(source, Data):
        if data_from(**settings) != Data():
            raise UsageError("a Data holds its settings itself: change them there, and load that alone")
        return _asked(source.source, {name: value for name, value in vars(source).items() if name != "source"})
    if isinstance(source, np.ndarray | Tensor):
        return data_from(source=IN_MEMORY, **settings)
    if isinstance(source, str | Path):
        return data_from(source=source_of(source), **settings)
    raise UsageError(f"{type(source).__name__} is no source of data: give a name, a path, or one array of all images")


def _array(values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):  # NumPy has no bfloat16
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)
    try:
        return np.asarray(values)
    except ValueError as error:
        raise UsageError(f"labels: {error}") from error


def unit(x: Tensor) -> Tensor:
    """Pixels as floats in [0, 1]."""
    return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x


def under(
    protocol: Protocol, x: NDArray[np.uint8] | NDArray[np.float32], split_number: int, *, binary: bool
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Pixels of a split as it is kept under a protocol: those that are binary stay, ``dynamic`` draws training's later.

    Args:
        protocol: see ``Dataset``.
        x: the images.
        split_number: 0 train, 1 validation, 2 test.
        binary: whether they are binary already.
    """
    stays = binary or protocol == "grey" or (protocol == "dynamic" and split_number == 0)
    return x if stays else binarize(x, protocol, split_number)


def binarize(x: NDArray[np.uint8] | NDArray[np.float32], protocol: Protocol, split_number: int) -> NDArray[np.uint8]:
    """Make pixels binary (0 or 255), the same way on every machine.

    ``threshold``: x > 0.5. ``static`` and ``dynamic``: one draw with P(1) = x from NumPy's legacy generator, whose
    stream is frozen for good, seeded by the protocol's constant and the number of the split.
    """
    bytes_ = x.dtype == np.uint8
    if protocol == "threshold":
        return np.where(x > (127 if bytes_ else 0.5), np.uint8(255), np.uint8(0))
    draw = np.random.RandomState(BINARIZATION_SEED + split_number)
    # Of the 255 values 0..254, v lie below v: P(1) is v/255 exactly.
    noise = draw.randint(0, 255, x.shape, np.uint8) if bytes_ else draw.random_sample(x.shape)
    return np.where(noise < x, np.uint8(255), np.uint8(0))


def binarize_batch(batch: Batch, noise: Noise) -> Batch:
    """Dynamic binarization of a training batch: x ~ Bernoulli(x), anew each time (stream ``"binarize"``)."""
    return replace(batch, x=(noise.uniform("binarize", batch.x.shape) < batch.x).to(batch.x.dtype))


def _rows(pool: Pool, validation_size: float | None, test_size: float | None) -> list[NDArray[np.int64]]:
    """Which images are trained on, held out for validation, and for test: of the pool's own test set all.

    Published test sets come with a published order; other data may be sorted, and are shuffled before the split.
    """
    if pool.test is not None and test_size is not None:
        raise UsageError(f"{pool.name} has a test set of its own ({len(pool.test.x)} images): leave --test-size out")
    if validation_size is None:
        validation_size = pool.validation_size or 0.1
    total = len(pool.train.x)
    held_out = _count(validation_size, total, "--validation-size")
    tested = 0 if pool.test is not None else _count(0.1 if test_size is None else test_size, total, "--test-size")
    if total - held_out - tested < 1:
        raise UsageError(
            f"{pool.name} has {total} images: none is left to train on beside {held_out} for validation and {tested} "
            f"for test: have more, or a smaller --validation-size{' or --test-size' if pool.test is None else ''}"
        )
    order = np.arange(total) if pool.test is not None else np.random.RandomState(SPLIT_SEED).permutation(total)
    train, validation, test = np.split(order, [total - held_out - tested, total - tested])
    return [train, validation, test if pool.test is None else np.arange(len(pool.test.x))]


def _count(size: float, total: int, flag: str) -> int:
    count = round(size * total) if size < 1 else round(size)
    if size <= 0 or (size >= 1 and size != count):
        raise UsageError(f"{flag} {size:g}: give a fraction between 0 and 1, or a whole number of images")
    return max(count, 1)
