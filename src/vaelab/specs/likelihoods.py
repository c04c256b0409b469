"""Specs of likelihoods p(x|z)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from vaelab.specs.spec import Spec, option


@final
@dataclass(frozen=True)
class Bernoulli(Spec):
    """Likelihood of binary pixels, computed from logits; on grey pixels a cross-entropy, not a likelihood."""

    part: ClassVar[str] = "vaelab.likelihoods:Bernoulli"
    word: ClassVar[str] = "bernoulli"


@final
@dataclass(frozen=True)
class Gaussian(Spec):
    """Likelihood of real-valued pixels: N(mean(z), sigma^2), one sigma for all pixels, learned or fixed."""

    part: ClassVar[str] = "vaelab.likelihoods:Gaussian"
    word: ClassVar[str] = "gaussian"
    sigma: float = option(0.3, "standard deviation of a pixel in [0, 1] (where learning starts from)")
    learn_sigma: bool = option(True, "learn sigma with the network")
