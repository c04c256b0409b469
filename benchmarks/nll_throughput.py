"""Importance-sampled likelihoods of 784-400-20, k = 5000, against pythae's ``get_nll``, in one run.

    python benchmarks/nll_throughput.py [--images 40] [--repeats 5] [--epochs 3]

Both score the same model (trained a few epochs here) on the same binarized test images. pythae is installed from PyPI
into an environment of its own (``.bench/pythae``); it gets the largest batch (all 5000 samples at once), ``no_grad``,
and whichever number of threads is faster for it. The two run in turn, each in a fresh process; what is quoted is the
median and range of the ratios, because the machine's speed drifts.

``--gap`` measures what bf16 products change instead, in nats; ``--ais`` how many images a second annealed importance
sampling scores as ``vaelab evaluate`` does it, the chains of many images in one batch and all cores busy, and with the
chains of four images at a time on one core (no peer anneals).
"""

from __future__ import annotations

import json
import platform
import statistics
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
from environments import HERE, PYTHAE, RESULT, python_of, result_of
from vaelab.evaluate import annealed, importance
from vaelab.evaluate.pieces import join
from vaelab.runs.checkpoint import write_json
from vaelab.runtime import cpu_name, has_fast_bf16
from vaelab.training.compiling import can_compile

SAMPLES = 5000
FIRST = 4  # images that each side scores before the clock starts


@dataclass(frozen=True)
class Options:
    """Importance-sampled likelihoods against pythae."""

    images: int = 40
    """Images that each side scores in each process."""
    repeats: int = 5
    epochs: int = 3
    """Epochs that the model is trained first."""
    threads: int = 2
    gap: bool = False
    """Measure what bf16 products change, over so many images with 500 samples, instead of the speed."""
    ais: bool = False
    """Time annealing instead (16 chains x 100 distributions x 10 leapfrog steps)."""
    ours: str = ""
    """Only time ours on this run folder, in this process (used by the benchmark itself)."""


