"""Matrix products of a traced step, by whatever makes the most of the processor.

torch gives fp32 products to MKL and bf16 ones to oneDNN. ``onednn`` gives fp32 ones to oneDNN too, where that is
faster; ``tiles`` computes bf16 ones by a function of its own where the processor has tile units (AMX) and the matrices
are of the size of a small network's, for which oneDNN's calls take longer than the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from vaelab.runtime import prefers_onednn
from vaelab.training.products.convolutions import CONVOLUTIONS
from vaelab.training.products.onednn import by_onednn
from vaelab.training.products.tiles import by_tiles, has_tiles

__all__ = ["by_onednn", "by_tiles", "faster_convolutions", "faster_products", "has_tiles"]


def faster_convolutions(device: torch.device) -> dict[Any, Callable[..., Any]]:
    """What ``make_fx`` is to trace in place of convolutions on this machine, so that they are products."""
    return CONVOLUTIONS if has_tiles(device) else {}


def faster_products(graph: GraphModule, device: torch.device) -> None:
    """Let the products of a traced graph be computed in the fastest way on this machine, in place.

    Args:
        graph: as ``make_fx`` traces it.
        device: where it computes; on a GPU nothing is changed.
    """
    if prefers_onednn(device):
        by_onednn(graph)
    if has_tiles(device):
        by_tiles(graph)
