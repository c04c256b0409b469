"""What vaelab's own distributions have in common.

Shapes: D latent dimensions; leading dimensions are free.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints


class NoDensityError(NotImplementedError, TypeError):
    """A log-density was asked of a distribution that has none.

    ``NotImplementedError`` is what torch's distributions raise, ``TypeError`` what vaelab's functions do where a number
    is undefined for a model: whoever expects either is told in the same words.
    """


class Unchecked(Distribution, ABC):
    """A distribution whose parameters and values are checked where they are made or loaded, not at each use.

    Args:
        batch_shape, event_shape: as torch's.
    """

    def __init__(self, batch_shape: Sequence[int], event_shape: Sequence[int]) -> None:
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)  # pyright: ignore[reportUnknownMemberType]

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """None."""
        return {}


class PointMass(Unchecked, ABC):
    """All mass on one vector.

    Args:
        loc: (*leading, D).
    """

    has_rsample = True

    def __init__(self, loc: Tensor) -> None:
        super().__init__(loc.shape[:-1], loc.shape[-1:])
        self.loc = loc

    @property
    def mean(self) -> Tensor:
        """The vector."""
        return self.loc

    @property
    def center(self) -> Tensor:
        """The vector."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """0."""
        return torch.zeros_like(self.loc)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """The vector, repeated."""
        return self.loc.expand(*sample_shape, *self.loc.shape)
