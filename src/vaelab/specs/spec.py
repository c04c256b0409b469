"""What all specs of parts share: a declared field, and the way from a spec to its part."""

from __future__ import annotations

import dataclasses
import math
from importlib import import_module
from typing import Any, ClassVar, Literal, TypeVar

from vaelab.errors import UsageError

Shape = tuple[int, int, int]  # channels, height, width of one image
Activation = Literal["relu", "tanh", "silu", "gelu", "gated"]  # gated: a * sigmoid(b), of two linear maps a and b


def option(
    default: Any, help: str, *, aliases: tuple[str, ...] = (), flag: str | None = None,
    above_zero: bool = False, at_most: float = math.inf, below: float = math.inf,
) -> Any:  # fmt: skip
    """Declare a field: its default, its line of help, other names, and the flag's name if it is not the field's.

    Its numbers are to be finite, 0 at least (or above), ``at_most`` at most and below ``below``.
    """
    more = {"aliases": aliases, "flag": flag, "above_zero": above_zero, "at_most": at_most, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, **more})


def positive(default: Any, help: str, **more: Any) -> Any:
    """Declare a field as ``option`` does, of numbers above 0."""
    return option(default, help, above_zero=True, **more)


class Spec:
    """Base of all specs of model parts.

    ``part`` names the module and class that ``build`` instantiates, ``word`` is what the command line calls it.
    """

    part: ClassVar[str]
    word: ClassVar[str]

    def __init_subclass__(cls) -> None:
        # What ``vaelab.specs.priors`` describes is in ``vaelab.priors``, and mostly of the same name.
        if "part" not in vars(cls):
            cls.part = f"{cls.__module__.replace('.specs', '')}:{cls.__name__}"

    def build(self, *shape: Any) -> Any:
        """Make the part for the given shapes. The part is ``torch.nn.Module(spec, *shape)``.

        Raises:
            UsageError: if there is no class of the name that ``part`` gives.
        """
        module, _, name = self.part.partition(":")
        found = getattr(import_module(module), name, None)
        if found is None:
            raise UsageError(f"{type(self).__name__} is made by {self.part}, and there is no such class")
        return found(self, *shape)


SpecT = TypeVar("SpecT", bound=Spec)
"""The configuration of a part."""
