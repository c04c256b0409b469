"""Images that are too many for memory: they stay on disk, mapped and not read, as bytes (or floats) in one file.

A ``.npy`` file is mapped where it lies. A folder of images is decoded once, into the user's cache folder, under a name
made from the names, sizes and times of its files: when one of them changes it is decoded anew.

Shapes: N images, C channels, H W sides.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from filelock import FileLock
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from vaelab.data.readers import PIECE, Images, Range, decode, list_images, shape_of, to_nchw
from vaelab.errors import FailureError

log = logging.getLogger("vaelab")

STREAMED = 2**30  # bytes of pixels from which on images stay on disk


def stream_array(
    path: Path, image_size: tuple[int, int] | None, channels: int | None, value_range: Range
) -> Images | None:
    """Map the images of a ``.npy`` file, if its values can be used as they are: bytes in 0..255, or float32 in 0..1.

    Returns:
        None if they fit into memory, or would have to be converted and so read into it.

    Raises:
        FailureError: on NaN and on values outside the range.
        UsageError: if the layout cannot be told.
    """
    if path.stat().st_size < STREAMED:
        return None
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except ValueError:  # damaged, or no array: who reads it whole says which
        return None
    as_bytes = array.dtype == np.uint8 and value_range in ("auto", "byte")
    as_floats = array.dtype == np.float32 and value_range in ("auto", "unit")
    if not (as_bytes or as_floats):
        return None
    x = to_nchw(array, str(path), image_size, channels)
    low, high, binary = np.inf, -np.inf, True
    for start in range(0, len(x), PIECE):
        piece = x[start : start + PIECE]
        low, high = np.minimum(low, piece.min()), np.maximum(high, piece.max())  # unlike min and max they keep NaN
        binary = binary and bool(np.isin(piece, (0, 255) if as_bytes else (0, 1)).all())
        if not np.isfinite(low + high):
            raise FailureError(f"{path} holds values that are NaN or infinite: clean it first")
    if as_bytes and high <= 1:
        return None  # binary images, which are kept as 0 and 255
    if as_floats and not 0 <= low <= high <= 1:
        raise FailureError(f"{path} holds values from {low:g} to {high:g}, outside 0..1: rescale them, or say "
                           "what they mean with --range")  # fmt: skip
    return Images(cast(NDArray[np.uint8] | NDArray[np.float32], x), binary=binary)


def stream_folder(root: Path, image_size: tuple[int, int] | None, channels: int | None, cache: Path) -> Images | None:
    """Map the images of a folder, decoded once into ``cache``; see ``readers.read_folder`` for what is done to each.

    Returns:
        None if they fit into memory.

    Raises:
        FailureError: if a file is no image, the sizes differ, or the disk is too small.
    """
    files, y, classes = list_images(root)
    shape = shape_of(files, image_size, channels)
    if np.prod(shape, dtype=np.int64) < STREAMED:
        return None
    path = cache / f"{_key(root, files, image_size, channels)}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.with_suffix(".lock")):
            if not path.exists():  # another process, which had the lock, may have decoded them
                _decode(files, shape, image_size, path, may_be_grey=channels is None)
    x = np.load(path, mmap_mode="c")
    pieces = (x[start : start + PIECE] for start in range(0, len(x), PIECE))  # of grey images the first one tells
    return Images(x, y, classes, binary=all(bool(np.isin(piece, (0, 255)).all()) for piece in pieces))


def _key(root: Path, files: Sequence[Path], image_size: tuple[int, int] | None, channels: int | None) -> str:
    described = [(str(file.relative_to(root)), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    content = json.dumps([1, image_size, channels, described])  # 1: how pixels are made of files
    return f"{root.name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _decode(
    files: Sequence[Path], shape: tuple[int, ...], image_size: tuple[int, int] | None, path: Path, *,
    may_be_grey: bool,
) -> None:  # fmt: skip
    """Decode files into a new array file; one that is interrupted leaves nothing."""
    size, free = int(np.prod(shape, dtype=np.int64)), shutil.disk_usage(path.parent).free
    needed = size + (size // 3 if may_be_grey else 0)  # for the copy of one channel
    if needed > free:  # or the system would end the process, when it writes to a mapped file on a full disk
        raise FailureError(f"{len(files):,} decoded images take {needed / 1e9:.1f} GB, and {path.parent} has "
                           f"{free / 1e9:.1f} GB free: give a smaller --image-size, or set XDG_CACHE_HOME")  # fmt: skip
    log.info("decoding %s images once, into %s (%.1f GB)", f"{len(files):,}", path, size / 1e9)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".decoding-") as folder:
        target = Path(folder) / "images.npy"
        array = open_memmap(target, "w+", np.uint8, shape)
        if decode(files, image_size, array, shown=True) and may_be_grey:
            coloured, target = array, Path(folder) / "grey.npy"
            array = open_memmap(target, "w+", np.uint8, (shape[0], 1, *shape[2:]))
            for start in range(0, len(files), PIECE):
                array[start : start + PIECE] = coloured[start : start + PIECE, :1]
        array.flush()
        target.replace(path)
