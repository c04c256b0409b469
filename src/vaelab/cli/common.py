"""What commands on a run share. Nothing heavy is imported before a command starts to work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from vaelab.config import Run
from vaelab.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from vaelab.data import Dataset
    from vaelab.models import VAE

RunPath = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN", help="a run folder")]
Output = Annotated[Path | None, tyro.conf.arg(help="the file to write; default: one in the run folder")]


def refuse_unknown_flags(arguments: Sequence[str], known: set[str]) -> None:
    """Raise for a flag that does not exist, naming the closest that does."""
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            raise UsageError(f"no flag {flag}{did_you_mean(flag, known)}")


def config(run: Path) -> Run:
    """A run's configuration."""
    from vaelab.folder import RunFolder

    return RunFolder.open(run).run


def opened(run: Path) -> tuple[Run, VAE, Dataset]:
    """A run's configuration, model and data, the data checked to be those that it was trained on."""
    from vaelab.folder import RunFolder
    from vaelab.train import load_data, load_model, require_same_data

    model, folder = load_model(run), RunFolder.open(run)
    data = load_data(folder.run)
    require_same_data(folder, data)
    return folder.run, model, data


def target_file(run: Path, out: Path | None, name: str) -> Path:
    """The file to write: the one that is asked for, if it does not exist, or one in the run folder."""
    from vaelab.folder import RunFolder

    RunFolder.open(run)
    if out is not None and out.exists():
        raise UsageError(f"--out {out} exists: give another name, or remove it first")
    return out or run / name


def write(path: Path, content: bytes) -> None:
    """Write a file and say where it is."""
    from vaelab.checkpoint import write_bytes

    write_bytes(path, content)
    print(path)
