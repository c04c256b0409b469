"""How large should the latent be, and which beta? A grid of runs is trained and measured, and one recommended.

Every run is trained, then measured, by processes of its own. Settings are compared by the likelihood of the validation
split: the test set is not for choosing.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from vaelab import __version__
from vaelab.config import Run, flat, from_json, override, to_json
from vaelab.data.datasets import Dataset, load
from vaelab.drawing.media import png
from vaelab.errors import FailureError, InterruptedRun, UsageError
from vaelab.evaluate.undefined import why_no_bound
from vaelab.figures import tuning as picture
from vaelab.labels import duration, readable
from vaelab.progress import Bar
from vaelab.recipes import recipe
from vaelab.runs.checkpoint import read_json, write_bytes, write_json
from vaelab.runs.folder import RunFolder
from vaelab.studies.grid import Grid, Point, Stage
from vaelab.studies.recommend import Recommendation, Setting, recommend
from vaelab.train import interruptions, with_absolute_path
from vaelab.training.trainer import build_model

FORMAT = 1  # of tuning.json
POLL = 0.1  # seconds between two looks at the processes
_HANG_UP = () if sys.platform == "win32" else (signal.SIGHUP,)  # the children have sessions of their own


@final
@dataclass(frozen=True)
class Result:
    """What a tuning came to.

    Args:
        settings: all that is measured, by size and beta.
        recommendation: None if nothing could be measured.
        protocol: of the likelihood.
        failures: of the runs that failed, one line each by name.
    """

    settings: tuple[Setting, ...]
    recommendation: Recommendation | None
    protocol: str
    failures: dict[str, str]

    def rows(self) -> list[dict[str, Any]]:
        """The settings as plain JSON; ``above`` the best, with the standard error of that difference."""
        if self.recommendation is None:
            return []
        return [
            {"latent_dim": s.latent_dim, "beta": s.beta, "seeds": s.seeds, "nll": s.nll, "stderr": s.stderr,
             "above": above.value, "above_stderr": above.stderr, "spread": None if math.isnan(s.spread) else s.spread,
             "slack": s.slack, **s.means}
            for s, above in zip(self.settings, self.recommendation.above, strict=True)
        ]  # fmt: skip


def plan(recipe_name: str, data: str, **changes: Any) -> tuple[Run, Dataset]:
    """What all runs share: a recipe on these data under a protocol that has a likelihood; and the data.

    Args:
        recipe_name, data: the recipe and the data.
        changes: settings by their flat names; None leaves a recipe's. A ``protocol`` that is left gives way to
            ``dynamic`` where it has no likelihood.

    Raises:
        UsageError: if there is no such recipe or data, a setting cannot be meant, there is no likelihood, or training
            ends before its warm-up.
        FailureError: if the data cannot be read.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    run = with_absolute_path(override(recipe(recipe_name), data=data, **given))
    warm_up = max(run.objective.annealing_epochs, run.schedule.warmup_epochs)
    if run.training.epochs < warm_up:
        raise UsageError(
            f"--epochs {run.training.epochs}: {recipe_name} warms up over {warm_up:g} epochs, and has not trained at "
            f"its beta before: give at least {math.ceil(warm_up)}"
        )
    loaded = load(run.data)
    if not build_model(run, loaded.shape).is_density(binary_data=loaded.binary):
        if "protocol" in given:
            raise UsageError(
                f"--protocol {given['protocol']}: these pixels have no likelihood under {recipe_name}, and without one "
                "sizes cannot be compared: leave it out, and they are binarized"
            )
        run = override(run, protocol="dynamic")
        loaded = load(run.data)
    if len(loaded.validation) < 2:
        raise UsageError(f"{loaded.name} has 1 validation image, which has no standard error: give more images")
    return run, loaded


def tune(grid: Grid, data: Dataset, jobs: int, bar: Bar) -> Result:
    """Train and measure what is missing of a grid, compare, and write ``tuning.json`` and ``tuning.png``.

    Args:
        grid: the runs and their folder.
        data: the data of its runs, as ``plan`` loaded them.
        jobs: how many processes at a time.
        bar: shows progress.

    Raises:
        UsageError: if the folder holds something else, or runs of the recipe have not the bound they are compared by.
        FailureError: if the data have changed, or the folder is in use.
        InterruptedRun: on Ctrl-C, after all processes have saved themselves.
    """
    _require_same(grid, data)
    _require_bound(grid, data)
    with _claimed(grid.out) as inherited:
        points = grid.points()
        stages = {point: grid.stage(point) for point in points}
        finished = {point for point in points if stages[point] is None}
        failures: dict[str, str] = {}
        pool = _Pool(grid, jobs, inherited, bar, deque(p for p in points if stages[p]), finished, failures)
        result = _write(grid, data, finished, failures)
        if pool.waiting:
            pool.work(lambda: _write(grid, data, finished, failures))
            result = _write(grid, data, finished, failures)
        if result.recommendation is not None:
            chosen, title = result.recommendation.chosen, f"{grid.base.recipe} on {result.protocol}"
            figure = picture(result.rows(), (chosen.latent_dim, chosen.beta), title=title)
            write_bytes(grid.out / "tuning.png", png(figure))
    return result


