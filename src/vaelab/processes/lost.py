"""What is said when another process of a training has gone."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from vaelab.errors import FailureError


class LostProcessError(FailureError):
    """Another process of the training has ended, or cannot be reached."""


@contextlib.contextmanager
def failures() -> Generator[None]:
    """Say of an error inside the block that another process has gone.

    Raises:
        LostProcessError: in place of what a socket or ``torch.distributed`` raises.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise LostProcessError(
            f"another process of this training has gone ({str(error).splitlines()[0]}): start them all again, "
            "with --resume"
        ) from error
