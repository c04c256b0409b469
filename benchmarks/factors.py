"""Do objectives that weigh the codes' dependence disentangle? Sprites, whose factors are known; a row per run.

    nice python benchmarks/factors.py [--seeds 0 1 2] [--epochs 30] [--only "tc 6" ...] [--out factors]

Each row trains one network on 11,520 sprites and measures it: distortion and rate on the 1,440 test images, the total
correlation of codes, the mutual information gap and the DCI scores on all 14,400 images, as the factors' published
scores are. Writes ``benchmarks/results/OUT.json`` after each row, and goes on with the rows that are missing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import vaelab as v
from vaelab.config import Run
from vaelab.data import Dataset
from vaelab.evaluate import Estimate, factors
from vaelab.models import VAE
from vaelab.runs.checkpoint import read_json, write_json
from vaelab.runs.folder import source_commit
from vaelab.runtime import cpu_name

HERE = Path(__file__).parent

# What it is, the objective, its settings.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "elbo, beta 1": ("elbo", {"beta": 1.0}),
    "elbo, beta 4": ("elbo", {"beta": 4.0}),
    "tc 6": ("tc", {"beta": 6.0}),
    "factor 10": ("factor", {"gamma": 10.0}),
}
NETWORK: dict[str, Any] = {
    "encoder": "conv", "decoder": "conv", "encoder_conv_channels": (32, 32, 64), "encoder_hidden_dims": (256,),
    "decoder_conv_channels": (64, 32, 32), "decoder_hidden_dims": (256,), "latent_dim": 10,
    "batch_size": 128, "learning_rate": 1e-3,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Objectives that disentangle, on images of known factors."""

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 30
    threads: int = 1
    only: tuple[str, ...] = ()
    """Rows to run; default: all."""
    images: int | None = None
    """Train on so many images and score so many: for a trial."""
    out: str = "factors"
    """Name of the results."""


def main(options: Options) -> None:
    """Train and measure what has no result yet."""
    torch.set_num_threads(options.threads)
    path = HERE / "results" / f"{options.out}.json"
    rows: dict[str, Any] = read_json(path)["rows"] if path.exists() else {}
    data = v.load("sprites")
    if options.images is not None:
        data = replace(data, train=data.train.first(options.images))
    for seed in options.seeds:  # outermost, so that a benchmark that is stopped has whole seeds
        for name in options.only or ROWS:
            key = f"{name} / seed {seed}"
            if key in rows:
                continue
            run, started = configured(name, seed, options), time.perf_counter()
            model = v.fit(run, data)
            seconds = time.perf_counter() - started
            scores = measured(model, run, data, options.images)
            rows[key] = {
                "objective": name, "seed": seed, "epochs": options.epochs, "seconds": round(seconds),
                **{score: [round(e.value, 4), round(e.stderr, 4)] for score, e in scores.items()},
            }  # fmt: skip
            write_json(path, described(options, rows, scores))
            print(key, rows[key], flush=True)


def configured(name: str, seed: int, options: Options) -> Run:
    """The run of a row."""
    objective, settings = ROWS[name]
    run = v.override(v.recipes.mlp(), data="sprites", encoder="conv", decoder="conv", objective=objective)
    rest = {key: value for key, value in NETWORK.items() if key not in ("encoder", "decoder")}
    training = {"epochs": options.epochs, "seed": seed, "threads": options.threads, "precision": "fp32"}
    return v.override(run, **rest, **settings, **training)


def measured(model: VAE, run: Run, data: Dataset, images: int | None) -> dict[str, Estimate]:
    """Distortion and rate on the test images; how codes lie to factors, on all images."""
    on_test = v.evaluate.evaluate(model, run, data, "test")
    scores, left_out = factors.known_factors(model, data, images)
    if left_out:
        raise SystemExit(" ".join(left_out))
    return {**{name: on_test[name] for name in ("distortion", "rate")}, **scores}


def described(options: Options, rows: dict[str, Any], scores: dict[str, Estimate]) -> dict[str, Any]:
    """The content of the results file."""
    summary: dict[str, dict[str, list[float]]] = {}
    for name in ROWS:
        of_seeds = [row for row in rows.values() if row["objective"] == name]
        if of_seeds:
            values = {score: np.array([row[score][0] for row in of_seeds]) for score in scores}
            spread = {score: float(v_.std(ddof=1) / len(v_) ** 0.5) if len(v_) > 1 else float("nan")
                      for score, v_ in values.items()}  # fmt: skip
            summary[name] = {score: [round(float(v_.mean()), 4), *([round(spread[score], 4)] if len(v_) > 1 else [])]
                             for score, v_ in values.items()}  # fmt: skip
    seeds = " ".join(map(str, options.seeds))
    return {
        "command": f"nice python benchmarks/factors.py --seeds {seeds} --epochs {options.epochs} "
                   f"--threads {options.threads} --out {options.out}",
        "what": "sprites; rows: value and standard error over images; summary: mean and standard error over seeds",
        "protocols": {score: e.protocol for score, e in scores.items()},
        "units": {score: e.unit for score, e in scores.items()},
        "network": NETWORK, "objectives": ROWS,
        "machine": cpu_name(), "threads": options.threads, "torch": torch.__version__, "commit": source_commit(),
        "summary": summary, "rows": rows,
    }  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options))
