"""The two ways in which vaelab says no: a wrong request, and a right one that the world refused.

``code`` is what the command line exits with.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class UsageError(ValueError):
    """The request itself is wrong (a flag, a name, a value)."""

    code: ClassVar[int] = 2


class FailureError(RuntimeError):
    """The request was right and could not be carried out (data, disk, numbers)."""

    code: ClassVar[int] = 1


class InterruptedRun(FailureError):
    """The run was stopped by Ctrl-C or a termination signal, and saved."""

    code: ClassVar[int] = 130


class LostProcessError(FailureError):
    """Another process of a training has ended, or cannot be reached."""


class NotFiniteError(FailureError):
    """A number of a training run is NaN or infinite.

    Args:
        message: what to tell the user.
        step: the training step at which it was seen.
        term: the loss term, or the weight.
    """

    def __init__(self, message: str, step: int, term: str) -> None:
        super().__init__(message)
        self.step, self.term = step, term


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, else the list of known names.

    Example:
        >>> did_you_mean("conv-bta", ["mlp", "conv-beta"])
        "; did you mean 'conv-beta'?"
        >>> did_you_mean("resnet", ["mlp", "conv-beta"])
        '; choose one of conv-beta, mlp'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else f"; choose one of {', '.join(names)}"