# --- the folder -----------------------------------------------------------------------------------------------------


def _write(grid: Grid, data: Dataset, finished: set[Point], failures: Mapping[str, str]) -> Result:
    """Write ``tuning.json`` as far as the grid has come."""
    settings, protocol = grid.settings(finished)
    advice = recommend(settings) if settings else None
    result = Result(tuple(settings), advice, protocol, dict(failures))
    content = {
        "format": FORMAT,
        "vaelab": __version__,
        "recipe": grid.base.recipe,
        "run": to_json(grid.base),
        "data": data.record(),
        "unit": "nats per image; active_units in units; seconds of training",
        "protocol": protocol,
        "settings": result.rows(),
        "recommendation": None if advice is None else {
            "latent_dim": advice.chosen.latent_dim, "beta": advice.chosen.beta, "reasons": list(advice.reasons),
        },
        "failures": dict(failures),
    }  # fmt: skip
    write_json(grid.out / "tuning.json", content)
    return result


def _require_same(grid: Grid, data: Dataset) -> None:
    """Refuse a folder that holds something else than runs of this recipe on these data."""
    file = grid.out / "tuning.json"
    if grid.out.exists() and not grid.out.is_dir():
        raise UsageError(f"--out {grid.out} is a file: choose another folder")
    if not file.exists():
        if grid.out.exists() and any(not path.name.startswith(".") for path in grid.out.iterdir()):
            raise UsageError(f"{grid.out} is not empty and holds no tuning of vaelab: choose another folder with --out")
        return
    content = read_json(file)
    if content.get("format") != FORMAT or not {"run", "data"} <= content.keys():
        raise FailureError(f"{file} was written by another vaelab ({content.get('vaelab')}): choose another --out")
    before = from_json(content["run"])
    if before.recipe != grid.base.recipe:
        raise UsageError(f"{grid.out} holds runs of {before.recipe}, not of {grid.base.recipe}: choose another --out")
    ours = flat(before)
    for name, leaf in flat(grid.base).items():
        if name not in ours or ours[name].value != leaf.value:
            kept = f" from the {ours[name].value}" if name in ours else ""
            raise UsageError(f"--{name.replace('_', '-')} {leaf.value} differs{kept} of the runs in {grid.out}: "
                             "choose another --out")  # fmt: skip
    for key, value in data.record().items():
        if content["data"].get(key) != value:
            was = f"{key} was {content['data'].get(key)}, is {value}"
            raise FailureError(f"the data have changed since the runs in {grid.out} began: {was}")


def _require_bound(grid: Grid, data: Dataset) -> None:
    """Refuse, before any training, settings that the recipe has not, and models without the bound to compare by."""
    for point in grid.wanted:
        if point.seed == 0:  # another seed is the same model
            why = why_no_bound(build_model(grid.run(point), data.shape))
            if why is not None:
                raise UsageError(f"sizes of {grid.base.recipe} cannot be compared: {why}")


