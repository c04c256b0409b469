"""Compiled functions: passes over memory fused into one, where the machine has a compiler and the work is long."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from vaelab.models import VAE


def can_compile(device: torch.device) -> bool:
    """Whether torch can compile here: for a CPU with a C++ compiler and Python's headers, for a GPU with Triton."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return device.type == "cpu" and headers.exists() and shutil.which(os.environ.get("CXX", "g++")) is not None


@contextmanager
def compiled_log_px(model: VAE) -> Generator[None]:
    """Let a model score images by a compiled ``log_px`` inside the block; numbers change by rounding.

    It is compiled at the first call, in some ten seconds, and again for other shapes: a shape that is known is faster.
    """
    own = vars(model)
    # An instance's attribute comes before its class's method.
    own["log_px"] = torch.compile(model.log_px, dynamic=False)
    try:
        yield
    finally:
        del own["log_px"]
