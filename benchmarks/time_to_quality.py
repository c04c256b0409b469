"""Seconds from the start of a process to a recipe's test result, and what bf16 changes of that result.

    python benchmarks/time_to_quality.py [--recipe fast] [--seeds 0 1 2 3 4] [--precisions bf16 fp32] [--threads 2]

Each seed is a fresh process that imports, reads MNIST, trains with validation after each epoch, and scores the test
images (one posterior sample, the protocol of the published numbers). Nothing is left out of the clock.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time

STARTED = time.perf_counter()  # of a process that is timed: before the imports that it pays for

from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

HERE = Path(__file__).parent
RESULT = "RESULT "


@dataclass(frozen=True)
class Options:
    """Time to quality."""

    recipe: str = "fast"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    precisions: tuple[str, ...] = ("bf16", "fp32")
    compile: str = "auto"
    threads: int = 2
    epochs: int | None = None
    changes: tuple[str, ...] = ()
    """Other settings of the recipe, as in num_samples=10 or warm_samples=[]."""
    side: str | None = None
    """Train and score once, in this precision, in this process (used by the benchmark itself)."""


def main() -> None:
    """Time every seed, print a table, write benchmarks/results/time-RECIPE.json."""
    if "--side" in sys.argv:
        options = json.loads(sys.argv[sys.argv.index("--side") + 1])
        print(RESULT + json.dumps(one(**options)), flush=True)
        return
    import tyro

    from environments import result_of
    from vaelab.recipes import RECIPES
    from vaelab.runs.checkpoint import write_json
    from vaelab.runtime import cpu_name

    options = tyro.cli(Options)
    published = RECIPES[options.recipe].published
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for precision in options.precisions:  # in turn: a machine whose speed drifts is fair to both
            given = {"recipe": options.recipe, "seed": seed, "precision": precision, "threads": options.threads,
                     "compile": options.compile, "epochs": options.epochs,
                     "changes": dict(read_change(change) for change in options.changes)}  # fmt: skip
            started = time.perf_counter()
            found = result_of([sys.executable, __file__, "--side", json.dumps(given)])
            seconds = time.perf_counter() - started
            row = {**given, "seconds": round(seconds, 2), **found}
            rows.append(row)
            told = [key for key in ("distortion", "rate") if key in published]
            beaten = bool(told) and all(row[key] <= published[key] for key in told)
            print(f"seed {seed} {precision}: {seconds:.1f} s ({row['training']:.1f} training), test reconstruction "
                  f"{row['distortion']:.2f}, KL {row['rate']:.2f}"
                  f"{', beats the published' if beaten else ''}", flush=True)  # fmt: skip
    content = {
        "command": " ".join(["python benchmarks/time_to_quality.py", *sys.argv[1:]]),
        "what": "from process start to the test result; 10,000 test images as the recipe is trained",
        "machine": cpu_name(), "published": published, "rows": rows, "gap": gap(rows),
    }  # fmt: skip
    write_json(HERE / "results" / f"time-{options.recipe}.json", content)
    print(f"bf16 - fp32 of the objective: {content['gap']}")


def read_change(text: str) -> tuple[str, Any]:
    """A setting's name and value, of ``name=value`` with the value in JSON."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


def one(
    recipe: str, seed: int, precision: str, threads: int, compile: str, epochs: int | None, changes: dict[str, Any]
) -> dict[str, Any]:
    """Train and score in this process."""
    import torch
    from torch.nn import ModuleDict

    import vaelab as v
    from vaelab.objectives import sum_parts
    from vaelab.train import fit

    imported = time.perf_counter()
    run = v.override(v.recipes.recipe(recipe), seed=seed, precision=precision, threads=threads, compile=compile)
    run = v.override(run, **changes, **({} if epochs is None else {"epochs": epochs}))
    data = v.load(run.data)
    read = time.perf_counter()
    model = fit(run, data)
    trained = time.perf_counter()
    torch.set_num_threads(threads)
    objective = run.objective.at(math.inf)
    batches = data.batches("test", 500)
    with torch.no_grad():
        parts = objective.parts(model, ModuleDict(), *next(iter(data.batches("test", 2))))
    zeros = {name: torch.zeros_like(part[0], dtype=torch.float64) for name, part in parts.items()}
    sums = sum_parts(objective, model, ModuleDict(), batches, zeros)
    means = {name: total / len(data.test) for name, total in sums.items()}
    times = {"imports": imported - STARTED, "data": read - imported, "training": trained - read,
             "test": time.perf_counter() - trained}  # fmt: skip
    scores = {**{name: means[name] for name in objective.terms}, "objective": objective.loss(means)}
    return {**{key: round(value, 2) for key, value in times.items()}, **{k: float(v) for k, v in scores.items()}}


def gap(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """What bf16 adds to the test objective, in nats: the mean over seeds, and its standard error."""
    both = {(row["seed"], row["precision"]): row["objective"] for row in rows}
    seeds = sorted({seed for seed, _ in both})
    if not all((seed, precision) in both for seed in seeds for precision in ("bf16", "fp32")):
        return None
    found = [both[seed, "bf16"] - both[seed, "fp32"] for seed in seeds]
    spread = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
    return {"mean": statistics.mean(found), "stderr": spread, "seeds": len(found)}


if __name__ == "__main__":
    main()
