"""bf16 products of a traced step on a processor's tile units (AMX), by a small library that is built once a machine.

oneDNN uses these units too, but of a product of a small network, 128 x 784 x 400, it spends more time around the
arithmetic: some 40 us to find and set up its function, and as much again where a factor is transposed.

Shapes: N rows, K inputs, M outputs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from jaxtyping import BFloat16
from platformdirs import user_cache_path
from torch import Tensor
from torch.fx import GraphModule, Node

from vaelab.runtime import cpu_flags
from vaelab.training.products.graphs import operations

log = logging.getLogger("vaelab")

SOURCE = Path(__file__).with_name("tiles.cpp")
LARGEST = 1e8  # floating-point operations: larger products are oneDNN's, whose blocks suit the caches
FLAGS = [
    "-O3", "-std=c++20", "-fPIC", "-shared",
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mamx-tile", "-mamx-bf16",
]  # fmt: skip

torch.library.define(
    "vaelab::tile_product",
    "(Tensor a, Tensor b, bool a_turned, bool b_turned) -> Tensor",
    tags=(torch.Tag.flexible_layout,),  # any will do: without it the compiler copies what it passes
)
torch.library.define(
    "vaelab::tile_affine",
    "(Tensor bias, Tensor a, Tensor b, bool a_turned, bool b_turned) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)


@torch.library.register_fake("vaelab::tile_product")
def _product(
    a: BFloat16[Tensor, "N K"], b: BFloat16[Tensor, "K M"], a_turned: bool, b_turned: bool
) -> BFloat16[Tensor, "N M"]:
    return a.new_empty(a.shape[int(a_turned)], b.shape[1 - int(b_turned)])


@torch.library.register_fake("vaelab::tile_affine")
def _affine(bias: Tensor, a: Tensor, b: Tensor, a_turned: bool, b_turned: bool) -> Tensor:
    return _product(a, b, a_turned, b_turned)


torch.library.define("vaelab::windows", "(Tensor images) -> Tensor")
torch.library.define("vaelab::spread", "(Tensor parts, SymInt height, SymInt width) -> Tensor")


@torch.library.register_fake("vaelab::windows")
def _windows(images: BFloat16[Tensor, "B H W C"]) -> BFloat16[Tensor, "B*h*w 9*C"]:
    count, height, width, channels = images.shape
    return images.new_empty(count * ((height + 1) // 2) * ((width + 1) // 2), 9 * channels)


@torch.library.register_fake("vaelab::spread")
def _spread(parts: BFloat16[Tensor, "B*h*w 9*C"], height: int, width: int) -> BFloat16[Tensor, "B H W C"]:
    places = ((height + 1) // 2) * ((width + 1) // 2)
    return parts.new_empty(parts.shape[0] // places, height, width, parts.shape[1] // 9)


def by_tiles(graph: GraphModule) -> int:
    """Let the tile units compute the small bf16 products of a traced graph, in place; returns how many there are.

    Sums are of fp32 and rounded once, as oneDNN's are, in another order. A factor that the graph transposes is given
    as it was before, with a note that says so: the units do not mind, and the compiler need not write it down twice.

    Args:
        graph: as ``make_fx`` traces it. Products of fp32 stay as they are.
    """
    replaced = {
        torch.ops.aten.mm.default: torch.ops.vaelab.tile_product.default,
        torch.ops.aten.addmm.default: torch.ops.vaelab.tile_affine.default,
    }
    found = [
        node
        for node in graph.graph.nodes
        if node.target in replaced and 0 < operations(node, torch.bfloat16) <= LARGEST
    ]
    for node in found:
        *bias, a, b = node.args
        (a, a_turned), (b, b_turned) = _as_it_lay(a), _as_it_lay(b)
        node.target = replaced[node.target]
        node.args = (*bias, a, b, a_turned, b_turned)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return len(found)


def _as_it_lay(node: Node) -> tuple[Node, bool]:
    """What a node transposes, and whether it does so an odd number of times."""
    turned = False
    while node.target is torch.ops.aten.t.default:
        node, turned = node.args[0], not turned  # type: ignore[assignment]
    return node, turned


# --- the library ----------------------------------------------------------------------------------------------------


@functools.cache
def has_tiles(device: torch.device) -> bool:
    """Whether the tile units can be used here: the processor has them, the system lets us, and the library is built.

    Where the processor has them and the rest fails, one line says so, and oneDNN computes as before.
    """
    if device.type != "cpu" or not {"amx_tile", "amx_bf16", "avx512_bf16"} <= cpu_flags():
        return False
    try:
        library = _built(user_cache_path("vaelab", appauthor=False) / "compiled")
        if ctypes.CDLL(str(library)).vaelab_permit_tiles() != 0:
            raise OSError("the system does not give them")
        torch.ops.load_library(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("the processor's tile units are used by torch alone (%s): slower", _reason(error))
        return False
    return True


def _built(folder: Path) -> Path:
    """The library in this folder; built, in some three seconds, if it is not there for this source and this torch.

    Raises:
        OSError: if the folder cannot be written, or there is no compiler.
        SubprocessError: if the compiler fails or does not end.
    """
    compiler = os.environ.get("CXX", "g++")
    key = "\0".join([SOURCE.read_text(), compiler, *FLAGS, torch.__version__, platform.machine(), sys.platform])
    library = folder / f"tiles-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # Under another name first: a process that is killed, or another one beside, leaves no half of a library.
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / library.name
        root = Path(torch.__file__).parent
        line = [compiler, *FLAGS, SOURCE, "-o", made, f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch_cpu"]
        subprocess.run(line, check=True, capture_output=True, text=True, timeout=120)  # noqa: S603
        made.replace(library)
    return library


def _reason(error: Exception) -> str:
    """Why it failed, in one line: a compiler's first error, else what the system says."""
    said = getattr(error, "stderr", None) or str(error)
    lines = [line for line in said.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
