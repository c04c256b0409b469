"""Specs of priors p(z)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from vaelab.specs.spec import Spec, option


@final
@dataclass(frozen=True)
class StandardNormal(Spec):
    """Prior p(z) = N(0, I)."""

    part: ClassVar[str] = "vaelab.priors:StandardNormal"
    word: ClassVar[str] = "standard-normal"


@final
@dataclass(frozen=True)
class Mixture(Spec):
    """Prior that is a learned mixture of diagonal normals."""

    part: ClassVar[str] = "vaelab.priors:MixturePrior"
    word: ClassVar[str] = "mixture"
    num_components: int = option(10, "components of the mixture")


@final
@dataclass(frozen=True)
class VampPrior(Spec):
    """Prior that is a mixture of the posteriors of learned pseudo-inputs."""

    part: ClassVar[str] = "vaelab.priors:VampPrior"
    word: ClassVar[str] = "vamp"
    num_components: int = option(500, "pseudo-inputs, each with a component of the mixture")
