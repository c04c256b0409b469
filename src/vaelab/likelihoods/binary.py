"""Likelihoods of binary pixels.

Shapes: C H W image, P parameters per channel; leading dimensions are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Distribution, Independent

from vaelab import specs
from vaelab.likelihoods.likelihood import Likelihood, Support


@final
class Bernoulli(Likelihood[specs.Bernoulli]):
    r"""Independent pixels, from logits :math:`a`: :math:`\log p(x|z) = \sum_i [x_i a_i - \log(1 + e^{a_i})]`.

    On binary pixels this is the log of a probability mass. On grey pixels it is minus the binary cross-entropy, which
    is normalised over nothing: useful to train with, not a likelihood of the data.
    """

    support: Support = "binary"

    def forward(self, params: Tensor) -> Distribution:
        """The distribution of an image; ``mean`` is the picture to look at."""
        return BernoulliImage(params.float())


@final
class BernoulliImage(Independent):  # pyright: ignore[reportMissingTypeArgument]
    """The distribution of an image of independent Bernoulli pixels, from their logits (*leading, C, H, W)."""

    def __init__(self, logits: Tensor) -> None:
        pixels = TorchBernoulli(logits=logits, validate_args=False)
        super().__init__(pixels, 3, validate_args=False)  # pyright: ignore[reportUnknownMemberType]
        self.logits = logits

    def expand(self, batch_shape: Any, _instance: Any = None) -> BernoulliImage:
        """The same distribution with more leading dimensions."""
        return BernoulliImage(self.logits.expand(*batch_shape, *self.logits.shape[-3:]))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability (*leading) of images (*leading, C, H, W) or of any shape that broadcasts with the logits."""
        apply: Callable[[Tensor, Tensor], Tensor] = cast(Any, _BernoulliLogProb).apply
        return apply(self.logits, value)


class _BernoulliLogProb(torch.autograd.Function):
    r""":math:`\sum_i [x_i a_i - \log(1 + e^{a_i})]` over an image; its derivative by a is :math:`x - \sigma(a)`.

    The same as torch's binary cross-entropy from logits, in half the passes over the pixels and with one logarithm for
    up to 64 of them: one of each takes a fifth of a training step of a small network, and half of an importance-sampled
    likelihood.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(logits, x)
        flat = logits.flatten(-3)
        one_image = x.shape[-3:] == logits.shape[-3:] and math.prod(x.shape[:-3]) == 1 and x.ndim <= logits.ndim
        if one_image:  # under many samples: a product with a vector; but a sum of a likelihood, and so never in bf16
            with torch.autocast(logits.device.type, enabled=False):
                linear = flat @ x.flatten().to(flat.dtype)
        else:
            linear = (x * logits).sum((-3, -2, -1))
        return linear - softplus_sum(flat)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        logits, x = ctx.saved_tensors
        grad = grad[..., None, None, None]
        by_x = (grad * logits).sum_to_size(x.shape) if ctx.needs_input_grad[1] else None
        return ((x - torch.sigmoid(logits)) * grad).sum_to_size(logits.shape), by_x


def softplus_sum(logits: Tensor) -> Tensor:
    r"""Compute :math:`\sum_i \log(1 + e^{a_i})` over the last axis, with few logarithms.

    :math:`\log(1 + e^a) = \max(a, 0) + \log(1 + e^{-|a|})`, and a product of 64 factors in (1, 2] stays below
    :math:`2^{64}`, which fp32 can hold: one logarithm serves them all, with a relative error of some 64 roundings.
    """
    factors = logits.abs().neg_().exp_().add_(1)
    # Columns far apart are multiplied, not neighbours: that fills a processor's vector registers.
    columns = factors.view(*factors.shape[:-1], _share(factors.shape[-1]), -1)
    products: Tensor = torch.prod(columns, -2)
    return torch.relu(logits).sum(-1) + products.log().sum(-1)


def _share(count: int) -> int:
    """Into how many factors of one product ``count`` columns are best divided: at most 64, and in whole vectors."""
    shares = [share for share in range(64, 0, -1) if count % share == 0]
    return next((share for share in shares if count // share % 16 == 0), shares[0])
