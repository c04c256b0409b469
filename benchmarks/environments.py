"""The peers' environments, made once from PyPI in ``.bench/``, so that theirs is what their users install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
PYTHAE, JAX = "pythae==0.1.2", "jax==0.10.2"
TORCH = f"torch=={torch.__version__.partition('+')[0]}"
REQUIREMENTS = {"pythae": (TORCH, PYTHAE), "jax": (JAX, "numpy")}


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
