"""The training images closest to given ones: whether a model repeats what it has seen.

Shapes: N images, K neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaelab.data.datasets import Split


def nearest_images(images: Tensor, split: Split, count: int = 1) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    r"""Find the closest images of a split, by :math:`\lVert x - x' \rVert_2` over pixels in [0, 1].

    Means of p(x|z) are smooth, and so closer to any image than a sharp one is: compare their distances with those of
    other smooth pictures, such as reconstructions of held-out images, and not with those of images.

    Args:
        images: (N, C, H, W) in [0, 1].
        split: where to look; all of it is read once.
        count: K, at most the size of the split.

    Returns:
        The rows of each image's closest (N, K), the closest first, and their distances (N, K).

    Reference:
        Theis, van den Oord & Bethge (2016), A Note on the Evaluation of Generative Models, section 4.
        https://arxiv.org/abs/1511.01844
    """
    count = min(count, len(split))
    flat = images.flatten(1).to(split.device)
    best = flat.new_full((len(flat), 0), 0.0)
    rows = torch.zeros((len(flat), 0), dtype=torch.long, device=split.device)
    start = 0
    for piece in split.pieces():
        # Not by a matrix product, in whose rounding a copy is at some hundredths and not at 0.
        found = torch.cdist(flat, piece.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        at = torch.arange(start, start + len(piece), device=split.device).expand(len(flat), -1)
        best, kept = torch.topk(torch.cat([best, found], 1), min(count, best.shape[1] + len(piece)), largest=False)
        rows = torch.cat([rows, at], 1).gather(1, kept)
        start += len(piece)
    return rows.cpu().numpy(), best.cpu().double().numpy()
