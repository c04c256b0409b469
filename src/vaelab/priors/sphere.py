"""The uniform prior on the unit sphere."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.kl import register_kl  # pyright: ignore[reportUnknownVariableType]
from torch.nn.functional import normalize

from vaelab import specs
from vaelab.distribution import Unchecked
from vaelab.posteriors import Head, Space
from vaelab.posteriors.sphere import VonMisesFisherPosterior, log_area
from vaelab.priors.prior import Encode, Prior
from vaelab.runtime import Noise
from vaelab.specs import Shape


@final
class UniformOnSphere(Unchecked):
    r"""The uniform law on the unit sphere in R^D: :math:`\log p(z) = -\log |S^{D-1}|`, with respect to its area.

    Args:
        zeros: (D,), which tell D and the device.
    """

    def __init__(self, zeros: Tensor) -> None:
        super().__init__(torch.Size(), zeros.shape)
        self.zeros = zeros

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (*leading) of unit vectors (*leading, D), in nats: the same for all."""
        return value.new_full(value.shape[:-1], -log_area(len(self.zeros)))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, D) by torch's global generator."""
        return normalize(torch.randn(self._extended_shape(sample_shape), device=self.zeros.device), dim=-1)

    def rsample_from(self, noise: Noise, count: int) -> Tensor:
        """Draw (count, D): directions of normal vectors."""
        return normalize(noise.normal("prior", (count, *self.event_shape)), dim=-1)


@final
class UniformSphere(Prior[specs.UniformSphere]):
    r"""The uniform prior on the unit sphere in R^D, :math:`p(z) = 1 / |S^{D-1}|`.

    Reference:
        Davidson et al. (2018), Hyperspherical Variational Auto-Encoders. https://arxiv.org/abs/1804.00891
    """

    space: Space = "sphere"
    zeros: Tensor

    def __init__(self, spec: specs.UniformSphere, head: Head[Any], shape: Shape) -> None:
        super().__init__(spec, head, shape)
        self.register_buffer("zeros", torch.zeros(head.latent_dim), persistent=False)

    def forward(self, encode: Encode | None = None, codebook: Tensor | None = None) -> Distribution:
        """The distribution, of event shape (D,)."""
        return UniformOnSphere(self.zeros)


@register_kl(VonMisesFisherPosterior, UniformOnSphere)
def _kl(q: VonMisesFisherPosterior, p: UniformOnSphere) -> Tensor:  # pyright: ignore[reportUnusedFunction]
    return q.kl_to_uniform()
