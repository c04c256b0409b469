"""What all specs of parts share: a declared field, and the way from a spec to its part."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any, ClassVar, Literal, TypeVar

Shape = tuple[int, int, int]  # channels, height, width of one image
Activation = Literal["relu", "tanh", "silu", "gelu", "gated"]  # gated: a * sigmoid(b), of two linear maps a and b


def option(default: Any, help: str, *, aliases: tuple[str, ...] = (), flag: str | None = None) -> Any:
    """Declare a field: its default, its line of help, other names, and the flag's name if it is not the field's."""
    return dataclasses.field(default=default, metadata={"help": help, "aliases": aliases, "flag": flag})


class Spec:
    """Base of all specs of model parts.

    ``part`` names the module and class that ``build`` instantiates, ``word`` is what the command line calls it.
    """

    part: ClassVar[str]
    word: ClassVar[str]

    def build(self, *shape: Any) -> Any:
        """Make the part for the given shapes. The part is ``torch.nn.Module(spec, *shape)``."""
        module, name = self.part.split(":")
        return getattr(import_module(module), name)(self, *shape)


SpecT = TypeVar("SpecT", bound=Spec)
"""The configuration of a part."""
