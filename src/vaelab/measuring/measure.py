"""Measuring a run folder: all that ``vaelab evaluate`` reports, with progress, kept as it goes.

What takes long is done a few images at a time. Their values are kept in ``evaluation.pt``, so that a measurement that
was interrupted goes on where it was, and one that is finished is not made again; ``metrics.json`` is rewritten after
each part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch

from vaelab import evaluate as measures
from vaelab.config import Run, override
from vaelab.data.datasets import Dataset, Protocol, SplitName, load
from vaelab.data.guard import require_fit
from vaelab.errors import FailureError, UsageError
from vaelab.evaluate import Annealing, Estimate, annealed, importance, quality
from vaelab.evaluate.overview import overview
from vaelab.evaluate.pieces import Rows, Values, join
from vaelab.evaluate.undefined import why_no_annealing, why_no_bound
from vaelab.labels import duration, images
from vaelab.measuring.extractors import extractors_for
from vaelab.measuring.kept import FORMAT, Kept, images_key, importance_key, length
from vaelab.models import VAE
from vaelab.progress import Bar
from vaelab.runs.checkpoint import read_json, write_json
from vaelab.runs.folder import RunFolder
from vaelab.runs.loading import data_of, load_model
from vaelab.runtime import has_fast_bf16, resolve_device, threads
from vaelab.training.compiling import can_compile

SAVE_EVERY = 20.0  # seconds between two saves of a long part's values
CODES = 10_000  # of which the aggregate posterior is made
WORTH_COMPILING = 5_000_000  # decodes: below a minute of them, the compiler takes longer than it saves
SIMULATED = 100  # images that bidirectional Monte Carlo brackets

Part = Literal["elbo", "nll", "latents", "reconstruction", "samples", "ais"]
PARTS: tuple[Part, ...] = ("elbo", "nll", "latents", "reconstruction", "samples")
Found = dict[str, dict[str, Any]]  # "metrics": name to Estimate; "per_dimension": name to list


@final
@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        split: which images.
        protocols: what is done to their pixels; empty: as the run was trained, and binarized (``dynamic``) too where
            the likelihood of the pixels as they are is none and they are in memory.
        parts: which measures.
        num_samples: importance samples per image.
        rows: importance-sample only the first so many images; None: all.
        ais_images: anneal only the first so many images.
        annealing: how.
        memory: bytes that activations may take.
        precision: arithmetic of the importance sampler's products; auto: bf16 where the processor is fast at it.
        device, threads: where, and on how many.
    """

    split: SplitName = "test"
    protocols: tuple[Protocol, ...] = ()
    parts: tuple[Part, ...] = PARTS
    num_samples: int = 5000
    rows: int | None = None
    ais_images: int = 1000
    annealing: Annealing = Annealing()
    memory: int = 2**30
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    threads: int | None = None


PRESETS: dict[str, Plan] = {
    "quick": Plan(num_samples=500),
    "paper": Plan(num_samples=5000, annealing=Annealing(num_distributions=10_000)),
}


@final
@dataclass(frozen=True)
class Subject:
    """What a part measures: one split under one protocol."""

    run: Run
    model: VAE
    data: Dataset
    plan: Plan
    kept: Kept
    bar: Bar

    @property
    def size(self) -> int:
        """Images of the split."""
        return len(self.data.split(self.plan.split))

    @property
    def images_hash(self) -> str:
        """Of the images as they are scored."""
        return self.data.sha256(self.plan.split)

    @property
    def workers(self) -> int:
        """Threads that score images side by side."""
        return torch.get_num_threads() if self.data.train.device.type == "cpu" else 1

    def bound_protocol(self, how: str, rows: int | None = None) -> str:
        """The protocol of a bound."""
        return measures.bound_protocol(self.model, self.data, self.plan.split, how, rows)


def measure(path: Path, plan: Plan, bar: Bar) -> dict[str, Any]:
    """Measure a run by a plan; returns the content of its ``metrics.json``.

    Raises:
        UsageError: if there is no run, no such split, a part cannot be had that was asked for alone, or somebody else
            measures the run.
        FailureError: if files are damaged, the data have changed, or the model's numbers are not finite.
    """
    folder = RunFolder.open(path)
    with folder.measured():
        return _measure(folder, plan, bar)


