"""Fetching MNIST from its public hosts: several of them, checked by SHA-256, written atomically."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from vaelab.errors import FailureError
from vaelab.runs.checkpoint import write_bytes

MNIST_HOSTS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)

# Of the unpacked files: the gzip files differ between hosts.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

_CHUNK = 1 << 16


def download(
    folder: Path, hosts: Sequence[str] = MNIST_HOSTS, sha256: Mapping[str, str] = MNIST_SHA256, timeout: float = 20.0
) -> None:
    """Put the files named in ``sha256`` into ``folder`` as ``NAME.gz``; files that are there and right are kept.

    Every host is tried in turn for each file, until one delivers content with the right hash.

    Raises:
        FailureError: naming every host that was tried and what it answered.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True) as progress:
        for name, digest in sha256.items():
            target = folder / f"{name}.gz"
            if not _is_right(target, digest):
                write_bytes(target, _fetch(name, digest, hosts, timeout, progress))


def _is_right(path: Path, digest: str) -> bool:
    try:
        return hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest() == digest
    except (OSError, EOFError, zlib.error):
        return False


def _fetch(name: str, digest: str, hosts: Sequence[str], timeout: float, progress: Progress) -> bytes:
    tried: list[str] = []
    for host in hosts:
        url = f"{host}/{name}.gz"
        try:
            packed = _get(url, timeout, progress)
            found = hashlib.sha256(gzip.decompress(packed)).hexdigest()
        except urllib.error.HTTPError as error:
            tried.append(f"{url} (HTTP {error.code})")
        except (OSError, http.client.HTTPException, EOFError, zlib.error, ValueError) as error:
            reason = str(getattr(error, "reason", None) or error).strip()  # of a bad answer it is a line of it
            tried.append(f"{url} ({reason})")
        else:
            if found == digest:
                return packed
            tried.append(f"{url} (wrong content: SHA-256 {found[:12]}..., expected {digest[:12]}...)")
    raise FailureError("no host delivered it: " + "; ".join(tried))


def _get(url: str, timeout: float, progress: Progress) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        size = int(answer.headers.get("Content-Length", 0))
        task = progress.add_task(url.rsplit("/", 1)[1], total=size or None)
        chunks: list[bytes] = []
        while chunk := answer.read(_CHUNK):
            chunks.append(chunk)
            progress.advance(task, len(chunk))
    content = b"".join(chunks)
    if size and len(content) != size:
        raise ValueError(f"cut short after {len(content)} of {size} bytes")
    return content
