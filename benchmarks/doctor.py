"""Illnesses provoked on purpose, and what ``vaelab doctor`` says of each: the confusion matrix in docs/doctor.md.

    python benchmarks/doctor.py [--seeds 0 1 2 3 4] [--data digits mnist] [--only CASE ...]
    python benchmarks/doctor.py --calibrate      on seed 100: the symptoms that thresholds were set by

Each case trains a small network (784-256-D, in fp32 on one thread) on digits' 1,437 images or on 3,000 of MNIST, spoils
what its name says, and asks the doctor. A run that is interrupted goes on: results are kept case by case.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import tyro

import vaelab as v
from vaelab.config import Run
from vaelab.data.datasets import Dataset, unit
from vaelab.diagnose import USED, Symptoms, diagnose, examine
from vaelab.errors import FailureError, InterruptedRun
from vaelab.models import VAE, Batch
from vaelab.objectives import ELBO
from vaelab.runs.checkpoint import read_json, write_json
from vaelab.runs.folder import RunFolder
from vaelab.runtime import StepNoise, cpu_name, generator

HERE = Path(__file__).parent
HEALTHY = "healthy"
BY_HEART = 60


@dataclass(frozen=True)
class Options:
    """Illnesses provoked on purpose, and what the doctor says."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    data: tuple[str, ...] = ("digits", "mnist")
    only: tuple[str, ...] = ()
    calibrate: bool = False
    out: str = "doctor"
    """Name of the results, which a second call adds to."""


@dataclass
class Case:
    """One provoked illness.

    Args:
        expected: what the doctor should say; empty for a healthy run.
        settings: of the run.
        data: changes the data set.
        spoil: changes the trained model.
        seen: how many training images it has seen last, where that is not all.
    """

    expected: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: Callable[[Dataset], Dataset] = lambda data: data
    spoil: Callable[[VAE, Dataset, int], None] = lambda model, data, seed: None
    seen: int | None = None


def few(count: int) -> Callable[[Dataset], Dataset]:
    """Only so many training images."""
    return lambda data: replace(data, train=data.train.first(count))


def pixels(change: Callable[[torch.Tensor], torch.Tensor], *, binary: bool = False) -> Callable[[Dataset], Dataset]:
    """Every pixel changed."""

    def apply(data: Dataset) -> Dataset:
        parts = {name: replace(data.split(name), x=change(unit(data.split(name).x)))
                 for name in ("train", "validation", "test")}  # fmt: skip
        return replace(data, **parts, binary=binary)

    return apply


def overtrain_encoder(model: VAE, data: Dataset, seed: int) -> None:
    """The encoder, alone, learns 60 training images by heart; the decoder stays as it is."""
    x = unit(data.train.x[:BY_HEART])
    parameters = [*model.encoder.parameters(), *model.posterior_head.parameters()]
    optimizer, objective = torch.optim.Adam(parameters, 1e-2), ELBO()
    model.train()
    for step in range(6000):
        rows = torch.randint(BY_HEART, (BY_HEART,), generator=generator(seed, "overtrain", step))
        for _, loss in objective.losses(model, objective.networks(model), Batch(x[rows]), StepNoise(seed, step)):
            optimizer.zero_grad()
            cast(torch.Tensor, loss).backward(inputs=parameters)
            optimizer.step()
    model.eval()


CASES: dict[str, Case] = {
    HEALTHY: Case(""),
    "healthy, binarized anew each time": Case("", {"protocol": "dynamic"}),
    "beta 100": Case("posterior collapse", {"beta": 100.0}),
    "beta 6": Case("collapsed dimensions", {"beta": 6.0}),
    "beta 0.02": Case("hole between codes and prior", {"beta": 0.02}),
    "100 training images": Case("over-fitting", {"epochs": 300}, few(100)),
    "encoder learns 60 images by heart": Case("over-fitting of the encoder", spoil=overtrain_encoder, seen=BY_HEART),
    "3 epochs at a tenth of the learning rate": Case("under-training", {"epochs": 3, "learning_rate": 1e-4}),
    "pixels divided by 255 twice": Case("wrong data range", {}, pixels(lambda x: x / 255)),
    "Bernoulli on pixels in 0.2..0.8": Case("likelihood does not fit", {}, pixels(lambda x: 0.2 + 0.6 * x)),
    "Gaussian on binary pixels": Case(
        "likelihood does not fit", {"likelihood": "gaussian"}, pixels(lambda x: (x > 0.5).float(), binary=True)
    ),
    "latent of 2": Case("latent too small", {"latent_dim": 2}),
    "latent of 100": Case("latent too large", {"latent_dim": 100}),
    "learning rate rises to 1": Case(
        "exploding gradient", {"schedule": "cyclic", "max_lr": 1.0, "base_lr": 1e-4, "cycle_epochs": 80.0}
    ),
    "learning rate of a million": Case("ended in NaN", {"learning_rate": 1e6}),
}


