"""Values of single images that ``vaelab evaluate`` keeps, so that none is measured twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch

from vaelab.evaluate.pieces import Values
from vaelab.runs.checkpoint import load_tensors, save_tensors

FORMAT = 3  # of metrics.json and evaluation.pt


def importance_key(split: str, protocol: str, images_hash: str, num_samples: int, *, bf16: bool) -> str:
    """Under which name the importance sampler's values of rows are kept.

    Args:
        split, protocol, images_hash: of the images as they are scored.
        num_samples: per image.
        bf16: whether products were taken in it.
    """
    return f"{images_key(split, protocol, images_hash)} importance {num_samples} {'bf16' if bf16 else 'fp32'}"


def images_key(split: str, protocol: str, images_hash: str) -> str:
    """Under which name values of these images are kept, before what was done to them."""
    return f"{split} {protocol} {images_hash[:16]}"


def length(values: Values) -> int:
    """Of how many rows all values are there."""
    return min((len(value) for value in values.values()), default=0)


@final
class Kept:
    """Values of rows that were measured, in one file: what is in it need not be measured again.

    Args:
        path: the file.
        weights: hash of the model's weights; values of other weights are dropped.
    """

    def __init__(self, path: Path, weights: str) -> None:
        self._path, self._weights = path, weights
        self._content: dict[str, Any] = {}
        if path.exists():
            content = load_tensors(path)
            if content.get("weights") == weights and content.get("format") == FORMAT:
                self._content = content["values"]

    def get(self, key: str) -> Values:
        """The values under this key; empty if there are none."""
        return {name: value.numpy() for name, value in self._content.get(key, {}).items()}

    def put(self, key: str, values: Values) -> None:
        """Keep these values in place of those under this key."""
        if length(values) <= length(self.get(key)):
            return
        self._content[key] = {name: torch.from_numpy(value) for name, value in values.items()}
        save_tensors(self._path, {"format": FORMAT, "weights": self._weights, "values": self._content})
