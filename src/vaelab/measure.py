"""Measuring a run folder: all that ``vaelab evaluate`` reports, with progress, kept as it goes.

What takes long is done a few images at a time. Their values are kept in ``evaluation.pt``, so that a measurement that
was interrupted goes on where it was, and one that is finished is not made again; ``metrics.json`` is rewritten after
each part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch

from vaelab import evaluate as measures
from vaelab.checkpoint import load_tensors, read_json, save_tensors, write_json
from vaelab.compiling import can_compile
from vaelab.config import Run, override
from vaelab.data.datasets import Dataset, Protocol, SplitName
from vaelab.data.guard import require_fit
from vaelab.errors import UsageError
from vaelab.evaluate import Estimate, annealed, importance, quality
from vaelab.evaluate.overview import overview
from vaelab.evaluate.pieces import Rows, Values, join
from vaelab.evaluate.undefined import why_no_annealing, why_no_bound
from vaelab.extractors import extractors_for
from vaelab.folder import RunFolder
from vaelab.labels import duration
from vaelab.loading import data_of, load_data, load_model
from vaelab.models import VAE
from vaelab.progress import Bar
from vaelab.runtime import has_fast_bf16, resolve_device, threads

FORMAT = 3  # of metrics.json
SAVE_EVERY = 20.0  # seconds between two saves of a long part's values
CODES = 10_000  # of which the aggregate posterior is made
WORTH_COMPILING = 5_000_000  # decodes: below a minute of them, the compiler takes longer than it saves
SIMULATED = 100  # images that bidirectional Monte Carlo brackets

Part = Literal["elbo", "nll", "latents", "reconstruction", "samples", "ais"]
PARTS: tuple[Part, ...] = ("elbo", "nll", "latents", "reconstruction", "samples")
Found = dict[str, dict[str, Any]]  # "metrics": name to Estimate; "per_dimension": name to list


@final
@dataclass(frozen=True)
class Annealing:
    """How annealed importance sampling is done.

    Args:
        images: the first so many of the split.
        chains: per image.
        distributions: from the start to the posterior.
        start: the encoder's posterior, or the prior.
    """

    images: int = 1000
    chains: int = 16
    distributions: int = 500
    start: Literal["encoder", "prior"] = "encoder"


@final
@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        split: which images.
        protocols: what is done to their pixels; empty: as the run was trained, and binarized (``dynamic``) too where
            the likelihood of the pixels as they are is none.
        parts: which measures.
        num_samples: importance samples per image.
        rows: importance-sample only the first so many images; None: all.
        annealing: for the part ``ais``.
        memory: bytes that activations may take.
        precision: arithmetic of the importance sampler's products; auto: bf16 where the processor is fast at it.
        device, threads: where, and on how many.
    """

    split: SplitName = "test"
    protocols: tuple[Protocol, ...] = ()
    parts: tuple[Part, ...] = PARTS
    num_samples: int = 5000
    rows: int | None = None
    annealing: Annealing = Annealing()
    memory: int = 2**30
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    threads: int | None = None