def _measure(folder: RunFolder, plan: Plan, bar: Bar) -> dict[str, Any]:
    path, run = folder.path, folder.run
    model, data = load_model(path), data_of(folder)
    model.to(device := resolve_device(plan.device))
    weights = folder.weights_sha256()
    about = {"format": FORMAT, "recipe": run.recipe, "beta": run.objective.beta, "data": data.record(),
             "weights_sha256": weights}  # fmt: skip
    content = _measured_before(path / "metrics.json", about)
    with threads(plan.threads), bar:
        scored = _under(run, model, data, plan)
        plan = _possible(model, scored, plan, bar)
        kept = Kept(path / "evaluation.pt", weights)
        subjects = [Subject(run, model, under.to(device), plan, kept, bar) for under in scored]
        jobs: list[tuple[Subject, Part]] = [(subject, part) for subject in subjects for part in _parts(subject)]
        for subject, part in jobs:
            if part in SECONDS and (seconds := SECONDS[part](subject)) > 5:
                bar.say(f"{_title(subject, part)}: about {duration(seconds)}")
        for subject, part in jobs:
            bar.begin(_title(subject, part))
            found = MEASURES[part](subject)
            found["about"] = {**found.get("about", {}), "pixels": subject.data.pixels,
                              "images_sha256": subject.images_hash,
                              "train_sha256": subject.data.sha256("train")}  # fmt: skip
            place = content["splits"].setdefault(plan.split, {}).setdefault(subject.data.protocol, {})
            if part == "elbo":  # of pixels that were not taken for binary before, and are now
                place.get("about", {}).pop("cross_entropy_floor", None)
            if part == "ais":  # of another annealing, where this one has no importance samples beside it
                place.get("metrics", {}).pop("ais_gain", None)
            for kind, values in found.items():
                plain = {name: v.to_json() if isinstance(v, Estimate) else v for name, v in values.items()}
                place[kind] = {**place.get(kind, {}), **plain}
            write_json(path / "metrics.json", content)
    return content


def _possible(model: VAE, scored: list[Dataset], plan: Plan, bar: Bar) -> Plan:
    """The plan without what cannot be had here; refuses a part that was asked for alone, or is never a default."""
    bounded = bool(plan.protocols) or any(model.is_density(binary_data=data.binary) for data in scored)
    no_likelihood = None if bounded else "these pixels are not binary, and have no likelihood under a Bernoulli"
    reasons: dict[Part, str | None] = {
        "nll": why_no_bound(model) or no_likelihood,
        "ais": why_no_annealing(model, plan.annealing.start) or no_likelihood,
        "samples": quality.why_no_comparison(scored[0], plan.split),
    }
    left = tuple(part for part in plan.parts if reasons.get(part) is None)
    for part in plan.parts:
        if (reason := reasons.get(part)) is not None:
            if part == "ais" or not left:
                raise UsageError(f"no {part} of this model: {reason}")
            bar.say(f"{part} is left out: {reason}")
    return replace(plan, parts=left)


