r"""Likelihoods of 8-bit pixels: probability masses over the 256 levels :math:`v/255`.

Their nats are those of a probability, so that ``-log p / (C H W log 2)`` is the customary number of bits a dimension.
``log_prob`` scores the level that is nearest to each pixel: images that augmentation has resampled are thereby brought
to 8 bits, as a file of them would be. Data that are not of 8 bits to begin with are refused (``data.guard``).

Shapes: C H W image, P parameters per channel, M components, V = 256 levels; leading dimensions are free.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torch.nn.functional import logsigmoid, softplus

from vaelab import specs
from vaelab.likelihoods.likelihood import Likelihood, Pixels, Support, by_channel
from vaelab.likelihoods.real import learned_or_fixed
from vaelab.likelihoods.unit import logit_of_mean

STEP = 1 / 255  # from one level to the next
# Of a scale that the network chooses: e^-7 of pixels in [-1, 1]. So narrow a logistic has 97 % of its mass in one bin.
MIN_LOG_SCALE = -7 - math.log(2)


@final
class DiscretizedLogistic(Likelihood[specs.DiscretizedLogistic]):
    r"""Independent 8-bit pixels: the mass that a logistic distribution has in the bin around each level.

    :math:`P(v) = \sigma(\frac{x + \delta - \mu}{s}) - \sigma(\frac{x - \delta - \mu}{s})` with :math:`x = v/255`,
    :math:`\delta = 1/510`; the bin of 0 is open below, that of 255 above. The network gives :math:`2\mu - 1` (pixels
    scaled to [-1, 1]); one scale s serves all pixels.

    Reference:
        Kingma et al. (2016), Improved Variational Inference with Inverse Autoregressive Flow (the likelihood of their
        natural images, appendix). https://arxiv.org/abs/1606.04934
    """

    support: Support = "bytes"
    log_scale: Tensor

    def __init__(self, spec: specs.DiscretizedLogistic, channels: int) -> None:
        super().__init__(spec, channels)
        learned_or_fixed(self, "log_scale", math.log(spec.scale), learn=spec.learn_scale)

    def forward(self, params: Tensor) -> Distribution:
        """The distribution of an image; ``mean`` is the picture to look at."""
        loc = (0.5 + 0.5 * params.float()).unsqueeze(-4)
        return LogisticMixtureImage(torch.zeros_like(loc), loc, self.log_scale.expand_as(loc))

    def start(self, mean: Tensor) -> Tensor:
        """Locations at this mean."""
        return 2 * mean - 1


@final
class LogisticMixture(Likelihood[specs.LogisticMixture]):
    r"""Independent 8-bit channels, each a mixture of M discretized logistics: :math:`\sum_m \pi_m P(v; \mu_m, s_m)`.

    For each channel of each pixel the network gives M logits of the weights, M locations (as :math:`2\mu - 1`) and M
    log-scales, which a softplus keeps above :math:`e^{-7}` of pixels scaled to [-1, 1].

    Note:
        PixelCNN++ shares the weights among a pixel's channels and lets red shift green, and both blue; here channels
        are independent given z, as for every other likelihood, and what they share is left to z.

    Reference:
        Salimans et al. (2017), PixelCNN++, section 2.1. https://arxiv.org/abs/1701.05517
    """

    support: Support = "bytes"

    def __init__(self, spec: specs.LogisticMixture, channels: int) -> None:
        super().__init__(spec, channels)
        self.params_per_channel = 3 * spec.num_components

    def forward(self, params: Tensor) -> Distribution:
        """The distribution of an image; ``mean`` is the picture to look at."""
        count = self.spec.num_components
        logits, loc, raw = by_channel(params, 3, count).unbind(-5)
        # softplus as a bound, where a clamp would leave what is below it without a gradient
        log_scale = MIN_LOG_SCALE + softplus(raw - math.log(2) - MIN_LOG_SCALE)
        return LogisticMixtureImage(logits, 0.5 + 0.5 * loc, log_scale)

    def start(self, mean: Tensor) -> Tensor:
        """Equal weights, all locations at this mean, and scales of 0.1 for pixels in [0, 1]."""
        loc = (2 * mean - 1).expand(self.spec.num_components, *mean.shape).flatten(0, 1)
        return torch.cat([torch.zeros_like(loc), loc, torch.full_like(loc, math.log(0.2))])


@final
class Categorical256(Likelihood[specs.Categorical256]):
    r"""Independent 8-bit channels with a probability for each level: :math:`P(v) = e^{a_v} / \sum_u e^{a_u}`.

    Levels know nothing of their neighbours, and there are 256 parameters a channel: the most flexible, and the dearest.

    Reference:
        van den Oord, Kalchbrenner & Kavukcuoglu (2016), Pixel Recurrent Neural Networks.
        https://arxiv.org/abs/1601.06759
    """

    params_per_channel = 256
    support: Support = "bytes"

    def forward(self, params: Tensor) -> Distribution:
        """The distribution of an image; ``mean`` is the picture to look at."""
        return CategoricalImage(by_channel(params, self.params_per_channel))

    def start(self, mean: Tensor) -> Tensor:
        """Logits linear in the level, of the slope that gives about this mean."""
        return (logit_of_mean(mean) * _levels(mean)).flatten(0, 1)


@final
class LogisticMixtureImage(Pixels):
    r"""The distribution of an image of 8-bit pixels, each a mixture of M discretized logistics.

    The mass of a bin is never taken as a difference of two sigmoids, which fp32 loses far from the mode and for scales
    much wider than a bin: :math:`\sigma(b) - \sigma(a) = \sigma(b)\, \sigma(-a)\, (1 - e^{a - b})` is a product, and
    :math:`b - a = 1/255 s` does not depend on the pixel.

    Args:
        logits: (*leading, M, C, H, W), of the weights, up to a constant for each channel of each pixel.
        loc, log_scale: (*leading, M, C, H, W), for pixels in [0, 1].
    """

    own = 4

    def __init__(self, logits: Tensor, loc: Tensor, log_scale: Tensor) -> None:
        super().__init__(logits, loc, log_scale)
        self.log_weights, self.loc, self.log_scale = logits.log_softmax(-4), loc, log_scale

    def log_prob_of_pixels(self, value: Tensor) -> Tensor:
        """Log-masses (*leading, C, H, W) of the nearest levels, in nats."""
        level = (value * 255).round().unsqueeze(-4)
        precision = torch.exp(-self.log_scale)
        centred = level * STEP - self.loc
        below = logsigmoid((centred + STEP / 2) * precision)  # of being below the bin's upper edge
        above = logsigmoid((STEP / 2 - centred) * precision)
        width = torch.log(-torch.expm1(-STEP * precision))
        # The first bin has no lower edge and the last no upper one.
        log_mass = torch.where(level < 255, below, 0) + torch.where(level > 0, above, 0)
        log_mass = log_mass + torch.where((level > 0) & (level < 255), width, 0)
        return torch.logsumexp(self.log_weights + log_mass, -4)

    @property
    def mean(self) -> Tensor:
        r"""(*leading, C, H, W): of the logistics clipped to [0, 1], before they are rounded to levels.

        :math:`\int_0^1 \sigma(\frac{\mu - t}{s})\, dt = s\, [\zeta(\frac\mu s) - \zeta(\frac{\mu - 1}{s})]`, with
        :math:`\zeta` the softplus. The mean over levels is this integral's midpoint rule of 255 steps: the two differ
        by at most half a level (1/510), and by less than 1/20,000 where s is a level or more.
        """
        width = torch.exp(-self.log_scale)
        scale, u = self.log_scale.exp(), self.loc * width
        # The difference of two softplus loses all digits under a wide logistic; the other form does under a narrow one.
        narrow = scale * (softplus(u) - softplus(u - width))
        wide = -scale * torch.log1p(torch.sigmoid(u) * torch.expm1(-width.clamp(max=1)))
        return (self.log_weights.exp() * torch.where(width < 1, wide, narrow)).sum(-4)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, *leading, C, H, W), levels / 255, by torch's global generator."""
        with torch.no_grad():
            weights = Categorical(logits=self.log_weights.movedim(-4, -1), validate_args=False)
            component = weights.sample(sample_shape).unsqueeze(-4)
            loc, log_scale = _chosen(self.loc, component), _chosen(self.log_scale, component)
            # A logistic, rounded: the bin around a level is what is rounded to it.
            x = loc + log_scale.exp() * torch.logit(self.uniform(sample_shape))
            return (x * 255).round().clamp(0, 255) / 255


