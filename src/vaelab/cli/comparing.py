"""The command that puts runs side by side: ``compare``."""

from __future__ import annotations

import dataclasses
import json as json_
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Printed
from tyro.conf import Positional

from vaelab.errors import UsageError
from vaelab.labels import duration, images, label, pixels, setting

if TYPE_CHECKING:
    from vaelab.studies.comparison import Comparison, Measured, Row, Table

Runs = Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN RUN ...", help="run folders, evaluated")]

RULE = (
    "* better than every other run by more than 2 standard errors of the difference, sqrt(s1^2 + s2^2). "
    "Runs are scored on the same images, so that this overstates the noise of the difference; "
    "it says nothing of another seed."
)
PIPE_WIDTH = 1000  # where there is no terminal, nothing is folded
LONGEST_UNIT = 8  # a longer one says what the label says
LEAST_LABEL = 16  # narrower, a label is no longer readable


def compare(runs: Runs, /, out: Path | None = None, json: bool = False) -> None:
    """Put evaluated runs side by side: their numbers as far as they are comparable, their curves, their samples.

    Args:
        out: the PNG, SVG or PDF to write; default: compare-NAME-NAME.png in the current folder.
        json: print JSON instead of tables; a picture is drawn then only with --out.
    """
    from vaelab import figures
    from vaelab.drawing import media
    from vaelab.runs.checkpoint import write_bytes
    from vaelab.studies import comparison

    measured = comparison.gather(runs)
    target = None if json and out is None else _target(out, [run.name for run in measured])
    found = comparison.compare(measured)
    if json:
        content = {**dataclasses.asdict(found), "picture": None if target is None else str(target)}
        print(json_.dumps(content, indent=2))
    else:
        console = _console()
        with console.capture() as text:  # in one piece: a pipe whose reader leaves early ends in main(), not here
            _print(console, found)
        print(text.get(), end="")
    if target is not None:
        models = {run.name: run.model for run in measured}
        write_bytes(target, media.encode(figures.comparison(_curves(measured), models), target.suffix))
        if not json:
            print(target)


def _curves(runs: Sequence[Measured]) -> list[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """The histories of runs by name, in a panel, with a title, for each set that was validated on the same images."""
    panels: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        data, protocol = run.record["data"], run.record["protocol"]
        kind = ", as densities" if run.is_real else ""
        key = (f"{data}, {pixels(protocol, run.record['shape'][0])}{kind}", run.record["validation_sha256"][:8])
        panels.setdefault(key, {})[run.name] = run.history
    titles = [title for title, *_ in panels]
    return [(f"{title}, images {sha256}" if titles.count(title) > 1 else title, histories)
            for (title, sha256), histories in panels.items()]  # fmt: skip


def _target(out: Path | None, names: Sequence[str]) -> Path:
    path = out or Path("-".join(["compare", *(name.replace("/", "-") for name in names)]) + ".png")
    from vaelab.drawing.media import FIGURES

    if path.suffix not in FIGURES:
        raise UsageError(f"--out {path}: a picture is a {' or '.join(FIGURES)}")
    if path.exists():
        raise UsageError(f"{'--out ' if out else ''}{path} exists: give another name with --out, or remove it first")
    return path


def _console() -> Console:
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=PIPE_WIDTH)


def _print(console: Console, found: Comparison) -> None:
    _print_runs(console, found)
    for table in found.tables:
        _print_table(console, table)
    if any(row.better and len(row.cells) > 1 for table in found.tables for row in table.rows):
        _say(console, RULE)
    elif not any(len(table.runs) > 1 for table in found.tables):
        _say(console, "No two of these runs can be compared.")
    if found.apart:
        _say(console, "", "Kept apart:", *(f"- {reason}" for reason in found.apart))


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _print_runs(console: Console, found: Comparison) -> None:
    runs = Printed(box=None)
    for column in ("run", "recipe", "seed", "epochs", "parameters", "training"):
        runs.add_column(column, justify="left" if column in ("run", "recipe") else "right", overflow="fold")
    for run in found.runs:
        asked = "" if run["epochs"] == run["epochs_asked_for"] else f" of {run['epochs_asked_for']}"
        runs.add_row(escape(run["name"]), run["recipe"], str(run["seed"]), f"{run['epochs']}{asked}",
                     f"{run['parameters']:,}", duration(run["seconds"]))  # fmt: skip
    console.print(runs, highlight=False)
    machines: dict[str, list[str]] = {}
    for run in found.runs:
        machines.setdefault(run["machine"] or "a machine that was not recorded", []).append(run["name"])
    if len(machines) == 1:
        _say(console, f"Trained on {next(iter(machines))}.")
    else:
        on = [f"{machine} ({', '.join(names)})" for machine, names in machines.items()]
        _say(console, f"Trained on {'; '.join(on)}.")
    _say(console, *found.training_sets)
    _say(console, "")
    names = [run["name"] for run in found.runs]
    rows = [(name.replace("_", "-"), "", [setting(values[r]) if r in values else "" for r in names])
            for name, values in found.settings.items()]  # fmt: skip
    if rows:
        _grid(console, "Settings that differ", names, rows)
    else:
        _say(console, "No setting differs, but for the seed or the epochs.", "")


