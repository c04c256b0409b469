"""Training throughput of 784-400-20 at batch 128 against pythae, in one run: ``make bench``.

pythae is installed from PyPI into an environment of its own (``.bench/pythae``), with the same torch. The two train in
turn, ours, theirs, ours, theirs, ..., each in a fresh process; counted are the seconds of whole epochs after the first
of each process. What is quoted is the ratio of each pair, its median and range, because the machine's speed drifts.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import vaelab as v
from vaelab.checkpoint import write_json
from vaelab.errors import FailureError
from vaelab.runtime import cpu_name
from vaelab.trainer import Trainer

HERE = Path(__file__).parent
PEER = Path(".bench/pythae")
PYTHAE = "pythae==0.1.2"


@dataclass(frozen=True)
class Options:
    """Training throughput against pythae."""

    repeats: int = 5
    epochs: int = 4
    """Epochs a process; the first is not counted."""
    threads: int = 2
    ours: bool = False
    """Only time ours, in this process (used by the benchmark itself)."""


def main(options: Options) -> None:
    """Run the benchmark, print a table, write benchmarks/results/train_throughput.json."""
    if options.ours:
        print("RESULT " + json.dumps(time_ours(options)))
        return
    python = peer_environment()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npy"
        data, x = load_images()
        np.save(images, x)
        rows: list[dict[str, float]] = []
        for repeat in range(options.repeats):
            common = [str(options.epochs), str(options.threads)]
            ours = [sys.executable, __file__, "--ours", "--epochs", common[0], "--threads", common[1]]
            theirs = [str(python), str(HERE / "peers" / "pythae_epochs.py"), str(images), *common]
            row = {"vaelab": run(ours), "pythae": run(theirs)}
            row["ratio"] = row["pythae"] / row["vaelab"]
            rows.append(row)
            print(f"pair {repeat + 1}: vaelab {row['vaelab']:.2f} s, pythae {row['pythae']:.2f} s an epoch, "
                  f"ratio {row['ratio']:.2f}", flush=True)  # fmt: skip
    result = {
        "command": f"python benchmarks/train_throughput.py --repeats {options.repeats} --epochs {options.epochs} "
        f"--threads {options.threads}",
        "what": "784-400-20 MLP, batch 128, Adam 1e-3, BCE + KL, fp32, median seconds of an epoch per process",
        "data": data,
        "images": len(x),
        "threads": options.threads,
        "machine": cpu_name(),
        "versions": {"torch": torch.__version__, "pythae": PYTHAE.partition("==")[2], "vaelab": version("vaelab"),
                     "python": platform.python_version()},
        "pairs": rows,
        "median": {key: statistics.median(row[key] for row in rows) for key in ("vaelab", "pythae", "ratio")},
    }  # fmt: skip
    write_json(HERE / "results" / "train_throughput.json", result)
    ratios = [row["ratio"] for row in rows]
    print(f"vaelab trains {result['median']['ratio']:.2f} times as fast as pythae "
          f"(median of {len(rows)} pairs, {min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


def time_ours(options: Options) -> list[float]:
    """Seconds of each epoch."""
    layers: dict[str, Any] = {"encoder_hidden_dims": (400,), "decoder_hidden_dims": (400,)}
    run = v.override(v.recipes.mlp(), latent_dim=20, epochs=options.epochs, **layers)
    torch.set_num_threads(options.threads)
    _, x = load_images()
    # 60,000 images an epoch, as the peer: no validation split is taken from them.
    part = v.data.Split(torch.from_numpy(x), None, torch.arange(len(x)))
    data = v.data.Dataset("images", "grey", part, part, part, binary=False, classes=None)
    trainer = Trainer(run, data, torch.device("cpu"))
    seconds: list[float] = []
    for _ in range(options.epochs):
        started = time.perf_counter()
        for _ in range(trainer.steps_per_epoch):
            trainer.train_step()
        trainer.check_finite()
        seconds.append(time.perf_counter() - started)
    return seconds


def load_images() -> tuple[str, np.ndarray]:
    """The 60,000 training images of MNIST, or as many random ones where it cannot be had."""
    try:
        data = v.load("mnist")
    except FailureError as error:
        print(f"{error}\ntiming with random images instead", file=sys.stderr)
        return "random", np.random.default_rng(0).integers(0, 256, (60_000, 1, 28, 28), np.uint8)
    return "mnist", np.concatenate([data.train.x.numpy(), data.validation.x.numpy()])


def run(command: list[str]) -> float:
    """Median seconds of an epoch after the first, of one process."""
    result = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if result.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    seconds: list[float] = json.loads(lines[-1].removeprefix("RESULT "))
    return statistics.median(seconds[1:] or seconds)


def peer_environment() -> Path:
    """Make pythae's environment, once; returns its Python."""
    python = PEER / "bin" / "python"
    if not (PEER / ".ready").exists():
        print(f"installing {PYTHAE} into {PEER}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"torch=={torch.__version__.partition('+')[0]}", PYTHAE], check=True)
        (PEER / ".ready").touch()
    return python


if __name__ == "__main__":
    main(tyro.cli(Options))
