"""What is wrong with a run: symptoms are measured, and rules name the illness and the next step.

Measuring and judging are apart: ``examine`` turns a run into ``Symptoms``, plain numbers; ``diagnose`` turns those into
findings by thresholds that were set on other seeds than the ones that docs/doctor.md reports on.

Shapes: N images, D latent dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray

from vaelab import specs
from vaelab.config import Run
from vaelab.data.datasets import BATCH, Dataset, Split
from vaelab.evaluate import annealed, classifiers, latents
from vaelab.evaluate.estimate import evaluating
from vaelab.evaluate.pieces import join
from vaelab.evaluate.undefined import why_no_annealing
from vaelab.models import VAE
from vaelab.objectives import elbo_terms, terms_as_defined
from vaelab.training.trainer import likelihood_of

IMAGES = 2000  # of the validation and the training split, at most
ANNEALED_IMAGES = 100

Kind = Literal["illness", "note"]


@final
@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        name: the illness, in one word or two.
        kind: an ``illness`` asks for action; a ``note`` is good to know.
        evidence: the numbers that say so.
        remedy: what to do next.
    """

    name: str
    kind: Kind = field(default="illness", kw_only=True)
    evidence: str
    remedy: str


@final
@dataclass(frozen=True, kw_only=True)
class Symptoms:
    """What the rules look at. Nats are per image; what could not be measured is None.

    Args:
        beta: the objective's weight on the rate.
        history: one record an epoch.
        failure: the content of ``failure.json``, if the run ended in NaN.
        pixels: mean, standard deviation, least and greatest of the training pixels, as the model sees them.
        middle: share of the training pixels between 0.1 and 0.9.
        binary: every pixel is 0 or 1.
        support: what the likelihood is made for: ``binary``, ``unit``, ``bytes`` or ``real`` pixels.
        train_size: training images.
        train, validation: -ELBO of each of some images, in nats; None for a model without a rate.
        total_rate: mean rate over validation images; None for a model without one.
        rate: mean rate of each dimension over validation images, (D,); None where dimensions have none of their own.
        two_sample: accuracy of telling q(z) from p(z).
        prior_held: codes were led to the prior, or it was fitted to them afterwards.
        descends: the loss that is recorded falls from the first epoch on, if all is well.
        can_weigh: the objective has a ``--beta`` that could be raised.
        can_anneal: it has a ``--kl-warmup-epochs``.
        annealed_train, annealed_validation: -log p(x) of some images by annealing, where the -ELBO differs.
    """

    beta: float
    history: Sequence[dict[str, Any]]
    failure: dict[str, Any] | None = None
    pixels: tuple[float, float, float, float]
    middle: float
    binary: bool
    support: str
    train_size: int
    train: NDArray[np.float64] | None = None
    validation: NDArray[np.float64] | None = None
    total_rate: float | None = None
    rate: NDArray[np.float64] | None = None
    two_sample: float | None = None
    prior_held: bool = True
    descends: bool = True
    can_weigh: bool = True
    can_anneal: bool = True
    annealed_train: NDArray[np.float64] | None = None
    annealed_validation: NDArray[np.float64] | None = None


# --- examining ------------------------------------------------------------------------------------------------------


