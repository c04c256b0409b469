"""Scoring a few images at a time: what takes long can be shown, kept and gone on with, and fills every core.

Shapes: B images of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vaelab.errors import FailureError
from vaelab.evaluate.estimate import evaluating
from vaelab.models import VAE
from vaelab.runtime import eval_mode, threads

Values = dict[str, NDArray[np.float64]]
"""Values of some images by name, each (B,)."""

Rows = tuple[slice, Values]
"""Which images, and their values."""


def in_pieces(model: VAE, pieces: list[slice], score: Callable[[slice], Values], workers: int = 1) -> Iterator[Rows]:
    """Score pieces in order, with the model in evaluation mode meanwhile.

    Args:
        model: what ``score`` measures.
        pieces: which images each.
        score: the values of a piece. With several workers it is called from their threads: it draws no number from
            torch's global generator, and leaves the model's mode alone.
        workers: threads that score pieces side by side on a CPU. Each has one thread for its products: a core to each
            piece beats all cores on one small product.
    """
    with eval_mode(model), model.fixed_prior(), threads(1 if workers > 1 else None):
        if workers == 1:
            yield from ((piece, score(piece)) for piece in pieces)
            return
        pool = ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1))
        try:
            yield from zip(pieces, pool.map(score, pieces), strict=True)
        finally:  # pieces that no worker has begun are given up: a caller may stop early
            pool.shutdown(cancel_futures=True)


def join(rows: Iterable[Rows]) -> Values:
    """The values of all rows, of those of pieces in order; empty if there are none."""
    parts = [values for _, values in rows]
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def not_finite(what: str, row: int, where: str) -> FailureError:
    """The error to raise where ``what`` of image ``row`` is NaN or infinite; ``where`` says of which images."""
    return FailureError(
        f"{what} of image {row} {where} is not finite: the weights of this model are broken, or its pixels are out of "
        "range"
    )


def decode_bytes(model: VAE) -> int:
    """Bytes of activations that decoding one latent vector and scoring its image takes, measured on the networks."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, Tensor) else 0

    leaves = [module for module in model.decoder.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    try:
        with evaluating(model):
            model.decoder(torch.zeros(1, model.latent_dim, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return 4 * (total + 2 * math.prod(model.shape))
