"""A reported number, with standard error, unit, count and protocol; and the mode in which models are measured."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vaelab.runtime import eval_mode


@final
@dataclass(frozen=True)
class Estimate:
    """A mean over examples, with its standard error.

    Args:
        value: the mean.
        stderr: its standard error over the n examples; NaN for n = 1.
        unit: what it is counted in.
        n: how many examples.
        protocol: everything that another number must share to be comparable.
    """

    value: float
    stderr: float
    unit: str
    n: int
    protocol: str

    @classmethod
    def of(cls, values: NDArray[np.float64], unit: str, protocol: str) -> Estimate:
        """The estimate that per-example values give."""
        n = len(values)
        stderr = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
        return cls(float(values.mean()), stderr, unit, n, protocol)

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.stderr:.2f} {self.unit} (n={self.n:,}, {self.protocol})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, in which a standard error that cannot be had (n = 1) is null."""
        return {**dataclasses.asdict(self), "stderr": self.stderr if self.n > 1 else None}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """No gradients, dropout and batch norm as in evaluation; the model's mode is restored."""
    with eval_mode(model), torch.no_grad():
        yield
