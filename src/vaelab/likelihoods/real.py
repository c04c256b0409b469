"""Likelihoods of real-valued pixels.

Shapes: C H W image, P parameters per channel; leading dimensions are free.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from vaelab import specs
from vaelab.likelihoods.likelihood import Support


@final
class Gaussian(nn.Module):
    r"""Normal pixels with one sigma: :math:`\log p = -\sum_i [(x_i - m_i)^2 / 2\sigma^2 + \log \sigma \sqrt{2\pi}]`.

    The mean is a sigmoid of the decoder's output, as pixels lie in [0, 1]. A learned sigma balances distortion against
    rate by itself, so that no weight on the KL has to be tuned.

    Args:
        spec: the configuration.
        channels: C.
    Reference:
        Rybkin, Daniilidis & Levine (2021), Simple and Effective VAE Training with Calibrated Decoders, section 3.
        https://arxiv.org/abs/2006.13202
    """

    params_per_channel = 1
    support: Support = "real"
    log_sigma: Tensor

    def __init__(self, spec: specs.Gaussian, channels: int) -> None:
        super().__init__()
        self.spec = spec
        log_sigma = torch.tensor(math.log(spec.sigma))
        if spec.learn_sigma:
            self.log_sigma = nn.Parameter(log_sigma)
        else:
            self.register_buffer("log_sigma", log_sigma)

    def forward(self, params: Tensor) -> Distribution:
        """The distribution of an image; ``mean`` is the picture to look at."""
        mean = torch.sigmoid(params.float())
        return Independent(Normal(mean, self.log_sigma.exp(), validate_args=False), 3, validate_args=False)

    def is_density(self, *, binary_data: bool) -> bool:
        """True: a density over real-valued pixels (and can be positive: a density may pass 1)."""
        return True
