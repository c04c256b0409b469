"""The run folder: where a run keeps its configuration, history, checkpoints and pictures.

``config.json`` what was asked for and what it was resolved to; ``history.jsonl`` one line an epoch; ``last.pt`` all
that a resume needs; ``best_model.pth`` the weights to use; pictures; ``metrics.json`` and ``evaluation.pt`` written by
``evaluate``; ``failure.json`` where a run ended in NaN; ``.lock`` is held by who trains, ``.measuring`` by
who measures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shlex
import subprocess
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from filelock import FileLock, Timeout

from vaelab import __version__
from vaelab.config import Run, flat, from_json, to_json
from vaelab.data.sources import IN_MEMORY, MADE, NAMED
from vaelab.errors import FailureError, NotFiniteError, UsageError
from vaelab.runs.checkpoint import (
    append_line,
    load_tensors,
    read_json,
    read_lines,
    save_tensors,
    write_bytes,
    write_json,
)
from vaelab.slots import SLOTS, parts_of
from vaelab.specs import WarmupCosine

log = logging.getLogger("vaelab")

FORMAT = 1  # of config.json and last.pt; raised when an older vaelab could not read what is written

# Settings that a resume may change: they alter the bits of what follows, not what is computed.
MACHINE_SETTINGS = frozenset({"precision", "compile", "device", "threads"})

LOCK, MEASURING = ".lock", ".measuring"


@final
@dataclass(frozen=True)
class RunFolder:
    """A folder that holds one run. Files are replaced atomically; the history is appended to, line by line."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, resumable: bool = True) -> RunFolder:
        """Claim an empty or new folder; ``resumable``: what is there already could be gone on with.

        Raises:
            UsageError: if it holds another run, or anything else that could be overwritten.
        """
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            what = "a file" if path.exists() else "a link to a place that does not exist"
            raise UsageError(f"--out {path} is {what}: choose another folder")
        if (path / "config.json").exists():
            raise UsageError(
                f"{path} holds a run already: {'go on with it by --resume, or ' if resumable else ''}"
                "choose another folder with --out"
            )
        if path.exists() and any(file.name != LOCK for file in path.iterdir()):
            raise UsageError(f"{path} is not empty and holds no run of vaelab: choose another folder with --out")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A folder that holds a run.

        Raises:
            UsageError: if there is none.
        """
        if not (path / "config.json").exists():
            hint = "train one with vaelab train RECIPE --out " + str(path)
            raise UsageError(f"{path} holds no run (no config.json): {hint}")
        return cls(path)

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """Keep others from training into this folder, inside the block; a process that dies lets go of it.

        Raises:
            UsageError: if somebody holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        taken = f"another process trains into {self.path}: wait for it or stop it, or choose another folder with --out"
        with _locked(
            self.path / LOCK, taken, f"the disk of {self.path} knows no locks: let no other process train into it"
        ):
            yield

    @contextlib.contextmanager
    def measured(self) -> Generator[None]:
        """Keep others from measuring this run, inside the block: each would write what it has found over the other's.

        Raises:
            UsageError: if somebody does.
        """
        taken = f"another process measures {self.path}: wait for it or stop it"
        with _locked(
            self.path / MEASURING, taken, f"the disk of {self.path} knows no locks: measure it in one process"
        ):
            yield

    def sweep(self) -> None:
        """Remove what a run has left that was killed in the middle of a write, or went wrong."""
        for leftover in (*self.path.rglob(".*.tmp"), *self.path.glob("failure.json")):
            leftover.unlink()

    # configuration

    def write_config(self, run: Run, data: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
        """Write ``config.json``: the run, what its data are, and what ``auto`` was resolved to."""
        origin = {"format": FORMAT, "vaelab": __version__, "commit": source_commit()}
        content = {**origin, "run": to_json(run), "data": data, "resolved": resolved}
        write_json(self.path / "config.json", content)

    def config(self) -> dict[str, Any]:
        """The content of ``config.json``.

        Raises:
            FailureError: if it is damaged or was written by a newer vaelab.
        """
        content = read_json(self.path / "config.json")
        if content.get("format") != FORMAT:
            raise FailureError(
                f"{self.path} was written in format {content.get('format')} by vaelab {content.get('vaelab')}; "
                f"vaelab {__version__} reads format {FORMAT}"
            )
        if not {"run", "data", "resolved"} <= content.keys():
            raise FailureError(f"{self.path / 'config.json'} is incomplete")
        return content

    @property
    def run(self) -> Run:
        """The run's configuration."""
        return from_json(self.config()["run"])

    def reconcile(self, run: Run, remedy: str = "leave it out") -> Run:
        """The run to go on with, given one that was asked for: the folder's own, but for what may change.

        Args:
            run: the one that was asked for.
            remedy: what to do about a setting that differs.

        Raises:
            UsageError: naming the first setting that differs and both its values.
        """
        content = self.config()
        if "refit" in content:
            raise UsageError(
                f"{self.path} holds a run whose prior was fitted after its training: it cannot be gone on with; train "
                f"{content['refit']['from']} further, then fit the prior again (vaelab refit)"
            )
        ours = from_json(content["run"])
        if run.recipe != ours.recipe:
            raise UsageError(f"{self.path} holds a run of {ours.recipe}, not of {run.recipe}")
        for slot in SLOTS:
            kept, wanted = (getattr(part, "word", "auto") for part in (getattr(ours, slot), getattr(run, slot)))
            if kept != wanted:
                raise UsageError(f"--{slot} {wanted} differs from the {kept} of the run in {self.path}: {remedy}")
        before, spread = flat(ours), isinstance(run.schedule, WarmupCosine)
        for name, leaf in flat(run).items():
            kept, wanted = before[name].value, leaf.value
            longer = name == "epochs" and wanted > kept
            moved = name == "data" and kept not in NAMED and wanted not in NAMED  # whether they are the same is hashed
            if wanted == kept or name in MACHINE_SETTINGS or (longer and not spread) or moved:
                continue
            flag = "--" + name.replace("_", "-")
            why = " (the schedule is spread over the epochs, so more of them would be another run)" if longer else ""
            raise UsageError(f"{flag} {wanted} differs from the {kept} of the run in {self.path}: {remedy}{why}")
        return run

    def require_path_of_data(self, run: Run) -> None:
        """Refuse to go on without data of one's own that have been moved.

        Args:
            run: the run in this folder, or one that goes on with it.

        Raises:
            UsageError: naming where they were, and what to do.
        """
        content, source = self.config(), run.data.source
        if source != content["run"]["data"]["source"] or source in NAMED or Path(source).expanduser().exists():
            return
        if source == MADE:
            raise UsageError(f"the run in {self.path} was trained on a data set made in Python: only vaelab.fit(..., "
                             "resume=True) and vaelab.evaluate.evaluate can be given it again")  # fmt: skip
        remedy, where = "put them, or a link to them, there", f"no longer at {source}"
        if source == IN_MEMORY:
            remedy, where = "save them as .npy or .npz", "in no file"
        if "refit" not in content:
            words = ["vaelab", *parts_of(run), "train", run.recipe, "--out", str(self.path), "--resume", "--data"]
            remedy += f", {'and' if source == IN_MEMORY else 'or'} name their new place by {shlex.join(words)} PATH"
        raise UsageError(f"the data of the run in {self.path} are {where}: {remedy}")

    # history

    def history(self) -> list[dict[str, Any]]:
        """One record an epoch."""
        return read_lines(self.path / "history.jsonl")

    def append_history(self, record: Mapping[str, Any]) -> None:
        """Add one epoch's record."""
        append_line(self.path / "history.jsonl", record)

    def best_epoch(self) -> int:
        """The epoch whose weights are the best.

        Raises:
            FailureError: if its history or checkpoint is lost.
        """
        history, state = self.history(), self.load_last()
        if not history or state is None:
            lost = f"{self.path} has lost its history.jsonl or last.pt"
            raise FailureError(f"{lost}: go on with it by --resume, or train it again")
        return history[-1]["epoch"] if state["best"] is None else state["best"][1]

    def cut_history(self, step: int) -> None:
        """Drop the records of steps that a resume will take again."""
        kept = [record for record in self.history() if record["step"] <= step]
        write_bytes(self.path / "history.jsonl", "".join(json.dumps(record) + "\n" for record in kept).encode())

    # the end of a run that went wrong

    def write_failure(self, error: NotFiniteError, checkpoint_step: int | None) -> None:
        """Write ``failure.json``: at which step which term was no longer finite, and the last checkpoint before it."""
        content = {"message": str(error), "step": error.step, "term": error.term, "checkpoint_step": checkpoint_step}
        write_json(self.path / "failure.json", content)

    def failure(self) -> dict[str, Any] | None:
        """The content of ``failure.json``; None if the run did not end so, or was gone on with since."""
        path = self.path / "failure.json"
        return read_json(path) if path.exists() else None

    # weights

    def save_last(self, state: Mapping[str, Any]) -> None:
        """Write ``last.pt``."""
        save_tensors(self.path / "last.pt", {"format": FORMAT, **state})

    def load_last(self) -> dict[str, Any] | None:
        """The content of ``last.pt``; None if the run was stopped before its first checkpoint."""
        if not (self.path / "last.pt").exists():
            return None
        state = load_tensors(self.path / "last.pt")
        if state.get("format") != FORMAT:
            raise FailureError(f"{self.path / 'last.pt'} is of another format than {FORMAT}")
        return state

    def save_best(self, weights: Mapping[str, Any]) -> None:
        """Write ``best_model.pth``."""
        save_tensors(self.path / "best_model.pth", weights)

    def load_best(self) -> dict[str, Any]:
        """The weights of ``best_model.pth``."""
        return load_tensors(self.path / "best_model.pth")

    def weights_sha256(self) -> str:
        """Of ``best_model.pth``: what was measured is of these weights alone."""
        return hashlib.sha256((self.path / "best_model.pth").read_bytes()).hexdigest()


@contextlib.contextmanager
def _locked(file: Path, taken: str, unknown: str) -> Generator[None]:
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(taken) from error
    except NotImplementedError:
        log.info(unknown)
    try:
        yield
    finally:
        lock.release()


def source_commit() -> str | None:
    """The commit of the checkout that this package is read from, with ``-dirty`` if it was changed; None elsewhere."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            found = subprocess.run(["git", "-C", package, *arguments], capture_output=True, text=True, timeout=10)  # noqa: S603, S607
        except (OSError, subprocess.TimeoutExpired):
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # an installed copy, in some other checkout
        return None
    commit, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--", ".")
    return f"{commit}-dirty" if changed else commit