PRESETS: dict[str, Plan] = {
    "quick": Plan(num_samples=500),
    "paper": Plan(num_samples=5000, annealing=Annealing(distributions=10_000)),
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
        UsageError: if there is no run, no such split, or nothing can be sampled.
        FailureError: if files are damaged, the data have changed, or the model's numbers are not finite.
    """
    _check(plan)
    folder = RunFolder.open(path)
    run, model, data = folder.run, load_model(path), data_of(folder)
    device = resolve_device(plan.device)
    weights = folder.weights_sha256()
    about = {"format": FORMAT, "recipe": run.recipe, "beta": run.objective.beta, "data": data.record(),
             "weights_sha256": weights}  # fmt: skip
    content = _measured_before(path / "metrics.json", about)
    with threads(plan.threads), bar:
        plan = _possible(model.to(device), plan, bar)
        kept = Kept(path / "evaluation.pt", weights)
        subjects = [Subject(run, model.to(device), under.to(device), plan, kept, bar)
                    for under in _under(run, model, data, plan)]  # fmt: skip
        jobs: list[tuple[Subject, Part]] = [(subject, part) for subject in subjects for part in _parts(subject)]
        for subject, part in jobs:
            if part in SECONDS and (seconds := SECONDS[part](subject)) > 5:
                bar.say(f"{_title(subject, part)}: about {duration(seconds)}")
        for subject, part in jobs:
            bar.begin(_title(subject, part))
            found = MEASURES[part](subject)
            found["about"] = {**found.get("about", {}), "images_sha256": subject.images_hash,
                              "train_sha256": subject.data.sha256("train")}  # fmt: skip
            place = content["splits"].setdefault(plan.split, {}).setdefault(subject.data.protocol, {})
            for kind, values in found.items():
                plain = {name: v.to_json() if isinstance(v, Estimate) else v for name, v in values.items()}
                place[kind] = {**place.get(kind, {}), **plain}
            write_json(path / "metrics.json", content)
    return content


def _check(plan: Plan) -> None:
    numbers = {"--num-samples": plan.num_samples, "--rows": plan.rows, "--ais-images": plan.annealing.images,
               "--ais-chains": plan.annealing.chains, "--ais-steps": plan.annealing.distributions}  # fmt: skip
    for flag, number in numbers.items():
        least = 2 if flag == "--ais-steps" else 1
        if number is not None and number < least:
            raise UsageError(f"{flag} {number}: must be at least {least}")


def _possible(model: VAE, plan: Plan, bar: Bar) -> Plan:
    """The plan without what this model cannot have; refuses a part that was asked for alone, or is never a default."""
    reasons: dict[Part, str | None] = {"nll": why_no_bound(model), "ais": why_no_annealing(model, plan.annealing.start)}
    left = tuple(part for part in plan.parts if reasons.get(part) is None)
    for part in set(plan.parts) - set(left):
        if part == "ais" or not left:
            raise UsageError(f"no {part} of this model: {reasons[part]}")
        bar.say(f"{part} is left out: {reasons[part]}")
    return replace(plan, parts=left)


def _measured_before(file: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What was measured before stays, as long as it was the same weights on the same data."""
    before = read_json(file) if file.exists() else {}
    return {**about, "splits": before["splits"] if before | about == before and "splits" in before else {}}


def _under(run: Run, model: VAE, data: Dataset, plan: Plan) -> list[Dataset]:
    """The data under each protocol to score; refuses those that the likelihood is none of."""
    protocols = plan.protocols or (data.protocol,)
    if not plan.protocols and data.protocol == "grey" and not model.is_density(binary_data=data.binary):
        protocols = ("grey", "dynamic")
    found = [data if p == data.protocol else load_data(override(run, protocol=p)) for p in protocols]
    for under in found:
        require_fit(model.likelihood_head, under, (plan.split,))
    return found


def _parts(subject: Subject) -> list[Part]:
    """The parts that can be had: unless asked for, likelihoods only of pixels that have one, the rest as trained."""
    plan = subject.plan
    own = bool(plan.protocols) or subject.data.protocol == subject.run.data.protocol
    likelihood = bool(plan.protocols) or subject.model.is_density(binary_data=subject.data.binary)
    fits: dict[Part, bool] = {
        "elbo": True,
        "nll": likelihood,
        "ais": likelihood,
        "samples": own and subject.data.train.y is not None,
    }
    return [part for part in plan.parts if fits.get(part, own)]


def _title(subject: Subject, part: Part) -> str:
    plan, a = subject.plan, subject.plan.annealing
    words = {
        "nll": f"importance sampling, {_rows(subject):,} images x {plan.num_samples:,} samples",
        "ais": f"annealing, {min(a.images, subject.size):,} images x {a.chains} chains x {a.distributions:,} steps",
    }
    return f"{words.get(part, part)} ({subject.data.protocol})"


def _rows(subject: Subject) -> int:
    return subject.size if subject.plan.rows is None else min(subject.plan.rows, subject.size)


# --- the parts ------------------------------------------------------------------------------------------------------


def _elbo(s: Subject) -> Found:
    found: Found = {"metrics": {**measures.evaluate(s.model, s.run, s.data, s.plan.split)}}
    if not s.model.is_density(binary_data=s.data.binary):
        found["about"] = {"cross_entropy_floor": measures.grey_floor(s.data.split(s.plan.split))}
    return found


def _nll(s: Subject) -> Found:
    def rows(first: int) -> Iterator[Rows]:
        return _importance(s, rows=_rows(s), first_row=first, compiling=_compiles(s))

    values = _drain(s, _nll_key(s), _rows(s), rows)
    precision = ", bf16 products" if _bf16(s) else ""
    return {"metrics": {**importance.summarize(
        values, s.plan.num_samples, lambda how: s.bound_protocol(how + precision, _rows(s)))}}  # fmt: skip


def _nll_key(s: Subject) -> str:
    return f"{_key(s)} importance {s.plan.num_samples} {'bf16' if _bf16(s) else 'fp32'}"


def _compiles(s: Subject) -> bool:
    """By what is asked for, not by what is left of it: an evaluation that goes on does as it did."""
    return _rows(s) * s.plan.num_samples >= WORTH_COMPILING and can_compile(s.data.train.device)


def _importance(s: Subject, **options: Any) -> Iterator[Rows]:
    settings: dict[str, Any] = {
        "num_samples": s.plan.num_samples,
        "memory": s.plan.memory,
        "bf16": _bf16(s),
        "workers": s.workers,
    }
    return importance.importance_rows(s.model, s.data, s.plan.split, **settings | options)


def _bf16(s: Subject) -> bool:
    if s.plan.precision == "auto":
        return has_fast_bf16(s.data.train.device)
    return s.plan.precision == "bf16"


def _ais(s: Subject) -> Found:
    a = s.plan.annealing
    size = min(a.images, s.size)

    def rows(first: int) -> Iterator[Rows]:
        return _annealed(s, rows=size, first_row=first)

    key = f"{_key(s)} annealed {a.chains} {a.distributions} {a.start}"
    values = _drain(s, key, size, rows)
    bounds = annealed.summarize(values, lambda how: s.bound_protocol(how, size), **_annealing(s))
    sampled = s.kept.get(_nll_key(s)).get(f"k={s.plan.num_samples}", np.empty(0))
    if len(sampled) >= size:  # the same images, so that what differs between them does not count
        how = f"AIS less IWAE k={s.plan.num_samples}, paired"
        bounds["ais_gain"] = Estimate.of(values["log_px"] - sampled[:size], "nats", s.bound_protocol(how, size))
    s.bar.begin("bidirectional Monte Carlo on simulated images")
    simulated = min(SIMULATED, size)

    def bracketed(first: int) -> Iterator[Rows]:
        return annealed.bdmc_rows(s.model, num_images=simulated, first_row=first, **_annealing(s))

    brackets = _drain(s, f"simulated {a.chains} {a.distributions} {a.start}", simulated, bracketed)
    return {"metrics": {**bounds, **annealed.summarize_gap(brackets, **_annealing(s))}}


def _annealed(s: Subject, **options: Any) -> Iterator[Rows]:
    return annealed.ais_rows(s.model, s.data, s.plan.split, **_annealing(s) | options)


def _annealing(s: Subject) -> dict[str, Any]:
    a = s.plan.annealing
    return {
        "num_chains": a.chains,
        "num_distributions": a.distributions,
        "start": a.start,
        "memory": s.plan.memory,
        "workers": s.workers,
    }


def _latents(s: Subject) -> Found:
    found = overview(s.model, s.data, s.plan.split, CODES)
    about = {"left_out": found.left_out} if found.left_out else {}
    return {"metrics": {**found.metrics}, "per_dimension": {**found.per_dimension}, "about": about}


def _reconstruction(s: Subject) -> Found:
    return {"metrics": {**quality.reconstruction(s.model, s.data, s.plan.split)}}


def _samples(s: Subject) -> Found:
    # One feature space, of the pixels as they are, serves all protocols: what a model draws are grey means.
    grey = s.data if s.data.protocol == "grey" else load_data(override(s.run, protocol="grey"))
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
    trial, samples = 4, min(s.plan.num_samples, 500)
    started = time.perf_counter()
    list(_importance(s, rows=trial, num_samples=samples, workers=1))
    once = (time.perf_counter() - started) / trial * s.plan.num_samples / samples
    return once * _rows(s) / torch.get_num_threads()


def _ais_seconds(s: Subject) -> float:
    a = s.plan.annealing
    trial = min(16, a.images, s.size)

    def seconds(steps: int) -> float:
        started = time.perf_counter()
        list(_annealed(s, rows=trial, num_distributions=steps))
        return time.perf_counter() - started

    # Two lengths: what a step takes, without what goes before the first.
    short, long = 4, 8
    begin = seconds(short)
    step = max(seconds(long) - begin, 0.0) / (long - short)
    # The gap's simulated images go forward and back.
    images = min(a.images, s.size) + 2 * min(SIMULATED, a.images, s.size)
    return (begin + step * (a.distributions - short)) * images / trial


SECONDS: dict[str, Callable[[Subject], float]] = {"nll": _nll_seconds, "ais": _ais_seconds}


def _key(s: Subject) -> str:
    """What the values of rows depend on, besides the weights."""
    return f"{s.plan.split} {s.data.protocol} {s.images_hash[:16]}"


def _drain(s: Subject, key: str, size: int, rows: Callable[[int], Iterator[Rows]]) -> Values:
    """The values of the first ``size`` rows: those that are kept, and the rest computed, shown and kept."""
    parts = [s.kept.get(key)]
    done, saved = _length(parts[0]), time.monotonic()
    s.bar.advance(min(done, size), size)
    try:
        for piece, values in rows(done) if done < size else ():
            parts.append(values)
            done = piece.stop
            s.bar.advance(done, size)
            if time.monotonic() - saved > SAVE_EVERY:
                s.kept.put(key, join([part for part in parts if part]))
                saved = time.monotonic()
    finally:
        values = join([part for part in parts if part]) if any(parts) else {}
        s.kept.put(key, values)
    return {name: value[:size] for name, value in values.items()}


def _length(values: Values) -> int:
    return min((len(value) for value in values.values()), default=0)


@final
class Kept:
    """Values of rows that were measured, in one file: what is in it need not be measured again.

    Args:
        path: the file.
        weights: hash of the model's weights; values of other weights are dropped.
    """

    def __init__(self, path: Path, weights: str) -> None:
        self._path, self._weights = path, weights
        self._content: dict[str, Any] = {}
        if path.exists():
            content = load_tensors(path)
            if content.get("weights") == weights and content.get("format") == FORMAT:
                self._content = content["values"]

    def get(self, key: str) -> Values:
        """The values under this key; empty if there are none."""
        return {name: value.numpy() for name, value in self._content.get(key, {}).items()}

    def put(self, key: str, values: Values) -> None:
        """Keep these values in place of those under this key."""
        if _length(values) <= _length(self.get(key)):
            return
        self._content[key] = {name: torch.from_numpy(value) for name, value in values.items()}
        save_tensors(self._path, {"format": FORMAT, "weights": self._weights, "values": self._content})
