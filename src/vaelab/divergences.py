"""Divergences and the numerically careful reductions that bounds are made of.

Shapes: K samples, B batch, L latent layers.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence


def log_mean_exp(log_w: Float[Tensor, "K *rest"]) -> Float[Tensor, "*rest"]:
    r"""Compute :math:`\log \frac1K \sum_{k=1}^K \exp(\log w_k)` over the first axis without overflow, in nats.

    ``K`` is read from the tensor that is reduced, never passed in: a sum over one number of samples divided by another
    is how published likelihoods went wrong.

    Raises:
        ValueError: if ``K == 0``.

    Example:
        >>> log_mean_exp(torch.full((5, 2), 3.0))
        tensor([3., 3.])
    """
    if log_w.shape[0] == 0:
        raise ValueError("log_mean_exp needs at least one sample: got K = 0")
    return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])


def kl_to_standard_normal(loc: Float[Tensor, "*B D"], log_scale: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
    r"""From a diagonal to the standard normal: :math:`\sum_d \frac12 (\mu_d^2 + \sigma_d^2 - 1) - \log \sigma_d`.

    In nats per example, from the logarithm of the scale: that is what networks emit.

    Reference:
        Kingma & Welling (2014), appendix B. https://arxiv.org/abs/1312.6114

    Example:
        >>> kl_to_standard_normal(torch.tensor([3.0, 0.0]), torch.zeros(2))
        tensor(4.5000)
    """
    return (0.5 * (loc.square() + torch.exp(2 * log_scale) - 1) - log_scale).sum(-1)


def analytic_kl(q: Distribution, p: Distribution) -> Tensor | None:
    r"""Compute :math:`D_{KL}(q \| p) = E_q[\log q - \log p]` in closed form, in nats; None where none is known.

    The closed forms are torch's registered ones, summed over the event dimensions. For a diagonal normal against the
    standard normal it is :math:`\frac12 \sum_d (\mu_d^2 + \sigma_d^2 - 1 - \log \sigma_d^2)`.

    Returns:
        One divergence per element of the batch shape.
    """
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def kl_of_dimensions(q: Distribution, p: Distribution) -> Tensor | None:
    """The divergence of each dimension, (B, D) in nats, where both are products over dimensions; else None."""
    factorise = all(isinstance(d, Independent) and not d.base_dist.event_shape for d in (q, p))
    return analytic_kl(cast(Independent, q).base_dist, cast(Independent, p).base_dist) if factorise else None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The same numbers; what flows back through them is multiplied by ``factor``."""
    return factor * x + ((1 - factor) * x).detach()