def _print_table(console: Console, table: Table) -> None:
    title = f"{table.data} {table.split} ({images(table.images)}), {table.pixels}"
    rows: list[tuple[str, str, list[str]]] = []
    for row in table.rows:
        fewer = f" [n={row.n:,}]" if row.n != table.images else ""
        unit = row.unit if len(row.unit) <= LONGEST_UNIT else ""
        rows.append((label(row.metric, row.beta) + fewer, unit, _cells(row, table.runs)))
    _grid(console, title, table.runs, rows, end=not table.notes)
    for note in table.notes:
        labels = list(dict.fromkeys(label(metric, None).strip() for metric in note.metrics))
        _say(console, f"{', '.join(labels)}: {note.text}." if labels else note.text)
    if table.notes:
        _say(console, "")


def _cells(row: Row, runs: Sequence[str]) -> list[str]:
    """Value and standard error of each run, with as many places as the errors have something to say about."""
    errors = [cell.stderr for cell in row.cells.values() if cell.stderr]
    places = min(max(2, -math.floor(math.log10(min(errors)))), 6) if errors else 2
    shown: list[str] = []
    for name in runs:
        cell = row.cells.get(name)
        error = "" if cell is None or cell.stderr is None else f" ± {cell.stderr:.{places}f}"
        mark = "*" if row.best == name else " "
        shown.append("- " if cell is None else f"{cell.value:.{places}f}{error}{mark}")
    return shown


def _grid(console: Console, title: str, runs: Sequence[str], rows: Sequence[tuple[str, str, list[str]]],
          end: bool = True) -> None:  # fmt: skip
    """Print rows of (label, unit, cell of each run), as many runs side by side as the width has room for.

    Where all do not fit, the spaces about the ± go first, then labels fold; then the runs are dealt out to several
    tables, one below the other.
    """
    units = max(len(unit) for _, unit, _ in rows)
    labels = max(len(label) for label, _, _ in rows)
    cells = [cells for _, _, cells in rows]
    widths = _widths(runs, cells)
    label, gap, block = labels, 2, len(runs)
    if console.width < labels + 2 + (units + 2 if units else 0) + sum(widths) + 2 * len(runs):
        tight = [[cell.replace(" ± ", "±") for cell in row] for row in cells]
        left = console.width - 1 - (units + 1 if units else 0) - sum(_widths(runs, tight)) - len(runs)
        if left >= LEAST_LABEL:
            cells, label, gap = tight, min(labels, left), 1
        else:
            room, each = console.width - 2 - (units + 2 if units else 0), max(widths) + 2
            block = max(1, (room - labels) // each)
            label = min(labels, max(8, room - block * each))  # on a very narrow one labels fold for a single run
    for first in range(0, len(runs), block):
        # Not as the table's own title, which would be folded to its width.
        heading = title if first == 0 else f"{title} (continued)"
        console.print(heading, style="bold", soft_wrap=True, highlight=False, markup=False)
        shown = Printed(box=None, padding=(0, gap, 0, 0))
        shown.add_column("", width=label, overflow="fold")
        if units:
            shown.add_column("", no_wrap=True)
        for name in runs[first : first + block]:
            shown.add_column(escape(name), justify="right", overflow="fold")
        for (name, unit, _), row in zip(rows, cells, strict=True):
            part = row[first : first + block]
            if any(cell.strip(" -") for cell in part):
                marked = [f"[bold]{escape(cell)}[/bold]" if cell.endswith("*") else escape(cell) for cell in part]
                shown.add_row(escape(name), *([escape(unit)] if units else []), *marked)
        console.print(shown, highlight=False)
        if end or first + block < len(runs):
            _say(console, "")


def _widths(runs: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int]:
    """What each run's column needs: numbers are never folded, long names and settings (a path) are."""
    return [max(min(len(name), 12), *(min(len(row[i]), 24) for row in cells)) for i, name in enumerate(runs)]
