"""Likelihoods p(x|z): from a decoder's output to a distribution over images.

Every likelihood states how many parameters it needs per channel, which data it is a density or mass function of, and
returns a distribution whose event is the whole image, so that ``log_prob`` is in nats per image.

Shapes: C H W image, P parameters per channel; leading dimensions are free.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Literal, Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vaelab.distribution import Unchecked
from vaelab.errors import UsageError
from vaelab.specs.spec import SpecT

# Pixels in {0, 1}; reals in [0, 1]; the 256 levels v/255; reals.
Support = Literal["binary", "unit", "bytes", "real"]


class Likelihood(nn.Module, ABC, Generic[SpecT]):
    """The module that makes the distribution of an image of what a decoder gives.

    Args:
        spec: the configuration.
        channels: C.
    """

    params_per_channel: int = 1
    support: Support

    def __init__(self, spec: SpecT, channels: int) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, params: Tensor) -> Distribution:
        """Map (*leading, P*C, H, W) to a distribution of event shape (C, H, W)."""

    def start(self, mean: Tensor) -> Tensor:
        """Parameters (P*C, H, W) whose distribution has about this mean (C, H, W), strictly between 0 and 1: logits.

        Raises:
            UsageError: if P is not 1: such a likelihood says it itself.
        """
        if self.params_per_channel != 1:
            raise UsageError(f"--init glorot: {type(self).__name__} does not say where its parameters start (start)")
        return mean.logit()


class Pixels(Unchecked, ABC):
    """Independent pixels as one event (C, H, W), made of some tensors (*leading, C, H, W), or (*leading, P, C, H, W).

    Args:
        parameters: tensors of equal leading shape.
    """

    own: ClassVar[int] = 3  # dimensions of one image's parameters; 4 with P

    def __init__(self, *parameters: Tensor) -> None:
        self._parameters = parameters
        super().__init__(parameters[0].shape[: -self.own], parameters[0].shape[-3:])

    @abstractmethod
    def log_prob_of_pixels(self, value: Tensor) -> Tensor:
        """Log-probabilities (*leading, C, H, W), in nats."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability (*leading) of images (*leading, C, H, W) or of any shape that broadcasts, in nats."""
        return self.log_prob_of_pixels(value).sum((-3, -2, -1))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same distribution with more leading dimensions."""
        return type(self)(*(p.expand(*batch_shape, *p.shape[-self.own :]) for p in self._parameters))

    def uniform(self, sample_shape: Any) -> Tensor:
        """Uniform numbers strictly between 0 and 1 (*sample_shape, *leading, C, H, W), by torch's global generator."""
        like = self._parameters[0]
        u = torch.rand(self._extended_shape(torch.Size(sample_shape)), dtype=like.dtype, device=like.device)
        eps = torch.finfo(u.dtype).eps
        return u.clamp(eps / 2, 1 - eps)


def by_channel(params: Tensor, *counts: int) -> Tensor:
    """(*leading, P*C, H, W) as (*leading, *counts, C, H, W) in fp32, where P is the product of the counts."""
    return params.float().reshape(*params.shape[:-3], *counts, -1, *params.shape[-2:])
