"""Trackers: the numbers and pictures of a training in TensorBoard, Weights & Biases, Trackio or MLflow.

None is needed: a run folder holds the same numbers in ``history.jsonl``, and the pictures beside it. Each tracker is a
function of ``on_epoch_end``, needs a package of its own, and has that package's settings (``WANDB_MODE=offline``,
``MLFLOW_TRACKING_URI``).
"""

from __future__ import annotations

import logging
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
from PIL import Image

from vaelab.config import Picture, Run, flat
from vaelab.errors import UsageError
from vaelab.runs.checkpoint import read_json, write_json
from vaelab.slots import SLOTS
from vaelab.train import Epoch

log = logging.getLogger("vaelab")

NAMES = "trackers.json"
"""The file of a run folder that says what trackers call the run, so that a resumed run stays one."""


class Tracker(ABC):
    """Follows one training: pass it to ``fit(..., on_epoch_end=[...])``, or name it to ``vaelab train --track``.

    Every number of ``history.jsonl`` is recorded under its name there, at its epoch; settings, and the pictures that
    are drawn into a run folder, are too. A run that is resumed stays one, and a run that was not followed from its
    beginning is recorded from there. What the package fails at (no network, no account) is said in one line, and the
    training goes on without it.

    Args:
        project: what the run belongs to: a project, or MLflow's experiment.

    Raises:
        UsageError: if the package is not installed.
    """

    word: ClassVar[str]
    """What the tracker is called: on the command line, by pip, and as a module."""

    def __init__(self, project: str = "vaelab") -> None:
        if find_spec(self.word) is None:
            raise UsageError(f"{self.word} is not installed: pip install {self.word}")
        self.project = project
        self._begun = self._failed = False
        self._recorded = 0  # the last epoch: some trackers take nothing for one that is earlier

    @final
    def __call__(self, epoch: Epoch) -> None:
        """Record an epoch and the pictures that it has drawn."""
        self._attempt(lambda: self._record(epoch))
        if epoch.folder is not None:
            self.show(epoch.run.pictures_due(epoch.number, last=epoch.last), epoch.folder, epoch.number)

    @final
    def show(self, pictures: Iterable[Picture], folder: Path, epoch: int) -> None:
        """Record those of these pictures of a run folder, drawn at this epoch, that are PNG files."""
        for name, path in ((p.draw, folder / p.file.format(epoch=epoch)) for p in pictures):
            if self._begun and path.suffix == ".png" and path.exists():
                self._attempt(lambda name=name, path=path: self._show(name, path, self._recorded))

    @final
    def finish(self) -> None:
        """Record that the training has ended."""
        if self._begun:
            self._attempt(self._close)

    def _record(self, epoch: Epoch) -> None:
        records = epoch.history[-1:]
        if self._begun and epoch.number == 1:  # of another training, that this one is passed to as well
            self._close()
            self._begun = False
        if not self._begun:
            names = read_json(epoch.folder / NAMES) if epoch.folder and (epoch.folder / NAMES).exists() else {}
            known = names.get(self.word)
            if known is None:
                records = epoch.history
            name = self._open(epoch, known)
            self._begun = True
            if epoch.folder is not None:
                write_json(epoch.folder / NAMES, {**names, self.word: name})
        for record in records:
            self._recorded = record["epoch"]
            self._log({name: v for name, v in record.items() if name not in ("epoch", "step")}, self._recorded)

    def _attempt(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except UsageError:
            raise
        except Exception as error:  # whatever a package raises: hours of training are not to end by it
            self._failed = True
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("%s: %s; the training goes on without it", self.word, why)

    @abstractmethod
    def _open(self, epoch: Epoch, known: str | None) -> str:
        """Open the record of a run, with its settings; returns what the tracker calls it.

        Args:
            epoch: the first that is recorded by this process.
            known: what it was called before the run was resumed; None: it is new to the tracker.
        """

    @abstractmethod
    def _log(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Record the numbers of an epoch."""

    @abstractmethod
    def _show(self, name: str, path: Path, epoch: int) -> None:
        """Record a PNG file under a name, as of an epoch."""

    @abstractmethod
    def _close(self) -> None:
        """Close the record."""


def settings_of(run: Run) -> dict[str, Any]:
    """Recipe, parts and settings of a run by their flat names, as numbers and words."""
    parts = {slot: "auto" if (part := getattr(run, slot)) is None else part.word for slot in SLOTS}
    values = {name: leaf.value for name, leaf in flat(run).items()}
    plain = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in values.items()}
    return {"recipe": run.recipe, **parts, **plain}


def _title(epoch: Epoch) -> str:
    return epoch.run.recipe if epoch.folder is None else epoch.folder.resolve().name


@final
class TensorBoard(Tracker):
    """Event files in the run folder: ``tensorboard --logdir runs`` shows all runs side by side.

    Args:
        folder: where the files go; None: into the run folder.
    """

    word = "tensorboard"

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__()
        self.folder = folder

    def _open(self, epoch: Epoch, known: str | None) -> str:
        from torch.utils.tensorboard import SummaryWriter

        if (folder := self.folder or epoch.folder) is None:
            raise UsageError("TensorBoard's files need a folder: give fit an out, or TensorBoard a folder")
        # A run that was killed may have recorded an epoch that it had not saved: those are shown no more.
        self.writer = SummaryWriter(str(folder), purge_step=None if known is None else epoch.number)
        rows = [f"| {name} | {value} |" for name, value in settings_of(epoch.run).items()]
        self.writer.add_text("settings", "\n".join(["| | |", "|---|---|", *rows]), epoch.number)
        return _title(epoch)

    def _log(self, numbers: Mapping[str, float], epoch: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def _show(self, name: str, path: Path, epoch: int) -> None:
        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), epoch, dataformats="HWC")
        self.writer.flush()

    def _close(self) -> None:
        self.writer.close()


class WandB(Tracker):
    """Weights & Biases: ``wandb login`` once, or ``WANDB_MODE=offline`` and ``wandb sync`` later."""

    word = "wandb"

    def _open(self, epoch: Epoch, known: str | None) -> str:
        self.package: Any = import_module(self.word)
        given = {"project": self.project, "config": settings_of(epoch.run)}
        self.run = self.package.init(**given, resume="never" if known is None else "allow", **self._named(epoch, known))
        return getattr(self.run, self.key)

    key: ClassVar[str] = "id"
    """The attribute of the package's run that is its name for ever."""

    def _named(self, epoch: Epoch, known: str | None) -> dict[str, Any]:
        """What the package is to call the run."""
        return {"name": _title(epoch), "id": known, "dir": epoch.folder and str(epoch.folder)}

    def _log(self, numbers: Mapping[str, float], epoch: int) -> None:
        self.run.log(dict(numbers), step=epoch)

    def _show(self, name: str, path: Path, epoch: int) -> None:
        self.run.log({name: self.package.Image(str(path))}, step=epoch)

    def _close(self) -> None:
        self.run.finish()


@final
class Trackio(WandB):
    """Trackio, which keeps runs in a database on this machine: ``trackio show`` shows them."""

    word = "trackio"

    key = "name"

    def _named(self, epoch: Epoch, known: str | None) -> dict[str, Any]:
        return {"name": known or f"{_title(epoch)}-{uuid.uuid4().hex[:6]}"}  # folders may be called alike


@final
class MLflow(Tracker):
    """MLflow, at ``MLFLOW_TRACKING_URI``; by default in files below the current folder, which ``mlflow ui`` shows."""

    word = "mlflow"

    def _open(self, epoch: Epoch, known: str | None) -> str:
        self.package: Any = import_module("mlflow")
        self.package.set_experiment(self.project)
        run = self.package.start_run(run_id=known, run_name=_title(epoch))
        if known is None:
            self.package.log_params(settings_of(epoch.run))
        return run.info.run_id

    def _log(self, numbers: Mapping[str, float], epoch: int) -> None:
        self.package.log_metrics(dict(numbers), step=epoch)

    def _show(self, name: str, path: Path, epoch: int) -> None:
        self.package.log_artifact(str(path), "pictures")

    def _close(self) -> None:
        self.package.end_run()


TRACKERS: Mapping[str, type[Tracker]] = {kind.word: kind for kind in (TensorBoard, WandB, Trackio, MLflow)}
"""All trackers by their words."""