def examine(
    run: Run,
    model: VAE | None,
    data: Dataset,
    history: Sequence[dict[str, Any]],
    failure: dict[str, Any] | None = None,
    *,
    images: int = IMAGES,
) -> Symptoms:
    """Measure the symptoms of a run, on its training and validation images; the test images stay untouched.

    Args:
        run: its configuration.
        model: its model; None if it has saved none.
        data: what it was trained on.
        history, failure: what its folder says of its training.
        images: of each split, at most.
    """
    likelihood = likelihood_of(run, data.shape).build(data.shape[0]) if model is None else model.likelihood_head
    flags = {field.name for field in fields(run.objective)}
    symptoms = Symptoms(
        beta=run.objective.beta,
        history=history,
        failure=failure,
        **_of_pixels(data.train.first(max(images, 1))),
        binary=data.binary,
        support=likelihood.support,
        train_size=len(data.train),
        prior_held=run.objective.holds_a_prior or not isinstance(run.prior, specs.StandardNormal),
        descends=run.objective.descends,
        can_weigh="beta" in flags,
        can_anneal="kl_warmup_epochs" in flags,
    )
    if model is None:
        return symptoms
    train, validation = _first(data, "train", images), _first(data, "validation", images)
    with evaluating(model):
        distortion, rate = terms_as_defined(model, validation.batches("validation", BATCH))
        if rate is not None:
            of_train = sum(elbo_terms(model, train.batches("train", BATCH)))
            symptoms = replace(symptoms, train=of_train, validation=distortion + rate, total_rate=float(rate.mean()))
    if model.space != "codes":  # of which no dimension has a rate, and which are not meant to be uniform
        codes = latents.encode(model, validation, "validation")
        test = classifiers.two_sample_test(codes, "") if len(codes) >= classifiers.TELLING else None
        symptoms = replace(
            symptoms,
            rate=None if codes.rate is None else codes.rate.mean(0),
            two_sample=None if test is None else test.value,
        )
    if _gap(symptoms) is None or why_no_annealing(model) is not None:
        return symptoms
    how, workers = annealed.Annealing(num_chains=4, num_distributions=50), torch.get_num_threads()
    values = [
        -join(annealed.ais_rows(model, part_of, split, how, rows=ANNEALED_IMAGES, workers=workers))["log_px"]
        for part_of, split in ((train, "train"), (validation, "validation"))
    ]
    return replace(symptoms, annealed_train=values[0], annealed_validation=values[1])


def _of_pixels(images: Split) -> dict[str, Any]:
    """The symptoms of pixels, some images at a time: in double precision all of them may not fit in memory."""
    sums, count, low, high = np.zeros(3), 0, math.inf, -math.inf
    for x in map(torch.Tensor.double, images.pieces()):
        count += x.numel()
        sums += [float(part.sum()) for part in (x, x.square(), (x > 0.1) & (x < 0.9))]
        low, high = min(low, float(x.min())), max(high, float(x.max()))
    mean, square, middle = sums / count
    std = math.sqrt(max(square - mean**2, 0.0) * count / (count - 1))
    return {"pixels": (float(mean), std, low, high), "middle": float(middle)}


def _first(data: Dataset, split: str, count: int) -> Dataset:
    return replace(data, **{split: data.split(split).first(count)})


# --- judging --------------------------------------------------------------------------------------------------------

# Thresholds, each the middle between what healthy runs and provoked ones showed on seeds 100 and up
# (benchmarks/doctor.py --calibrate); the confusion matrix in docs/doctor.md is of other seeds.
HOLE = 0.88  # accuracy of telling codes from the prior
GAP = 0.5  # of the rate, by which validation images may be worse than training images: what z says should carry over
USED = 0.1  # nats: a dimension with less says nothing (a variance of its means, in a short training, can be left over)
STILL_FALLING = 0.01  # of the validation loss, over the last tenth of the run
ROUGH = 0.1  # rise of the training loss above its least so far, as a part of that
SCALE = 10.0  # nats: parts of a loss or a rate are taken of this at least: densities pass through 0, and rates vanish
CROWDED = 2.2  # nats in the least used dimension
MIDDLE = 0.5  # share of pixels that are neither dark nor bright


def diagnose(symptoms: Symptoms) -> list[Finding]:
    """All findings, illnesses first, without those that another one explains; empty for a healthy run."""
    found = [finding for rule in RULES if (finding := rule(symptoms)) is not None]
    explained = {name for finding in found for name in EXPLAINS.get(finding.name, ())}
    left = [finding for finding in found if finding.name not in explained]
    return sorted(left, key=lambda finding: finding.kind != "illness")


def _nan(s: Symptoms) -> Finding | None:
    if s.failure is None:
        return None
    kept = s.failure["checkpoint_step"]
    good = "no checkpoint was saved before it" if kept is None else f"the last good checkpoint is step {kept} (last.pt)"
    return Finding(
        "ended in NaN",
        f"{s.failure['term']} was not finite at step {s.failure['step']}; {good}",
        "a smaller --learning-rate, or --clip-norm 1; data outside [0, 1] and bf16 are the other usual causes",
    )


