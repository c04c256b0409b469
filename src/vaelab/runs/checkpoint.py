"""Atomic files that hold tensors and JSON, and nothing that executes.

Every file is written whole or not at all: to a temporary file beside it, flushed to the disk, then renamed over it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vaelab.errors import FailureError


@contextlib.contextmanager
def atomic_write(path: Path) -> Generator[BinaryIO]:
    """Open a file for writing that takes the place of ``path`` only when the block ends without an error.

    Raises:
        FailureError: if the disk is full or the folder cannot be written; what stood at ``path`` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_write(path) as file:
        file.write(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FailureError: if the file is missing, unreadable or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FailureError(f"{path} is missing: {path.parent} is not a run folder of vaelab") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FailureError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise FailureError(f"{path} does not hold a JSON object")
    return content


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dictionaries of them with ``torch.save``, atomically."""
    buffer = io.BytesIO()
    torch.save(_alone(dict(content)), buffer)
    write_bytes(path, buffer.getvalue())


def _alone(content: Any) -> Any:
    """The same content, its tensors without what else lies in their storage: torch would write all of that."""
    if isinstance(content, dict):
        return {key: _alone(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_alone(value) for value in content]
    is_part = isinstance(content, Tensor) and content.untyped_storage().nbytes() > content.nbytes
    return content.clone() if is_part else content


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what ``save_tensors`` wrote; refuses anything that would execute code (``weights_only=True``).

    Raises:
        FailureError: if the file is missing, damaged, or not made of tensors and plain data.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise FailureError(f"{path} is missing: the run has saved no checkpoint yet, or it was moved") from error
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError on a damaged file
        raise FailureError(f"{path} is damaged or not a checkpoint of vaelab ({type(error).__name__})") from error


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line, flushed to the disk."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _explained(error, path) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; a last line that was cut short by a crash is left out."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FailureError(f"{path} cannot be read: {error}") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise FailureError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def _explained(error: OSError, path: Path) -> FailureError:
    if error.errno == errno.ENOSPC:
        return FailureError(f"the disk is full: {path} was not written; free some space first")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FailureError(f"{path.parent} cannot be written: its permissions do not allow it")
    return FailureError(f"{path} cannot be written: {error.strerror or error}")
