"""Everything to be known of vaelab on one GPU, in one call, without a network: ``python benchmarks/gpu.py``.

    python benchmarks/gpu.py [--device cuda] [--steps 200] [--recipes mlp fast ...] [--out FILE]

In this order: are the numbers those of the CPU, and of compiled steps those of plain ones; images a second of each
recipe, and which share of the machine's measured peak that is; the seconds that ``fast`` takes to its published mark.
MNIST if it is there (``$VAELAB_DATA``), else random images of its size, and then no mark. It writes
benchmarks/results/gpu.json and prints the same as a table. ``--device cpu`` tries the script itself.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import vaelab as v
from environments import random_images
from vaelab.config import Run
from vaelab.errors import FailureError
from vaelab.objectives import elbo_terms
from vaelab.recipes import RECIPES, recipe
from vaelab.runs.checkpoint import write_json
from vaelab.runtime import Noise, Sampler, StepNoise, machine
from vaelab.training.trainer import Trainer, build_model

MODES = (("fp32", "off"), ("fp32", "on"), ("bf16", "off"), ("bf16", "on"))


@dataclass(frozen=True)
class Options:
    """vaelab on one GPU."""

    device: str = "cuda"
    steps: int = 200
    """Steps that are timed, after as many as compiling and warming up take."""
    checked: tuple[str, ...] = ("mlp", "conv-warmup")
    """Recipes whose numbers are compared with the CPU's, and compiled with plain."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    """Recipes that are timed."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the time to quality."""
    out: Path = Path(__file__).parent / "results" / "gpu.json"


def main(options: Options) -> None:
    """Measure everything, print tables, write JSON."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here that torch can use: --device cpu tries the script itself")
    data, real = images()
    result: dict[str, Any] = {
        "command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:]),
        "machine": machine(device),
        "torch": torch.__version__,
        "data": "mnist" if real else "random images",
    }

    def keep(name: str, work: Callable[[], Any]) -> None:
        result[name] = work()
        write_json(options.out, result)  # what was measured is kept if the next thing fails

    keep("correctness", lambda: correctness(options.checked, data, device, min(options.steps, 20)))
    keep("peak", lambda: {kind: peak(device, getattr(torch, kind)) for kind in ("float32", "bfloat16")})
    result["speed"] = []
    for name, (precision, way) in itertools.product(options.recipes, MODES):
        result["speed"].append(speed(name, precision, way, data, device, options.steps))
        write_json(options.out, result)
    if real:
        ways = itertools.product(("off", "on"), options.seeds)
        keep("time_to_quality", lambda: [quality(seed, way, data, device) for way, seed in ways])
    show(result)


def images() -> tuple[v.data.Dataset, bool]:
    """MNIST, or random images of its size."""
    try:
        return v.load("mnist"), True
    except FailureError as error:
        print(f"{error}\nrandom images instead", file=sys.stderr)
        parts = [v.data.Split(random_images(n), None, torch.arange(n)) for n in (55_000, 5_000, 10_000)]
        return v.data.Dataset("random", "grey", *parts, binary=False, classes=None), False


def correctness(names: Sequence[str], data: v.data.Dataset, device: torch.device, steps: int) -> dict[str, float]:
    """The largest relative differences: of the loss and gradients to the CPU's, and of compiled steps to plain ones."""
    found: dict[str, float] = {}
    for name in names:
        run = recipe(name)
        losses: list[float] = []
        gradients: list[torch.Tensor] = []
        eps = StepNoise(0, 0).normal("z", (64, 1, run.posterior.latent_dim))  # pyright: ignore[reportAttributeAccessIssue]
        for place in (torch.device("cpu"), device):
            model = build_model(run, data.shape).to(place)
            batch = data.to(place).train.rows(slice(64))
            given = Given(eps.to(place))
            draw = model.draw(batch.x, noise=given)
            loss = (draw.kl.sum(0) - draw.log_px.mean(0)).mean()
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
        found[f"{name}: loss"] = abs(losses[1] / losses[0] - 1)
        found[f"{name}: gradient"] = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
        terms: list[torch.Tensor] = []
        for way in ("off", "on"):
            trainer = Trainer(v.override(run, compile=way, precision="fp32"), data.to(device), device)
            for _ in range(steps):
                trainer.train_step()
            terms.append(trainer.terms[:steps, 0].cpu())
        found[f"{name}: compiled, {steps} steps"] = float(((terms[1] - terms[0]) / terms[0]).abs().max())
    return found


