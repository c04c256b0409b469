"""Where data come from: a path, ``$VAELAB_DATA``, the user's cache, a download, or the embedded digits.

A source yields one pool of images, or two where its publisher set a test set apart.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from platformdirs import user_cache_path

from vaelab.config import Data
from vaelab.data.download import MNIST_SHA256, download
from vaelab.data.readers import (
    Images,
    as_images,
    labelled,
    parse_idx,
    read_array_file,
    read_folder,
    read_idx_pair,
    unpacked,
)
from vaelab.data.sprites import factors as sprite_factors
from vaelab.data.sprites import images as sprite_images
from vaelab.data.streaming import stream_array, stream_folder
from vaelab.errors import FailureError, UsageError, did_you_mean
from vaelab.labels import readable

log = logging.getLogger("vaelab")

# Sources of images that were no file's: an array, which ``load`` has split, and a data set that the user has made.
IN_MEMORY, MADE = "<in memory>", "<made in Python>"
NOWHERE = (IN_MEMORY, MADE)

_IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

# What made the images (N, F), each factor counted from 0, by their row numbers (N,).
Factors = Callable[[NDArray[np.int64]], NDArray[np.int64]]


@dataclass(frozen=True)
class Pool:
    """All images of a source: those to train on (and to split), and its own test set if it has one."""

    name: str
    train: Images
    test: Images | None = None
    validation_size: int | None = None  # the split that is customary for this data set
    factors: Factors | None = None


def source_of(source: str | Path) -> str:
    """A source as a configuration names it: a ``Path`` is a place, also if a data set is called so."""
    return f"./{source}" if isinstance(source, Path) and str(source) in (*NAMED, *NOWHERE) else str(source)


def find(data: Data) -> Pool:
    """Load a named data set, a folder, an array file or a folder of idx files. Protocol and split are left to ``load``.

    Raises:
        UsageError: if there is no such name or path.
        FailureError: if the data are there and cannot be read.
    """
    source, described = data.source, (data.image_size, data.channels, data.value_range) != (None, None, "auto")
    if source in NAMED:
        if described:
            raise UsageError(
                f"--image-size, --channels and --range describe your own files, not {source}: leave them out"
            )
        if Path(source).is_dir() and Path(source).resolve() not in [place.resolve() for place in _places(source, [])]:
            log.info("%s is the data set of that name; the folder here is --data ./%s", source, source)
        return NAMED[source]()
    path = Path(source).expanduser()
    if source in NOWHERE:
        raise UsageError("these images were only in memory: save them as .npy or .npz, and name that file")
    if not path.exists():
        raise UsageError(f"--data {source}: neither a path nor a data set{did_you_mean(source, NAMED)}")
    if path.is_dir() and (found := _idx_files(path)):
        if described:
            raise UsageError("idx files say themselves what they hold: leave out --image-size, --channels and --range")
        return _idx_pool(readable(path.name), found)
    if path.is_dir():
        streamed = stream_folder(path, data.image_size, data.channels, _cache("images"))
        return Pool(readable(path.name), streamed or read_folder(path, data.image_size, data.channels))
    if path.suffix in (".npy", ".npz"):
        return _array_pool(path, data)
    raise UsageError(f"--data {source}: give a folder of images, a .npy or .npz file, or a folder of idx files")


def in_memory(x: NDArray[np.generic], y: NDArray[np.generic] | None, data: Data) -> Pool:
    """Images, and their class numbers or None, that are no file's, read as those of a ``.npz`` file are.

    Raises:
        UsageError, FailureError: as ``find``.
    """
    images = as_images(x, "the array", image_size=data.image_size, channels=data.channels, value_range=data.value_range)
    return Pool("array", images if y is None else labelled(images, y, "labels"))


# --- named data sets ------------------------------------------------------------------------------------------------


def mnist() -> Pool:
    """MNIST (LeCun, Cortes & Burges 1998): 60,000 + 10,000 grey digits of 28 x 28, checked by SHA-256.

    Looked for in ``$VAELAB_DATA/mnist``, then in the user's cache folder, then downloaded into it.
    """
    tried: list[str] = []
    cache = _cache("mnist")
    for place in _places("mnist", tried):
        found = _idx_files(place)
        missing = [name for name in _IDX_NAMES if name not in found]
        if not missing:
            return _checked_mnist(found)
        if found and place != cache:  # the cache is ours to complete
            raise FailureError(f"{place} lacks {missing[0]} (or {missing[0]}.gz): complete it or remove the folder")
        tried.append(f"{place} ({'incomplete' if found else 'not there'})")
    try:
        download(cache)
    except FailureError as error:
        raise FailureError(
            f"MNIST could not be had; tried {', '.join(tried)}; {error}. --data digits needs no download"
        ) from error
    return _checked_mnist(_idx_files(cache))


def digits() -> Pool:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 (Alpaydin & Kaynak 1998), upsampled to 28 x 28. Embedded."""
    from sklearn.datasets import load_digits

    bundled: Any = load_digits()
    small = np.asarray(bundled.images * (255 / 16), np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC)) for image in small]
    return Pool("digits", Images(np.stack(large)[:, None], bundled.target.astype(np.int64), tuple("0123456789")))


