"""Training: ``fit`` and the loop beneath it.

A run is a function of its configuration: every random number is derived from (seed, stream, step), so a run that was
killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vaelab import specs
from vaelab.config import Run, override
from vaelab.data.augment import Motion, augment
from vaelab.data.datasets import Dataset, binarize_batch, load
from vaelab.data.sources import Reading
from vaelab.errors import FailureError, UsageError
from vaelab.folder import MACHINE_SETTINGS, RunFolder
from vaelab.models import VAE
from vaelab.objectives import elbo_terms
from vaelab.progress import Display
from vaelab.runtime import StepNoise, epoch_order, generator, machine, reseed_dropout, resolve_device, resolve_precision, threads
from vaelab.specs import Shape

log = logging.getLogger("vaelab")

TERMS = ("loss", "distortion", "rate", "grad_norm")  # what is recorded of every step, in nats per example
EVALUATION_BATCH = 500


class InterruptedRun(FailureError):
    """The run was stopped by Ctrl-C or a termination signal, and saved."""


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
    """

    run: Run
    model: VAE
    data: Dataset
    number: int
    history: list[dict[str, Any]]
    folder: Path | None


def fit(
    run: Run,
    data: str | Dataset | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    on_epoch_end: Sequence[Callable[[Epoch], None]] = (),
    display: Display | None = None,
) -> VAE:
    """Train a run and return its best model: the weights with the lowest monitored validation loss.

    Monitored is the validation objective at its final weights (the final beta), with fixed noise, from the epoch on in
    which annealing and warm-up have ended.

    Args:
        run: the configuration.
        data: the name or path of a data set in place of the run's own, or one that is loaded.
        out: the run folder; None writes nothing.
        resume: go on with the run in ``out``; its configuration must be the same, but for precision, device, threads,
            and more epochs on a schedule that does not depend on their number.
        on_epoch_end: functions to call after each epoch.
        display: shows progress; None shows nothing.

    Raises:
        UsageError: if the configuration cannot be meant or the folder holds something else.
        FailureError: if the data cannot be read, the disk is full, or the loss is no longer finite.
        InterruptedRun: on Ctrl-C, if there is a folder, after the run was saved.
    """
    if isinstance(data, str):
        run = override(run, data=data)
    folder = _folder(out, resume)
    if folder is not None and resume:
        run = folder.reconcile(run)
    device = resolve_device(run.training.device)
    with threads(run.training.threads), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        dataset = data if isinstance(data, Dataset) else load_data(run)
        trainer = Trainer(run, dataset.to(device), device)
        if folder is not None:
            _prepare(folder, trainer, resume)
        with display or contextlib.nullcontext(), _interruptions(enabled=folder is not None) as interrupted:
            _train(trainer, folder, on_epoch_end, display, interrupted)
        return trainer.best_model()


def load_data(run: Run) -> Dataset:
    """Load a run's data set."""
    data = run.data
    reading = Reading(data.image_size, data.channels, data.value_range)
    return load(
        data.source,
        protocol=data.protocol,
        validation_size=data.validation_size,
        test_size=data.test_size,
        reading=reading,
    )


def build_model(run: Run, shape: Shape) -> VAE:
    """Make a run's model for images of this shape, with weights that depend on the run's seed alone."""
    likelihood = run.likelihood or (specs.Bernoulli() if shape[0] == 1 else specs.Gaussian())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(run.training.seed, "weights").initial_seed())
        return VAE(run.encoder, run.posterior, run.prior, run.decoder, likelihood, shape)


