"""Likelihoods of pixels in the unit interval.

Shapes: C H W image, P parameters per channel; leading dimensions are free.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Distribution

from vaelab import specs
from vaelab.likelihoods.likelihood import Likelihood, Pixels, Support


@final
class ContinuousBernoulli(Likelihood[specs.ContinuousBernoulli]):
    r"""Independent pixels in [0, 1], from logits :math:`a`: :math:`p(x|z) = \prod_i e^{a_i x_i} a_i / (e^{a_i} - 1)`.

    The Bernoulli's formula divided by its integral over [0, 1]: what a cross-entropy on grey pixels leaves out.
    ``mean`` is the distribution's own, :math:`\frac12 + \frac12 (\coth \frac a2 - \frac 2a)`, not the logit's sigmoid.

    Reference:
        Loaiza-Ganem & Cunningham (2019), The continuous Bernoulli. https://arxiv.org/abs/1907.06845
    """

    support: Support = "unit"

    def forward(self, params: Tensor) -> Distribution:
        """The distribution of an image; ``mean`` is the picture to look at."""
        return ContinuousBernoulliImage(params.float())

    def start(self, mean: Tensor) -> Tensor:
        """The logits of this mean."""
        return logit_of_mean(mean)


@final
class ContinuousBernoulliImage(Pixels):
    """The distribution of an image of independent continuous Bernoulli pixels, from their logits (*leading, C, H, W).

    ``torch.distributions.ContinuousBernoulli`` goes through probabilities, which fp32 cannot tell from 0 or 1 beyond a
    logit of 16 (from there on its mean is 0.94), and loses four digits beside a logit of 0. Here all is a function of
    the logit.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits)
        self.logits = logits

    def log_prob_of_pixels(self, value: Tensor) -> Tensor:
        r"""Log-density :math:`a (x - \frac12) - \log \frac{\sinh (a/2)}{a/2}` of each pixel, in nats."""
        return self.logits * (value - 0.5) - log_sinhc(self.logits / 2)

    @property
    def mean(self) -> Tensor:
        """(*leading, C, H, W)."""
        return 0.5 + 0.5 * langevin(self.logits / 2)

    @property
    def variance(self) -> Tensor:
        r"""(*leading, C, H, W): :math:`\frac14 (h^{-2} - \sinh^{-2} h)` with :math:`h = a/2`."""
        h = self.logits / 2
        small, far = _near_zero(h)
        series = _polynomial(h.square(), (1 / 3, -1 / 15, 2 / 189, -1 / 675, 2 / 10395))
        return 0.25 * torch.where(small, series, far.square().reciprocal() - far.sinh().square().reciprocal())

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, *leading, C, H, W) by torch's global generator, through the inverse of the CDF."""
        with torch.no_grad():
            # Of the density that falls from 0, whose inverse is exact for any slope but 0; mirrored where it rises.
            slope = self.logits.abs().clamp(min=1e-6)
            falling = -torch.log1p(self.uniform(sample_shape) * torch.expm1(-slope)) / slope
            return torch.where(self.logits > 0, 1 - falling, falling).clamp(0, 1)


def log_sinhc(h: Tensor) -> Tensor:
    r"""Compute :math:`\log (\sinh h / h)`, to rounding for any h: near 0 by its series."""
    small, far = _near_zero(h)
    far = far.abs()
    series = h.square() * _polynomial(h.square(), (1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775))
    return torch.where(small, series, far + torch.log(-torch.expm1(-2 * far)) - torch.log(2 * far))


def langevin(h: Tensor) -> Tensor:
    r"""Compute Langevin's function :math:`\coth h - 1/h`, the derivative of ``log_sinhc``, to rounding for any h."""
    small, far = _near_zero(h)
    series = h * _polynomial(h.square(), (1 / 3, -1 / 45, 2 / 945, -1 / 4725, 2 / 93555))
    return torch.where(small, series, far.tanh().reciprocal() - far.reciprocal())


def logit_of_mean(mean: Tensor) -> Tensor:
    """The logit at which a continuous Bernoulli has this mean, by bisection.

    Args:
        mean: between 0.001 and 0.999.
    """
    low, high = torch.full_like(mean, -1100.0), torch.full_like(mean, 1100.0)
    for _ in range(40):
        middle = (low + high) / 2
        below = 0.5 + 0.5 * langevin(middle / 2) < mean
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _near_zero(h: Tensor) -> tuple[Tensor, Tensor]:
    """Where the series holds (five terms are exact to 1e-9 there), and h with another value there.

    Of two branches of a ``where`` both are differentiated: the one not taken must be finite, too.
    """
    small = h.abs() < 0.5
    return small, torch.where(small, 1.0, h)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's scheme, the constant first."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total
