"""Divergences and the numerically careful reductions that bounds are made of.

Shapes: K samples, B batch, L latent layers, D latent dimensions, N data set, M any number of latents.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from vaelab.runtime import Noise

Weighting = Literal["weighted", "stratified"]
Kernel = Literal["imq", "rbf"]


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


def resample(share: Float[Tensor, "K B"], u: Float[Tensor, "B J"]) -> Int[Tensor, "B J"]:
    r"""Draw J of K samples by their shares (of sum 1): each k at each place with probability ``share[k]``, on average.

    The j-th uniform number picks from the j-th of J equal parts of the whole (stratified resampling): every mean
    over the J is unbiased, and of less variance than of independent draws.

    Reference:
        Kitagawa (1996), Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space Models, section 3.
        https://doi.org/10.2307/1390750
    """
    ends = share.mT.cumsum(1)
    places = (torch.arange(u.shape[1], device=u.device) + u) / u.shape[1]
    return torch.searchsorted(ends, places.to(ends)).clamp(max=len(share) - 1)


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
    if isinstance(q, Independent) and isinstance(p, Independent):
        return analytic_kl(cast(Any, q).base_dist, cast(Any, p).base_dist)
    return None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The same numbers; what flows back through them is multiplied by ``factor``."""
    # A sum of parts, factor x + (1 - factor) x, would lose digits where they cancel.
    return x.detach() + factor * (x - x.detach())


# --- the aggregate posterior ----------------------------------------------------------------------------------------


def aggregate_log_prob(
    z: Float[Tensor, "B D"], q: Normal, total: int, weighting: Weighting = "weighted"
) -> tuple[Float[Tensor, "B"], Float[Tensor, "D B"]]:
    r"""Estimate :math:`\log q(z)` and :math:`\log q(z_d)` of the aggregate :math:`q(z) = \frac1N \sum_n q(z|x_n)`.

    :math:`q(z_i) \approx \sum_j w_{ij} q(z_i|x_j)` over the batch that z was drawn from. ``weighted``:
    :math:`w_{ij} = 1 / (N B)`, which is too low: by a factor of B where z_i's own posterior is all of the density, and
    in mean by about N where all posteriors overlap. ``stratified``: :math:`w_{ii} = 1 / N` for the example that z_i
    came from, and an equal share of the rest for each of the others: an unbiased estimate of the density, and exact
    where the batch is the whole data set.

    Args:
        z: one sample of each example's posterior.
        q: the posteriors' dimensions, of batch shape (B, D), in the same order.
        total: N.
        weighting: which estimate.

    Returns:
        Both log-densities at z, in nats.

    Note:
        Multiplying out :math:`(z - \mu)^2` costs digits where scales are small beside the spread of the means: some
        1e-3 nats in fp32 at a ratio of 100.

    Reference:
        Chen et al. (2018), Isolating Sources of Disentanglement in VAEs, eq. 5 and appendix C.
        https://arxiv.org/abs/1802.04942
    """
    size = len(z)
    log_q = _log_prob_of_pairs(z, q)
    if weighting == "weighted":
        log_weights = z.new_full((), -math.log(total * size))
    else:
        own = torch.eye(size, dtype=torch.bool, device=z.device)
        rest = (total - 1) / (total * max(size - 1, 1))
        log_weights = torch.where(own, 1 / total, rest).to(z.dtype).log()
    return torch.logsumexp(log_q.sum(0) + log_weights, -1), torch.logsumexp(log_q + log_weights, -1)


def _log_prob_of_pairs(z: Float[Tensor, "B D"], q: Normal) -> Float[Tensor, "D B B"]:
    """The log-density of each dimension of each code under each posterior: linear in (z^2, z, 1), so a matrix product.

    The pairs stand last, so that sums over the data run along memory, and autograd keeps one such tensor, not four.
    """
    # A product in bf16 would lose the difference of two squares.
    with torch.autocast(z.device.type, enabled=False):
        centre, precision = q.loc.mean(0), q.scale.pow(-2)
        at, loc = z - centre, q.loc - centre
        constant = -0.5 * (loc.square() * precision + math.log(2 * math.pi)) - q.scale.log()
        codes = torch.stack([at.square(), at, torch.ones_like(at)], -1)
        posteriors = torch.stack([-0.5 * precision, loc * precision, constant], -1)
        return codes.transpose(0, 1) @ posteriors.transpose(0, 1).mT


def permute_dimensions(z: Float[Tensor, "B D"], noise: Noise) -> Float[Tensor, "B D"]:
    r"""Permute each dimension over the batch, independently: a sample of :math:`\prod_d q(z_d)` from one of q(z).

    Each column keeps its values and loses its company. From ``noise`` (stream ``"permute"``).

    Reference:
        Kim & Mnih (2018), Disentangling by Factorising, algorithm 1. https://arxiv.org/abs/1802.05983
    """
    return z.gather(0, noise.uniform("permute", z.shape).argsort(0))


# --- maximum mean discrepancy ---------------------------------------------------------------------------------------


def squared_distances(x: Float[Tensor, "B D"], y: Float[Tensor, "M D"]) -> Float[Tensor, "B M"]:
    """Of each row of x from each of y, by one matrix product in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT).clamp(min=0)


def similarity(squared: Float[Tensor, "B M"], dim: int, kernel: Kernel) -> Float[Tensor, "B M"]:
    r"""A positive definite kernel of squared distances s, in the scale C = 2D at which standard normal vectors lie.

    ``imq``: :math:`\sum_a \frac{aC}{aC + s}` over the scales a = 0.1, 0.2, 0.5, 1, 2, 5, 10; ``rbf``:
    :math:`e^{-s / C}`.

    Reference:
        Tolstikhin et al. (2018), Wasserstein Auto-Encoders, section 4 (``imq``). https://arxiv.org/abs/1711.01558
    """
    scale = 2.0 * dim
    if kernel == "rbf":
        return torch.exp(-squared / scale)
    return sum((a * scale / (a * scale + squared) for a in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)), squared.new_zeros(()))


def mmd_of_rows(x: Float[Tensor, "B D"], y: Float[Tensor, "B D"], kernel: Kernel) -> Float[Tensor, "B"]:
    r"""The squared maximum mean discrepancy as a mean over rows: the share of each pair (x_i, y_i) in it.

    :math:`\frac{1}{B-1} \sum_{j \ne i} [k(x_i, x_j) + k(y_i, y_j)] - \frac1B \sum_j [k(x_i, y_j) + k(x_j, y_i)]`. The
    mean over i is the unbiased estimate, which can be negative. (One row alone has no pair: those sums are 0 then.)

    Reference:
        Gretton et al. (2012), A Kernel Two-Sample Test, eq. 3. https://jmlr.org/papers/v13/gretton12a.html
    """
    size, dim = x.shape
    other = 1 - torch.eye(size, dtype=x.dtype, device=x.device)
    within = sum((similarity(squared_distances(a, a), dim, kernel) * other).sum(1) for a in (x, y))
    across = similarity(squared_distances(x, y), dim, kernel)
    return within / max(size - 1, 1) - across.mean(1) - across.mean(0)
