r"""The likelihood by annealed importance sampling, and on simulated data a bracket around it.

Where a posterior is a poor proposal, importance sampling needs more samples than anyone has. Annealing leads a few
chains from it, or from the prior, to the true posterior p(z|x) in many small steps.

Shapes: N data set, B images at a time, C chains per image, M = C * B, D latent dimensions, T distributions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast, final, get_args

import torch
from torch import Tensor

from vaelab.data.datasets import EVALUATION_SEED, Dataset
from vaelab.divergences import log_mean_exp
from vaelab.errors import UsageError, did_you_mean
from vaelab.evaluate.estimate import Estimate
from vaelab.evaluate.importance import effective_sample_size
from vaelab.evaluate.pieces import Rows, Values, decode_bytes, in_pieces, not_finite
from vaelab.models import VAE
from vaelab.posteriors import Posterior
from vaelab.runtime import RowNoise, derived_seed, generator, seeded
from vaelab.samplers import Annealed, annealed_importance_sampling, pilot_step_sizes, sigmoid_schedule

Start = Literal["encoder", "prior"]

PILOT_CHAINS = 2  # per image: more make the step sizes hardly better, and two cost an eighth of what 16 chains do

# Chains at a time where memory allows more: what stays in the processor's cache; on a GPU, of the usual thousand images
# with 16 chains each a quarter, so that progress shows and an interruption does not lose all.
_CPU_CHAINS, _GPU_CHAINS = 512, 4096
_BACKWARD = 3  # times the memory of a decode, for one with its gradient
_CHUNK = 25  # transitions whose noise is drawn at once
# MKL takes other ways for products of few rows, and rounds otherwise: of fewer than 16 on some processors, than four on
# others. An encoder has a row for each image, so blocks are filled up to 16.
_LEAST = 16
_MADE = "that the model made"
_GLOBAL_GENERATOR = threading.Lock()


@final
@dataclass(frozen=True)
class Annealing:
    """How images are annealed; as a string, the words of a protocol.

    Args:
        num_chains: C, chains per image.
        num_distributions: T, from the start to the posterior, at least 2.
        start: ``encoder``, from q(z|x), which is near; ``prior``, from p(z), which no encoder can spoil.
        num_leapfrog: leapfrog steps a transition, a gradient each.

    Raises:
        UsageError: if a number or the start makes no sense.
    """

    num_chains: int = 16
    num_distributions: int = 500
    start: Start = "encoder"
    num_leapfrog: int = 10

    def __post_init__(self) -> None:
        if self.start not in get_args(Start):
            raise UsageError(f"no start {self.start!r}{did_you_mean(self.start, get_args(Start))}")
        for name, least in (("num_chains", 1), ("num_distributions", 2), ("num_leapfrog", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} {getattr(self, name)}: must be at least {least}")

    def __str__(self) -> str:
        return (
            f"AIS from the {self.start}, {self.num_chains} chains x {self.num_distributions:,} distributions x "
            f"{self.num_leapfrog} leapfrog steps"
        )


def ais_rows(
    model: VAE,
    data: Dataset,
    split: str = "test",
    how: Annealing = Annealing(),
    *,
    rows: int | None = None,
    first_row: int = 0,
    memory: int = 2**30,
    workers: int = 1,
) -> Iterator[Rows]:
    r"""Anneal a split, a few images at a time, so that a caller can show progress, save and go on later.

    Each image has C chains of its own, led from q(z|x) or p(z) to p(z|x) through T distributions by Hamiltonian Monte
    Carlo, with step sizes from a pilot run of two other chains. The mean of their weights is p(x) in expectation, so
    :math:`\log \frac1C \sum_c w_c` is a lower bound on log p(x) in expectation, closer with more T and C.

    Noise belongs to the rows: neither the memory, the workers nor where it was gone on changes a number, as long as a
    row of a product rounds the same whatever the rows beside it, as in MKL from 16 rows on. Where it does not (as on
    GPUs it may not), chains part in time, as trajectories multiply the last bit: each number is then another draw of
    the same estimate.

    Args:
        model: the trained model.
        data: the data set under the protocol to score.
        split: train, validation or test.
        how: with how many chains and distributions, and where the chains start.
        rows: only the first so many images of the split; None: all.
        first_row: where to begin.
        memory: bytes that activations may take, all workers together; 16 images at a time are the least.
        workers: threads that anneal images side by side on a CPU, each with one thread for its products.

    Returns:
        Rows of the split, with ``log_px`` (the bound, in nats), ``ess`` (of the C weights) and ``acceptance`` (the
        share of accepted transitions) of each image.

    Raises:
        TypeError: if the chains start from an encoder whose posterior has no density.
        FailureError: if a log-density is not finite, naming it and the image.

    Note:
        The protocol is that of Wu et al., but for the step sizes: theirs adapt within the run that is measured.

    Reference:
        Wu, Burda, Salakhutdinov & Grosse (2017), On the Quantitative Analysis of Decoder-Based Generative Models.
        https://arxiv.org/abs/1611.04273
    """
    annealer = _Annealer(model, how, EVALUATION_SEED)
    size = len(data.split(split)) if rows is None else min(rows, len(data.split(split)))

    def score(piece: slice) -> Values:
        return annealer.score(data.scored(split, piece).x, piece, f"of the {split} split")

    return in_pieces(model, annealer.pieces(first_row, size, memory, workers), score, workers)


def summarize(values: Values, how: Annealing, protocol: Callable[[str], str]) -> dict[str, Estimate]:
    r"""Estimates from the values of all rows, as ``ais_rows`` yields them.

    ``nll_ais`` is an upper bound on :math:`-\log p(x)` in expectation, in nats per example; how close it is,
    ``summarize_gap`` indicates. ``ais_ess`` is in chains.

    Args:
        values: the joined rows.
        how: as they were annealed.
        protocol: makes the protocol of an estimator's words.
    """
    words = protocol(str(how))
    return {
        "nll_ais": Estimate.of(-values["log_px"], "nats", words),
        "ais_ess": Estimate.of(values["ess"], "chains", words),
        "ais_acceptance": Estimate.of(values["acceptance"], "share", words),
    }


def bdmc_rows(
    model: VAE,
    how: Annealing = Annealing(),
    *,
    num_images: int = 100,
    seed: int = 0,
    first_row: int = 0,
    memory: int = 2**30,
    workers: int = 1,
) -> Iterator[Rows]:
    r"""Bracket log p(x) of images that the model itself makes (bidirectional Monte Carlo), a few at a time.

    Of :math:`z \sim p(z)`, :math:`x \sim p(x|z)` it is known that z is an exact sample of p(z|x). Chains forward bound
    log p(x) from below; C chains back from that z bound it from above: both in expectation, for any T.

    Args:
        model: the trained model.
        how, first_row, memory, workers: as in ``ais_rows``.
        num_images: how many images to make: the first ones are the same for any number.
        seed: of the images and the chains.

    Returns:
        Rows of the images, with ``lower`` and ``upper`` in nats.

    Raises:
        TypeError, FailureError: as ``ais_rows``.

    Reference:
        Grosse, Ghahramani & Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo.
        https://arxiv.org/abs/1511.02543
    """
    annealer = _Annealer(model, how, seed)
    return in_pieces(model, annealer.pieces(first_row, num_images, memory, workers), annealer.bracket, workers)


def summarize_gap(values: Values, how: Annealing) -> dict[str, Estimate]:
    """How far annealing may be off, in nats per image, from the bounds of all rows, as ``bdmc_rows`` yields them.

    Exact about the model's own images. For real ones it is an indication: a model makes images that it finds easy.

    Returns:
        ``bdmc_lower``, ``bdmc_upper`` and ``bdmc_gap``, upper - lower.
    """
    protocol = (
        f"{len(values['lower']):,} images simulated from the model, {how}, forward and back: it brackets log p(x) of "
        "simulated data, and only indicates the error on real data"
    )
    bounds = {"lower": values["lower"], "upper": values["upper"], "gap": values["upper"] - values["lower"]}
    return {f"bdmc_{name}": Estimate.of(bound, "nats", protocol) for name, bound in bounds.items()}


# --- a few images ---------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class _Annealer:
    """What anneals images: all but the images."""

    model: VAE
    how: Annealing
    seed: int

    def pieces(self, first: int, size: int, memory: int, workers: int) -> list[slice]:
        """The rows from ``first`` on, as many at a time as fit, and leave no worker idle."""
        most = _CPU_CHAINS if self.model.device.type == "cpu" else _GPU_CHAINS
        chains = min(most, memory // (workers * _BACKWARD * decode_bytes(self.model)))
        images = max(_LEAST, min(chains // self.how.num_chains, -(-(size - first) // workers)))
        return [slice(begin, min(begin + images, size)) for begin in range(first, size, images)]

    @torch.no_grad()
    def score(self, x: Tensor, rows: slice, where: str) -> Values:
        """The bound of each image, with the weights' ESS and the acceptance; each (B,)."""
        images = torch.arange(max(len(x), _LEAST), device=x.device).clamp(max=len(x) - 1)
        target = _Target(self.model, x[images], self.how.start, rows.start, where)
        z = target.start_chains(self.how.num_chains, self._seed("forward"))
        result = self._anneal(target, z, self._step_sizes(target), "forward")
        chains = (self.how.num_chains, -1)
        log_w, acceptance = (values.unflatten(0, chains) for values in (result.log_w, result.acceptance))
        values = {"log_px": log_mean_exp(log_w), "ess": effective_sample_size(log_w), "acceptance": acceptance.mean(0)}
        return {name: value[: len(x)].numpy() for name, value in values.items()}

    @torch.no_grad()
    def bracket(self, rows: slice) -> Values:
        """The bounds of images that the model makes; each (B,)."""
        filled = range(rows.start, max(rows.stop, rows.start + _LEAST))
        exact, x = _simulate(self.model, filled, self._seed("simulation"), self.model.device)
        target = _Target(self.model, x, self.how.start, rows.start, _MADE)
        eps = self._step_sizes(target)
        forward = target.start_chains(self.how.num_chains, self._seed("forward"))
        lower = self._anneal(target, forward, eps, "forward").log_w
        upper = self._anneal(target, exact.expand(self.how.num_chains, -1, -1), eps, "reverse").log_w
        bounds = {"lower": log_mean_exp(lower.unflatten(0, (self.how.num_chains, -1))),
                  "upper": -log_mean_exp(upper.unflatten(0, (self.how.num_chains, -1)))}  # fmt: skip
        return {name: bound[: rows.stop - rows.start].numpy() for name, bound in bounds.items()}

    def _step_sizes(self, target: _Target) -> Tensor:
        """(T - 1, B), from a pilot run."""
        z, draws = target.start_chains(PILOT_CHAINS, self._seed("pilot")), self._draws(target, PILOT_CHAINS, "pilot")
        return pilot_step_sizes(target, z.flatten(0, 1), sigmoid_schedule(self.how.num_distributions), draws,
                                num_chains=PILOT_CHAINS, num_leapfrog=self.how.num_leapfrog)  # fmt: skip

    def _anneal(self, target: _Target, z: Tensor, eps: Tensor, direction: Literal["forward", "reverse"]) -> Annealed:
        return annealed_importance_sampling(
            target,
            z.flatten(0, 1),
            sigmoid_schedule(self.how.num_distributions),
            eps.repeat(1, self.how.num_chains),
            self._draws(target, self.how.num_chains, direction),
            num_leapfrog=self.how.num_leapfrog,
            reverse=direction == "reverse",
        )

    def _draws(self, target: _Target, num_chains: int, purpose: str) -> _RowDraws:
        noise = RowNoise(self._seed(purpose), target.first_row, self.model.device, block=1)
        return _RowDraws(noise, len(target.x), num_chains, self.model.latent_dim)

    def _seed(self, purpose: str) -> int:
        return generator(self.seed, "ais", purpose).initial_seed()


