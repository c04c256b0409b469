"""What a traced training step is given in place of what would be computed anew: noise, and an objective's numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, final

import torch
from torch import Tensor

from vaelab.objectives import Objective
from vaelab.runtime import Noise, Sampler
from vaelab.training.updates import CannotCompileError, on_device

Request = tuple[Sampler, str, tuple[int, ...]]
"""Some noise that was asked for: sampler, stream and shape."""


@final
class GivenNoise(Noise):
    """Noise whose numbers are given, request by request; a request that is new is noted, and answered with zeros."""

    def __init__(self, asked: list[Request], given: Sequence[Tensor], device: torch.device) -> None:
        self._asked, self._device = asked, device
        self._given = dict(zip(asked, given, strict=True))

    def drawn(self, sampler: Sampler, stream: str, shape: Sequence[int]) -> Tensor:
        """What is given for this request."""
        request = sampler, stream, tuple(shape)
        if request not in self._given:
            self._asked.append(request)
            self._given[request] = torch.zeros(shape, device=self._device)
        return self._given[request]


@final
class Weights:
    """An objective's numbers (a scheduled beta) as tensors, so that a compiled function need not know them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: tuple[str, ...] | None = None
        self._values: list[float] = []
        self._tensors: list[Tensor] = []

    def of(self, objective: Objective) -> list[Tensor]:
        """Its numbers: what was a float at the first call. Whole numbers are counts, and stay as they are."""
        if self._names is None:
            fields = dataclasses.fields(cast(Any, objective))
            self._names = tuple(field.name for field in fields if isinstance(getattr(objective, field.name), float))
        values = [float(getattr(objective, name)) for name in self._names]
        if values != self._values:
            self._values = values
            self._tensors = [on_device(torch.tensor(value), self._device) for value in values]
        return self._tensors

    def without(self, objective: Objective) -> Objective:
        """The objective but for its numbers: what a compiled function is made for."""
        self.of(objective)
        return _with(objective, dict.fromkeys(self._names or (), 0.0))

    def put(self, objective: Objective, tensors: Sequence[Tensor]) -> Objective:
        """The objective with tensors in place of them."""
        return _with(objective, dict(zip(self._names or (), tensors, strict=True)))


def _with(objective: Objective, numbers: Mapping[str, Any]) -> Objective:
    """The objective with these in place of its numbers.

    Raises:
        CannotCompileError: where it cannot be made of them, as it checks or needs them when it is made.
    """
    try:
        return cast(Objective, replace(cast(Any, objective), **numbers))
    except Exception as error:
        raise CannotCompileError(f"{type(objective).__name__} looks at its numbers when it is made: {error}") from error
