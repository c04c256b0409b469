"""Strict readers: idx files, folders of images, NumPy arrays. Each returns ``Images`` or says what is wrong and where.

Shapes: N images, C channels (1 or 3), H W sides.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

from vaelab.errors import FailureError, UsageError
from vaelab.labels import readable

Range = Literal["auto", "unit", "byte", "symmetric"]

PIECE = 256  # images at a time, where all are gone through
MOST_CLASSES = 100_000
_LONGEST = 1000  # times the shorter side: what is longer counts images

_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True)
class Images:
    """Images as they were read.

    Args:
        x: (N, C, H, W), uint8 in 0..255 or float32 in 0..1. Binary images are uint8 of only 0 and 255.
        y: (N,) class numbers, or None.
        classes: the names of the classes, or None.
        binary: every pixel is 0 or 1.
    """

    x: NDArray[np.uint8] | NDArray[np.float32]
    y: NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    binary: bool = False


# --- idx ------------------------------------------------------------------------------------------------------------


def read_idx(path: Path) -> NDArray[np.generic]:
    """Read one idx file (the format of MNIST), plain or gzip, strictly: magic number, sizes and length must agree.

    Reference:
        LeCun, Cortes & Burges, The MNIST database, "File formats".

    Raises:
        FailureError: if the file is missing, truncated, too long, damaged or no idx file.
    """
    return parse_idx(unpacked(path), str(path))


def unpacked(path: Path) -> bytes:
    """The content of a file, decompressed if it is gzip."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FailureError(f"{path} is damaged or cut short ({error}): fetch it again") from error
    except OSError as error:
        raise FailureError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_idx(raw: bytes, name: str) -> NDArray[np.generic]:
    """Parse the content of an idx file; ``name`` is for the error messages."""
    if len(raw) < 4 or raw[:2] != b"\x00\x00" or raw[2] not in _IDX_DTYPES or raw[3] == 0:
        raise FailureError(f"{name} is not an idx file: its magic number is 0x{raw[:4].hex()}")
    dtype, ndim = np.dtype(_IDX_DTYPES[raw[2]]), raw[3]
    header = 4 + 4 * ndim
    if len(raw) < header:
        raise FailureError(f"{name} is cut short: {len(raw)} bytes, its header alone has {header}; fetch it again")
    shape = tuple(int(side) for side in np.frombuffer(raw[4:header], ">u4"))
    expected = header + math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        state = "cut short" if len(raw) < expected else "too long"
        raise FailureError(f"{name} is {state}: {len(raw)} bytes, its header says {expected}; fetch it again")
    return np.frombuffer(raw, dtype, offset=header).reshape(shape).astype(dtype.newbyteorder("="))


def read_idx_pair(images: Path, labels: Path | None) -> Images:
    """Read an idx file of N images and, if given, one of their N labels.

    Raises:
        FailureError: if one is not what it should be, or their counts differ.
    """
    x = read_idx(images)
    if x.dtype != np.uint8 or x.ndim != 3:
        raise FailureError(f"{images} holds {x.dtype} of shape {x.shape}, not uint8 images (N, H, W)")
    read = _of_bytes(x.astype(np.uint8)[:, None])
    return read if labels is None else labelled(read, read_idx(labels), str(labels))


def labelled(images: Images, labels: NDArray[np.generic], name: str) -> Images:
    """The same images with their class numbers, whose names are the classes'.

    Raises:
        FailureError: if they are not a whole number from 0 for each image.
    """
    count = len(images.x)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        remedy = {
            (count,): "number them by y = np.unique(y, return_inverse=True)[1]",
            (count, 1): "flatten them by y = y.ravel()",
        }.get(labels.shape, "of a row of scores for each image take y = y.argmax(1)" if labels.ndim == 2 else "")
        raise FailureError(f"{name} holds {labels.dtype} {labels.shape}: labels for the {count} images are {count} "
                           f"whole numbers from 0{'; ' * bool(remedy)}{remedy}")  # fmt: skip
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    if low < 0 or high >= MOST_CLASSES:
        raise FailureError(f"{name} holds labels from {low} to {high}: classes are numbered from 0, to "
                           f"{MOST_CLASSES - 1:,} at most")  # fmt: skip
    return replace(images, y=labels.astype(np.int64), classes=tuple(str(label) for label in range(high + 1)))


