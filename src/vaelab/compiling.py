"""Compiled functions: passes over memory fused into one, where the machine has a compiler and the work is long."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaelab.models import VAE

log = logging.getLogger("vaelab")


def can_compile(device: torch.device) -> bool:
    """Whether torch can compile here: for a CPU with a C++ compiler and Python's headers, for a GPU with Triton."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return device.type == "cpu" and headers.exists() and shutil.which(os.environ.get("CXX", "g++")) is not None


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch's compiler raises; importing it takes a while, so not before it is used."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


def reason(error: Exception) -> str:
    """Why compiling failed, in one line."""
    inner = getattr(error, "inner_exception", error)
    return f"{type(inner).__name__}: {(str(inner).strip() or 'no message').splitlines()[0]}"


@contextmanager
def compiled_log_px(model: VAE) -> Generator[None]:
    """Let a model score images by a compiled ``log_px`` inside the block; numbers change by rounding.

    It is compiled at the first call, in some ten seconds, and again for other shapes: a shape that is known is faster.
    Where that fails, one line says so, and the model scores as it did.
    """
    plain = model.log_px
    fused = torch.compile(plain, dynamic=False)
    own = vars(model)

    def log_px(*args: Any) -> Tensor:
        try:
            return fused(*args)
        except compile_errors() as error:
            if own["log_px"] is log_px:  # the first thread that fails says it
                own["log_px"] = plain
                log.warning("log p(x|z) cannot be compiled here (%s): slower without", reason(error))
            return plain(*args)

    # An instance's attribute comes before its class's method.
    own["log_px"] = log_px
    try:
        yield
    finally:
        del own["log_px"]
