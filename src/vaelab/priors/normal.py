"""The standard normal prior."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.distributions.kl import register_kl  # pyright: ignore[reportUnknownVariableType]

from vaelab import specs
from vaelab.divergences import kl_to_standard_normal
from vaelab.posteriors import FullNormalPosterior, Head, NormalPosterior
from vaelab.priors.prior import Encode, Prior
from vaelab.runtime import Noise
from vaelab.specs import Shape


@final
class StandardNormal(Prior[specs.StandardNormal]):
    r""":math:`p(z) = N(z; 0, I)` over D latents.

    Reference:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes, section 3. https://arxiv.org/abs/1312.6114
    """

    zeros: Tensor
    ones: Tensor

    def __init__(self, spec: specs.StandardNormal, head: Head[Any], shape: Shape) -> None:
        super().__init__(spec, head, shape)
        self.register_buffer("zeros", torch.zeros(head.latent_dim), persistent=False)
        self.register_buffer("ones", torch.ones(head.latent_dim), persistent=False)

    def forward(self, encode: Encode | None = None, codebook: Tensor | None = None) -> Distribution:
        """The distribution, of event shape (D,)."""
        return UnitNormal(self.zeros, self.ones)


@final
class UnitNormal(Independent):  # pyright: ignore[reportMissingTypeArgument]
    """N(0, I), told apart by its type, so that its divergence from a diagonal normal is the simplest one."""

    def __init__(self, zeros: Tensor, ones: Tensor) -> None:
        normal = Normal(zeros, ones, validate_args=False)
        super().__init__(normal, 1, validate_args=False)  # pyright: ignore[reportUnknownMemberType]

    def rsample_from(self, noise: Noise, count: int) -> Tensor:
        """Standard normal numbers (count, D)."""
        return noise.normal("prior", (count, *self.event_shape))


@register_kl(NormalPosterior, UnitNormal)
def _kl(q: NormalPosterior, p: UnitNormal) -> Tensor:  # pyright: ignore[reportUnusedFunction]
    return kl_to_standard_normal(q.loc, q.log_scale)


@register_kl(FullNormalPosterior, UnitNormal)
def _kl_full(q: FullNormalPosterior, p: UnitNormal) -> Tensor:  # pyright: ignore[reportUnusedFunction]
    factor = q.scale_tril
    log_scale = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    # The trace of L L^T is the sum of the squares of all entries of L.
    return 0.5 * (q.loc.square().sum(-1) + factor.square().sum((-2, -1)) - q.loc.shape[-1]) - log_scale