@final
class _Target:
    """log q0 and log p(x, z) of the chains of B images, the chains leading: row ``c * B + i`` is one of image i.

    Args:
        model: in ``eval`` mode.
        x: (B, C, H, W).
        start: what q0 is.
        first_row: the number of the first image.
        where: in what, for messages.
    """

    def __init__(self, model: VAE, x: Tensor, start: Start, first_row: int, where: str) -> None:
        self.x, self.first_row = x, first_row
        self._model, self._where = model, where
        self._pz = model.prior()
        self._qz = model.posterior(x) if start == "encoder" else None

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Both for z (M, D), each (M,)."""
        terms = self._terms(z.unflatten(0, (-1, len(self.x))))
        start = next(iter(terms.values()))
        return start.flatten(), (terms["log p(z)"] + terms["log p(x|z)"]).flatten()

    def start_chains(self, num_chains: int, seed: int) -> Tensor:
        """Samples of q0, (C, B, D), from noise that belongs to the rows."""
        device = self.x.device
        if self._qz is None:
            chains: list[Tensor] = []
            for row in range(self.first_row, self.first_row + len(self.x)):
                with _seeded(seed, row, device):
                    chains.append(self._pz.sample((num_chains,)))
            z = torch.stack(chains, 1)
        else:
            noise = RowNoise(seed, self.first_row, device, block=1)
            z, log_density = cast(Posterior, self._qz).rsample_and_log_prob((num_chains,), noise)
            if log_density is None:
                raise TypeError(
                    f"the chains cannot start from this encoder: its posterior {type(self._qz).__name__} has no "
                    'density; use start="prior"'
                )
        for name, values in self._terms(z).items():
            bad = (~values.isfinite()).any(0).nonzero()
            if len(bad):
                raise not_finite(name, self.first_row + int(bad[0]), self._where)
        return z

    def _terms(self, z: Tensor) -> dict[str, Tensor]:
        """The log-densities of z (C, B, D), each (C, B), that of q0 first."""
        start = {} if self._qz is None else {"log q(z|x)": self._qz.log_prob(z)}
        return {**start, "log p(z)": self._pz.log_prob(z), "log p(x|z)": self._model.likelihood(z).log_prob(self.x)}


@final
class _RowDraws:
    """The noise of transitions, of which each image has its own, whatever the images beside it.

    Args:
        noise: of the images.
        size: B.
        num_chains: C.
        latent_dim: D.
    """

    def __init__(self, noise: RowNoise, size: int, num_chains: int, latent_dim: int) -> None:
        self._noise, self._size, self._num_chains, self._latent_dim = noise, size, num_chains, latent_dim
        self._chunk = -1
        self._momentum = self._uniform = torch.empty(0)

    def __call__(self, i: int) -> tuple[Tensor, Tensor]:
        """Of the i-th transition: normal (M, D), uniform (2, M)."""
        chunk, offset = divmod(i, _CHUNK)
        if chunk != self._chunk:
            shape = (self._size, _CHUNK, self._num_chains)
            momentum = self._noise.normal(f"momentum {chunk}", (*shape, self._latent_dim))
            uniform = self._noise.uniform(f"uniform {chunk}", (*shape, 2))
            self._momentum = momentum.permute(1, 2, 0, 3).flatten(1, 2)
            self._uniform = uniform.permute(1, 3, 2, 0).flatten(2)
            self._chunk = chunk
        return self._momentum[offset], self._uniform[offset]


def _simulate(model: VAE, rows: range, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents (B, D) from the prior, and images (B, C, H, W) sampled from their likelihoods."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for row in rows:
        with _seeded(seed, row, device):
            z = model.prior().sample()
            px = model.likelihood(z)
            if not px.mean.isfinite().all():
                raise not_finite("the mean of p(x|z)", row, _MADE)
            pairs.append((z, px.sample()))
    z, x = (torch.stack(values) for values in zip(*pairs, strict=True))
    return z, x


@contextmanager
def _seeded(seed: int, row: int, device: torch.device) -> Generator[None]:
    """Let torch's distributions draw the numbers of one row, and leave the global generator as it was.

    They sample from it, and accept no other: one thread at a time.
    """
    with _GLOBAL_GENERATOR, seeded(derived_seed(seed, "dropout", row, 0), device):  # the seed that ``reseed`` gives
        yield