# --- folders of images ----------------------------------------------------------------------------------------------


def read_folder(root: Path, image_size: tuple[int, int] | None, channels: int | None) -> Images:
    """Read every image below ``root``: its own files, or those of its class sub-folders.

    Each image is turned as its EXIF tag says, laid on white where it is transparent, and brought to 8 bits; with
    ``image_size`` it is scaled to cover (height, width) and cut at the centre.

    Args:
        root: a folder of images, or of one sub-folder a class.
        image_size: (height, width); None: all must have the same size.
        channels: 1 for grey, 3 for colour; None: grey if every image is.

    Raises:
        FailureError: if the folder is empty, a file is no image, or the sizes differ.
        UsageError: if the folder is split into train and test already.
    """
    files, y, classes = list_images(root)
    x = np.empty(shape_of(files, image_size, channels), np.uint8)
    if decode(files, image_size, x) and channels is None:
        x = np.ascontiguousarray(x[:, :1])
    return replace(_of_bytes(x), y=y, classes=classes)


def shape_of(files: Sequence[Path], image_size: tuple[int, int] | None, channels: int | None) -> tuple[int, ...]:
    """(N, C, H, W) of images as they are decoded, if all are of the size of the first; C is 3 until it is known."""
    with _large_images():
        return (len(files), 1 if channels == 1 else 3, *read_image(files[0], image_size).shape[:2])


@contextlib.contextmanager
def _large_images() -> Iterator[None]:
    """Without Pillow's warning that a large image could be an attack: they are the user's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def decode(
    files: Sequence[Path], image_size: tuple[int, int] | None, x: NDArray[np.uint8], *, shown: bool = False
) -> bool:
    """Decode images into an array (N, C, H, W) on all cores, and tell whether every one of them is grey.

    Args:
        files: the images.
        image_size: as in ``read_folder``.
        x: where they go, one after the other; for C = 1 they are made grey.
        shown: whether the progress is.

    Raises:
        FailureError: if a file is no image, the sizes differ, or nothing of 16 bits would be left.
    """
    grey, brightest = True, 0
    with ThreadPoolExecutor(os.cpu_count()) as pool, _large_images():
        for start in track(range(0, len(files), PIECE), "decoding", console=Console(stderr=True), transient=True,
                           disable=not shown):  # fmt: skip
            some = files[start : start + PIECE]
            pictures = pool.map(lambda file: read_image(file, image_size), some)
            for row, (file, picture) in enumerate(zip(some, pictures, strict=True), start):
                if picture.shape[:2] != x.shape[2:]:
                    sizes = [f"{height}x{width}" for height, width in (x.shape[2:], picture.shape[:2])]
                    raise FailureError(f"images differ in size: {files[0]} is {sizes[0]}, {file} is {sizes[1]}; "
                                       "give --image-size HEIGHT WIDTH to scale and crop them")  # fmt: skip
                grey = grey and bool((picture == picture[..., :1]).all())
                brightest = max(brightest, int(picture.max()))
                in_grey = x.shape[1] == 1
                x[row] = np.asarray(Image.fromarray(picture).convert("L")) if in_grey else picture.transpose(2, 0, 1)
    if brightest == 0 and _is_deep(files[0]):
        raise FailureError(f"the 16-bit images of {files[0].parent} are all black in 8 bits: no value is above 256 of "
                           "65,535; rescale them")  # fmt: skip
    return grey


def list_images(root: Path) -> tuple[list[Path], NDArray[np.int64] | None, tuple[str, ...] | None]:
    """The files of a folder; if it has sub-folders, the numbers of their classes and the classes' names, else None."""
    visible = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    folders = [path for path in visible if path.is_dir()]
    for folder in folders:
        if root.resolve().is_relative_to(folder.resolve()):
            raise FailureError(f"{folder} is a link to a folder that {root} is in: its images would count twice")
    if folders and len(folders) < len(visible):
        stray = next(path for path in visible if not path.is_dir())
        raise FailureError(f"{root} mixes files ({stray.name}) with sub-folders ({folders[0].name}): use one or other")
    _refuse_split(root, folders)
    seen = {root.resolve()}
    in_folders = [(folder, sorted(_files_below(folder, seen))) for folder in folders]
    in_classes = [(folder, part) for folder, part in in_folders if part]  # an empty folder is no class
    files = [path for _, part in in_classes for path in part] if folders else visible
    if not files:
        raise FailureError(f"{root} holds no images")
    if not folders:
        return files, None, None
    y = np.repeat(np.arange(len(in_classes), dtype=np.int64), [len(part) for _, part in in_classes])
    return files, y, tuple(readable(folder.name) for folder, _ in in_classes)


