"""Trainings that vary one thing at a time, for the tables in docs/: ``python benchmarks/sweep.py NAME``.

Each row is one run (one seed, so differences of a few tenths of a nat mean nothing), scored on the validation split.
Writes ``benchmarks/results/sweep-NAME.json`` after each row, and goes on with the rows that are missing.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import vaelab as v
from vaelab.runs.checkpoint import write_json
from vaelab.runtime import cpu_name

RESULTS = Path(__file__).parent / "results"

FIVE = {"epochs": 5}
SHORT_BETA = {"epochs": 4, "kl_warmup_epochs": 2.0, "warmup_epochs": 1.0, "base_lr": 1e-5, "max_lr": 2e-3}

PLAIN = {
    "encoder_activation": "relu",
    "decoder_activation": "relu",
    "encoder_hidden_dims": (),
    "decoder_hidden_dims": (),
}

# name: recipe, rows of (what it is, changed settings)
SWEEPS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    "improving": (
        "mlp",
        [
            ("the recipe mlp, 5 epochs", FIVE),
            ("latent_dim 5", {**FIVE, "latent_dim": 5}),
            ("latent_dim 50", {**FIVE, "latent_dim": 50}),
            ("depth: 512-256 and back", {**FIVE, "encoder_hidden_dims": (512, 256), "decoder_hidden_dims": (256, 512)}),
            ("width: 1024", {**FIVE, "encoder_hidden_dims": (1024,), "decoder_hidden_dims": (1024,)}),
            ("SiLU", {**FIVE, "encoder_activation": "silu", "decoder_activation": "silu"}),
            ("warm-up + cosine, peak 3e-3", {**FIVE, "schedule": "warmup-cosine", "max_lr": 3e-3, "base_lr": 1e-5}),
            ("beta 0.5", {**FIVE, "beta": 0.5}),
            ("beta 4", {**FIVE, "beta": 4.0}),
            ("convolutions (32, 64), dense 256", {**FIVE, "encoder": "conv", "decoder": "conv",
              "encoder_conv_channels": (32, 64), "encoder_hidden_dims": (256,),
              "decoder_conv_channels": (64, 32), "decoder_hidden_dims": (256,)}),
        ],
    ),
    "beta": ("conv-2d", [(f"beta {beta:g}", {"beta": beta, "epochs": 3}) for beta in (0.1, 0.5, 1.0, 2.0, 5.0)]),
    "augmentation": (
        "conv-beta",
        [
            ("no augmentation, no dropout", {**SHORT_BETA, "augment_prob": 0.0, "dropout": 0.0}),
            ("the recipe: 10 % of the images, dropout 0.05", SHORT_BETA),
            ("every image, dropout 0.05", {**SHORT_BETA, "augment_prob": 1.0}),
            ("the recipe with ReLU and without the dense layers", {**SHORT_BETA, **PLAIN}),
        ],
    ),
}  # fmt: skip


def main(name: str, threads: str = "2") -> None:
    """Run the rows of a sweep that have no result yet."""
    recipe, rows = SWEEPS[name]
    path = RESULTS / f"sweep-{name}.json"
    done: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    data = v.load("mnist")
    for label, changes in rows:
        if label in done:
            continue
        run = v.override(v.recipes.recipe(recipe), threads=int(threads), **changes)
        started = time.monotonic()
        model = v.fit(run, data)
        seconds = time.monotonic() - started
        scores = v.evaluate.evaluate(model, run, data, "validation")
        row = {key: [round(e.value, 3), round(e.stderr, 3)] for key, e in scores.items()}
        done[label] = {"changes": changes, **row, "epochs": run.training.epochs, "seconds": round(seconds)}
        print(label, row, flush=True)
        write_json(
            path,
            {
                "command": f"python benchmarks/sweep.py {name} {threads}",
                "recipe": recipe,
                "protocol": next(iter(scores.values())).protocol,
                "unit": "nats per image: value, standard error over images",
                "seed": run.training.seed,
                "threads": int(threads),
                "machine": cpu_name(),
                "torch": torch.__version__,
                "rows": done,
            },
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