def _exploding(s: Symptoms) -> Finding | None:
    least = math.inf
    if not s.descends:
        return None
    # A KL weight that rises makes the loss rise with it: only epochs at the final weight are compared.
    for record in (record for record in s.history if record["beta"] >= s.beta):
        loss = record["loss"]
        if loss - least > ROUGH * max(abs(least), SCALE):
            return Finding(
                "exploding gradient",
                f"the training loss rose from {least:.1f} to {loss:.1f} nats in epoch {record['epoch']}",
                "--clip-norm 1, and a --learning-rate three times smaller",
            )
        least = min(least, loss)
    return None


def _range(s: Symptoms) -> Finding | None:
    mean, std, low, high = s.pixels
    if high > 0.5 and low < 0.25 and std > 0.02:
        return None
    return Finding(
        "wrong data range",
        f"training pixels lie in {low:.3f}..{high:.3f} (mean {mean:.3f}), where 0..1 is expected",
        "say what the values mean: --range unit, byte or symmetric; pixels that were divided by 255 twice look so",
    )


def _likelihood(s: Symptoms) -> Finding | None:
    if s.support in ("real", "unit") and s.binary:
        return Finding(
            "likelihood does not fit",
            "a density over real values is scored on pixels that are 0 or 1: it can grow without bound",
            "--likelihood bernoulli",
        )
    if s.support == "binary" and not s.binary and s.middle > MIDDLE:
        return Finding(
            "likelihood does not fit",
            f"{s.middle:.0%} of the pixels are neither dark nor bright, and a Bernoulli is made for 0 and 1",
            "--likelihood gaussian (its sigma is learned)",
        )
    return None


def _collapse(s: Symptoms) -> Finding | None:
    if s.total_rate is None:
        return None
    evidence = f"rate {s.total_rate:.2f} nats, beta {s.beta:g}"
    # Of a model whose dimensions have no rates of their own, all must do with what one is to have.
    active, total = (int(s.total_rate > USED), 1) if s.rate is None else (int((s.rate > USED).sum()), len(s.rate))
    if s.rate is not None:
        evidence = f"{active} of {total} dimensions are in use, {evidence}"
    if active == 0:
        anneal = "anneal it (--kl-warmup-epochs 10)" if s.can_anneal else "--objective elbo can anneal it"
        remedy = anneal if s.beta <= 1 else "lower --beta, to 1 at most"
        return Finding("posterior collapse", evidence, f"the KL outweighs what z is worth: {remedy}")
    if active < 0.5 * total and s.beta > 1:
        return Finding("collapsed dimensions", evidence, "lower --beta: at 1 more dimensions are worth it")
    return None


def _size(s: Symptoms) -> Finding | None:
    if s.rate is None:
        return None
    active, total = int((s.rate > USED).sum()), len(s.rate)
    if 0 < active < 0.5 * total and s.beta <= 1:
        return Finding(
            "latent too large",
            f"{active} of {total} dimensions are in use",
            f"--latent-dim {max(2, active + active // 4)} is enough; the surplus costs time, hardly likelihood",
            kind="note",
        )
    if active == total and s.rate.min() > CROWDED and s.beta >= 0.5:
        return Finding(
            "latent too small",
            f"all {total} dimensions are full: the least used one carries {s.rate.min():.2f} nats",
            f"--latent-dim {2 * total} (vaelab tune-latent measures what is best), unless it is meant for a picture",
        )
    return None


def _no_prior(s: Symptoms) -> Finding | None:
    if s.prior_held:
        return None
    seen = "" if s.two_sample is None else f": a classifier tells them apart {s.two_sample:.0%} of the time"
    return Finding(
        "no prior yet",
        f"the objective did not lead codes to the standard normal that samples are drawn from{seen}",
        "vaelab refit RUN --prior mixture (or flow) fits a prior to the codes; reconstructions need none",
        kind="note",
    )


