"""Specs of approximate posteriors q(z|x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from vaelab.specs.spec import Spec, option


@final
@dataclass(frozen=True)
class DiagonalNormal(Spec):
    """Approximate posterior with independent normal latents: q(z|x) = N(loc(x), diag(scale(x)^2))."""

    part: ClassVar[str] = "vaelab.posteriors:DiagonalNormal"
    word: ClassVar[str] = "diagonal-normal"
    latent_dim: int = option(20, "number of latent dimensions", aliases=("z_dim",))