@final
class Trainer:
    """The state of a run, and the three things that change it: a step, the end of an epoch, loading a checkpoint."""

    def __init__(self, run: Run, data: Dataset, device: torch.device) -> None:
        self.run, self.data, self.device = run, data, device
        self.precision = resolve_precision(run.training.precision, device, run.bf16_gap)
        self.batch_size = min(run.training.batch_size, len(data.train))
        if self.batch_size < run.training.batch_size:
            log.info("batch size %d: there are no more training images", self.batch_size)
        self.steps_per_epoch = len(data.train) // self.batch_size
        self.model = build_model(run, data.shape).to(device)
        self.networks = run.objective.networks(self.model).to(device)
        self.groups = run.objective.groups(self.model, self.networks)
        self.schedule = run.schedule.schedule(self.steps_per_epoch, run.training.epochs)
        self.optimizers = {name: run.optimizer.build(group, self.schedule(0)) for name, group in self.groups.items()}
        self.plateaus = [_plateau(run.schedule, optimizer) for optimizer in self.optimizers.values()]
        self.average = _average(self.model, run.training.ema_decay)
        self.motion = Motion(run.augment.rotate, run.augment.shift, run.augment.augment_prob)
        self.step = 0
        self.stopped = False
        self.best: tuple[float, int] | None = None  # the lowest monitored loss, and its epoch
        self.best_weights: dict[str, Tensor] | None = None
        # Terms of the epoch's steps so far stay on the device: no step waits for a number to reach the host.
        self.terms = torch.zeros(self.steps_per_epoch, len(TERMS), device=device)
        self.order = torch.empty(0)

    @property
    def epoch(self) -> int:
        """Whole epochs that lie behind."""
        return self.step // self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, unless it stops early."""
        return self.run.training.epochs * self.steps_per_epoch

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.stopped or self.step >= self.total_steps

    @property
    def evaluated(self) -> VAE:
        """The model whose weights count: the averaged ones, if the run averages."""
        return self.model if self.average is None else cast(VAE, self.average.module)

    def train_step(self) -> None:
        """Take one step."""
        within = self.step % self.steps_per_epoch
        if within == 0 or len(self.order) == 0:
            self.order = epoch_order(len(self.data.train), self.run.training.seed, self.epoch, self.device)
        noise = StepNoise(self.run.training.seed, self.step, self.device)
        batch = self.data.train.rows(self.order[within * self.batch_size : (within + 1) * self.batch_size])
        batch = augment(batch, self.motion, noise)
        if self.data.protocol == "dynamic":
            batch = binarize_batch(batch, noise)
        reseed_dropout(self.run.training.seed, self.step)
        self.model.train()
        objective = self.run.objective.at(self.step / self.steps_per_epoch)
        losses = objective.losses(self.model, self.networks, batch, noise)
        norm = self.terms.new_zeros(())
        while True:
            try:
                with self._autocast():
                    group, loss = next(losses)
            except StopIteration as end:
                terms: dict[str, Tensor] = end.value
                break
            norm = torch.maximum(norm, self._descend(group, loss))
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.terms[within] = torch.stack([terms["loss"], terms["distortion"], terms["rate"], norm])
        self.step += 1

    def _descend(self, group: str, loss: Tensor) -> Tensor:
        """One optimizer step of one group; returns the gradient's norm where it is clipped, else 0."""
        parameters, optimizer = self.groups[group], self.optimizers[group]
        if not isinstance(self.run.schedule, specs.Plateau):
            for settings in optimizer.param_groups:
                settings["lr"] = self.schedule(self.step)
        optimizer.zero_grad()
        loss.backward(inputs=parameters)
        clip = self.run.training.clip_norm
        norm = loss.new_zeros(()) if clip is None else clip_grad_norm_(parameters, clip)
        optimizer.step()
        return norm

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return float(next(iter(self.optimizers.values())).param_groups[0]["lr"])

    def recent_terms(self) -> dict[str, float]:
        """Mean terms of the last steps of this epoch, at most 50, and the learning rate.

        Raises:
            FailureError: if a loss of this epoch is not finite, naming the step and the term.
        """
        self.check_finite()
        done = self._steps_into_epoch()
        mean = self.terms[max(0, done - 50) : done].mean(0).tolist()
        return {**dict(zip(TERMS, mean, strict=True)), "learning_rate": self.learning_rate()}

    def check_finite(self) -> None:
        """Raise if a step of this epoch had a loss that is NaN or infinite."""
        done = self._steps_into_epoch()
        terms = self.terms[:done, :3]
        bad = (~torch.isfinite(terms)).nonzero()
        if len(bad) == 0:
            return
        row, _ = bad[0].tolist()
        values = dict(zip(TERMS, terms[row].tolist(), strict=False))
        term = next((name for name in ("distortion", "rate") if not math.isfinite(values[name])), "loss")
        step = self.step - done + row
        raise FailureError(
            f"the loss is no longer finite: {term} is {values[term]} at step {step} (epoch {step // self.steps_per_epoch + 1}); "
            f"try a smaller learning rate, or --clip-norm 1"
        )

    def _steps_into_epoch(self) -> int:
        """Steps whose terms are at hand: of the running epoch, or all of the one that has just ended."""
        return (self.step - 1) % self.steps_per_epoch + 1 if self.step else 0

    def end_epoch(self) -> dict[str, Any]:
        """Validate, remember the best weights, let plateau and early stopping decide; return the epoch's record."""
        self.check_finite()
        objective = self.run.objective.at(self.step / self.steps_per_epoch)
        training = dict(zip(TERMS, self.terms.double().mean(0).tolist(), strict=True))
        learning_rate = self.learning_rate()
        validation = self.validate()
        self._monitor(validation["validation_loss"])
        if self.run.training.clip_norm is None:
            del training["grad_norm"]
        return {
            "epoch": self.epoch,
            "step": self.step,
            **training,
            **validation,
            "beta": objective.beta,
            "learning_rate": learning_rate,
        }

    def validate(self) -> dict[str, float]:
        """Validation means in nats per image, the loss at the objective's final weights, with fixed noise."""
        model = self.evaluated.eval()
        with self._autocast():
            distortion, rate = elbo_terms(model, self.data.validation.batches(EVALUATION_BATCH))
        means = torch.tensor([distortion.mean(), rate.mean()], dtype=torch.float64)
        loss = float(self.run.objective.at(math.inf).weigh(means[0], means[1]))
        if not math.isfinite(loss):
            raise FailureError(f"the validation loss is {loss} after step {self.step}: try a smaller learning rate")
        return {"validation_loss": loss, "validation_distortion": float(means[0]), "validation_rate": float(means[1])}

    def _monitor(self, loss: float) -> None:
        settled = max(self.run.objective.annealing_epochs, self.run.schedule.warmup_epochs)
        if self.epoch < settled:
            return
        if self.best is None or loss < self.best[0]:
            self.best = (loss, self.epoch)
            self.best_weights = {name: value.clone() for name, value in self.evaluated.state_dict().items()}
        for plateau in self.plateaus:
            if plateau is not None:
                plateau.step(loss)
        patience = self.run.training.patience
        self.stopped = patience is not None and self.epoch - self.best[1] >= patience

    def best_model(self) -> VAE:
        """The model with the best weights, in ``eval`` mode; the current ones if none were monitored yet."""
        model = self.evaluated
        if self.best_weights is not None:
            model.load_state_dict(self.best_weights)
        return model.eval()

    def state(self) -> dict[str, Any]:
        """All that a resume needs besides the configuration."""
        return {
            "step": self.step,
            "stopped": self.stopped,
            "best": None if self.best is None else list(self.best),
            "model": self.model.state_dict(),
            "networks": self.networks.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "plateaus": [None if plateau is None else plateau.state_dict() for plateau in self.plateaus],
            "terms": self.terms,
        }

    def load_state(self, state: dict[str, Any], best_weights: dict[str, Tensor] | None) -> None:
        """Take up the state of a checkpoint."""
        self.step, self.best_weights = state["step"], best_weights
        self.best = None if state["best"] is None else tuple(state["best"])
        # A run that had come to its end by early stopping stays ended; more epochs do not revive it.
        self.stopped = state["stopped"]
        self.model.load_state_dict(state["model"])
        self.networks.load_state_dict(state["networks"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for plateau, saved in zip(self.plateaus, state["plateaus"], strict=True):
            if plateau is not None:
                plateau.load_state_dict(saved)
        self.terms.copy_(state["terms"])

    def resolved(self) -> dict[str, Any]:
        """What ``auto`` was resolved to, and the machine, for ``config.json``."""
        return {
            "precision": self.precision,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            "parameters": self.model.num_parameters(),
            "machine": machine(self.device),
            "torch": torch.__version__,
        }


# --- the loop -------------------------------------------------------------------------------------------------------


def _train(
    trainer: Trainer,
    folder: RunFolder | None,
    on_epoch_end: Sequence[Callable[[Epoch], None]],
    display: Display | None,
    interrupted: threading.Event,
) -> None:
    history = [] if folder is None else folder.history()
    save_every = trainer.run.training.save_every
    try:
        while not trainer.done:
            started, first = time.monotonic(), trainer.step
            while trainer.step == first or trainer.step % trainer.steps_per_epoch:
                trainer.train_step()
                if display is not None and display.due():
                    _show(display, trainer, trainer.step - first, time.monotonic() - started)
                if interrupted.is_set() and folder is not None:
                    trainer.check_finite()
                    if trainer.step % trainer.steps_per_epoch:
                        folder.save_last(trainer.state())
                        raise InterruptedRun(f"interrupted at step {trainer.step} and saved")
                if save_every and trainer.step % save_every == 0 and trainer.step % trainer.steps_per_epoch and folder:
                    trainer.check_finite()
                    folder.save_last(trainer.state())
            trained = time.monotonic() - started
            record = trainer.end_epoch()
            record["images_per_second"] = round((trainer.step - first) * trainer.batch_size / trained, 1)
            record["seconds"] = round(time.monotonic() - started, 3)
            history.append(record)
            if folder is not None and trainer.best is not None and trainer.best[1] == trainer.epoch:
                folder.save_best(trainer.best_weights or {})
            if display is not None:
                _show(display, trainer, trainer.step - first, trained)
            event = Epoch(trainer.run, trainer.evaluated.eval(), trainer.data, trainer.epoch, history, folder and folder.path)
            for function in on_epoch_end:
                function(event)
            if folder is not None:
                folder.append_history(record)
                folder.save_last(trainer.state())
            if interrupted.is_set():
                raise InterruptedRun(f"interrupted after epoch {trainer.epoch} and saved")
    except FailureError as error:
        if folder is None or isinstance(error, InterruptedRun):
            raise
        saved = folder.load_last()
        kept = f"{folder.path / 'last.pt'} keeps step {saved['step']}" if saved else "no checkpoint had been saved yet"
        raise FailureError(f"{error}; {kept}") from error
    if trainer.best is None:
        log.info("annealing and warm-up had not ended when the run did: its last weights are taken as its best")
        if folder is not None:
            folder.save_best(trainer.evaluated.state_dict())


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
    return RunFolder.open(Path(out)) if resume else RunFolder.create(Path(out))


def _prepare(folder: RunFolder, trainer: Trainer, resume: bool) -> None:
    """Write a new run's configuration, or load a resumed run's checkpoint."""
    record, resolved = trainer.data.record(), trainer.resolved()
    if not resume:
        folder.write_config(trainer.run, record, resolved)
        return
    before = folder.config()
    for key, value in record.items():
        if before["data"].get(key) != value:
            raise FailureError(f"the data have changed since the run in {folder.path} began: {key} was {before['data'].get(key)}, is {value}")
    changed = [k for k in sorted(MACHINE_SETTINGS) if before["resolved"][k] != resolved[k]]
    for key in changed:
        log.info("%s was %s and is now %s: the result will differ in its bits", key, before["resolved"][key], resolved[key])
    state = folder.load_last()
    if state is None:
        log.info("the run had no checkpoint yet: it starts anew")
    else:
        best = folder.load_best() if state["best"] is not None else None
        trainer.load_state(state, best)
        log.info("resumed at step %d of %d (epoch %d)", trainer.step, trainer.total_steps, trainer.epoch + 1)
    folder.cut_history(trainer.step)
    folder.write_config(trainer.run, record, resolved)


@contextlib.contextmanager
def _interruptions(*, enabled: bool) -> Iterator[threading.Event]:
    """Turn Ctrl-C and a termination signal into an event that is looked at between two steps.

    In the middle of a step the weights could be new and the optimizer's moments old: such a state cannot be resumed.
    A second Ctrl-C stops at once. Only the main thread may set handlers; elsewhere nothing changes.
    """
    event = threading.Event()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _plateau(schedule: Any, optimizer: Optimizer) -> ReduceLROnPlateau | None:
    if not isinstance(schedule, specs.Plateau):
        return None
    return ReduceLROnPlateau(
        optimizer, factor=schedule.lr_factor, patience=schedule.lr_patience, min_lr=schedule.min_lr
    )


def _average(model: nn.Module, decay: float) -> AveragedModel | None:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


def load_model(path: str | Path) -> VAE:
    """The best model of the run in this folder, on the CPU, in ``eval`` mode.

    Raises:
        UsageError: if the folder holds no run.
        FailureError: if its files are damaged or do not belong together.
    """
    folder = RunFolder.open(Path(path))
    channels, height, width = folder.config()["data"]["shape"]
    model = build_model(folder.run, (channels, height, width))
    try:
        model.load_state_dict(folder.load_best())
    except RuntimeError as error:
        raise FailureError(f"{folder.path / 'best_model.pth'} does not fit config.json: {str(error).splitlines()[-1]}") from error
    return model.eval()