def freyfaces() -> Pool:
    """Frey Face: 1,965 grey frames of 28 x 20 of one face (Roweis & Saul 2000)."""
    tried: list[str] = []
    for place in _places("freyfaces", tried):
        path = place / "freyfaces.npy"
        if path.exists():
            return Pool("freyfaces", as_images(read_array_file(path)["x"], str(path)))
        tried.append(f"{path} (not there)")
    raise FailureError(
        f"Frey Face could not be found: tried {', '.join(tried)}. It has no public host whose content could be "
        f"checked: put it there as a uint8 array (1965, 28, 20); --data digits needs no file"
    )


def _sprites() -> Pool:
    return Pool("sprites", sprite_images(), factors=sprite_factors)


NAMED: dict[str, Callable[[], Pool]] = {"mnist": mnist, "digits": digits, "freyfaces": freyfaces, "sprites": _sprites}


def _places(name: str, tried: list[str]) -> list[Path]:
    root = os.environ.get("VAELAB_DATA")
    if not root:
        tried.append("$VAELAB_DATA (not set)")
    return [*([Path(root).expanduser() / name] if root else []), _cache(name)]


def _cache(name: str) -> Path:
    return user_cache_path("vaelab", appauthor=False) / name


def _checked_mnist(files: dict[str, Path]) -> Pool:
    arrays: dict[str, np.ndarray] = {}
    for name, digest in MNIST_SHA256.items():
        raw = unpacked(files[name])
        array = parse_idx(raw, str(files[name]))  # first: a cut file should be called that, not a wrong hash
        if hashlib.sha256(raw).hexdigest() != digest:
            raise FailureError(f"{files[name]} is not MNIST's (wrong SHA-256): for other idx files give --data FOLDER")
        arrays[name] = array
    train_x, train_y, test_x, test_y = (arrays[name] for name in _IDX_NAMES)
    classes = tuple("0123456789")
    train = Images(train_x[:, None], train_y.astype(np.int64), classes)
    return Pool("mnist", train, Images(test_x[:, None], test_y.astype(np.int64), classes), validation_size=5000)


# --- files of the user ----------------------------------------------------------------------------------------------


def _idx_files(folder: Path) -> dict[str, Path]:
    places = {name: (folder / name, folder / f"{name}.gz") for name in _IDX_NAMES}
    return {name: next(p for p in pair if p.exists()) for name, pair in places.items() if any(p.exists() for p in pair)}


def _idx_pool(name: str, files: dict[str, Path]) -> Pool:
    train_x, train_y, test_x, test_y = (files.get(part) for part in _IDX_NAMES)
    if train_x is None:
        raise FailureError(f"{next(iter(files.values())).parent} lacks {_IDX_NAMES[0]} (or {_IDX_NAMES[0]}.gz)")
    test = read_idx_pair(test_x, test_y) if test_x else None
    return _same_kind(Pool(name, read_idx_pair(train_x, train_y), test))


def _same_kind(pool: Pool) -> Pool:
    if pool.test is not None and pool.train.x.shape[1:] != pool.test.x.shape[1:]:
        shapes = [part.x.shape[1:] for part in (pool.train, pool.test)]
        raise FailureError(f"{pool.name}: the training images are {shapes[0]}, the test images {shapes[1]}")
    if pool.test is not None and pool.test.y is not None and pool.train.classes is not None:
        last = int(pool.test.y.max(initial=0))
        if last >= len(pool.train.classes):
            raise FailureError(f"{pool.name}: the test labels go to {last}, those of the training images to "
                               f"{len(pool.train.classes) - 1}: number the classes of both alike")  # fmt: skip
    return pool


def _array_pool(path: Path, data: Data) -> Pool:
    if path.suffix == ".npy":
        streamed = stream_array(path, data.image_size, data.channels, data.value_range)
        if streamed is not None:
            return Pool(readable(path.stem), streamed)
    arrays = read_array_file(path)

    def images(key: str, labels: str) -> Images:
        read = as_images(
            arrays[key],
            f"{path}[{key}]" if path.suffix == ".npz" else str(path),
            image_size=data.image_size,
            channels=data.channels,
            value_range=data.value_range,
        )
        y = arrays.get(labels)
        return read if y is None else labelled(read, y, f"{path}[{labels}]")

    def say_unused(*used: str) -> None:
        if unused := sorted(arrays.keys() - {*used}):
            log.info("%s: not used: %s", path, ", ".join(unused))

    if {"x_train", "x_test"} <= arrays.keys():
        say_unused("x_train", "y_train", "x_test", "y_test")
        train, test = images("x_train", "y_train"), images("x_test", "y_test")
        return _same_kind(Pool(readable(path.stem), train, test))
    key = "x" if "x" in arrays else next((k for k in arrays if len(arrays) == 1), None)
    if key is None:
        raise UsageError(
            f"{path} holds {', '.join(sorted(arrays)) or 'no arrays'}: name the images x (and y), or x_train and x_test"
        )
    say_unused(key, "y")
    return Pool(readable(path.stem), images(key, "y"))
