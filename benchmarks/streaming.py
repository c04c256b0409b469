"""Training from disk against training from memory: ``python benchmarks/streaming.py``.

The same ``.npy`` file of random images (1.2 GB, colour, 64 x 64), once read into memory and once mapped, and a
convolutional network on either, in turn; the ratio of their speeds, its median and range. The file has just been
written, so that the system may hold it in its own cache: a slow disk would show in a larger file.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import vaelab as v
from vaelab.data import streaming
from vaelab.runs.checkpoint import write_json
from vaelab.runtime import cpu_name
from vaelab.training.trainer import Trainer

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """Training from disk against training from memory."""

    images: int = 100_000
    side: int = 64
    steps: int = 10
    """Timed in one go, in turn."""
    repeats: int = 9
    threads: int = 2


def main(options: Options) -> None:
    """Time both, print the ratio, write benchmarks/results/streaming.json."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        array = np.lib.format.open_memmap(path, "w+", np.uint8, (options.images, options.side, options.side, 3))
        draw = np.random.default_rng(0)
        for start in range(0, len(array), 1000):
            array[start : start + 1000] = draw.integers(0, 256, array[start : start + 1000].shape, np.uint8)
        array.flush()
        run = v.override(v.recipes.conv_warmup(), batch_size=128, compile="off", data=str(path))
        trainers: dict[str, Trainer] = {}
        for name, limit in (("memory", 2**62), ("disk", 1)):
            streaming.STREAMED = limit
            trainers[name] = Trainer(run, v.load(str(path)), torch.device("cpu"))
        assert trainers["disk"].data.train.where is not None
        assert trainers["memory"].data.train.where is None
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for repeat in range(1 + options.repeats):
            for name, trainer in trainers.items():
                started = time.perf_counter()
                for _ in range(options.steps):
                    trainer.train_step()
                trainer.check_finite()
                if repeat:  # the first warms up
                    seconds[name].append((time.perf_counter() - started) / options.steps)
    ratios = [memory / disk for memory, disk in zip(seconds["memory"], seconds["disk"], strict=True)]
    result = {
        "command": "python benchmarks/streaming.py", "machine": cpu_name(), "threads": options.threads,
        "what": f"{options.images:,} images of 3 x {options.side} x {options.side}, conv-warmup's network, batch 128",
        "ms_per_step": {name: statistics.median(values) * 1e3 for name, values in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
    }  # fmt: skip
    write_json(HERE / "results" / "streaming.json", result)
    median = result["ratio"]["median"]
    print(f"from disk at {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of the speed from memory")


if __name__ == "__main__":
    main(tyro.cli(Options))
