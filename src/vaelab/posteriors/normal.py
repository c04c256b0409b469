"""Normal posteriors.

Shapes: K samples, B batch, F features, D latent dimensions.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from vaelab import specs
from vaelab.posteriors.posterior import Head, LogDensity
from vaelab.runtime import Noise


@final
class NormalPosterior(Independent):  # pyright: ignore[reportMissingTypeArgument]
    r"""A diagonal normal over D latents: :math:`q(z|x) = \prod_d N(z_d; \mu_d, \sigma_d^2)`.

    A ``torch.distributions.Distribution`` with batch shape (B,) and event shape (D,), so ``mean``, ``rsample((50,))``,
    ``log_prob`` and ``kl_divergence`` work as everywhere in torch.
    """

    penalty: Tensor | None = None

    def __init__(self, loc: Tensor, log_scale: Tensor) -> None:
        scale = torch.exp(log_scale)
        normal = Normal(loc, scale, validate_args=False)
        super().__init__(normal, 1, validate_args=False)  # pyright: ignore[reportUnknownMemberType]
        self.loc, self.scale, self.log_scale = loc, scale, log_scale

    @property
    def center(self) -> Tensor:
        """The mean."""
        return self.loc

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalPosterior:
        """The same distribution with more leading dimensions."""
        shape = (*batch_shape, self.loc.shape[-1])
        return NormalPosterior(self.loc.expand(shape), self.log_scale.expand(shape))

    def rsample_and_log_prob(
        self, shape: tuple[int, ...], noise: Noise, *, stop: bool = False
    ) -> tuple[Tensor, LogDensity]:
        r"""Reparameterise: :math:`z = \mu + \sigma \odot \epsilon`, :math:`\epsilon \sim N(0, I)` from ``noise``.

        Reference:
            Kingma & Welling (2014), Auto-Encoding Variational Bayes, section 2.4. https://arxiv.org/abs/1312.6114
        """
        loc, scale = self.loc, self.scale
        # The batch leads in noise (a process gets its rows), the samples lead in z.
        count = math.prod(shape)
        eps = noise.normal("z", (loc.shape[0], count, *loc.shape[1:])).transpose(0, 1)
        z = loc + scale * eps.reshape(*shape, *loc.shape)
        held = NormalPosterior(loc.detach(), self.log_scale.detach()) if stop else self
        return z, lambda: held.log_prob(z)


@final
class DiagonalNormal(Head[specs.DiagonalNormal]):
    r"""Head of an encoder: linear maps of the features give :math:`q(z|x) = \prod_d N(z_d; \mu_d, \sigma_d^2)`.

    Reference:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes, appendix C. https://arxiv.org/abs/1312.6114
    """

    def __init__(self, spec: specs.DiagonalNormal, in_features: int) -> None:
        super().__init__(spec, spec.latent_dim)
        self.loc_and_log_scale = nn.Linear(in_features, 2 * spec.latent_dim)

    def forward(self, features: Float[Tensor, "B F"]) -> NormalPosterior:
        """The posterior of each example."""
        # fp32 from here on: under bf16 the difference of two near scales, and so the KL, would be lost.
        loc, log_scale = self.loc_and_log_scale(features).float().chunk(2, dim=-1)
        return NormalPosterior(loc, log_scale)
