"""How fast vaelab trains, beside its peers and the machine's own limits, all in one run: ``make bench``.

    python benchmarks/training.py [--repeats 5] [--only SIDE ...] [--scaling]

Each repeat runs every side once, in a fresh process, one after the other, so that a machine whose speed drifts is fair
to all; what is quoted are ratios within a repeat, their median and range. A repeat is a seed: the sides' test ELBOs are
compared over them. Counted are the seconds of an epoch after the first of each process (the first compiles; it is
given apart). Peers are installed from PyPI into environments of their own, in ``.bench``.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch.fx.experimental.proxy_tensor import make_fx

import vaelab as v
from environments import HERE, JAX, PYTHAE, RESULT, python_of, random_images, result_of
from vaelab.errors import FailureError
from vaelab.objectives import elbo_terms
from vaelab.processes.distributed import leads, team
from vaelab.runs.checkpoint import write_json
from vaelab.runs.folder import source_commit
from vaelab.runtime import cpu_name, denormals_flushed
from vaelab.training.products import faster_products
from vaelab.training.trainer import Trainer

WARM_UP = 5  # steps of the convolutional network; the first compiles
MLP = {"encoder_hidden_dims": (400,), "decoder_hidden_dims": (400,), "latent_dim": 20, "lr": 1e-3, "batch_size": 128}


@dataclass(frozen=True)
class Options:
    """Training speed beside peers and limits."""

    repeats: int = 5
    epochs: int = 3
    """Epochs of a process of the MLP; the first is not counted."""
    steps: int = 25
    """Steps of a process of the convolutional network that are timed, three times, after five that are not."""
    threads: int = 2
    only: tuple[str, ...] = ()
    """These sides alone (default: all)."""
    scaling: bool = False
    """Measure how cost grows instead: with batch, width, image size and number of images."""
    side: str | None = None
    """Be this side, in this process, on these images (used by the benchmark itself)."""
    train: Path = Path()
    test: Path = Path()
    seed: int = 0


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Args:
        what: one line for the table.
        work: ``mlp`` (784-400-20, batch 128, Adam 1e-3) or ``conv`` (conv-beta's network and optimizer, batch 256).
        peer: the environment and the script of another library; None is vaelab.
        settings: of vaelab's run.
        processes: under torchrun, each with its share of the threads.
    """

    what: str
    work: Literal["mlp", "conv"]
    peer: tuple[str, str] | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    processes: int = 1


SIDES: dict[str, Side] = {
    "tutorial": Side("tutorial script, DataLoader", "mlp", ("pythae", "tutorial_epochs.py")),
    "pythae": Side(PYTHAE.replace("==", " "), "mlp", ("pythae", "pythae_epochs.py")),
    "jax": Side(f"{JAX.replace('==', ' ')}, an epoch in one compiled scan", "mlp", ("jax", "jax_epochs.py")),
    "plain-fp32": Side("vaelab, plain step, fp32", "mlp", None, (("precision", "fp32"), ("compile", "off"))),
    "plain-bf16": Side("vaelab, plain step, bf16", "mlp", None, (("precision", "bf16"), ("compile", "off"))),
    "fp32": Side("vaelab, compiled, fp32", "mlp", None, (("precision", "fp32"), ("compile", "on"))),
    "bf16": Side("vaelab, compiled, bf16", "mlp", None, (("precision", "bf16"), ("compile", "on"))),
    "conv-plain-fp32": Side("plain step, fp32", "conv", None, (("precision", "fp32"), ("compile", "off"))),
    "conv-plain-bf16": Side("plain step, bf16", "conv", None, (("precision", "bf16"), ("compile", "off"))),
    "conv-fp32": Side("compiled, fp32", "conv", None, (("precision", "fp32"), ("compile", "on"))),
    "conv-bf16": Side("compiled, bf16", "conv", None, (("precision", "bf16"), ("compile", "on"))),
    "conv-2-processes": Side("compiled, bf16, 2 processes of one thread", "conv", None,
                             (("precision", "bf16"), ("compile", "on")), processes=2),
}  # fmt: skip


def main(options: Options) -> None:
    """Run everything, print as it goes, write benchmarks/results/training.json."""
    if options.side is not None:
        result = ceilings(options) if options.side == "ceilings" else train(options)
        if leads():
            print(RESULT + json.dumps(result), flush=True)
        return
    if options.scaling:
        write_json(HERE / "results" / "scaling.json", {**about(options), "rows": scaling(options)})
        return
    chosen = [name for name in (*SIDES, "ceilings") if not options.only or name in options.only]
    repeats: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = save_images(Path(folder))
        for seed in range(options.repeats):
            row: dict[str, Any] = {}
            for name in chosen:
                row[name] = result_of(command(name, seed, paths, options), OMP_NUM_THREADS="")
                print(f"repeat {seed + 1}: {name} {describe(name, row[name])}", flush=True)
            repeats.append(row)
            # Written after each repeat: a run that is stopped has measured something.
            path = HERE / "results" / ("training.json" if not options.only else "training-part.json")
            write_json(path, {**about(options), "data": paths[2], "repeats": repeats})


