"""One-hot latents.

Shapes: K samples, B batch, F features, S sites, M classes, D = S M latent dimensions.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vaelab import specs
from vaelab.distribution import Unchecked
from vaelab.posteriors.posterior import Head, LogDensity, Space
from vaelab.runtime import Noise


@final
class CategoricalPosterior(Unchecked):
    r"""S independent one-hot vectors of M classes, flat: :math:`q(z|x) = \prod_s \prod_m \pi_{sm}^{z_{sm}}`.

    A draw is always one-hot, so log-masses, bounds and the KL are those of the discrete model.

    Args:
        logits: (B, S, M), up to a constant of each site.
        temperature: of the softmax whose gradient stands for that of a draw.
    """

    has_rsample = True
    penalty: Tensor | None = None

    def __init__(self, logits: Tensor, temperature: float) -> None:
        *batch, sites, classes = logits.shape
        super().__init__(torch.Size(batch), torch.Size([sites * classes]))
        self.log_pi = logits.log_softmax(-1)
        self.temperature = temperature

    @property
    def mean(self) -> Tensor:
        """The probabilities (B, D)."""
        return self.log_pi.exp().flatten(-2)

    @property
    def variance(self) -> Tensor:
        """(B, D)."""
        return self.mean * (1 - self.mean)

    @property
    def center(self) -> Tensor:
        """The most likely class of each site, one-hot (B, D)."""
        return one_hot(self.log_pi).flatten(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass (*leading) of one-hot latents (*leading, D), in nats."""
        return _log_mass(value, self.log_pi)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, B, D) by torch's global generator."""
        uniform = torch.rand(*sample_shape, *self.log_pi.shape, device=self.log_pi.device)
        return self._draw(uniform)

    def rsample_and_log_prob(
        self, shape: tuple[int, ...], noise: Noise, *, stop: bool = False
    ) -> tuple[Tensor, LogDensity]:
        r"""Draw by the Gumbel-max trick; the gradient is that of the softmax in place of the maximum.

        :math:`z = \mathrm{onehot} \arg\max_m (\log \pi_m + g_m)`, :math:`g = -\log(-\log u)` with u uniform, is an
        exact draw. Backwards z counts as :math:`\mathrm{softmax}((\log \pi + g) / \tau)`.

        Note:
            This is the straight-through form: biased gradients, exact bounds. The papers' relaxed z, no longer one-hot,
            would need the density of the relaxed distribution, and bounds nothing of the discrete model.

        Reference:
            Jang, Gu & Poole (2017), Categorical Reparameterization with Gumbel-Softmax, sections 2.1, 2.2.
            https://arxiv.org/abs/1611.01144
            Maddison, Mnih & Teh (2017), The Concrete Distribution, section 3. https://arxiv.org/abs/1611.00712
        """
        batch, *rest = self.log_pi.shape
        # The batch leads in noise (a process gets its rows), the samples lead in z.
        uniform = noise.uniform("z", (batch, math.prod(shape), *rest)).transpose(0, 1)
        z = self._draw(uniform.reshape(*shape, *self.log_pi.shape))
        log_pi = self.log_pi.detach() if stop else self.log_pi
        return z, lambda: _log_mass(z, log_pi)

    def _draw(self, uniform: Tensor) -> Tensor:
        gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(uniform.dtype).tiny)))
        perturbed = self.log_pi + gumbel
        soft = torch.softmax(perturbed / self.temperature, -1)
        # In these brackets: hard + soft - soft would be off by a rounding.
        return (one_hot(perturbed) + (soft - soft.detach())).flatten(-2)


@final
class GumbelSoftmax(Head[specs.GumbelSoftmax]):
    r"""Head of an encoder: a linear map of the features gives the logits of every site.

    Reference:
        Jang, Gu & Poole (2017), Categorical Reparameterization with Gumbel-Softmax. https://arxiv.org/abs/1611.01144
    """

    space: Space = "categories"

    def __init__(self, spec: specs.GumbelSoftmax, in_features: int) -> None:
        super().__init__(spec, spec.sites * spec.classes)
        self.logits = nn.Linear(in_features, self.latent_dim)

    def forward(self, features: Float[Tensor, "B F"]) -> CategoricalPosterior:
        """The posterior of each example."""
        logits = self.logits(features).float().reshape(-1, self.spec.sites, self.spec.classes)
        return CategoricalPosterior(logits, self.spec.temperature)


def one_hot(scores: Tensor) -> Tensor:
    """1 at the greatest of the last axis, the first of equal ones, 0 elsewhere."""
    best = scores.detach().argmax(-1, keepdim=True)
    return (best == torch.arange(scores.shape[-1], device=scores.device)).to(scores.dtype)


def _log_mass(z: Tensor, log_pi: Tensor) -> Tensor:
    return (z * log_pi.flatten(-2)).sum(-1)
