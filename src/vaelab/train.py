"""Training: ``fit`` and the loop beneath it.

A run is a function of its configuration: every random number is derived from (seed, stream, step), so a run that was
killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vaelab.config import Data, Run, from_json, override, to_json
from vaelab.data.datasets import Dataset, load
from vaelab.data.sources import MADE, NAMED, NOWHERE, source_of
from vaelab.errors import FailureError, InterruptedRun, LostProcessError, NotFiniteError, UsageError
from vaelab.models import VAE
from vaelab.processes.distributed import leads, team
from vaelab.progress import Display
from vaelab.runs.folder import MACHINE_SETTINGS, RunFolder
from vaelab.runs.loading import require_same_data
from vaelab.runtime import denormals_flushed, resolve_device, threads
from vaelab.training.compiling import can_compile
from vaelab.training.trainer import Trainer

log = logging.getLogger("vaelab")

_TURNS = threading.RLock()  # of threads that train


@dataclass(frozen=True)
class Epoch:
    """What a function in ``on_epoch_end`` is given.

    Args:
        run: the configuration.
        model: the model as it is validated (averaged weights, if the run averages), in ``eval`` mode.
        data: the data set, on the computing device.
        number: the epoch, counted from 1.
        history: one record an epoch so far, this one included.
        folder: the run folder, or None.
        last: whether the run ends with this epoch.
    """

    run: Run
    model: VAE
    data: Dataset
    number: int
    history: list[dict[str, Any]]
    folder: Path | None
    last: bool


def fit(
    run: Run,
    data: str | Path | Dataset | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    on_epoch_end: Sequence[Callable[[Epoch], None]] = (),
    display: Display | None = None,
) -> VAE:
    """Train a run and return its best model, on the CPU: the weights with the lowest monitored validation loss.

    Monitored is the validation objective at its final weights (the final beta), with fixed noise, from the epoch on in
    which annealing and warm-up have ended. Threads that call this take turns, since a process has one
    generator of initial weights and dropout, and one number of threads; several GPUs take a process each.

    Args:
        run: the configuration.
        data: in place of the run's own: a name, a path, or a data set that is loaded, whose source, protocol and sizes
            the run then has.
        out: the run folder; None writes nothing.
        resume: go on with the run in ``out``; its configuration must be the same, but for precision, compile, device,
            threads, a new place of the same data, and more epochs on a schedule that does not depend on their number.
        on_epoch_end: functions to call after each epoch. One that has a method ``follow``, as trackers have, is given
            run, history and folder before the first step too.
        display: shows progress; None shows nothing.

    Raises:
        UsageError: if the configuration cannot be meant, the folder holds something else, or another process trains
            into it.
        FailureError: if the data cannot be read, the disk is full, or the loss is no longer finite.
        InterruptedRun: on Ctrl-C, if there is a folder, after the run was saved.
    """
    if isinstance(data, str | Path):
        run, data = override(run, data=source_of(data)), None
    elif isinstance(data, Dataset):
        data.require_images()
        run = replace(run, data=data.asked or Data(MADE, data.protocol))
    elif data is not None:
        raise UsageError(
            f"data: {type(data).__name__} is none; give a name, a path, or what vaelab.load makes of arrays"
        )
    run = with_absolute_path(run)
    folder = _folder(out, resume)
    if folder is not None:
        _require_readable(run)
    if folder is not None and resume:
        if data is not None and run.data.source in NOWHERE:  # which names no place: the folder's own stays
            run = replace(run, data=folder.run.data)
        elif data is None and folder.run.data.source in NOWHERE and run.data.source in NAMED:
            raise UsageError(f"the run in {folder.path} was trained on data in memory: give fit the same data")
        run = folder.reconcile(run)
        if data is None:
            folder.require_path_of_data(run)
    device = resolve_device(run.training.device)
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    held = folder.held() if folder is not None and leads() else contextlib.nullcontext()
    with _TURNS, threads(run.training.threads), generators, team(device) as together:
        dataset = load(run.data) if data is None else data
        trainer = Trainer(run, dataset.to(device), device, together)
        with held:
            if folder is not None:
                if not resume and leads():
                    RunFolder.create(folder.path)  # who had the turn or the lock before may have trained into it
                _prepare(folder, trainer, resume)
            if not together.leads:
                folder, display, on_epoch_end = None, None, ()
            with display or contextlib.nullcontext(), interruptions(enabled=out is not None) as interrupted:
                _train(trainer, folder, on_epoch_end, display, interrupted)
        return trainer.best_model().cpu()


def with_absolute_path(run: Run) -> Run:
    """The run with the path of its data made absolute, so that it can be gone on with from another folder."""
    path = Path(run.data.source).expanduser()
    if run.data.source in NAMED or not path.exists():
        return run
    return override(run, data=str(path.resolve()))


# --- the loop -------------------------------------------------------------------------------------------------------


def _train(
    trainer: Trainer,
    folder: RunFolder | None,
    on_epoch_end: Sequence[Callable[[Epoch], None]],
    display: Display | None,
    interrupted: threading.Event,
) -> None:
    history = [] if folder is None else folder.history()
    save_every, path = trainer.run.training.save_every, None if folder is None else folder.path
    for function in on_epoch_end:
        if (follow := getattr(function, "follow", None)) is not None:
            follow(trainer.run, history, path)
    try:
        while not trainer.done:
            started, computed, first = time.monotonic(), time.process_time(), trainer.step
            with denormals_flushed():
                while trainer.step == first or trainer.step % trainer.steps_per_epoch:
                    trainer.train_step()
                    if display is not None and display.due():
                        _show(display, trainer, trainer.step - first, time.monotonic() - started)
                    within, asked = trainer.step % trainer.steps_per_epoch, trainer.team.ask(interrupted.is_set())
                    if within and (asked or (save_every and trainer.step % save_every == 0)):
                        trainer.agree_on_terms()
                        trainer.check_finite()
                        if folder is not None:
                            folder.save_last(trainer.state())
                        if asked:
                            raise InterruptedRun(f"interrupted at step {trainer.step} and saved")
            trained = time.monotonic() - started
            record = trainer.end_epoch()
            record["images_per_second"] = round((trainer.step - first) * trainer.batch_size / trained, 1)
            record["seconds"] = round(time.monotonic() - started, 3)
            # What an idle machine would have taken, times its threads: seconds alone also count who else was there.
            record["cpu_seconds"] = round(time.process_time() - computed, 3)
            history.append(record)
            if folder is not None and trainer.best is not None and trainer.best[1] == trainer.epoch:
                folder.save_best(trainer.best_weights or {})
            if display is not None:
                _show(display, trainer, trainer.step - first, trained)
            model = trainer.evaluated.eval()
            event = Epoch(trainer.run, model, trainer.data, trainer.epoch, history, path, last=trainer.done)
            for function in on_epoch_end:
                function(event)
            if folder is not None:
                folder.append_history(record)
                folder.save_last(trainer.state())
            if trainer.team.ask(interrupted.is_set()) and not trainer.done:
                raise InterruptedRun(f"interrupted after epoch {trainer.epoch} and saved")
    except FailureError as error:
        if folder is None or isinstance(error, InterruptedRun):
            raise
        raise _with_what_is_kept(error, folder) from error
    if trainer.best is None:
        log.info("annealing and warm-up had not ended when the run did: its last weights are taken as its best")
        if folder is not None:
            folder.save_best(trainer.evaluated.state_dict())


def _with_what_is_kept(error: FailureError, folder: RunFolder) -> FailureError:
    """The error of a failed training that also tells what was saved, and how to go on."""
    saved = folder.load_last()
    again, go_on = "--resume starts it anew", ": go on with --resume"
    if isinstance(error, NotFiniteError):
        folder.write_failure(error, None if saved is None else saved["step"])
        again, go_on = "give a new try another --out", ""
    nothing = f"no checkpoint had been saved yet: {again}"
    kept = f"{folder.path / 'last.pt'} keeps step {saved['step']}{go_on}" if saved else nothing
    kind = LostProcessError if isinstance(error, LostProcessError) else FailureError
    return kind(f"{error}; {kept}")


def _show(display: Display, trainer: Trainer, steps: int, seconds: float) -> None:
    number = -(-trainer.step // trainer.steps_per_epoch)
    speed = steps * trainer.batch_size / max(seconds, 1e-9)
    display.show(number, trainer.run.training.epochs, trainer.step, trainer.total_steps, trainer.recent_terms(), speed)


# --- preparing ------------------------------------------------------------------------------------------------------


def _folder(out: str | Path | None, resume: bool) -> RunFolder | None:
    if out is None:
        if resume:
            raise UsageError("resume needs the folder of the run: give out")
        return None
    if resume:
        return RunFolder.open(Path(out))
    return RunFolder.create(Path(out)) if leads() else None


def _require_readable(run: Run) -> None:
    """Refuse a run whose folder could never be read: with a part or objective that is not vaelab's."""
    try:
        from_json(json.loads(json.dumps(to_json(run))))
    except TypeError as error:
        raise UsageError(f"a run folder cannot be written: {error}; give plain numbers and words, or set them by "
                         "vaelab.override") from error  # fmt: skip
    except UsageError as error:
        raise UsageError(f"a run folder could not be read again: {error}. (A part of your own is registered by "
                         "vaelab.register, or trains without out)") from error  # fmt: skip


