"""Recipes against their published numbers: trained, measured, and put side by side as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from vaelab.config import Run, override
from vaelab.data.datasets import load
from vaelab.errors import FailureError, UsageError
from vaelab.measuring.measure import PARTS, Part, Plan, measure
from vaelab.progress import Bar, Display
from vaelab.recipes import RECIPES, Recipe, part_of, recipe
from vaelab.runs.checkpoint import read_json
from vaelab.runs.folder import RunFolder
from vaelab.train import fit, with_absolute_path

SHORT = 10.0  # minutes: a recipe that costs less is run with three seeds, else with one


@final
@dataclass(frozen=True)
class Row:
    """One number of one recipe.

    Args:
        recipe, metric: which.
        published: the source's number; None if it gives none.
        values: ours, one a seed.
        stderr: standard error over examples of the first seed's.
        unit, protocol: of ours.
        minutes: training, one seed, as measured.
    """

    recipe: str
    metric: str
    published: float | None
    values: tuple[float, ...]
    stderr: float | None
    unit: str
    protocol: str
    minutes: float

    @property
    def measured(self) -> str:
        """Mean and s.d. over seeds; of one seed the value and its standard error over examples, named so."""
        mean = statistics.mean(self.values)
        if len(self.values) > 1:
            return f"{mean:.2f} ± {statistics.stdev(self.values):.2f} (s.d. of {len(self.values)} seeds)"
        return f"{mean:.2f}" if self.stderr is None else f"{mean:.2f} (one seed; s.e. over images {self.stderr:.2f})"


def seeds_of(entry: Recipe, asked: int | None) -> range:
    """The seeds to run: as many as asked for, else three of a cheap recipe, and one of a dear or unknown one."""
    return range(asked if asked is not None else 3 if entry.minutes is not None and entry.minutes < SHORT else 1)


def reproduce(
    names: Sequence[str], out: Path, *, seeds: int | None = None, data: str | None = None, epochs: int | None = None,
    num_samples: int | None = None, threads: int | None = None, bar: Bar,
) -> list[Row]:  # fmt: skip
    """Train and measure recipes, each seed in a run folder of its own; what is there already is gone on with.

    Args:
        names: the recipes.
        out: where the run folders are.
        seeds: how many; None: see ``seeds_of``.
        data, epochs: in place of the recipe's own. Then it is no reproduction, but tells that all works, and no
            published number stands beside it.
        num_samples: importance samples, where the published number is a likelihood; None: as many as it was made of.
        threads: CPU threads.
        bar: shows the measuring.
    """
    rows: list[Row] = []
    for name in names:
        entry = RECIPES[name]
        wanted = tuple(entry.published) or entry.shown
        plan = _plan(wanted, num_samples, threads)
        published = _comparable(entry, recipe(name), data, epochs)
        if published != entry.published:
            bar.say(f"{name}: with other data or epochs than the recipe's, no published number stands beside it")
        found: list[dict[str, Any]] = []
        minutes: list[float] = []
        for seed in seeds_of(entry, seeds):
            settings = {"seed": seed, "threads": threads, "data": data, "epochs": epochs}
            run = override(recipe(name), **{k: v for k, v in settings.items() if v is not None})
            path = out / f"{name}-{Path(run.data.source).stem}-s{seed}"
            bar.say(f"{name}, seed {seed}: into {path}")
            _train(run, path)
            content = measure(path, plan, bar)
            found.append(content["splits"]["test"][run.data.protocol]["metrics"])
            minutes.append(sum(record["seconds"] for record in RunFolder.open(path).history()) / 60)
        measured = _measured(wanted, plan.num_samples, found)
        for metric in [metric for metric in entry.published if metric not in measured]:
            bar.say(f"{name}: {metric} was not measured (published {entry.published[metric]:g})")
        rows += [_row(name, metric, published.get(metric), found, statistics.mean(minutes)) for metric in measured]
    return rows


def rows_before(file: Path, names: Sequence[str], settings: Mapping[str, Any]) -> list[Row]:
    """The rows of other recipes that an earlier command has written.

    Raises:
        UsageError: if that had other ``data``, ``epochs`` or ``num_samples``.
        FailureError: if the file is no such table.
    """
    if not file.exists():
        return []
    try:
        content = read_json(file)
        rows = [Row(**{**row, "values": tuple(row["values"])}) for row in content["rows"]]
    except (KeyError, TypeError) as error:
        raise FailureError(f"{file} was not written by this vaelab: remove it, or choose another --out") from error
    others = [row for row in rows if row.recipe not in names]
    if others and content.get("settings") != settings:
        raise UsageError(f"{file} holds a table of other settings: choose another --out, or remove it")
    return others


def _train(run: Run, path: Path) -> None:
    """Train, or go on with what was interrupted; a run that is complete stays as it is."""
    run = with_absolute_path(run)
    resume = (path / "config.json").exists()
    if resume:
        RunFolder.open(path).reconcile(run, "ask for what it was begun with, or choose another folder with --out")
    fit(run, load(run.data), out=path, resume=resume, display=Display())


def _plan(wanted: Sequence[str], num_samples: int | None, threads: int | None) -> Plan:
    likelihoods = [int(metric.removeprefix("nll_")) for metric in wanted if metric.startswith("nll_")]
    needed = {"elbo", *map(part_of, wanted)}
    parts: tuple[Part, ...] = tuple(part for part in PARTS if part in needed)
    return Plan(parts=parts, num_samples=num_samples or max(likelihoods, default=1), threads=threads)


def _measured(wanted: Sequence[str], num_samples: int, found: list[dict[str, Any]]) -> list[str]:
    """What was measured of all seeds: in place of a bound with other importance samples than were taken, theirs."""
    common = set.intersection(*map(set, found))
    names = (m if m in common or not m.startswith("nll_") else f"nll_{num_samples}" for m in wanted)
    return [name for name in dict.fromkeys(names) if name in common]


def _comparable(entry: Recipe, own: Run, data: str | None, epochs: int | None) -> Mapping[str, float]:
    """The published numbers that a run may be held against: all of its recipe's, or none."""
    is_own = data in (None, own.data.source) and epochs in (None, own.training.epochs)
    return entry.published if is_own else {}


def _row(name: str, metric: str, published: float | None, found: list[dict[str, Any]], minutes: float) -> Row:
    first = found[0][metric]
    values = tuple(metrics[metric]["value"] for metrics in found)
    return Row(name, metric, published, values, first["stderr"], first["unit"], first["protocol"], minutes)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| recipe | number | published | measured | unit | protocol | minutes |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        published = "–" if row.published is None else f"{row.published:.2f}"
        protocol = row.protocol.replace("|", "\\|")
        lines.append(
            f"| `{row.recipe}` | {row.metric} | {published} | {row.measured} | {row.unit} | {protocol} | "
            f"{row.minutes:.1f} |"
        )
    return "\n".join(lines)
