"""What benchmarks share: the peers' environments, results of other processes, and images of noise.

The environments are made once from PyPI in ``.bench/``, so that theirs is what their users install.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PYTHAE, JAX = "pythae==0.1.2", "jax==0.10.2"
TORCH = f"torch=={torch.__version__.partition('+')[0]}"
REQUIREMENTS = {"pythae": (TORCH, PYTHAE), "jax": (JAX, "numpy")}
RESULT = "RESULT "  # what begins the line of a process's result


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there.

    Args:
        peer: ``pythae`` (with torch, NumPy and Pillow) or ``jax``.
    """
    folder = Path(".bench") / peer
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        print(f"installing {' '.join(REQUIREMENTS[peer])} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *REQUIREMENTS[peer]], check=True)
        (folder / ".ready").touch()
    return python


def result_of(line: Sequence[str], **environment: str) -> dict[str, Any]:
    """What a process prints as its result, in JSON, given a command line and variables to set."""
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment})
    printed = [text for text in done.stdout.splitlines() if text.startswith(RESULT)]
    if done.returncode or not printed:
        raise SystemExit(f"{' '.join(line)} failed:\n{done.stderr[-2000:]}")
    return json.loads(printed[-1].removeprefix(RESULT))


def random_images(count: int, side: int = 28) -> torch.Tensor:
    """Bytes (N, 1, side, side), always the same ones."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, generator=draw)