def _prepare(folder: RunFolder, trainer: Trainer, resume: bool) -> None:
    """Write a new run's configuration, or load a resumed run's checkpoint."""
    record = trainer.data.record()
    if not resume:
        folder.write_config(trainer.run, record, trainer.resolved())
        return
    before = {"compile": False, **folder.config()["resolved"]}  # runs of vaelab 0.1 knew no compiled steps
    require_same_data(folder, trainer.data)
    if trainer.run.training.compile == "auto":  # more epochs do not change how steps are taken
        trainer.compiled = trainer.team.agree(before["compile"] and can_compile(trainer.device))
    resolved = trainer.resolved()
    for key in sorted(MACHINE_SETTINGS):
        if before[key] != resolved[key]:
            log.info("%s was %s and is now %s: the result will differ in its bits", key, before[key], resolved[key])
    state = folder.load_last()
    if state is None:
        log.info("the run had no checkpoint yet: it starts anew")
    else:
        best = folder.load_best() if state["best"] is not None else None
        try:
            trainer.load_state(state, best)
        except (KeyError, RuntimeError, ValueError) as error:
            raise FailureError(f"{folder.path / 'last.pt'} does not fit config.json ({error})") from error
        if trainer.done:
            log.info("the run is complete, after %d epochs: nothing is left to train", trainer.epoch)
        else:
            log.info("resumed at step %d of %d (epoch %d)", trainer.step, trainer.total_steps, trainer.epoch + 1)
    trainer.team.wait()  # until all have read
    if not trainer.team.leads:
        return
    folder.sweep()
    folder.cut_history(trainer.step)
    folder.write_config(trainer.run, record, resolved)


@contextlib.contextmanager
def interruptions(*, enabled: bool = True, also: Sequence[int] = ()) -> Generator[threading.Event]:
    """Turn Ctrl-C and a termination signal into an event that is looked at between two steps.

    In the middle of a step the weights could be new and the optimizer's moments old: such a state cannot be resumed.
    A second Ctrl-C stops at once. Only the main thread may set handlers; elsewhere nothing changes. When another
    process is lost, a termination signal stays without effect.
    """
    event = threading.Event()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, *also)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

    def ask(number: int, frame: Any) -> None:
        event.set()
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield event
    except LostProcessError:  # torchrun ends all when one has gone: not before the line that says why
        before.pop(signal.SIGTERM, None)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
