"""Likelihoods of real-valued pixels.

All are densities: their nats depend on the unit of a pixel, which is such that it lies in [0, 1], and can be negative
as distortions. On pixels that take few values they grow without bound as the scale shrinks.

Shapes: K samples, B batch, C H W image, P parameters per channel; leading dimensions are free.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.distributions import Laplace as TorchLaplace

from vaelab import specs
from vaelab.likelihoods.likelihood import Likelihood, Support, by_channel


@final
class Gaussian(Likelihood[specs.Gaussian]):
    r"""Normal pixels with one sigma: :math:`\log p = -\sum_i [(x_i - m_i)^2 / 2\sigma^2 + \log \sigma \sqrt{2\pi}]`.

    The mean is a sigmoid of the decoder's output, as pixels lie in [0, 1]. A learned sigma balances distortion against
    rate by itself, so that no weight on the KL has to be tuned.

    Reference:
        Rybkin, Daniilidis & Levine (2021), Simple and Effective VAE Training with Calibrated Decoders, section 3.
        https://arxiv.org/abs/2006.13202
    """

    support: Support = "real"
    log_sigma: Tensor

    def __init__(self, spec: specs.Gaussian, channels: int) -> None:
        super().__init__(spec, channels)
        learned_or_fixed(self, "log_sigma", math.log(spec.sigma), learn=spec.learn_sigma)

    def forward(self, params: Tensor) -> Distribution:
        """The distribution of an image; ``mean`` is the picture to look at."""
        mean = torch.sigmoid(params.float())
        return Independent(Normal(mean, self.log_sigma.exp(), validate_args=False), 3, validate_args=False)


@final
class OptimalGaussian(Likelihood[specs.OptimalGaussian]):
    r"""Normal pixels with one sigma, the best one: :math:`\sigma^2` is the mean squared error of the training batch.

    In ``train`` mode, ``log_prob`` of images first sets sigma to the root of their mean squared error, over all
    samples, pixels and channels, without a gradient; in ``eval`` mode it takes the sigma that was set last, as batch
    norm does with its running means. Until one was set it is 1. By the envelope theorem nothing is lost without the
    gradient: the profile likelihood :math:`\max_\sigma \log p = -\frac{D}{2} (\log 2\pi e\, \mathrm{MSE})`, a mean over
    images of D numbers, has the same.

    Note:
        Sigma stays above 1/1000, a quarter of the step between 8-bit levels, so that a perfect reconstruction has a
        finite loss. In ``train`` mode the score of an image depends on those beside it; several processes each take the
        error of their own images. With several samples the error is their plain mean, which maximises the ELBO, not an
        importance-weighted bound.

    Reference:
        Rybkin, Daniilidis & Levine (2021), Simple and Effective VAE Training with Calibrated Decoders
        (the optimal sigma-VAE). https://arxiv.org/abs/2006.13202
    """

    support: Support = "real"
    log_sigma: Tensor

    def __init__(self, spec: specs.OptimalGaussian, channels: int) -> None:
        super().__init__(spec, channels)
        self.register_buffer("log_sigma", torch.tensor(0.0))

    def forward(self, params: Tensor) -> Distribution:
        """The distribution of an image; ``mean`` is the picture to look at."""
        return OptimalNormalImage(torch.sigmoid(params.float()), self.log_sigma, fits=self.training)


@final
class OptimalNormalImage(Independent):  # pyright: ignore[reportMissingTypeArgument]
    """The distribution of an image of normal pixels whose one sigma may be set by the images that it scores.

    Args:
        mean: (*leading, C, H, W).
        log_sigma: a scalar; a buffer that is written to, if ``fits``.
        fits: whether ``log_prob`` sets sigma first.
    """

    def __init__(self, mean: Tensor, log_sigma: Tensor, *, fits: bool) -> None:
        pixels = Normal(mean, log_sigma.exp(), validate_args=False)
        super().__init__(pixels, 3, validate_args=False)  # pyright: ignore[reportUnknownMemberType]
        self._log_sigma, self._fits = log_sigma, fits

    def expand(self, batch_shape: Any, _instance: Any = None) -> OptimalNormalImage:
        """The same distribution with more leading dimensions."""
        return OptimalNormalImage(self.mean.expand(*batch_shape, *self.event_shape), self._log_sigma, fits=self._fits)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (*leading) of images (*leading, C, H, W) or of any shape that broadcasts, in nats."""
        if not self._fits:
            return super().log_prob(value)
        with torch.no_grad():
            mse = (value - self.mean).square().mean()
            self._log_sigma.copy_(0.5 * torch.log(mse.clamp(min=1e-6)))
        fitted = Normal(self.mean, self._log_sigma.exp(), validate_args=False)
        return fitted.log_prob(value).sum((-3, -2, -1))


@final
class PixelGaussian(Likelihood[specs.PixelGaussian]):
    r"""Normal pixels, a sigma each: :math:`\log p = -\sum_i [(x_i - m_i)^2 / 2\sigma_i^2 + \log \sigma_i \sqrt{2\pi}]`.

    The decoder gives, for each channel of each pixel, the logit of the mean and r, of which
    :math:`\sigma = \sigma_{\min} + e^r`, a soft bound. Without it pixels that hardly vary (a background) would have a
    sigma of 0 and a density without bound; with it, the bound decides what they are worth.

    Reference:
        Kingma & Welling (2014), appendix C.2. https://arxiv.org/abs/1312.6114
        Rybkin, Daniilidis & Levine (2021), section 3 (why it needs a bound). https://arxiv.org/abs/2006.13202
    """

    params_per_channel = 2
    support: Support = "real"

    def forward(self, params: Tensor) -> Distribution:
        """The distribution of an image; ``mean`` is the picture to look at."""
        logit, raw = by_channel(params, 2).unbind(-4)
        sigma = self.spec.min_sigma + torch.exp(raw)
        return Independent(Normal(torch.sigmoid(logit), sigma, validate_args=False), 3, validate_args=False)

    def start(self, mean: Tensor) -> Tensor:
        """The logits of this mean, and sigmas of 0.3 above the bound."""
        return torch.cat([mean.logit(), torch.full_like(mean, math.log(0.3))])


@final
class Laplace(Likelihood[specs.Laplace]):
    r"""Laplace pixels with one scale b: :math:`\log p = -\sum_i [|x_i - m_i| / b + \log 2b]`.

    The absolute error, as a likelihood: less is paid for a few pixels that are far off, and edges come out sharper. The
    mean is a sigmoid of the decoder's output, as pixels lie in [0, 1].

    Reference:
        Laplace (1774), Mémoire sur la probabilité des causes par les événements (his first law of errors).
    """

    support: Support = "real"
    log_scale: Tensor

    def __init__(self, spec: specs.Laplace, channels: int) -> None:
        super().__init__(spec, channels)
        learned_or_fixed(self, "log_scale", math.log(spec.scale), learn=spec.learn_scale)

    def forward(self, params: Tensor) -> Distribution:
        """The distribution of an image; ``mean`` is the picture to look at."""
        mean = torch.sigmoid(params.float())
        return Independent(TorchLaplace(mean, self.log_scale.exp(), validate_args=False), 3, validate_args=False)


def learned_or_fixed(part: nn.Module, name: str, value: float, *, learn: bool) -> None:
    """Give a part a scalar: a parameter, or a buffer that stays as it is."""
    if learn:
        part.register_parameter(name, nn.Parameter(torch.tensor(value)))
    else:
        part.register_buffer(name, torch.tensor(value))
