"""What an objective remembers of each training image from one epoch to the next.

Shapes: B batch, D latent dimensions, R the highest row number that has been seen, and one.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn


@final
class Chains(nn.Module):
    """A Markov chain's state for each image, and the step size of all; kept in checkpoints.

    Args:
        latent_dim: D.
    """

    z: Tensor  # (R, D); NaN for images that have not come yet
    log_eps: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.register_buffer("z", torch.empty(0, latent_dim))
        self.register_buffer("log_eps", torch.tensor(-2.0))
        self.register_load_state_dict_pre_hook(_make_room)  # pyright: ignore[reportUnknownMemberType]

    def of(self, index: Tensor | None, start: Tensor) -> Tensor:
        """Where the chains of these images are, (B, D): those of ``start`` for images without one.

        Args:
            index: the images' rows in the data; None: nothing is known of them, and nothing is kept.
            start: (B, D).
        """
        if index is None:
            return start
        missing = int(index.max()) + 1 - len(self.z)
        if missing > 0:
            self.z = torch.cat([self.z, self.z.new_full((missing, self.z.shape[1]), torch.nan)])
        z = self.z[index]
        return torch.where(z.isnan(), start, z)

    def keep(self, index: Tensor | None, z: Tensor) -> None:
        """Remember where the chains of these images are."""
        if index is not None:
            self.z[index] = z


def _make_room(chains: Chains, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    chains.z = torch.empty_like(state[f"{prefix}z"], device=chains.z.device)