def main(options: Options) -> None:
    """Provoke all, print as it goes, write benchmarks/results/doctor.json (or print symptoms)."""
    torch.set_num_threads(1)
    path = HERE / "results" / f"{options.out}{'-calibration' if options.calibrate else ''}.json"
    seeds = (100,) if options.calibrate else options.seeds
    results: dict[str, Any] = read_json(path) if path.exists() else {"rows": {}}
    asked = shlex.join(["python", "benchmarks/doctor.py", *sys.argv[1:]])
    # All calls that the rows are of.
    commands = "; ".join(dict.fromkeys([*results["command"].split("; "), asked]) if results["rows"] else [asked])
    for seed in seeds:  # outermost, so that a run that is stopped has whole seeds
        for name in options.data:
            for case, what in CASES.items():
                key = f"{name} / {case} / {seed}"
                if key in results["rows"] or (options.only and case not in options.only):
                    continue
                started = time.perf_counter()
                symptoms = provoke(what, images(name, what.settings.get("protocol", "grey")), seed)
                found = {finding.name: finding.kind for finding in diagnose(symptoms)}
                seconds = round(time.perf_counter() - started, 1)
                row = {"expected": what.expected, "found": found, "seconds": seconds}
                results["rows"][key] = {**row, **summary(symptoms)}
                write_json(path, {
                    "command": commands,
                    "what": "illnesses provoked on purpose; one thread, fp32", "machine": cpu_name(),
                    "rows": results["rows"],
                })  # fmt: skip
                print(
                    f"{key}: expected {what.expected or 'nothing'}; found {', '.join(found) or 'nothing'}", flush=True
                )
                if options.calibrate:
                    print("   " + json.dumps(summary(symptoms)), flush=True)


def images(name: str, protocol: Any) -> Dataset:
    """Digits, or 3,000 and 1,000 images of MNIST."""
    data = v.load(name, protocol=protocol)
    if name == "digits":
        return data
    return replace(data, train=data.train.first(3000), validation=data.validation.first(1000))


def provoke(case: Case, data: Dataset, seed: int) -> Symptoms:
    """Train, spoil, examine."""
    base: dict[str, Any] = {
        "encoder_hidden_dims": (256,), "decoder_hidden_dims": (256,), "latent_dim": 20, "threads": 1, "seed": seed,
        "epochs": 50, "batch_size": 64, "learning_rate": 2e-3,
    }  # fmt: skip
    settings = base | case.settings
    if "schedule" in settings:  # it brings learning rates of its own
        del settings["learning_rate"]
    schedule = {"schedule": settings.pop("schedule")} if "schedule" in settings else {}
    run: Run = v.override(v.override(v.recipes.mlp(), **schedule), **settings)
    data = case.data(data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        try:
            # Training refuses a density on binary pixels; runs of earlier versions have it, and the doctor names it.
            with patch("vaelab.training.trainer.require_fit"):
                model: VAE | None = v.fit(run, data, out=path)
        except InterruptedRun:
            raise
        except FailureError:
            model = None
        kept = RunFolder.open(path)
        history, failure = kept.history(), kept.failure()
    if model is not None:
        case.spoil(model, data, seed)
        data = data if case.seen is None else few(case.seen)(data)
    return examine(run, model, data, history, failure)


def summary(s: Symptoms) -> dict[str, Any]:
    """The symptoms as numbers to look at."""
    means = {name: None if values is None else round(float(values.mean()), 2) for name, values in (
        ("train", s.train), ("validation", s.validation), ("annealed_train", s.annealed_train),
        ("annealed_validation", s.annealed_validation))}  # fmt: skip
    rate = None if s.rate is None else {"least": round(float(s.rate.min()), 3), "total": round(float(s.rate.sum()), 2)}
    losses = [record["validation_loss"] for record in s.history][-7:]
    return {
        **means, "rate": rate, "used": None if s.rate is None else int((s.rate > USED).sum()),
        "two_sample": None if s.two_sample is None else round(s.two_sample, 3), "middle": round(s.middle, 3),
        "last_losses": [round(loss, 2) for loss in losses], "failure": dataclasses.asdict(s)["failure"],
    }  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options))