def main(options: Options) -> None:
    """Run the benchmark, print a table, write benchmarks/results/nll_throughput.json."""
    if options.ours:
        print(RESULT + json.dumps(time_ours(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        data, run = train(Path(folder), options)
        if options.gap or options.ais:
            (measure_gap if options.gap else measure_ais)(run, data, options)
            return
        export(run, data, Path(folder), options)
        rows: list[dict[str, float]] = []
        python = python_of("pythae")
        for repeat in range(options.repeats):
            ours = [sys.executable, __file__, "--ours", str(run), "--images", str(options.images),
                    "--threads", str(options.threads)]  # fmt: skip
            peer = [str(python), str(HERE / "peers" / "pythae_nll.py"), f"{folder}/x.npy", f"{folder}/weights.npz",
                    str(SAMPLES), str(SAMPLES)]  # fmt: skip
            mine = result_of(ours)
            theirs = min((result_of([*peer, str(threads)]) for threads in {1, options.threads}), key=seconds_of)
            row = {"vaelab": mine["images_per_second"], "pythae": 1 / seconds_of(theirs),
                   "products_alone": mine["products_alone"]}  # fmt: skip
            row["ratio"] = row["vaelab"] / row["pythae"]
            row["difference"] = statistics.mean(mine["log_px"]) - statistics.mean(theirs["log_px"])
            rows.append(row)
            speeds = f"vaelab {row['vaelab']:.1f}, pythae {row['pythae']:.1f} images/s, ratio {row['ratio']:.2f}"
            print(f"pair {repeat + 1}: {speeds}; NLL differs by {row['difference']:+.2f} nats", flush=True)
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    content = {
        "command": f"python benchmarks/nll_throughput.py --images {options.images} --repeats {options.repeats} "
        f"--epochs {options.epochs} --threads {options.threads}",
        "what": f"784-400-20 MLP, importance sampling with {SAMPLES} samples an image, "
        + ("bf16 products" if has_fast_bf16(torch.device("cpu")) else "fp32"),
        "data": data.name,
        "threads": options.threads,
        "machine": cpu_name(),
        "versions": {"torch": torch.__version__, "pythae": PYTHAE.partition("==")[2], "vaelab": version("vaelab"),
                     "python": platform.python_version()},
        "pairs": rows,
        "median": medians,
    }  # fmt: skip
    write_json(HERE / "results" / "nll_throughput.json", content)
    ratios = [row["ratio"] for row in rows]
    print(f"vaelab scores {medians['ratio']:.1f} times as many images a second as pythae "
          f"(median of {len(rows)} pairs, {min(ratios):.1f} to {max(ratios):.1f})")  # fmt: skip


def train(folder: Path, options: Options) -> tuple[v.data.Dataset, Path]:
    """A trained model, and binarized images to score."""
    layers: dict[str, Any] = {"encoder_hidden_dims": (400,), "decoder_hidden_dims": (400,)}
    run = v.override(v.recipes.mlp(), latent_dim=20, epochs=options.epochs, protocol="dynamic", threads=1, **layers)
    data = v.load("mnist", protocol="dynamic")
    v.fit(run, data, out=folder / "run")
    return data, folder / "run"


def export(run: Path, data: v.data.Dataset, folder: Path, options: Options) -> None:
    """The model's weights and the images, for pythae."""
    model = v.load_model(run)
    names = {"encoder": "encoder.layers.1", "head": "posterior_head.loc_and_log_scale", "decoder": "decoder.layers.0",
             "pixels": "decoder.layers.2"}  # fmt: skip
    layers = {name: model.get_submodule(path) for name, path in names.items()}
    arrays = {f"{name}_{kind}": getattr(layer, kind).detach().numpy()
              for name, layer in layers.items() for kind in ("weight", "bias")}  # fmt: skip
    np.savez(folder / "weights.npz", **arrays)
    np.save(folder / "x.npy", data.test.rows(slice(0, options.images)).x.numpy())


def time_ours(options: Options) -> dict[str, Any]:
    """Images a second of ``vaelab evaluate``'s own importance sampler, and its log-likelihoods."""
    torch.set_num_threads(options.threads)
    model, data = v.load_model(options.ours), v.load("mnist", protocol="dynamic")
    cpu = torch.device("cpu")
    settings: dict[str, Any] = {"num_samples": SAMPLES, "workers": options.threads, "bf16": has_fast_bf16(cpu),
                                "compiling": can_compile(cpu)}  # fmt: skip

    def score(images: int) -> list[float]:
        return join(importance.importance_rows(model, data, rows=images, **settings))[f"k={SAMPLES}"].tolist()

    # Not timed: they wait for the compiler, some ten seconds that ten thousand images have and forty have not.
    score(FIRST)
    started = time.perf_counter()
    log_px = score(options.images)
    seconds = time.perf_counter() - started
    return {"images_per_second": options.images / seconds, "log_px": log_px,
            "products_alone": products_alone(bf16=settings["bf16"])}  # fmt: skip


def products_alone(*, bf16: bool) -> float:
    """Images a second if scoring were nothing but the decoder's two products, as fast as torch does them here."""
    kind = torch.bfloat16 if bf16 else torch.float32
    z, hidden = torch.randn(SAMPLES, 20, dtype=kind), torch.randn(SAMPLES, 400, dtype=kind)
    first, second = torch.randn(20, 400, dtype=kind), torch.randn(400, 784, dtype=kind)
    times: list[float] = []
    for _ in range(12):
        started = time.perf_counter()
        _ = z @ first, hidden @ second
        times.append(time.perf_counter() - started)
    return 1 / statistics.median(times[2:])


def measure_gap(run: Path, data: v.data.Dataset, options: Options) -> None:
    """The change of the negative log-likelihood under bf16 products, paired over images and draws."""
    model = v.load_model(run)
    full, half = (
        join(importance.importance_rows(model, data, rows=options.images, num_samples=500, bf16=bf16))["k=500"]
        for bf16 in (False, True)
    )
    change = full - half
    stderr = change.std(ddof=1) / len(change) ** 0.5
    write_json(HERE / "results" / "nll_bf16_gap.json", {
        "command": f"python benchmarks/nll_throughput.py --gap --images {options.images} --epochs {options.epochs}",
        "what": "NLL with bf16 products minus NLL in fp32, 784-400-20, the same 500 draws an image",
        "nats": change.mean(), "stderr": stderr, "images": len(change), "machine": cpu_name(),
    })  # fmt: skip
    print(f"bf16 products change the NLL by {change.mean():+.4f} ± {stderr:.4f} nats ({len(change)} images)")


def measure_ais(run: Path, data: v.data.Dataset, options: Options) -> None:
    """Images a second of annealing, on all cores and on one, in large batches and in small ones, in turn."""
    model = v.load_model(run)
    how = annealed.Annealing(num_chains=16, num_distributions=100)

    def seconds(images: int, workers: int, at_once: int) -> float:
        torch.set_num_threads(workers)
        started = time.perf_counter()
        for first in range(0, images, at_once):
            end = min(first + at_once, images)
            list(annealed.ais_rows(model, data, how=how, rows=end, first_row=first, workers=workers))
        return time.perf_counter() - started

    seconds(4, 1, 4)
    few_images, rows = max(4, options.images // 4), []
    for repeat in range(options.repeats):
        row = {"batched": options.images / seconds(options.images, options.threads, options.images),
               "batched, one thread": options.images / seconds(options.images, 1, options.images),
               "four images, one thread": few_images / seconds(few_images, 1, 4)}  # fmt: skip
        row["ratio"] = row["batched"] / row["four images, one thread"]
        rows.append(row)
        print(f"{repeat + 1}: " + ", ".join(f"{name} {value:.2f}" for name, value in row.items()), flush=True)
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    write_json(HERE / "results" / "ais_throughput.json", {
        "command": f"python benchmarks/nll_throughput.py --ais --images {options.images} --repeats {options.repeats} "
        f"--epochs {options.epochs} --threads {options.threads}",
        "what": "784-400-20 MLP, annealed importance sampling, 16 chains x 100 distributions x 10 leapfrog steps, "
        "fp32; images a second",
        "data": data.name, "threads": options.threads, "machine": cpu_name(), "runs": rows, "median": medians,
    })  # fmt: skip


def seconds_of(found: dict[str, Any]) -> float:
    """Median seconds of an image after the first ones."""
    return statistics.median(found["seconds"][FIRST:])


if __name__ == "__main__":
    main(tyro.cli(Options))