def _measured_before(file: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What was measured before stays, as long as it was the same weights on the same data."""
    try:
        before = read_json(file) if file.exists() else {}
    except FailureError as error:
        raise FailureError(f"{error}; remove it to measure anew") from error
    return {**about, "splits": before["splits"] if before | about == before and "splits" in before else {}}


def _under(run: Run, model: VAE, data: Dataset, plan: Plan) -> list[Dataset]:
    """The data under each protocol to score; refuses those that the likelihood is none of."""
    protocols = plan.protocols or (data.protocol,)
    in_memory = data.train.where is None  # images that stay on disk are not binarized
    if not plan.protocols and data.protocol == "grey" and in_memory and not model.is_density(binary_data=data.binary):
        protocols = ("grey", "dynamic")
    found = [data if p == data.protocol else load(override(run, protocol=p).data) for p in protocols]
    for under in found:
        require_fit(model.likelihood_head, under, (plan.split,))
    return found


def _parts(subject: Subject) -> list[Part]:
    """The parts that can be had: unless asked for, likelihoods only of pixels that have one, the rest as trained."""
    plan = subject.plan
    own = bool(plan.protocols) or subject.data.protocol == subject.run.data.protocol
    likelihood = bool(plan.protocols) or subject.model.is_density(binary_data=subject.data.binary)
    fits: dict[Part, bool] = {"elbo": True, "nll": likelihood, "ais": likelihood}
    return [part for part in plan.parts if fits.get(part, own)]


def _title(subject: Subject, part: Part) -> str:
    plan, a = subject.plan, subject.plan.annealing
    words = {
        "nll": f"importance sampling, {images(_rows(subject))} x {plan.num_samples:,} samples",
        "ais": f"annealing, {images(_annealed(subject))} x {a.num_chains} chains x {a.num_distributions:,} steps",
    }
    return f"{words.get(part, part)} ({subject.data.protocol})"


def _rows(subject: Subject) -> int:
    """Images to importance-sample."""
    return subject.size if subject.plan.rows is None else min(subject.plan.rows, subject.size)


def _annealed(subject: Subject) -> int:
    """Images to anneal."""
    return min(subject.plan.ais_images, subject.size)


# --- the parts ------------------------------------------------------------------------------------------------------


def _elbo(s: Subject) -> Found:
    found: Found = {"metrics": {**measures.evaluate(s.model, s.run, s.data, s.plan.split)}}
    if not s.model.is_density(binary_data=s.data.binary):
        found["about"] = {"cross_entropy_floor": measures.grey_floor(s.data.split(s.plan.split))}
    return found


def _nll(s: Subject) -> Found:
    values = _drain(s, _nll_key(s), _rows(s), partial(_importance(s), rows=_rows(s), compiling=_compiles(s)))
    precision = ", bf16 products" if _bf16(s) else ""
    return {"metrics": {**importance.summarize(
        values, s.plan.num_samples, lambda how: s.bound_protocol(how + precision, _rows(s)))}}  # fmt: skip


def _compiles(s: Subject) -> bool:
    """By what is asked for, not by what is left of it: an evaluation that goes on does as it did."""
    return _rows(s) * s.plan.num_samples >= WORTH_COMPILING and can_compile(s.data.train.device)


def _importance(s: Subject) -> Callable[..., Iterator[Rows]]:
    """``importance_rows``, as the plan has it but for the rows."""
    return partial(importance.importance_rows, s.model, s.data, s.plan.split, num_samples=s.plan.num_samples,
                   memory=s.plan.memory, bf16=_bf16(s), workers=s.workers)  # fmt: skip


def _bf16(s: Subject) -> bool:
    if s.plan.precision == "auto":
        return has_fast_bf16(s.data.train.device)
    return s.plan.precision == "bf16"


def _ais(s: Subject) -> Found:
    how, size, simulated = s.plan.annealing, _annealed(s), _simulated(s)
    values = _drain(s, _ais_key(s), size, partial(_annealing(s), rows=size))
    bounds = annealed.summarize(values, how, lambda words: s.bound_protocol(words, size))
    sampled = s.kept.get(_nll_key(s)).get(f"k={s.plan.num_samples}", np.empty(0))
    if len(sampled) >= size:  # the same images, so that what differs between them does not count
        words = f"{how} less IWAE k={s.plan.num_samples}{', bf16 products' * _bf16(s)}, paired"
        bounds["ais_gain"] = Estimate.of(values["log_px"] - sampled[:size], "nats", s.bound_protocol(words, size))
    s.bar.begin("bidirectional Monte Carlo on simulated images")
    bracketed = partial(annealed.bdmc_rows, s.model, how, num_images=simulated, memory=s.plan.memory, workers=s.workers)
    brackets = _drain(s, _simulated_key(s), simulated, bracketed)
    return {"metrics": {**bounds, **annealed.summarize_gap(brackets, how)}}


def _annealing(s: Subject) -> Callable[..., Iterator[Rows]]:
    """``ais_rows``, as the plan has it but for the rows."""
    return partial(annealed.ais_rows, s.model, s.data, s.plan.split, how=s.plan.annealing, memory=s.plan.memory,
                   workers=s.workers)  # fmt: skip


def _simulated(s: Subject) -> int:
    """Images to simulate."""
    return min(SIMULATED, _annealed(s))


def _latents(s: Subject) -> Found:
    return overview(s.model, s.data, s.plan.split, CODES)


def _reconstruction(s: Subject) -> Found:
    return {"metrics": {**quality.reconstruction(s.model, s.data, s.plan.split)}}


def _samples(s: Subject) -> Found:
    # One feature space, of the pixels as they are, serves all protocols: what a model draws are grey means.
    grey = s.data if s.data.protocol == "grey" else load(override(s.run, protocol="grey").data)
    nets = extractors_for(grey, s.bar)
    s.bar.begin("sample quality")
    return {"metrics": {**quality.sample_quality(s.model, grey, nets, split=s.plan.split)}}


MEASURES: dict[Part, Callable[[Subject], Found]] = {
    "elbo": _elbo,
    "nll": _nll,
    "latents": _latents,
    "reconstruction": _reconstruction,
    "samples": _samples,
    "ais": _ais,
}


# --- what takes long ------------------------------------------------------------------------------------------------


def _nll_seconds(s: Subject) -> float:
    if not (left := _left(s, _nll_key(s), _rows(s))):
        return 0.0
    trial, samples = min(4, s.size), min(s.plan.num_samples, 500)
    once = _seconds(s, partial(_importance(s), rows=trial, num_samples=samples)) / trial
    return once * s.plan.num_samples / samples * left / s.workers


def _ais_seconds(s: Subject) -> float:
    how, size = s.plan.annealing, _annealed(s)
    # The gap's simulated images go forward and back.
    left = _left(s, _ais_key(s), size) + 2 * _left(s, _simulated_key(s), _simulated(s))
    if not left:
        return 0.0
    # Two lengths: what a step takes, without what goes before the first.
    trial, short, long = min(16, size), 4, 8
    begin, more = (
        _seconds(s, partial(_annealing(s), how=replace(how, num_distributions=steps), rows=trial))
        for steps in (short, long)
    )
    step = max(more - begin, 0.0) / (long - short)
    return (begin + step * (how.num_distributions - short)) * left / trial / s.workers


def _seconds(s: Subject, rows: Callable[..., Iterator[Rows]]) -> float:
    """What these rows take one of the workers."""
    with threads(1 if s.workers > 1 else None):
        started = time.perf_counter()
        list(rows(workers=1))
        return time.perf_counter() - started


def _left(s: Subject, key: str, size: int) -> int:
    """How many of so many rows are not kept."""
    return max(0, size - length(s.kept.get(key)))


SECONDS: dict[Part, Callable[[Subject], float]] = {"nll": _nll_seconds, "ais": _ais_seconds}


# --- what is kept ---------------------------------------------------------------------------------------------------


def _nll_key(s: Subject) -> str:
    return importance_key(s.plan.split, s.data.protocol, s.images_hash, s.plan.num_samples, bf16=_bf16(s))


def _ais_key(s: Subject) -> str:
    images = images_key(s.plan.split, s.data.protocol, s.images_hash)
    return f"{images} annealed {_annealing_key(s.plan.annealing)}"


def _simulated_key(s: Subject) -> str:
    return f"simulated {_annealing_key(s.plan.annealing)}"


def _annealing_key(a: Annealing) -> str:
    # Ten leapfrog steps are not named: what was kept before others could be asked for is theirs.
    return f"{a.num_chains} {a.num_distributions} {a.start}" + (f" {a.num_leapfrog}" if a.num_leapfrog != 10 else "")


def _drain(s: Subject, key: str, size: int, rows: Callable[..., Iterator[Rows]]) -> Values:
    """The values of the first ``size`` rows: those that are kept, and the rest computed, shown and kept.

    Args:
        s: what is measured.
        key: under which they are kept.
        size: how many rows.
        rows: computes them, from ``first_row`` on.
    """
    kept = s.kept.get(key)
    done, saved = length(kept), time.monotonic()
    parts: list[Rows] = [(slice(done), kept)] if kept else []
    s.bar.advance(min(done, size), size)
    try:
        for part in rows(first_row=done) if done < size else ():
            parts.append(part)
            done = part[0].stop
            s.bar.advance(done, size)
            if time.monotonic() - saved > SAVE_EVERY:
                s.kept.put(key, join(parts))
                saved = time.monotonic()
    finally:
        values = join(parts)
        s.kept.put(key, values)
    return {name: value[:size] for name, value in values.items()}
