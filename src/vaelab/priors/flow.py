"""A prior that a normalising flow makes of the standard normal.

Shapes: D latent dimensions; leading dimensions are free.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Distribution

from vaelab import specs
from vaelab.distribution import Unchecked
from vaelab.flows import MaskedFlow
from vaelab.posteriors import Head
from vaelab.priors.prior import Encode, StandardisedPrior
from vaelab.runtime import Noise
from vaelab.specs import Shape


@final
class FlowDistribution(Unchecked):
    r"""The law of a z whose image under a flow f is standard normal: :math:`p(z) = N(f(z); 0, I)\, |\det \partial f|`.

    Here f is a network of the standardised z, (z - loc) / scale. Scoring is the fast direction; a sample is mapped
    back. Neither mean nor variance is known.

    Args:
        flow: the network.
        loc, scale: (D,).
    """

    def __init__(self, flow: MaskedFlow, loc: Tensor, scale: Tensor) -> None:
        super().__init__(torch.Size(), loc.shape)
        self.flow, self.loc, self.scale = flow, loc, scale

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (*leading) of latents (*leading, D), in nats."""
        image, log_det = self.flow((value - self.loc) / self.scale)
        return -0.5 * (image.square() + math.log(2 * math.pi)).sum(-1) + log_det - self.scale.log().sum()

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, D) by torch's global generator."""
        with torch.no_grad():
            return self._mapped_back(torch.randn(self._extended_shape(sample_shape), device=self.loc.device))

    def rsample_from(self, noise: Noise, count: int) -> Tensor:
        """Draw (count, D), differentiably: standard normal numbers, mapped back."""
        return self._mapped_back(noise.normal("prior", (count, *self.event_shape)))

    def _mapped_back(self, eps: Tensor) -> Tensor:
        return self.loc + self.scale * self.flow(eps, inverse=True)[0]


@final
class FlowPrior(StandardisedPrior[specs.FlowPrior]):
    r"""A learned flow f over the latents, :math:`p(z) = N(f(z); 0, I)\, |\det \partial f|`.

    Latents are standardised by ``loc`` and ``scale`` first: 0 and 1, but for a flow that is fitted to latents after
    the training of a model, whose scale may be any.

    Reference:
        Chen et al. (2017), Variational Lossy Autoencoder, section 3.2 (an autoregressive flow as the prior).
        https://arxiv.org/abs/1611.02731
    """

    def __init__(self, spec: specs.FlowPrior, head: Head[Any], shape: Shape) -> None:
        super().__init__(spec, head, shape)
        self.flow = MaskedFlow(head.latent_dim, 0, spec.num_transforms, spec.hidden_dims, spec.flow_kind)

    def forward(self, encode: Encode | None = None, codebook: Tensor | None = None) -> Distribution:
        """The distribution, of event shape (D,)."""
        return FlowDistribution(self.flow, self.loc, self.scale)
