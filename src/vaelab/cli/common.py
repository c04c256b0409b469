"""What commands on a run share. Nothing heavy is imported before a command starts to work."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import Positional

from vaelab.config import Run
from vaelab.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from vaelab.data import Dataset
    from vaelab.models import VAE

T = TypeVar("T")
RunPath = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN", help="a run folder")]


def refuse_unknown_flags(arguments: Sequence[str], known: set[str]) -> None:
    """Raise for a flag that does not exist, naming the closest that does."""
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            of_parts = sorted(one for one in known if one.endswith(flag.removeprefix("-")))  # --encoder-conv-channels
            meant = f"; did you mean {' or '.join(map(repr, of_parts))}?" if of_parts else did_you_mean(flag, known)
            raise UsageError(f"no flag {flag}{meant}")


def refuse_repeated_lists(arguments: Sequence[str], types: dict[str, Any]) -> None:
    """Raise for a flag that takes several values and is given twice: the last would count alone.

    Args:
        arguments: the command line.
        types: of each flag.
    """
    given = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    for flag, kind in types.items():
        takes_several = any(get_origin(part) is tuple for part in (kind, *get_args(kind)))
        if takes_several and given.count(flag) > 1:
            raise UsageError(f"{flag} is given {given.count(flag)} times, and the last would count alone: give all "
                             f"values to one, {flag} A B")  # fmt: skip


def parse(what: Callable[..., T], arguments: Sequence[str], prog: str, **options: Any) -> T:
    """``tyro.cli``, with one line where it prints a box.

    Raises:
        UsageError: if a value has the wrong type, or one that is needed is missing.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(what, args=list(arguments), prog=prog, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # Below its title, between rules (with a frame around it where the encoding has one), is the message.
        below = (line.strip("│| ") for line in box.getvalue().splitlines()[1:])
        message = itertools.takewhile(_says, itertools.dropwhile(lambda line: not _says(line), below))
        raise UsageError(f"{_plain(' '.join(message))}; {prog} --help says more") from None


def later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A function that tyro reads as the command, and that returns the work in place of doing it.

    Parsing and working complain in different ways. The help speaks of no ``None`` (see ``without_none``), and of an
    argument in one paragraph, wherever the lines of the docstring end.
    """
    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)

    def put_off(*values: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(command, *values, **options)

    shown = {p.name: without_none(hints[p.name], p.default) for p in signature.parameters.values()}
    parameters = [p.replace(annotation=shown[p.name]) for p in signature.parameters.values()]
    put_off.__signature__, put_off.__annotations__ = signature.replace(parameters=parameters), shown
    put_off.__doc__ = re.sub(r"\n {8,}", " ", inspect.getdoc(command) or "")
    return put_off


def without_none(annotation: Any, default: Any) -> Any:
    """The annotation of a flag whose help names a default only where that says something.

    Of a flag that may be left out tyro writes ``{None}|INT`` and ``(default: None)``; here it is ``INT``.
    """
    if default is not None and default is not False and default not in ((), inspect.Parameter.empty):
        return annotation
    bare, *more = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    kinds = [kind for kind in get_args(bare) if kind is not type(None)]
    value = _metavar(kinds[0]) if default is None and len(kinds) == 1 else None
    return Annotated[(bare, tyro.conf.arg(metavar=value, help_behavior_hint=""), *more)]


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    if get_origin(kind) is tuple:  # INT INT, or INT ...
        return " ".join(map(_metavar, get_args(kind)))
    return "..." if kind is ... else kind.__name__.upper()


def _says(line: str) -> bool:
    return bool(line.strip("─-"))


def _plain(text: str) -> str:
    """What tyro says, in words for those who give flags and not types."""
    text = re.sub(r"^Error parsing (\S+): (.*)$", r"\1: \2", text).rstrip(".")
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", text)
    text = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", text)
    text = text.replace("'None', ", "").replace(", 'None'", "")  # of a flag that may be left out
    text = re.sub(r"no type matching \{None\}\|\{?(.+?)\}? could be instantiated from \[('.*')]", r"\2 is not \1", text)
    return re.sub(r"is not INT\b(?! INT)", "is not a whole number", re.sub(r"is not FLOAT", "is not a number", text))


def at_least(least: int, *, most: float = math.inf, **numbers: int | None) -> None:
    """Raise for a flag whose number is less than ``least`` or more than ``most``; None is one that was not given."""
    for name, number in numbers.items():
        if number is not None and not least <= number <= most:
            must = f"at least {least}" if most == math.inf else f"from {least} to {most:,}"
            raise UsageError(f"--{name.replace('_', '-')} {number}: must be {must}")


def opened(run: Path) -> tuple[Run, VAE, Dataset]:
    """A run's configuration, model and data, the data checked to be those that it was trained on."""
    from vaelab.runs.folder import RunFolder
    from vaelab.runs.loading import data_of, load_model

    folder = RunFolder.open(run)
    return folder.run, load_model(run), data_of(folder)


def target_file(run: Path, out: Path | None, name: str) -> Path:
    """The file to write: the one that is asked for, if it does not exist, or one in the run folder."""
    from vaelab.runs.folder import RunFolder

    RunFolder.open(run)
    if out is not None and out.exists():
        raise UsageError(f"--out {out} exists: give another name, or remove it first")
    return out or run / name


def write(path: Path, content: bytes) -> None:
    """Write a file and say where it is."""
    from vaelab.runs.checkpoint import write_bytes

    write_bytes(path, content)
    print(path)
