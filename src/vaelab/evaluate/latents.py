"""What the codes of a trained model say: how many dimensions are in use, what they know, and where they lie.

What needs the posterior's mean or density raises a ``TypeError`` for a model whose posterior has none.
Shapes: N examples, B batch, D latent dimensions, R points of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution

from vaelab.data.datasets import BATCH, EVALUATION_SEED, Dataset
from vaelab.distribution import NoDensityError
from vaelab.divergences import kl_of_dimensions, log_mean_exp
from vaelab.errors import FailureError, UsageError
from vaelab.evaluate.estimate import Estimate, evaluating
from vaelab.flows import Conditioned
from vaelab.models import VAE, Batch
from vaelab.posteriors import FlowPosterior, NormalPosterior, Posterior
from vaelab.runtime import RowNoise, seeded

Array = NDArray[np.float64]

ACTIVE = 0.01  # Burda's threshold on the variance of a posterior mean
RESAMPLES = 200  # of the bootstrap
FEW = 200  # codes of an aggregate whose densities are slow: 40,000 of them by 40 passes of a network take half a minute
_ENTRIES = 2**21  # numbers in a block of the (N, N) matrix: 16 MB
_LOST_NATS = 1e-7  # what a density may lose to rounding in a matrix product before it is computed again
_NOTHING = 60.0  # nats: N densities so far below another do not show in their sum


# --- codes ----------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What is computed of a batch: as in ``Codes``, but tensors of B rows, of the model's type and on its device."""

    qz: Distribution
    z: Tensor
    log_qz: Tensor | None
    log_pz: Tensor | None
    rate: Tensor | None
    y: Tensor | None


@final
@dataclass(frozen=True, eq=False)
class Codes:
    """The posteriors of N examples, and one latent of each; log-densities and rates in nats.

    Args:
        z: (N, D), the draw that the ELBO of one sample is made of.
        z_prior: (N, D), as many draws from the prior, always the same ones.
        log_qz: (N,), log q(z|x) at each example's own draw; None where it is undefined.
        log_pz: (N,), log p(z) at the same; None where it is undefined.
        rate: (N, D), the KL of each dimension; None unless posterior and prior are products over dimensions whose KL
            is known.
        y: (N,), class numbers, or None.
        batches: the posteriors themselves and all this by batches; normal posteriors in float64.
    """

    z: Array
    z_prior: Array
    log_qz: Array | None
    log_pz: Array | None
    rate: Array | None
    y: NDArray[np.int64] | None
    batches: tuple[Encoded, ...]

    def __len__(self) -> int:
        return len(self.z)

    @cached_property
    def loc(self) -> Array:
        """(N, D), the posterior means."""
        try:
            return _joined(batch.qz.mean for batch in self.batches)
        except NotImplementedError as error:
            kind = type(self.batches[0].qz).__name__
            raise TypeError(f"the means are undefined for this model: its posterior {kind} has none") from error

    @cached_property
    def center(self) -> Array:
        """(N, D), the latent that stands for each example in pictures; the mean of a normal posterior."""
        return _joined(cast(Posterior, batch.qz).center for batch in self.batches)

    @cached_property
    def log_scale(self) -> Array | None:
        """(N, D), the logarithms of the standard deviations of a ``NormalPosterior``; None for all others."""
        scales = [batch.qz.log_scale for batch in self.batches if isinstance(batch.qz, NormalPosterior)]
        return _joined(scales) if scales else None

    @property
    def slow_densities(self) -> bool:
        """Whether a posterior's density where it did not sample takes passes of a network, as that of an IAF does."""
        qz = self.batches[0].qz
        return isinstance(qz, FlowPosterior) and isinstance(qz.flow, Conditioned)

    @cached_property
    def log_agg_qz(self) -> Array:
        """(N,), log q(z) at each example's own draw: see ``log_aggregate``."""
        return log_aggregate(self)


def encode(model: VAE, data: Dataset, split: str, *, limit: int | None = None, batch_size: int = BATCH) -> Codes:
    """Encode a split: dropout and batch norm off, the model's mode restored, noise that belongs to the rows.

    Args:
        model, data, split: what is encoded.
        limit: take the first so many examples; None takes all.
        batch_size: a matter of memory alone.

    Raises:
        UsageError: if there is nothing to encode.
        TypeError: if a latent is not a vector.
        FailureError: if a latent is not finite.
    """
    count = len(data.split(split)) if limit is None else min(limit, len(data.split(split)))
    if count < 1:
        raise UsageError(f"no image of {data.name} {split} to encode: limit {limit}, {len(data.split(split))} images")
    device = data.train.device
    with evaluating(model):
        pz = model.prior()
        batches = tuple(
            _encode(model, pz, data.scored(split, rows), RowNoise(EVALUATION_SEED, rows.start, device))
            for rows in (slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size))
        )
        z_prior = _sample(pz, count, device)
    z = _joined(batch.z for batch in batches)
    if not np.isfinite(z).all():
        raise FailureError(f"not all latents of {data.name} {split} are finite: the model has diverged")

    def gathered(name: str) -> Array | None:
        """What the batches have under a name; None where they have nothing."""
        values = [value for batch in batches if (value := getattr(batch, name)) is not None]
        return _joined(values) if values else None

    y = [batch.y for batch in batches if batch.y is not None]
    return Codes(z, z_prior, gathered("log_qz"), gathered("log_pz"), gathered("rate"),
                 torch.cat(y).cpu().numpy() if y else None, batches)  # fmt: skip


