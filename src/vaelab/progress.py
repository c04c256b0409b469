"""What a person sees while something takes long: a live line in a terminal, nothing in a pipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self, final

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

_FIELDS = ("loss", "distortion", "rate", "lr", "images")


class _Live:
    """A live line on the error stream, where that is a terminal."""

    def __init__(self, *columns: ProgressColumn, transient: bool = False, **fields: Any) -> None:
        self._console = Console(stderr=True)
        hidden = not self._console.is_terminal
        self._progress = Progress(*columns, console=self._console, disable=hidden, transient=transient)
        self._task = self._progress.add_task("", total=None, **fields)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


@final
class Display(_Live):
    """A progress bar over all steps, with loss, distortion, rate (nats per image), learning rate and images/s.

    ``due()`` is true a few times a second: reading a number from a GPU makes it wait, so nobody asks more often.
    """

    def __init__(self) -> None:
        texts = (
            "[bold]{task.description}",
            "loss {task.fields[loss]}",
            "distortion {task.fields[distortion]}",
            "rate {task.fields[rate]}",
            "lr {task.fields[lr]}",
            "{task.fields[images]} images/s",
        )
        columns = [TextColumn(texts[0]), BarColumn(bar_width=20), *map(TextColumn, texts[1:]), TimeRemainingColumn()]
        super().__init__(*columns, **dict.fromkeys(_FIELDS, "-"))
        self._shown = 0.0

    def due(self) -> bool:
        """Whether it is time to show something again."""
        return not self._progress.disable and time.monotonic() - self._shown > 0.3

    def show(
        self, epoch: int, epochs: int, step: int, total: int, terms: Mapping[str, float], images_per_second: float
    ) -> None:
        """Show where the run is."""
        self._shown = time.monotonic()
        self._progress.update(
            self._task,
            description=f"epoch {epoch}/{epochs}",
            completed=step,
            total=total,
            loss=f"{terms['loss']:.2f}",
            distortion=f"{terms['distortion']:.2f}",
            rate=f"{terms['rate']:.2f}" if "rate" in terms else "-",
            lr=f"{terms['learning_rate']:.2g}",
            images=f"{images_per_second:,.0f}",
        )


@final
class Bar(_Live):
    """A progress bar for one long piece of work after another."""

    def __init__(self) -> None:
        count = TextColumn("{task.completed}/{task.total}")
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), count, TimeRemainingColumn()]
        super().__init__(*columns, transient=True)

    def begin(self, title: str) -> None:
        """Start on another piece of work."""
        self._progress.reset(self._task, description=title, total=None)

    def advance(self, done: int, total: int) -> None:
        """Show how much of it is done."""
        self._progress.update(self._task, completed=done, total=total)

    def say(self, text: str) -> None:
        """Print a line above the bar, on the error stream, where it is no part of the result."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
