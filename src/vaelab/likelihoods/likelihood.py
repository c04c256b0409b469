"""Likelihoods p(x|z): from a decoder's output to a distribution over images.

Every likelihood states how many parameters it needs per channel, which data it is a density or mass function of, and
returns a distribution whose event is the whole image, so that ``log_prob`` is in nats per image.

Shapes: C H W image, P parameters per channel; leading dimensions are free.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor
from torch.distributions import Distribution

Support = Literal["binary", "real"]  # pixels in {0, 1}; pixels on the real line


class Likelihood(Protocol):
    """What a VAE needs of a likelihood."""

    params_per_channel: int
    support: Support

    def __call__(self, params: Tensor) -> Distribution:
        """Map (*leading, P*C, H, W) to a distribution of event shape (C, H, W)."""
        ...

    def is_density(self, *, binary_data: bool) -> bool:
        """Whether ``log_prob`` of such data is the log of a normalised mass or density."""
        ...