# --- information ----------------------------------------------------------------------------------------------------


def active_units(codes: Codes, protocol: str) -> Estimate:
    r"""The number of latent dimensions in use: :math:`\sum_d [A_d > 0.01]`, with A from ``variance_of_means``.

    The standard error is that of a bootstrap over the examples (200 resamples, always the same ones); it is 0 where no
    dimension is near the threshold, and NaN for one example.

    Reference:
        Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders, section 5.2.
        https://arxiv.org/abs/1509.00519
    """
    loc, n = codes.loc - codes.loc.mean(0), len(codes)
    rng = np.random.default_rng(EVALUATION_SEED)
    # A resample is a count of each example: the moments of all of them are two matrix products.
    counts = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    variances = (counts @ loc**2 - (counts @ loc) ** 2) * n / max(1, n - 1)
    units = (variances > ACTIVE).sum(1)
    stderr = float(units.std(ddof=1)) if n > 1 else math.nan
    value = float((variance_of_means(codes) > ACTIVE).sum())
    return Estimate(value, stderr, "units", n, f"{protocol}, of {loc.shape[1]}, Var_x E[z|x] > {ACTIVE}")


def variance_of_means(codes: Codes) -> Array:
    r"""How much each posterior mean moves with x, (D,): :math:`A_d = \mathrm{Var}_x(E_{q(z|x)}[z_d])`; 0 for N = 1."""
    return codes.loc.var(0, ddof=1) if len(codes) > 1 else np.zeros(codes.loc.shape[1])


def mutual_information(codes: Codes, protocol: str) -> Estimate:
    r"""What z knows about which example it came from: :math:`I_q(x; z) = E[\log q(z|x) - \log q(z)]`, in nats.

    The aggregate q(z) is that of the N codes (``log_aggregate``), so this is at most log N, however much the model
    knows: compare ``saturated``. The standard error is over the examples, at a fixed q(z).

    Reference:
        Hoffman & Johnson (2016), ELBO surgery. http://approximateinference.org/2016/accepted/HoffmanJohnson2016.pdf
    """
    n = len(codes)
    about = f"{protocol}, aggregate of N={n:,} codes, at most log N = {math.log(n):.2f}"
    estimate = Estimate.of(_require_log_qz(codes) - codes.log_agg_qz, "nats", about)
    return replace(estimate, protocol=f"{about}: saturated") if saturated(estimate) else estimate


def aggregate_kl(codes: Codes, protocol: str) -> Estimate:
    r"""How far all codes together are from the prior: :math:`D_{KL}(q(z) \| p(z)) = E[\log q(z) - \log p(z)]`, in nats.

    With ``mutual_information`` it splits the rate: the two add up to the mean of log q(z|x) - log p(z), over the same
    draws. As the former is at most log N, this is at least the rate less log N: where the mutual information is
    saturated, it says more about N than about the model. Standard error and source as there.
    """
    note = ": saturated" if saturated(mutual_information(codes, protocol)) else ""
    cap = f"at least the rate less log N = {math.log(len(codes)):.2f}{note}"
    about = f"{protocol}, aggregate of N={len(codes):,} codes, {cap}"
    if codes.log_pz is None:
        raise TypeError("the KL from the prior is undefined for this model: its prior has no density")
    return Estimate.of(codes.log_agg_qz - codes.log_pz, "nats", about)


def saturated(information: Estimate) -> bool:
    """Whether a mutual information is within half a nat of log N: then it counts the codes, and is a lower bound."""
    return math.log(information.n) - information.value < 0.5


