"""Priors p(z). One distribution both scores and samples: what is drawn is what was trained against."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.distributions.kl import register_kl  # pyright: ignore[reportUnknownVariableType]

from vaelab import specs
from vaelab.divergences import kl_to_standard_normal
from vaelab.posteriors import NormalPosterior


@final
class StandardNormal(nn.Module):
    """p(z) = N(0, I) over D latents.

    Args:
        spec: the configuration (it has no fields).
        latent_dim: D.
    """

    zeros: Tensor
    ones: Tensor

    def __init__(self, spec: specs.StandardNormal, latent_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("ones", torch.ones(latent_dim), persistent=False)

    def forward(self, encode: Callable[[Tensor], Distribution] | None = None) -> Distribution:
        """The distribution, of event shape (D,). ``encode`` is for priors that are made of posteriors; unused here."""
        return UnitNormal(self.zeros, self.ones)


@final
class UnitNormal(Independent):  # pyright: ignore[reportMissingTypeArgument]
    """N(0, I), told apart by its type, so that its divergence from a diagonal normal is the simplest one."""

    def __init__(self, zeros: Tensor, ones: Tensor) -> None:
        normal = Normal(zeros, ones, validate_args=False)
        super().__init__(normal, 1, validate_args=False)  # pyright: ignore[reportUnknownMemberType]


@register_kl(NormalPosterior, UnitNormal)
def _kl(q: NormalPosterior, p: UnitNormal) -> Tensor:  # pyright: ignore[reportUnusedFunction]
    return kl_to_standard_normal(q.loc, q.log_scale)