def about(options: Options) -> dict[str, Any]:
    """What must stand beside the numbers."""
    flags = " --scaling" if options.scaling else f" --repeats {options.repeats} --epochs {options.epochs}"
    return {
        "command": f"python benchmarks/training.py{flags} --threads {options.threads}",
        "machine": cpu_name(),
        "threads": options.threads,
        "commit": source_commit(),
        "versions": {"torch": torch.__version__, "pythae": PYTHAE.partition("==")[2], "jax": JAX.partition("==")[2],
                     "vaelab": version("vaelab"), "python": platform.python_version()},
    }  # fmt: skip


def describe(name: str, row: dict[str, Any]) -> str:
    """One line of progress."""
    if name == "ceilings":
        return ", ".join(f"{key} {value:.2f}" for key, value in row.items())
    score = f", test -ELBO {row['distortion'] + row['rate']:.2f}" if "distortion" in row else ""
    return f"{seconds(row):.3f} s an epoch{score}, {row['memory']:.0f} MiB"


def seconds(row: dict[str, Any]) -> float:
    """Of an epoch: the median after the first."""
    return statistics.median(row["seconds"][1:])


def save_images(folder: Path) -> tuple[str, str, str]:
    """MNIST's 60,000 training images and its test images, or as many random ones: two files, and which they are."""
    try:
        data = v.load("mnist")
        train, test, name = (
            np.concatenate([data.train.x.numpy(), data.validation.x.numpy()]),
            data.test.x.numpy(),
            "mnist",
        )
    except FailureError as error:
        print(f"{error}\ntiming with random images instead", file=sys.stderr)
        train, test = (random_images(count).numpy() for count in (60_000, 10_000))
        name = "random"
    np.save(folder / "train.npy", train)
    np.save(folder / "test.npy", test)
    return str(folder / "train.npy"), str(folder / "test.npy"), name


def command(name: str, seed: int, paths: tuple[str, str, str], options: Options) -> list[str]:
    """What runs a side."""
    side = SIDES.get(name)
    if side is not None and side.peer is not None:
        environment, script = side.peer
        arguments = [*paths[:2], str(options.epochs), str(seed), str(options.threads)]
        return [str(python_of(environment)), str(HERE / "peers" / script), *arguments]
    threads = options.threads // (side.processes if side else 1)
    given = {"seed": seed, "epochs": options.epochs, "steps": options.steps, "threads": threads, "train": paths[0],
             "test": paths[1]}  # fmt: skip
    ours = [__file__, "--side", name, *(word for key, value in given.items() for word in (f"--{key}", str(value)))]
    if side is None or side.processes == 1:
        return [sys.executable, *ours]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(side.processes)]
    return [sys.executable, *launcher, *ours]


# --- our sides ------------------------------------------------------------------------------------------------------


def train(options: Options) -> dict[str, Any]:
    """Train as one of vaelab's sides; the seconds of epochs (conv: of its first steps, then of extrapolated epochs)."""
    assert options.side is not None
    side = SIDES[options.side]
    torch.set_num_threads(options.threads)
    base = v.recipes.mlp() if side.work == "mlp" else v.recipes.conv_beta()
    work = MLP if side.work == "mlp" else {"augment_prob": 0.0}
    settings = {**work, **dict(side.settings)}
    run = v.override(base, **settings, epochs=options.epochs, seed=options.seed)
    with team(torch.device("cpu")) as together:
        trainer = Trainer(run, images(options), torch.device("cpu"), together)
        result: dict[str, Any] = {"seconds": []}
        if side.work == "mlp":
            for _ in range(options.epochs):
                result["seconds"].append(timed(trainer, trainer.steps_per_epoch))
            result["memory"] = memory()
            model = trainer.model.eval()
            distortion, rate = elbo_terms(model, trainer.data.batches("test", 500))
            return {**result, "distortion": float(distortion.mean()), "rate": float(rate.mean())}
        result["seconds"].append(timed(trainer, WARM_UP))
        for _ in range(3):
            result["seconds"].append(timed(trainer, options.steps) / options.steps * trainer.steps_per_epoch)
        return {**result, "memory": memory()}


def timed(trainer: Trainer, steps: int) -> float:
    """The seconds of so many steps, taken as a run takes them."""
    started = time.perf_counter()
    with denormals_flushed():
        for _ in range(steps):
            trainer.train_step()
    trainer.check_finite()
    return time.perf_counter() - started


def images(options: Options) -> v.data.Dataset:
    """60,000 images an epoch, as the peers: no validation split is taken from them."""
    train, test = (torch.from_numpy(np.load(path)) for path in (options.train, options.test))
    parts = [v.data.Split(x, None, torch.arange(len(x))) for x in (train, test)]
    return v.data.Dataset("mnist", "grey", parts[0], parts[1], parts[1], binary=False, classes=None)


