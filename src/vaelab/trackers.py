"""Trackers: the numbers and pictures of a training in TensorBoard, Weights & Biases, Trackio or MLflow.

None is needed: a run folder holds the same numbers in ``history.jsonl``, and the pictures beside it. Each tracker is a
function of ``on_epoch_end``, needs a package of its own, and has that package's settings (``WANDB_MODE=offline``,
``MLFLOW_TRACKING_URI``).
"""

from __future__ import annotations

import logging
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self, final

import numpy as np
from PIL import Image

from vaelab.config import Picture, Run, flat
from vaelab.errors import UsageError, first_line
from vaelab.runs.checkpoint import read_json, write_json
from vaelab.slots import SLOTS
from vaelab.train import Epoch

log = logging.getLogger("vaelab")

KNOWN = "trackers.json"
"""The file of a run folder that says what trackers call the run, and which epoch each has had last."""


class Tracker(ABC):
    """Follows a training: pass it to ``fit(..., on_epoch_end=[...])``, or name it to ``vaelab train --track``.

    Every number of ``history.jsonl`` is recorded under its name there, at its epoch, with the settings; and the
    pictures that are drawn into the run folder before it is called (``drawing.pictures.draw_each_epoch``). A run that
    is resumed stays one, and is told what it missed. What the package fails at (no network, no account) is said in
    one line, and the training goes on without it.

    The record ends with the training, or, inside of ``with tracker:``, where that ends.

    Args:
        project: what the run belongs to: a project, or MLflow's experiment.

    Raises:
        UsageError: if the package is not installed.
    """

    word: ClassVar[str]
    """What it is called."""

    package: ClassVar[str | None] = None
    """The module that it needs, which pip knows by the same name."""

    def __init__(self, project: str = "vaelab") -> None:
        if self.package is not None and find_spec(self.package) is None:
            raise UsageError(f"{self.package} is not installed: pip install {self.package}")
        self.project = project
        self._history: Sequence[Mapping[str, Any]] | None = None  # of the training that is followed
        self._recorded = 0  # its last epoch that was
        self._is_open = self._failed = self._held = False

    def __enter__(self) -> Self:
        self._held = True
        return self

    def __exit__(self, *error: object) -> None:
        self._held = False
        self.finish()

    @final
    def __call__(self, epoch: Epoch) -> None:
        """Record an epoch and the pictures that it has drawn."""
        self.follow(epoch.run, epoch.history, epoch.folder)
        if epoch.folder is not None:
            self.show(epoch.run.pictures_due(epoch.number, last=epoch.last), epoch.folder, epoch.number)
        if epoch.last and not self._held:
            self.finish()

    @final
    def follow(self, run: Run, history: Sequence[Mapping[str, Any]], folder: Path | None) -> None:
        """Record those epochs of a training's history that were not; ``fit`` does so before the first step too.

        Args:
            run: the training's configuration.
            history: its epochs so far: the one list that ``fit`` adds to. Another is of another training.
            folder: its run folder.
        """
        if self._history is not history:
            self.finish()
            self._history, self._failed = history, False
        self._attempt(lambda: self._catch_up(run, history, folder))

    @final
    def show(self, pictures: Iterable[Picture], folder: Path, epoch: int) -> None:
        """Record those of these pictures of a run folder, drawn at this epoch, that are PNG files."""
        for name, path in ((p.draw, folder / p.file.format(epoch=epoch)) for p in pictures):
            if self._is_open and path.suffix == ".png" and path.exists():
                # As of the last epoch: some trackers take nothing for one that is earlier.
                self._attempt(lambda name=name, path=path: self.picture(name, path, self._recorded))

    @final
    def finish(self) -> None:
        """End the record."""
        if self._is_open:
            self._is_open, self._failed = False, False
            self._attempt(self.close)
        self._history = None

    def _catch_up(self, run: Run, history: Sequence[Mapping[str, Any]], folder: Path | None) -> None:
        if not self._is_open:
            known = _known(folder).get(self.word, {})
            before = history[-1]["epoch"] if history else 0
            # A run that was killed may have recorded an epoch that it had not saved, and trains again.
            self._recorded = min(known.get("epoch", 0), before)
            title = run.recipe if folder is None else folder.resolve().name
            self.name = self.open(title, settings_of(run), known.get("name"), folder)
            self._is_open = True
        for record in history:
            if record["epoch"] > self._recorded:
                self.numbers({k: v for k, v in record.items() if k not in ("epoch", "step")}, record["epoch"])
                self._recorded = record["epoch"]
        if folder is not None:
            write_json(folder / KNOWN, {**_known(folder), self.word: {"name": self.name, "epoch": self._recorded}})

    def _attempt(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except UsageError:
            raise
        except Exception as error:  # whatever a package raises: hours of training are not to end by it
            self._failed = True
            log.warning("%s: %s; the training goes on without it", self.word, first_line(error))

    @abstractmethod
    def open(self, title: str, settings: Mapping[str, Any], name: str | None, folder: Path | None) -> str:
        """Open the record of a run; returns what the tracker calls it.

        Args:
            title: what it is to be called.
            settings: numbers and words.
            name: what it was called before the run was resumed; None: it is new to the tracker.
            folder: the run folder.
        """

    @abstractmethod
    def numbers(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Record the numbers of an epoch."""

    @abstractmethod
    def picture(self, name: str, path: Path, epoch: int) -> None:
        """Record a PNG file under a name, as of an epoch."""

    @abstractmethod
    def close(self) -> None:
        """Close the record."""


def _known(folder: Path | None) -> dict[str, Any]:
    return read_json(folder / KNOWN) if folder is not None and (folder / KNOWN).exists() else {}


def settings_of(run: Run) -> dict[str, Any]:
    """Recipe, parts and settings of a run by their flat names, as numbers and words."""
    parts = {slot: "auto" if (part := getattr(run, slot)) is None else part.word for slot in SLOTS}
    values = {name: leaf.value for name, leaf in flat(run).items()}
    plain = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in values.items()}
    return {"recipe": run.recipe, **parts, **plain}


@final
class TensorBoard(Tracker):
    """Event files in the run folder: ``tensorboard --logdir runs`` shows all runs side by side.

    Args:
        folder: where the files go; None: into the run folder.
    """

    word = package = "tensorboard"

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__()
        self.folder = folder

    def open(self, title: str, settings: Mapping[str, Any], name: str | None, folder: Path | None) -> str:
        """Write the settings; what was recorded after the last epoch that counts is shown no more."""
        from torch.utils.tensorboard import SummaryWriter

        if (place := self.folder or folder) is None:
            raise UsageError("TensorBoard's files need a folder: give fit an out, or TensorBoard a folder")
        self.writer = SummaryWriter(str(place), purge_step=None if name is None else self._recorded + 1)
        rows = [f"| {name} | {value} |" for name, value in settings.items()]
        self.writer.add_text("settings", "\n".join(["| | |", "|---|---|", *rows]), self._recorded + 1)
        return title

    def numbers(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Write a scalar for each."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def picture(self, name: str, path: Path, epoch: int) -> None:
        """Write it as an image."""
        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), epoch, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class WandB(Tracker):
    """Weights & Biases: ``wandb login`` once, or ``WANDB_MODE=offline`` and ``wandb sync`` later."""

    word = package = "wandb"

    def open(self, title: str, settings: Mapping[str, Any], name: str | None, folder: Path | None) -> str:
        """Begin a run, or go on with the one of this id."""
        wandb: Any = import_module("wandb")
        self.image = wandb.Image
        self.run = wandb.init(
            project=self.project, name=title, config=dict(settings), id=name, dir=folder and str(folder),
            resume="never" if name is None else "allow", reinit="create_new",
        )  # fmt: skip
        return self.run.id

    def numbers(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Log them at the step that is the epoch."""
        self.run.log(dict(numbers), step=epoch)

    def picture(self, name: str, path: Path, epoch: int) -> None:
        """Log it as an image."""
        self.run.log({name: self.image(str(path))}, step=epoch)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


@final
class Trackio(WandB):
    """Trackio, which keeps runs in a database on this machine: ``trackio show`` shows them."""

    word = package = "trackio"

    def open(self, title: str, settings: Mapping[str, Any], name: str | None, folder: Path | None) -> str:
        """Begin a run, or go on with the one of this name, which has no other: folders may be called alike."""
        trackio: Any = import_module("trackio")
        self.image = trackio.Image
        resume, name = "never" if name is None else "allow", name or f"{title}-{uuid.uuid4().hex[:6]}"
        self.run = trackio.init(project=self.project, name=name, config=dict(settings), resume=resume)
        return name


@final
class MLflow(Tracker):
    """MLflow, at ``MLFLOW_TRACKING_URI`` or where MLflow keeps runs by itself: ``mlflow ui`` shows them."""

    word = package = "mlflow"

    def open(self, title: str, settings: Mapping[str, Any], name: str | None, folder: Path | None) -> str:
        """Begin a run of the experiment, with its settings, which MLflow lets nobody change; or go on with one."""
        self.client: Any = import_module("mlflow").MlflowClient()
        if name is not None:
            self.client.update_run(name, status="RUNNING")
            return name
        experiment = self.client.get_experiment_by_name(self.project)
        number = self.client.create_experiment(self.project) if experiment is None else experiment.experiment_id
        new: str = self.client.create_run(number, run_name=title).info.run_id
        for setting, value in settings.items():
            self.client.log_param(new, setting, value)
        return new

    def numbers(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Log a metric for each, at the step that is the epoch."""
        for name, value in numbers.items():
            self.client.log_metric(self.name, name, value, step=epoch)

    def picture(self, name: str, path: Path, epoch: int) -> None:
        """Keep the file among the run's artifacts."""
        self.client.log_artifact(self.name, str(path), "pictures")

    def close(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(self.name)


TRACKERS: Mapping[str, type[Tracker]] = {kind.word: kind for kind in (TensorBoard, WandB, Trackio, MLflow)}
"""All trackers by their words."""
