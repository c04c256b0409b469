"""The explorer as files for any static host: the same page, with the model in ONNX, run in the visitor's browser."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vaelab.errors import FailureError, UsageError
from vaelab.explorer.server import page_files
from vaelab.explorer.world import World
from vaelab.export import BATCHES, Graph, codes_to_check, parity, to_onnx
from vaelab.runs.checkpoint import write_bytes

log = logging.getLogger("vaelab")

Runtime = Literal["auto", "npm", "cdn"]

# onnxruntime-web's WebAssembly build, whole: the script and what it runs. The page checks these hashes, wherever the
# files come from.
VERSION = "1.30.0"
RUNTIME = {
    "script": ("ort.wasm.bundle.min.mjs", "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG"),
    "wasm": ("ort-wasm-simd-threaded.wasm", "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM"),
}
PUBLIC = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist/"
SERVED, STATIC = b'data-mode="server"', b'data-mode="static"'


def write_static(world: World, out: Path, runtime: Runtime = "auto", about: dict[str, Any] | None = None) -> list[str]:
    """Write the page and all that it needs into a new or empty folder; returns the names of the files.

    Args:
        world: the run.
        out: the folder.
        runtime: where onnxruntime-web is taken from. ``npm``: its package, now, into the folder; ``cdn``: a public
            address, each time the page is opened; ``auto``: npm where the command is there, else the public address.
        about: what is written into the graphs' properties.

    Raises:
        UsageError: if the folder is not empty, or npm is asked for and missing.
        FailureError: if a graph does not give the model's numbers, or the package is not the one that is known.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--static {out} is not an empty folder: choose another")
    if runtime == "npm" and shutil.which("npm") is None:
        raise UsageError("--runtime npm needs the command npm: install Node.js, or take --runtime cdn")
    images = torch.from_numpy(world.images[: max(BATCHES)]).float() / 255
    checked: dict[Graph, Tensor] = {"decoder": codes_to_check(world.model, images), "scorer": images}
    files: dict[str, bytes] = {}
    for graph, inputs in checked.items():
        files[f"{graph}.onnx"] = to_onnx(world.model, graph, about or {})
        parity(world.model, graph, files[f"{graph}.onnx"], inputs)
    kept = {} if runtime == "cdn" else _from_npm(required=runtime == "npm")
    places = {part: {"url": f"ort/{name}" if kept else PUBLIC + name, "integrity": integrity}
              for part, (name, integrity) in RUNTIME.items()}  # fmt: skip
    page = page_files()
    assert SERVED in page["index.html"], "the page does not say that it is served"
    files |= {
        **page,
        "index.html": page["index.html"].replace(SERVED, STATIC),
        "run.json": json.dumps(world.info, allow_nan=False).encode(),
        "points.bin": world.points(),
        "images.bin": world.pixels(),
        "runtime.json": json.dumps({"version": VERSION, "runtime": places}, indent=2).encode(),
        **{f"ort/{name}": content for name, content in kept.items()},
    }
    for name, content in files.items():
        write_bytes(out / name, content)
    return list(files)


def _from_npm(*, required: bool) -> dict[str, bytes]:
    """The runtime's files out of its npm package, checked; none where npm is missing or cannot reach its registry."""
    npm = shutil.which("npm")
    if npm is None:
        log.info("npm is not installed: the page takes onnxruntime-web from %s when it is opened", PUBLIC)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--silent", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)  # noqa: S603
        packages = list(Path(folder).glob("*.tgz"))
        if done.returncode or not packages:
            reason = (done.stderr.strip() or "no package came").splitlines()[-1]
            if required:
                raise FailureError(f"npm could not fetch onnxruntime-web {VERSION}: {reason}")
            log.info("npm could not fetch onnxruntime-web (%s): the page takes it from %s when opened", reason, PUBLIC)
            return {}
        with tarfile.open(packages[0]) as package:
            return {name: _checked(package, name, integrity) for name, integrity in RUNTIME.values()}


def _checked(package: tarfile.TarFile, name: str, integrity: str) -> bytes:
    try:
        member = package.extractfile(f"package/dist/{name}")
        content = b"" if member is None else member.read()
    except KeyError:
        content = b""
    found = "sha384-" + base64.b64encode(hashlib.sha384(content).digest()).decode()
    if found != integrity:
        raise FailureError(f"{name} of onnxruntime-web {VERSION} is not the file that is known: {found}")
    return content