def _refuse_split(root: Path, folders: Sequence[Path]) -> None:
    """Refuse folders of which one holds the training images, in classes of its own or beside others to test on."""
    names = {path.name.lower(): path for path in folders}
    training = next((names[name] for name in ("train", "training") if name in names), None)
    others = [names[name].name for name in ("test", "testing", "val", "valid", "validation", "dev") if name in names]
    if training is None:
        return
    if others:
        raise UsageError(f"{root} is split into {training.name} and {others[0]} already: vaelab splits by itself; give "
                         f"--data {training}")  # fmt: skip
    if len(folders) == 1 and any(path.is_dir() and not path.name.startswith(".") for path in training.iterdir()):
        raise UsageError(f"{root} holds {training.name} alone, and the classes are in that: give --data {training}")


def _files_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """All files of a folder and its sub-folders, linked ones too, but for hidden ones."""
    if (place := folder.resolve()) in seen:
        raise FailureError(f"{folder} is reached twice, by a link: its images would count twice")
    seen.add(place)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(path, seen)
        elif path.is_file():
            yield path
        elif path.is_symlink():
            raise FailureError(f"{path} is a link to a file that is not there: fetch that, or remove the link")


def read_image(path: Path, image_size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """One image as (H, W, 3) uint8."""
    try:
        with Image.open(path) as opened:
            picture = _to_rgb(ImageOps.exif_transpose(opened))
    except MemoryError:
        raise
    except Exception as error:  # damaged files end in errors of many kinds, struct's among them
        raise FailureError(f"{path} is not an image that can be read ({error}); remove it or repair it") from error
    if image_size is not None:
        height, width = image_size
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.uint8)


