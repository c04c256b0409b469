"""The tables in docs/ and README.md, made from the committed JSON.

    python benchmarks/tables.py collect RUN ...   copy what an evaluated run measured to benchmarks/results/mnist/
    python benchmarks/tables.py render            write the tables into the pages, between their markers

A page holds ``<!-- table: NAME -->`` and ``<!-- end -->``; what stands between is replaced.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vaelab.checkpoint import write_json
from vaelab.config import Run, flat
from vaelab.errors import FailureError
from vaelab.folder import RunFolder
from vaelab.recipes import RECIPES, recipe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md", "docs/improving.md", "docs/theory.md")


def collect(path: Path) -> None:
    """Copy what a run measured on the test split."""
    folder = RunFolder.open(path)
    measured = json.loads((path / "metrics.json").read_text())
    if "test" not in measured["splits"]:
        raise FailureError(f"{path}/metrics.json has no test numbers: run vaelab evaluate {path}")
    metrics = {**{key: measured[key] for key in ("recipe", "beta", "data")}, **measured["splits"]["test"]}
    history, config, state = folder.history(), folder.config(), folder.load_last()
    if state is None or state["best"] is None:
        raise FailureError(f"{path} has no best epoch: its run is not finished")
    best = history[state["best"][1] - 1]
    result = {
        "command": command(folder.run),
        "epochs": history[-1]["epoch"],
        "best_epoch": best["epoch"],
        "validation": {key: best[f"validation_{key}"] for key in ("loss", "distortion", "rate")},
        "seconds": round(sum(r["seconds"] for r in history)),
        "median_epoch_seconds": statistics.median(r["seconds"] for r in history),
        "images_per_second": statistics.median(r["images_per_second"] for r in history),
        "seed": folder.run.training.seed,
        "resolved": config["resolved"],
        "vaelab": config["vaelab"],
        **metrics,
    }
    write_json(RESULTS / "mnist" / f"{folder.run.recipe}.json", result)


def command(run: Run) -> str:
    """The command line that gives this run."""
    default = flat(recipe(run.recipe))
    words = [f"vaelab train {run.recipe}"]
    for name, leaf in flat(run).items():
        if leaf.value != default[name].value:
            values = leaf.value if isinstance(leaf.value, tuple) else (leaf.value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def render() -> None:
    """Write all tables into their pages."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text()))


def rendered(text: str) -> str:
    """A page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", table, text, flags=re.S)


def recipes_table() -> str:
    """The five recipes on MNIST's test set."""
    rows = ["| recipe | reconstruction | KL | −ELBO | published | epochs | time |", "|---|---|---|---|---|---|---|"]
    for name, entry in RECIPES.items():
        result = _load(f"mnist/{name}")
        if result is None:
            continue
        metrics = result["metrics"]
        published = "–"
        if entry.published:
            ours = metrics["objective"]["value"]
            published = (f"reconstruction {entry.published['distortion']:.2f}, KL {entry.published['rate']:.2f}, "
                         f"weighted sum {entry.published['objective']:.2f} (ours: {ours:.2f})")  # fmt: skip
        cells = [_number(metrics[key]) for key in ("distortion", "rate", "negative_elbo")]
        threads = result["resolved"]["threads"]
        minutes = result["median_epoch_seconds"] * result["epochs"] / 60
        time = f"{minutes:.0f} min on {threads} core{'s' if threads > 1 else ''}"
        rows.append(f"| `{name}` | {' | '.join(cells)} | {published} | {result['epochs']} | {time} |")
    return "\n".join(rows)


def commands_table() -> str:
    """How each recipe's numbers were made."""
    rows = ["| recipe | command | best epoch | images/s | parameters | machine |", "|---|---|---|---|---|---|"]
    for name in RECIPES:
        result = _load(f"mnist/{name}")
        if result is not None:
            resolved = result["resolved"]
            where = f"{resolved['machine']}, torch {resolved['torch']}, {resolved['precision']}"
            rows.append(
                f"| `{name}` | `{result['command']}` | {result['best_epoch']} of {result['epochs']} | "
                f"{result['images_per_second']:,.0f} | {resolved['parameters']:,} | {where} |"
            )
    return "\n".join(rows)


def sweep_table(name: str) -> Callable[[], str]:
    """A sweep's rows, in nats per validation image."""

    def table() -> str:
        result = _load(f"sweep-{name}")
        if result is None:
            return "(not measured yet)"
        rows = ["| | reconstruction | KL | −ELBO | epochs | seconds |", "|---|---|---|---|---|---|"]
        for label, row in result["rows"].items():
            numbers = (f"{row[key][0]:.2f} ± {row[key][1]:.2f}" for key in ("distortion", "rate", "negative_elbo"))
            rows.append(f"| {label} | {' | '.join(numbers)} | {row['epochs']} | {row['seconds']} |")
        threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
        rows.append(
            f"\n`{result['command']}`: {result['protocol']}; seed {result['seed']}; {threads}, {result['machine']}."
        )
        return "\n".join(rows)

    return table


def throughput_table() -> str:
    """Training throughput against pythae."""
    result = _load("train_throughput")
    if result is None:
        return "(not measured yet)"
    ratios = [pair["ratio"] for pair in result["pairs"]]
    median = result["median"]
    return "\n".join(
        [
            "| | seconds an epoch of 60,000 | ratio |",
            "|---|---|---|",
            f"| vaelab | {median['vaelab']:.2f} | {median['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
            f"| pythae {result['versions']['pythae']} | {median['pythae']:.2f} | 1 |",
            f"\n`{result['command']}`: {result['what']}; medians of {len(ratios)} interleaved pairs; "
            f"{result['threads']} threads, {result['machine']}, torch {result['versions']['torch']} on both sides.",
        ]
    )


TABLES: dict[str, Callable[[], str]] = {
    "recipes": recipes_table,
    "commands": commands_table,
    "improving": sweep_table("improving"),
    "beta": sweep_table("beta"),
    "augmentation": sweep_table("augmentation"),
    "throughput": throughput_table,
}


def _number(estimate: dict[str, Any]) -> str:
    return f"{estimate['value']:.2f} ± {estimate['stderr']:.2f}"


def _load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"] and len(sys.argv) > 2:
        for argument in sys.argv[2:]:
            collect(Path(argument))
    elif sys.argv[1:] == ["render"]:
        render()
    else:
        sys.exit(__doc__)