@final
class CategoricalImage(Pixels):
    """The distribution of an image of 8-bit pixels, from a logit for each level (*leading, V, C, H, W)."""

    own = 4

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits)
        self.logits = logits

    def log_prob_of_pixels(self, value: Tensor) -> Tensor:
        """Log-masses (*leading, C, H, W) of the nearest levels, in nats."""
        normaliser = self.logits.logsumexp(-4)
        level = _broadcast((value * 255).round().long(), normaliser)
        return _chosen(self.logits, level.unsqueeze(-4)) - normaliser

    @property
    def mean(self) -> Tensor:
        """(*leading, C, H, W)."""
        return (self.logits.softmax(-4) * _levels(self.logits)).sum(-4)

    @property
    def variance(self) -> Tensor:
        """(*leading, C, H, W)."""
        deviation = _levels(self.logits) - self.mean.unsqueeze(-4)
        return (self.logits.softmax(-4) * deviation.square()).sum(-4)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw (*sample_shape, *leading, C, H, W), levels / 255, by torch's global generator."""
        with torch.no_grad():
            levels = Categorical(logits=self.logits.movedim(-4, -1), validate_args=False)
            return levels.sample(sample_shape).to(self.logits) / 255


def _levels(like: Tensor) -> Tensor:
    """(V, 1, 1, 1), the levels in [0, 1]."""
    return torch.linspace(0, 1, 256, dtype=like.dtype, device=like.device)[:, None, None, None]


def _chosen(of: Tensor, index: Tensor) -> Tensor:
    """Of (*leading, N, C, H, W) the entries at ``index`` (*more, *leading, 1, C, H, W), without that axis."""
    return of.expand(*index.shape[:-4], *of.shape[-4:]).gather(-4, index).squeeze(-4)


def _broadcast(a: Tensor, b: Tensor) -> Tensor:
    """The first tensor in the shape that the two have together."""
    return torch.broadcast_tensors(a, b)[0]  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