def _hole(s: Symptoms) -> Finding | None:
    if s.two_sample is None or s.two_sample < HOLE:
        return None
    later = "or fit a prior to the codes: vaelab refit RUN --prior mixture"
    if s.beta < 1 and s.can_weigh:
        remedy = f"raise --beta towards 1, {later}"
    else:
        remedy = f"train longer, take a smaller --latent-dim, {later}"
    return Finding(
        "hole between codes and prior",
        f"a classifier tells codes of images from draws of the prior {s.two_sample:.0%} of the time (chance: 50 %); "
        "reconstructions can be good while samples, drawn where no code lies, are bad",
        remedy,
    )


def _gap(s: Symptoms) -> float | None:
    """How much worse validation images are than training images, in nats; None where that is within what is usual."""
    if s.train is None or s.validation is None or s.total_rate is None:
        return None
    gap = float(s.validation.mean() - s.train.mean())
    noise = math.hypot(_stderr(s.train), _stderr(s.validation))
    return gap if gap > GAP * max(s.total_rate, SCALE) + noise else None


def _overfit(s: Symptoms) -> Finding | None:
    gap = _gap(s)
    if gap is None:
        return None
    evidence = f"-ELBO is {gap:.1f} nats higher on validation than on training images"
    more = f"more data than {s.train_size:,} images, --rotate 5 --shift 1 --augment-prob 0.5, or a smaller network"
    if s.annealed_train is None or s.annealed_validation is None:
        return Finding("over-fitting", evidence, more)
    inner = float(s.annealed_validation.mean() - s.annealed_train.mean())
    evidence += f", -log p(x) by annealing {inner:.1f} nats"
    if inner < 0.4 * gap:
        return Finding(
            "over-fitting of the encoder",
            evidence,
            "the decoder is sound, the encoder is not: judge by --ais, or train the encoder on more images",
        )
    return Finding("over-fitting", evidence, more)


def _undertrained(s: Symptoms) -> Finding | None:
    if not s.history or s.failure is not None:
        return None
    losses = [record["validation_loss"] for record in s.history if record["beta"] >= s.beta]
    if not losses:
        reached = f"beta had reached {s.history[-1]['beta']:g} of {s.beta:g} when the training ended"
        return Finding("under-training", reached, "more --epochs than the annealing takes")
    back = max(1, len(losses) // 10)
    start = losses[-1 - back] if len(losses) > back else None
    fall = math.inf if start is None else (start - losses[-1]) / max(abs(losses[-1]), SCALE)
    if fall <= STILL_FALLING:
        return None
    how = "there is but one epoch to judge by" if start is None else (
        f"the validation loss still fell by {start - losses[-1]:.2f} nats, to {losses[-1]:.2f}, "
        f"in the last {'epoch' if back == 1 else f'{back} epochs'}"
    )  # fmt: skip
    return Finding("under-training", how, "more --epochs (twice as many), or a larger --learning-rate")


def _stderr(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.inf


_OF_THE_CODES = ("hole between codes and prior", "latent too small", "latent too large", "collapsed dimensions")
# What each illness brings with it: named beside its cause, it would only send the reader elsewhere.
EXPLAINS: dict[str, tuple[str, ...]] = {
    "ended in NaN": ("exploding gradient", "under-training", "posterior collapse", "over-fitting", *_OF_THE_CODES),
    "exploding gradient": ("under-training", "posterior collapse", "over-fitting", *_OF_THE_CODES),
    "wrong data range": ("likelihood does not fit", "under-training", "posterior collapse", "over-fitting",
                         *_OF_THE_CODES),
    "likelihood does not fit": ("under-training", "posterior collapse", "over-fitting", *_OF_THE_CODES),
    "posterior collapse": ("hole between codes and prior",),
    "under-training": _OF_THE_CODES,
    # Not a latent that is too small: over-fitting fills no dimension, and a network with too few can over-fit as well.
    "over-fitting": ("hole between codes and prior", "latent too large"),
    "over-fitting of the encoder": _OF_THE_CODES,
    "no prior yet": ("hole between codes and prior",),
    "hole between codes and prior": ("latent too small",),
}  # fmt: skip

RULES: tuple[Callable[[Symptoms], Finding | None], ...] = (
    _nan,
    _exploding,
    _range,
    _likelihood,
    _collapse,
    _undertrained,
    _overfit,
    _no_prior,
    _hole,
    _size,
)
