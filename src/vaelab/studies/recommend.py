r"""Which latent size and beta to take, given what was measured of each: a rule, and its reasons in words.

Shapes: N images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray


@final
@dataclass(frozen=True, eq=False)
class Setting:
    """One size and beta, measured: means over its seeds, in nats per image of the validation split.

    Args:
        latent_dim, beta: the setting.
        seeds: how many runs.
        nll: the importance-sampling bound on -log p(x).
        stderr: its standard error over images.
        images: (N,) the same of every image, a mean over seeds; None if they could not be had.
        spread: standard deviation over the seeds' ``nll``; NaN for one seed.
        slack: by how much the bound would still fall with more samples, if it falls as 1/k does.
        codes: how many the mutual information is measured on; 0 where it is undefined.
        means: the other measures by name, as far as they are defined, and training ``seconds``.
        has_beta: the recipe has a ``--beta`` to be chosen.
    """

    latent_dim: int
    beta: float
    seeds: int
    nll: float
    stderr: float
    images: NDArray[np.float64] | None = None
    spread: float = math.nan
    slack: float = 0.0
    codes: int = 0
    means: Mapping[str, float] = field(default_factory=dict[str, float])
    has_beta: bool = True


@final
@dataclass(frozen=True)
class Gap:
    """By how much one setting's -log p(x) lies above another's, in nats, and the standard error of that."""

    value: float
    stderr: float

    @property
    def within_noise(self) -> bool:
        """Whether it is no more than 2 standard errors."""
        return self.value <= 2 * self.stderr

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.stderr:.2f} nats"


def gap(a: Setting, b: Setting, seed_sd: float) -> Gap:
    r"""How far a lies above b: :math:`\bar d` and :math:`\sqrt{s_d^2 / N + \sigma^2 (1/K_a + 1/K_b)}`.

    Both are scored on the same images, so the differences :math:`d` of every image are what varies (a paired test);
    where these are missing, the standard errors of the two are taken as independent, which is too wide.
    :math:`\sigma` is the standard deviation that the seed alone makes, K the numbers of seeds.

    Args:
        a, b: the settings.
        seed_sd: sigma; NaN if it is not known, and then left out.
    """
    if a is b:
        return Gap(0.0, 0.0)
    if a.images is not None and b.images is not None:
        d = a.images - b.images
        value, variance = float(d.mean()), float(d.var(ddof=1)) / len(d)
    else:
        value, variance = a.nll - b.nll, a.stderr**2 + b.stderr**2
    if not math.isnan(seed_sd):
        variance += seed_sd**2 * (1 / a.seeds + 1 / b.seeds)
    return Gap(value, math.sqrt(variance))


def seed_spread(settings: Sequence[Setting]) -> float:
    """Standard deviation over seeds, pooled over all settings that have at least two; NaN if none has."""
    several = [s for s in settings if s.seeds > 1]
    freedom = sum(s.seeds - 1 for s in several)
    return math.sqrt(sum((s.seeds - 1) * s.spread**2 for s in several) / freedom) if several else math.nan


@final
@dataclass(frozen=True)
class Recommendation:
    """What to take, and why.

    Args:
        chosen: the smallest size within 2 standard errors of the best; of its betas that are, the one nearest to 1.
        best: the lowest -log p(x).
        above: how far each setting lies above the best, in the order of the settings.
        reasons: sentences for people.
    """

    chosen: Setting
    best: Setting
    above: tuple[Gap, ...]
    reasons: tuple[str, ...]


def recommend(settings: Sequence[Setting]) -> Recommendation:
    """The smallest latent size whose -log p(x) is within 2 standard errors (see ``gap``) of the lowest.

    Args:
        settings: one at least.
    """
    sd = seed_spread(settings)
    best = min(settings, key=lambda s: (s.nll, s.latent_dim, _from_one(s.beta)))
    above = tuple(gap(s, best, sd) for s in settings)
    close = [s for s, higher in zip(settings, above, strict=True) if higher.within_noise]
    chosen = min(close, key=lambda s: (s.latent_dim, _from_one(s.beta)))
    reasons = [*_why(settings, chosen, best, sd), *_edges(settings, chosen, best), *_doubts(settings, best, sd)]
    return Recommendation(chosen, best, above, tuple(reasons))


def _from_one(beta: float) -> float:
    return abs(math.log(beta)) if beta > 0 else math.inf


def _namer(settings: Sequence[Setting]) -> Callable[[Setting], str]:
    """What tells settings apart, in words."""
    several = len({s.beta for s in settings}) > 1
    return lambda s: f"size {s.latent_dim}" + (f", beta {s.beta:g}" if several else "")


def _why(settings: Sequence[Setting], chosen: Setting, best: Setting, sd: float) -> Generator[str]:
    name = _namer(settings)
    head = f"Recommended: --latent-dim {chosen.latent_dim}" + (f" --beta {chosen.beta:g}" if chosen.has_beta else "")
    if len(settings) == 1:
        yield f"{head}: the only setting that was measured, so there is nothing to compare it with."
        return
    if chosen is best:
        yield f"{head}: the lowest -log p(x), {best.nll:.2f} ± {best.stderr:.2f} nats."
    else:
        what = "smallest size" if chosen.latent_dim < best.latent_dim else "beta nearest to 1"
        yield (f"{head}: the {what} within 2 standard errors of the lowest -log p(x), {gap(chosen, best, sd)} above "
               f"that of {name(best)}.")  # fmt: skip
    if smaller := [s for s in settings if s.latent_dim < chosen.latent_dim]:
        nearest = min(smaller, key=lambda s: s.nll)
        yield f"Smaller is worse: {name(nearest)} lies {gap(nearest, best, sd)} above the lowest."
    if (active := chosen.means.get("active_units")) is not None:
        yield f"{active:.3g} of its {chosen.latent_dim} dimensions are active."
    largest = min(settings, key=lambda s: (-s.latent_dim, s.nll))
    if largest.latent_dim > chosen.latent_dim:
        above, active = gap(largest, best, sd), largest.means.get("active_units")
        if not above.within_noise:
            yield f"Too large is not free: {name(largest)} lies {above} above the lowest."
        elif active is not None and active <= largest.latent_dim - 1:
            yield (f"Too large is cheap: of {largest.latent_dim} dimensions {active:.3g} are active, training itself "
                   f"prunes the rest, and -log p(x) is within the noise of the lowest.")  # fmt: skip


def _edges(settings: Sequence[Setting], chosen: Setting, best: Setting) -> Generator[str]:
    sizes, betas = sorted({s.latent_dim for s in settings}), sorted({s.beta for s in settings})
    if len(sizes) > 1:
        if chosen.latent_dim == sizes[-1]:
            yield f"The best is the largest size that was tried: try larger ones, --latent-dims {2 * sizes[-1]}."
        elif best.latent_dim == sizes[-1]:
            yield (f"The lowest value is that of the largest size tried, so a larger one may be lower still; but what "
                   f"is gained beyond size {chosen.latent_dim} is within the noise.")  # fmt: skip
        elif chosen.latent_dim == sizes[0] > 1:
            yield f"The smallest size that was tried is enough: try smaller ones, --latent-dims {sizes[0] // 2}."
    if len(betas) > 1 and best.beta in (betas[0], betas[-1]) and best.beta > 0:
        ends = ("smallest", "smaller") if best.beta == betas[0] else ("largest", "larger")
        yield f"The best beta, {best.beta:g}, is the {ends[0]} that was tried: a {ends[1]} one may be better."


def _doubts(settings: Sequence[Setting], best: Setting, sd: float) -> Generator[str]:
    others = [s for s in settings if s.latent_dim != best.latent_dim] or [s for s in settings if s is not best]
    if not others:
        return
    rival, name = min(others, key=lambda s: s.nll), _namer(settings)
    between = gap(rival, best, sd)
    if any(s.images is None for s in settings):
        yield "Standard errors are unpaired, and so too wide: values of single images could not be read for all runs."
    if math.isnan(sd):
        yield "One seed each: how far training alone moves these numbers is not known; --seeds 3 shows it."
    elif sd > between.value:
        yield (f"Warning: seeds alone differ by {sd:.2f} nats (s.d.), more than the {between.value:.2f} between "
               f"{name(best)} and {name(rival)}: with other seeds these may change places.")  # fmt: skip
    slack = [s.slack for s in settings]
    if max(slack) - min(slack) > max(between.value, 2 * between.stderr):
        loose = max(settings, key=lambda s: s.slack)
        yield (f"Warning: with more samples the bound of {name(loose)} would fall by some {loose.slack:.1f} nats more, "
               f"which may change the order: give --num-samples a larger number.")  # fmt: skip