@torch.no_grad()
def log_aggregate(codes: Codes, *, rows: int | None = None) -> Array:
    r"""The aggregate posterior at each example's own draw: :math:`\log q(z_i) = \log \frac1N \sum_j q(z_i|x_j)`, (N,).

    Each one's own posterior is among the N. ``rows`` of the (N, N) matrix are held at a time; None: as fit 16 MB.
    """
    own = torch.from_numpy(_require_log_qz(codes))
    z, densities = torch.from_numpy(codes.z), _densities(codes)
    size = rows or max(1, _ENTRIES // len(codes))
    blocks: list[Tensor] = []
    for start in range(0, len(codes), size):
        beside = own[start : start + size]
        log_q = densities(z[start : start + size], beside)
        # The very number that stands in the mutual information, or rounding could carry that above log N.
        log_q.diagonal(start).copy_(beside)
        blocks.append(log_mean_exp(log_q.mT))
    return torch.cat(blocks).numpy()


# --- helpers --------------------------------------------------------------------------------------------------------


def _encode(model: VAE, pz: Distribution, batch: Batch, noise: RowNoise) -> Encoded:
    qz = model.posterior(batch.x)
    samples, log_density = cast(Posterior, qz).rsample_and_log_prob((1,), noise)
    z = samples[0]
    if z.ndim != 2:
        raise TypeError(f"codes are vectors, and this model's latents have the shape {tuple(z.shape[1:])}")
    log_qz = None if log_density is None else log_density()[0]
    rate = kl_of_dimensions(qz, pz)
    try:
        log_pz = pz.log_prob(z)
    except NoDensityError:
        log_pz = None
    if isinstance(qz, NormalPosterior):
        # The draw stays what the model made of it; from here on, nothing more is rounded.
        qz, z = NormalPosterior(qz.loc.cpu().double(), qz.log_scale.cpu().double()), z.cpu().double()
        log_qz = qz.log_prob(z)
    return Encoded(qz, z, log_qz, log_pz, rate, batch.y)


def _sample(pz: Distribution, count: int, device: torch.device) -> Array:
    """Draw from the prior, always the same; torch's global generators, of which it is drawn, are left as they were."""
    with seeded(EVALUATION_SEED, device):
        return _joined([pz.sample((count,))])


def _densities(codes: Codes) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of points (R, D) that gives their log-densities under every code's posterior (R, N).

    Its second argument (R,) is a density of each point; what is next to nothing beside that need not be exact.
    """
    if codes.log_scale is None:
        scored = codes.batches
        return lambda points, _: torch.cat([_log_prob(b.qz, points.to(b.z), len(b.z)) for b in scored], 1)
    return _normal_densities(*(torch.from_numpy(a) for a in (codes.loc, codes.log_scale, codes.z)))


def _normal_densities(loc: Tensor, log_scale: Tensor, z: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    r"""The same for N normals by one matrix product, as the log-density is linear in :math:`(z, z^2)`.

    The square is multiplied out, :math:`(z - \mu)^2 = z^2 - 2 z \mu + \mu^2`, which loses digits where a scale is
    tiny beside the spread of z (N, D), all points that will be asked for. There, pairs that count are scored again.
    """
    centre = loc.mean(0)
    mean, precision = loc - centre, torch.exp(-2 * log_scale)
    weights = torch.cat([mean * precision, -0.5 * precision], 1).mT.contiguous()
    normaliser = log_scale.sum(1) + 0.5 * loc.shape[1] * math.log(2 * math.pi)
    constant = -normaliser - 0.5 * (mean.square() * precision).sum(1)
    size = ((z - centre).abs().amax(0) + mean.abs()).square() * precision
    lost = 2 * loc.shape[1] * torch.finfo(torch.float64).eps * size.sum(1)  # at most, in nats
    narrow, step = torch.nonzero(~(lost < _LOST_NATS))[:, 0], max(1, _ENTRIES // loc.shape[1])

    def densities(points: Tensor, beside: Tensor) -> Tensor:
        centred = points - centre
        log_q = torch.addmm(constant, torch.cat([centred, centred.square()], 1), weights)
        negligible = log_q[:, narrow] < beside[:, None] - _NOTHING - lost[narrow]
        pairs = torch.nonzero(~negligible)
        for start in range(0, len(pairs), step):
            i, column = pairs[start : start + step].unbind(1)
            j = narrow[column]
            log_q[i, j] = NormalPosterior(loc[j], log_scale[j]).log_prob(points[i])
        return log_q

    return densities


def _log_prob(qz: Distribution, points: Tensor, count: int) -> Tensor:
    """Log-density of points (R, D) under each of ``count`` posteriors: (R, count)."""
    rows = max(1, _ENTRIES // (count * points.shape[1]))
    try:
        return torch.cat([qz.log_prob(block[:, None]) for block in points.split(rows)]).cpu().double()
    except NotImplementedError as error:
        raise TypeError(f"the aggregate posterior is undefined for this model: {error}") from error


def _require_log_qz(codes: Codes) -> Array:
    if codes.log_qz is None:
        kind = type(codes.batches[0].qz).__name__
        raise TypeError(f"the aggregate posterior is undefined for this model: its posterior {kind} has no density")
    return codes.log_qz


def _joined(tensors: Iterable[Tensor]) -> Array:
    return torch.cat(list(tensors)).detach().cpu().double().numpy()