def memory() -> float:
    """The most that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- the machine's limits -------------------------------------------------------------------------------------------


def ceilings(options: Options) -> dict[str, float]:
    """Milliseconds of a step if it were its matrix products (or convolutions) alone, and of a copy of memory."""
    torch.set_num_threads(options.threads)
    result: dict[str, float] = {}
    for kind, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        products = mlp_products(kind)
        convolutions = conv_products(kind, images(options))
        result[f"mlp products {name} (ms a step)"] = sum(clock(product) for product in products) * 1e3
        result[f"conv products {name} (ms a step)"] = sum(clock(product, 5) for product in convolutions) * 1e3
        large = torch.randn(1024, 1024).to(kind)
        result[f"large product {name} (GFLOP/s)"] = 2 * 1024**3 / clock(by_the_faster_library(large, large), 10) / 1e9
    memory = torch.empty(64 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(memory)
    result["copy (GB/s)"] = 2 * memory.numel() / clock(lambda: target.copy_(memory), 10) / 1e9
    return result


def clock(function: Callable[[], object], times: int = 100) -> float:
    """Seconds of a call: the least of five means."""
    function()
    means: list[float] = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(times):
            function()
        means.append((time.perf_counter() - started) / times)
    return min(means)


def mlp_products(kind: torch.dtype) -> list[Callable[[], object]]:
    """The matrix products of a step of 784-400-20 at batch 128: one forward, two backward (the first layer: one)."""
    found: list[Callable[[], object]] = []
    for i, (fan_in, fan_out) in enumerate(((784, 400), (400, 40), (20, 400), (400, 784))):
        x, weight, grad = (torch.randn(*size).to(kind) for size in ((128, fan_in), (fan_out, fan_in), (128, fan_out)))
        pairs = [(x, weight.t()), (grad.t(), x), *([(grad, weight)] if i else [])]
        found += [by_the_faster_library(*pair) for pair in pairs]
    return found


def by_the_faster_library(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    """A product as a compiled step computes it on this processor."""
    graph = make_fx(torch.mm, tracing_mode="fake")(a, b)
    faster_products(graph, a.device)
    return lambda: graph(a, b)


def conv_products(kind: torch.dtype, data: v.data.Dataset) -> list[Callable[[], object]]:
    """The convolutions and matrix products of a step of conv-beta's network at batch 256, forward and backward."""
    model = Trainer(v.override(v.recipes.conv_beta(), compile="off"), data, torch.device("cpu")).model
    found: list[Callable[[], object]] = []
    x = torch.rand(256, 1, 28, 28)
    seen: list[tuple[torch.nn.Module, torch.Tensor]] = []
    kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0].detach())))
        for module in model.modules() if isinstance(module, kinds)
    ]  # fmt: skip
    with torch.no_grad():
        model.likelihood(model.posterior(x).mean)
    for hook in hooks:
        hook.remove()
    for i, (module, inputs) in enumerate(seen):
        layer, given = module.to(kind), inputs.to(kind).requires_grad_(i > 0)
        output = layer(given)
        grad = torch.ones_like(output)
        learned = [*layer.parameters(), *([given] if i else [])]
        found.append(lambda layer=layer, given=given, grad=grad, learned=learned: torch.autograd.grad(
            layer(given), learned, grad))  # fmt: skip
    return found


# --- how cost grows -------------------------------------------------------------------------------------------------


def scaling(options: Options) -> dict[str, dict[str, float]]:
    """Microseconds an image of the MLP's compiled bf16 step, one thing changed at a time."""
    torch.set_num_threads(options.threads)
    grids: dict[str, dict[int, dict[str, Any]]] = {
        "batch": {n: {"batch_size": n} for n in (32, 64, 128, 256, 512, 1024)},
        "width": {n: {"encoder_hidden_dims": (n,), "decoder_hidden_dims": (n,)} for n in (100, 200, 400, 800, 1600)},
        "side of the image": {n: {} for n in (16, 28, 40, 56, 80)},
        "images": {n: {} for n in (2_000, 10_000, 60_000, 240_000)},
    }
    rows: dict[str, dict[str, float]] = {}
    for what, values in grids.items():
        rows[what] = {}
        for value, settings in values.items():
            side, count = (value if what.startswith("side") else 28), (value if what == "images" else 20_000)
            part = v.data.Split(random_images(count, side), None, torch.arange(count))
            data = v.data.Dataset("random", "grey", part, part, part, binary=False, classes=None)
            run = v.override(v.recipes.mlp(), **{**MLP, **settings}, precision="bf16", compile="on")
            trainer = Trainer(run, data, torch.device("cpu"))
            steps = max(10, min(trainer.steps_per_epoch, 25_600 // trainer.batch_size))
            timed(trainer, 5)
            best = min(timed(trainer, steps) / steps / trainer.batch_size for _ in range(5))
            rows[what][str(value)] = round(best * 1e6, 3)
            print(f"{what} {value}: {best * 1e6:.2f} us an image", flush=True)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options))