class Given(Noise):
    """The same numbers on every device."""

    def __init__(self, eps: torch.Tensor) -> None:
        self.eps = eps

    def drawn(self, sampler: Sampler, stream: str, shape: Sequence[int]) -> torch.Tensor:
        """Those numbers."""
        return self.eps.reshape(tuple(shape))


def peak(device: torch.device, kind: torch.dtype) -> float:
    """TFLOP/s of a large matrix product, as measured."""
    side = 8192 if device.type == "cuda" else 1024
    x = torch.randn(side, side, device=device, dtype=kind)
    for _ in range(3):
        torch.mm(x, x)
    best = min(timed(device, lambda: [torch.mm(x, x) for _ in range(5)]) / 5 for _ in range(5))
    return 2 * side**3 / best / 1e12


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds, with the device's queue empty before and after."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed(
    name: str, precision: str, way: str, data: v.data.Dataset, device: torch.device, steps: int
) -> dict[str, Any]:
    """Images and floating-point operations a second of a recipe's steps."""
    run: Run = v.override(recipe(name), precision=precision, compile=way)
    trainer = Trainer(run, data.to(device), device)

    def go(count: int) -> None:
        for _ in range(count):
            trainer.train_step()

    start = timed(device, lambda: go(10))
    seconds = min(timed(device, lambda: go(steps)) / steps for _ in range(3))
    trainer.check_finite()
    plain = Trainer(v.override(run, compile="off"), trainer.data, device)
    with FlopCounterMode(display=False) as counter:  # of a whole step: forward, backward, critics
        plain.train_step()
    work = counter.get_total_flops()
    return {"recipe": name, "precision": precision, "compile": way, "first_10_steps": start,
            "images_per_second": trainer.batch_size / seconds, "ms_per_step": seconds * 1e3,
            "tflops": work / seconds / 1e12}  # fmt: skip


def quality(seed: int, way: str, data: v.data.Dataset, device: torch.device) -> dict[str, Any]:
    """Seconds of training, compiling included, and the test result."""
    run = v.override(recipe("fast"), seed=seed, device=device.type, precision="bf16", compile=way)
    holder: list[v.VAE] = []
    seconds = timed(device, lambda: holder.append(v.fit(run, data)))
    distortion, rate = elbo_terms(holder[0].to(device), data.to(device).batches("test", 500))
    return {"seed": seed, "compile": way, "seconds": seconds, "distortion": float(distortion.mean()),
            "rate": float(rate.mean())}  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """The tables."""
    console = Console()
    console.print(f"{result['machine']}, torch {result['torch']}, {result['data']}")
    for name, value in result["correctness"].items():
        console.print(f"{name}: relative difference {value:.1e}")
    peaks = result["peak"]
    table = Table(
        "recipe", "precision", "compiled", "images/s", "ms a step", "TFLOP/s", "of the peak", "first 10 steps, s"
    )
    for row in result["speed"]:
        share = row["tflops"] / peaks["bfloat16" if row["precision"] == "bf16" else "float32"]
        table.add_row(row["recipe"], row["precision"], row["compile"], f"{row['images_per_second']:,.0f}",
                      f"{row['ms_per_step']:.3f}", f"{row['tflops']:.2f}", f"{share:.1%}",
                      f"{row['first_10_steps']:.1f}")  # fmt: skip
    console.print(table)
    for row in result.get("time_to_quality", ()):
        console.print(f"fast, seed {row['seed']}, compiled {row['compile']}: {row['seconds']:.2f} s, "
                      f"reconstruction {row['distortion']:.2f}, KL {row['rate']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options))
