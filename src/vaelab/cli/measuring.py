"""Commands that measure: ``evaluate``."""

from __future__ import annotations

import hashlib
import json as json_
from typing import Literal

from rich.console import Console
from rich.table import Table

from vaelab.cli.common import RunPath, opened
from vaelab.errors import UsageError


def evaluate(run: RunPath, /, split: Literal["train", "validation", "test"] = "test", num_samples: int = 1,
             json: bool = False) -> None:  # fmt: skip
    """Measure a run: negative ELBO, distortion, rate, with protocol and standard error; writes metrics.json.

    Args:
        split: the images to score.
        num_samples: posterior samples per image.
        json: print JSON instead of a table.
    """
    from vaelab import evaluate as measure
    from vaelab.checkpoint import read_json, write_json

    if num_samples < 1:
        raise UsageError(f"--num-samples {num_samples}: must be at least 1")
    config, model, data = opened(run)
    estimates = measure.evaluate(model, config, data, split, num_samples)
    floor = None if model.is_density(binary_data=data.binary) else measure.grey_floor(data.split(split))
    result = {"cross_entropy_floor": floor, "metrics": {name: e.to_json() for name, e in estimates.items()}}
    about = {
        "recipe": config.recipe,
        "beta": config.objective.beta,
        "data": data.record(),
        "weights_sha256": hashlib.sha256((run / "best_model.pth").read_bytes()).hexdigest(),
    }
    path = run / "metrics.json"
    before = read_json(path) if path.exists() else {}
    # What was measured on other splits stays, as long as it was the same weights on the same data.
    splits = before["splits"] if before | about == before and "splits" in before else {}
    write_json(path, {**about, "splits": {**splits, split: result}})
    if json:
        print(json_.dumps({**about, "split": split, **result}, indent=2))
        return
    console = Console()
    protocol = next(iter(estimates.values())).protocol
    console.print(f"{run}: {protocol}", highlight=False, soft_wrap=True)
    table = Table(box=None)
    for column in ("", "value", "s.e.", "unit", "n"):
        table.add_column(column, justify="left" if column in ("", "unit") else "right")
    names = {"negative_elbo": "-ELBO (distortion + rate)", "objective": f"distortion + {config.objective.beta:g} rate"}
    for name, estimate in estimates.items():
        numbers = (f"{estimate.value:.2f}", f"{estimate.stderr:.2f}", estimate.unit, f"{estimate.n:,}")
        table.add_row(names.get(name, name), *numbers)
    console.print(table, highlight=False)
    if floor is not None:
        console.print(f"Cross-entropy on grey pixels is no likelihood, and cannot go below {floor:.2f} nats here "
                      "(the mean entropy of the pixels).", highlight=False)  # fmt: skip