def _is_deep(path: Path) -> bool:
    with _large_images(), Image.open(path) as opened:
        return opened.mode.startswith("I")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":  # which Pillow would clip at 0 and 255
        raise ValueError("its pixels are floating-point numbers")
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it at 255 instead of scaling it
        deep = np.asarray(picture).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError(f"its pixels range from {deep.min()} to {deep.max()}, outside 16 bits")
        picture = Image.fromarray((deep // 257).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


# --- arrays ---------------------------------------------------------------------------------------------------------


def read_array_file(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read the arrays of a ``.npy`` (under the name ``x``) or ``.npz`` file; nothing is ever unpickled.

    Raises:
        FailureError: if the file is damaged or holds Python objects.
    """
    try:
        with path.open("rb") as file:
            start = file.read(6)
            if start[:2] != b"PK" and start != b"\x93NUMPY":
                raise FailureError(f"{path} is not a NumPy file (it begins with {start!r}): save a numeric array by "
                                   "numpy.save")  # fmt: skip
            file.seek(0)
            loaded = np.load(file, allow_pickle=False)
            return {"x": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (FailureError, MemoryError):
        raise
    except Exception as error:  # damaged files end in errors of many kinds, those of archives and of tokens among them
        if "allow_pickle" in str(error):
            raise FailureError(
                f"{path} holds Python objects, which are never unpickled: save a numeric array"
            ) from error
        raise FailureError(f"{path} is damaged or not a NumPy file ({error})") from error


def as_images(
    array: NDArray[np.generic],
    name: str,
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    value_range: Range = "auto",
) -> Images:
    """Turn an array (N,H,W), (N,H,W,C), (N,C,H,W) or (N,D) into ``Images``; ambiguity is an error.

    Integers mean 0..255 and floats 0..1, unless ``value_range`` says otherwise: ``unit`` 0..1, ``byte`` 0..255,
    ``symmetric`` -1..1. An array of only 0 and 1 is binary, and so are integers of only 0 and 255.

    Raises:
        FailureError: on NaN, on values outside the range, on objects or on an empty array.
        UsageError: if the layout cannot be told.
    """
    if array.dtype.kind not in "buif":
        raise FailureError(f"{name} holds {array.dtype}: images are integers in 0..255 or floats in 0..1")
    if array.size == 0:
        raise FailureError(f"{name} is empty: its shape is {array.shape}")
    x = np.ascontiguousarray(to_nchw(array, name, image_size, channels))
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).sum())
        raise FailureError(f"{name} holds {bad} values that are NaN or infinite: clean it first")
    low, high = float(x.min()), float(x.max())
    binary = value_range in ("auto", "unit") and bool(np.isin(x, (0, 1)).all())
    if binary:
        return Images((x != 0).astype(np.uint8) * np.uint8(255), binary=True)
    if value_range == "auto":
        value_range = "unit" if x.dtype.kind == "f" else "byte"
    bottom, top = {"unit": (0, 1), "byte": (0, 255), "symmetric": (-1, 1)}[value_range]
    if low < bottom or high > top:
        rescale = "rescale them" + " by x = x / np.float32(65535)" * (x.dtype == np.uint16)
        raise FailureError(
            f"{name} holds values from {low:g} to {high:g}, outside {bottom}..{top}: say what they mean with "
            f"--range (value_range in Python) unit (0..1), byte (0..255) or symmetric (-1..1), or {rescale}"
        )
    if x.dtype.kind != "f" and value_range == "byte":
        return _of_bytes(x.astype(np.uint8))
    return Images(((x.astype(np.float32) - bottom) / (top - bottom)).astype(np.float32))


def to_nchw(
    array: NDArray[np.generic], name: str, image_size: tuple[int, int] | None, channels: int | None
) -> NDArray[np.generic]:
    """An array of images as (N, C, H, W), a view of it where it can be.

    Raises:
        UsageError: if the layout cannot be told, or is not what was said.
    """
    if array.ndim == 2:
        planes = channels or 1
        side = math.isqrt(array.shape[1] // planes)
        height, width = image_size or (side, side)
        if planes * height * width != array.shape[1]:
            raise UsageError(
                f"{name} holds {array.shape[1]} numbers an image, which is not {planes}x{height}x{width}: "
                f"give --image-size HEIGHT WIDTH (and --channels 3 for colour); one image alone is (1, H, W)"
            )
        return array.reshape(-1, planes, height, width)
    if array.ndim == 3:
        x = array[:, None]
    elif array.ndim == 4:
        first, last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
        if first and last and channels is not None:
            first, last = array.shape[1] == channels, array.shape[3] == channels
        if not first and not last:
            raise UsageError(f"{name} has shape {array.shape}, and no axis of 1 or 3 channels (transparency is none)")
        if first and last:
            raise UsageError(f"{name} has shape {array.shape}: as (N, C, H, W) and as (N, H, W, C) alike a side has "
                             "less than 8 pixels")  # fmt: skip
        x = array if first else array.transpose(0, 3, 1, 2)
    else:
        raise UsageError(f"{name} has shape {array.shape}: images are (N,H,W), (N,H,W,C), (N,C,H,W) or (N,D)")
    short, long = sorted(x.shape[2:])
    # (28, 28, 500) is 500 images as MATLAB keeps them, and not 28 of 28 x 500.
    is_last = array.ndim == 3 and array.shape[0] == array.shape[1] and array.shape[2] > 4 * array.shape[0]
    if (is_last or long > _LONGEST * max(short, 1)) and image_size is None:
        raise UsageError(f"{name} holds images of {x.shape[2]}x{x.shape[3]}: their number must be the first axis; "
                         "np.moveaxis(x, -1, 0) brings the last one there; if it is, say so by --image-size HEIGHT "
                         "WIDTH")  # fmt: skip
    if channels is not None and x.shape[1] != channels:
        raise UsageError(f"{name} holds images of {x.shape[1]} channels, not --channels {channels}: leave it out")
    if image_size is not None and x.shape[2:] != image_size:
        raise UsageError(
            f"{name} holds images of {x.shape[2]}x{x.shape[3]}, not --image-size {image_size}: leave it out"
        )
    return x


def _of_bytes(x: NDArray[np.uint8]) -> Images:
    """Images (N, C, H, W) of bytes; those of 0 and 255 alone are binary."""
    return Images(x, binary=bool(np.isin(x, (0, 255)).all()))
