"""The normal posterior whose latents are correlated.

Shapes: K samples, B batch, F features, D latent dimensions.
"""

from __future__ import annotations

from typing import cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from vaelab import specs
from vaelab.posteriors.posterior import Head, LogDensity
from vaelab.runtime import Noise


@final
class FullNormalPosterior(MultivariateNormal):
    r"""A normal with full covariance: :math:`q(z|x) = N(z; \mu, L L^T)`, L lower triangular with a positive diagonal.

    Args:
        loc: (B, D), the mean.
        scale_tril: (B, D, D), the Cholesky factor L.
    """

    penalty: Tensor | None = None

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(loc, scale_tril=scale_tril, validate_args=False)  # pyright: ignore[reportUnknownMemberType]

    @property
    def center(self) -> Tensor:
        """The mean."""
        return self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (*leading) of latents (*leading, D), in nats."""
        with torch.autocast(value.device.type, enabled=False):
            return cast(Tensor, super().log_prob(value))

    def rsample_and_log_prob(
        self, shape: tuple[int, ...], noise: Noise, *, stop: bool = False
    ) -> tuple[Tensor, LogDensity]:
        r"""Reparameterise: :math:`z = \mu + L \epsilon`, :math:`\epsilon \sim N(0, I)` from ``noise``.

        Reference:
            Kingma & Welling (2019), An Introduction to Variational Autoencoders, section 2.5.1.
            https://arxiv.org/abs/1906.02691
        """
        loc, factor = self.loc, self.scale_tril
        size, dim = loc.shape
        eps = noise.normal("z", (size, torch.Size(shape).numel(), dim))
        with torch.autocast(loc.device.type, enabled=False):
            z = (loc[:, None] + eps @ factor.mT).transpose(0, 1).reshape(*shape, size, dim)
        held = FullNormalPosterior(loc.detach(), factor.detach()) if stop else self
        return z, lambda: held.log_prob(z)


@final
class FullNormal(Head[specs.FullNormal]):
    r"""Head of an encoder: a linear map of the features gives :math:`\mu` and L of :math:`q(z|x) = N(z; \mu, L L^T)`.

    L has the exponentials of D of its numbers on the diagonal and D (D - 1) / 2 more below it.
    """

    below: Tensor

    def __init__(self, spec: specs.FullNormal, in_features: int) -> None:
        dim = spec.latent_dim
        super().__init__(spec, dim)
        row, column = torch.tril_indices(dim, dim, offset=-1)
        self.register_buffer("below", row * dim + column, persistent=False)
        self.loc_and_factor = nn.Linear(in_features, 2 * dim + len(row))

    def forward(self, features: Float[Tensor, "B F"]) -> FullNormalPosterior:
        """The posterior of each example."""
        dim = self.latent_dim
        loc, log_diagonal, entries = self.loc_and_factor(features).float().split([dim, dim, len(self.below)], -1)
        lower = entries.new_zeros(entries.shape[0], dim * dim).index_copy(1, self.below, entries)
        return FullNormalPosterior(loc, lower.unflatten(1, (dim, dim)) + torch.diag_embed(log_diagonal.exp()))