@contextlib.contextmanager
def _claimed(out: Path) -> Generator[tuple[int, ...]]:
    """Hold the folder against another tuning; yields the descriptors that processes inherit.

    They hold it too: runs that a killed tuning has left behind are not trained twice at a time.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise FailureError(f"{out} cannot be written ({error.strerror}): choose another folder with --out") from error
    with lock:
        if sys.platform == "win32":
            yield ()
            return
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FailureError(f"{out} is in use by another tune-latent, or by runs that one left behind") from error
        yield (lock.fileno(),)


# --- processes ------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class _Worker:
    """A point on its way: the process of its stage, and since when the point was worked on."""

    point: Point
    stage: Stage
    process: subprocess.Popen[bytes]
    began: float
    whole: bool  # all of the point was done by this call, so that its time tells what others take


@final
@dataclass
class _Pool:
    """Processes that bring points to their end, some at a time."""

    grid: Grid
    jobs: int
    inherited: tuple[int, ...]
    bar: Bar
    waiting: deque[Point]
    finished: set[Point]
    failures: dict[str, str]
    running: list[_Worker] = field(default_factory=list)

    def work(self, save: Callable[[], object]) -> None:
        """Bring all points to their end, saving the result after each."""
        total = len(self.waiting)
        self.jobs = min(self.jobs, total)
        runs = f"{total} run{'s' if total > 1 else ''}"
        self.bar.say(f"{runs} to train and measure, {self.jobs} at a time, into {self.grid.out}")
        self.bar.begin(f"{runs}: epochs and measurements")
        self._show(total)
        estimated = False
        with self.bar, interruptions(also=_HANG_UP) as interrupted:
            try:
                while self.waiting or self.running:
                    while self.waiting and len(self.running) < self.jobs:
                        point = self.waiting.popleft()
                        self._start(point, time.monotonic(), whole=not self.grid.path(point).exists())
                    if interrupted.wait(POLL):
                        self._stop(total)
                    for worker in [w for w in self.running if w.process.poll() is not None]:
                        if self._advance(worker):
                            save()
                            estimated = estimated or self._estimate(worker)
                    self._show(total)
            finally:
                for worker in self.running:
                    worker.process.kill()

    def _start(self, point: Point, began: float, *, whole: bool) -> None:
        stage = self.grid.stage(point)
        assert stage is not None
        if self.grid.path(point).exists():
            RunFolder(self.grid.path(point)).sweep()  # of half-written files, where train wants an empty folder
        command = self.grid.command(point, stage)
        with self.grid.log(point).open("ab") as log:
            log.write(readable(f"$ vaelab {shlex.join(command)}\n").encode())
            log.flush()
            process = subprocess.Popen(  # noqa: S603 - vaelab itself
                [sys.executable, "-m", "vaelab", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=self.inherited,
                start_new_session=True,  # Ctrl-C reaches it once, from here, and not from the terminal besides
            )
        self.running.append(_Worker(point, stage, process, began, whole))

    def _advance(self, worker: _Worker) -> bool:
        """After a process has ended: start the point's next, or see the point off; true if it is finished."""
        self.running.remove(worker)
        point, code = worker.point, worker.process.returncode
        following = self.grid.stage(point)
        if code == 0 and following is None:
            self.finished.add(point)
            bound = (self.grid.metrics(point) or {})[self.grid.bound]
            self.bar.say(f"{point.name}: -log p(x) {bound['value']:.2f} ± {bound['stderr']:.2f} nats")
            return True
        if code == 0 and following != worker.stage:
            self._start(point, worker.began, whole=worker.whole)
            return False
        log = self.grid.log(point)
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1]
        said = "it said nothing" if last.startswith("$ ") else last.removeprefix("vaelab: ")
        ended = f"exit code {code}" if code >= 0 else f"signal {-code}"
        self.failures[point.name] = f"{said} ({ended}; log: {log})"
        self.bar.say(f"{point.name} failed: {self.failures[point.name]}")
        return False

    def _estimate(self, worker: _Worker) -> bool:
        """Say how long the rest will take, if this point tells and there is a rest."""
        left = len(self.waiting) + len(self.running)
        if not worker.whole or left == 0:
            return False
        seconds = time.monotonic() - worker.began
        self.bar.say(f"it took {duration(seconds)}; {left} more: about {duration(seconds * left / self.jobs)}")
        return True

    def _show(self, total: int) -> None:
        epochs = self.grid.base.training.epochs
        left = len(self.waiting) * (epochs + 1)
        for worker in self.running:
            trained = epochs if worker.stage == "measure" else len(RunFolder(self.grid.path(worker.point)).history())
            left += epochs + 1 - trained
        self.bar.advance(total * (epochs + 1) - left, total * (epochs + 1))

    def _stop(self, total: int) -> None:
        """Ask all processes to save themselves, and wait for them; a second Ctrl-C kills them."""
        self.bar.say(f"stopping: {len(self.running)} running, each saves itself first (Ctrl-C again: at once)")
        for worker in self.running:
            worker.process.terminate()
        for worker in self.running:
            worker.process.wait()
        left = len(self.waiting) + len(self.running)
        raise InterruptedRun(
            f"interrupted, {left} of {total} runs are left to finish; what is done is kept in {self.grid.out}: "
            "to go on, give the same command again"
        )
