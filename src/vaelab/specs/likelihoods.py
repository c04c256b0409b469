"""Specs of likelihoods p(x|z)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from vaelab.specs.spec import Spec, option, positive


@final
@dataclass(frozen=True)
class Bernoulli(Spec):
    """Likelihood of binary pixels, computed from logits; on grey pixels a cross-entropy, not a likelihood."""

    word: ClassVar[str] = "bernoulli"


# --- densities of pixels in [0, 1] ----------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class ContinuousBernoulli(Spec):
    """Likelihood of grey pixels: the Bernoulli's formula, normalised over [0, 1]."""

    word: ClassVar[str] = "continuous-bernoulli"


@final
@dataclass(frozen=True)
class Gaussian(Spec):
    """Likelihood of real-valued pixels: N(mean(z), sigma^2), one sigma for all pixels, learned or fixed."""

    word: ClassVar[str] = "gaussian"
    sigma: float = positive(0.3, "standard deviation of a pixel in [0, 1] (where learning starts from)")
    learn_sigma: bool = option(True, "learn sigma with the network")


@final
@dataclass(frozen=True)
class OptimalGaussian(Spec):
    """Likelihood of real-valued pixels: N(mean(z), sigma^2), sigma^2 the mean squared error of the training batch."""

    word: ClassVar[str] = "optimal-gaussian"


@final
@dataclass(frozen=True)
class PixelGaussian(Spec):
    """Likelihood of real-valued pixels: N(mean(z), sigma(z)^2), a sigma for each pixel."""

    word: ClassVar[str] = "pixel-gaussian"
    min_sigma: float = positive(0.01, "soft lower bound of each pixel's sigma, for pixels in [0, 1]")


@final
@dataclass(frozen=True)
class Laplace(Spec):
    """Likelihood of real-valued pixels: Laplace(mean(z), scale), one scale for all pixels, learned or fixed."""

    word: ClassVar[str] = "laplace"
    scale: float = positive(0.2, "mean absolute deviation of a pixel in [0, 1] (where learning starts from)")
    learn_scale: bool = option(True, "learn the scale with the network")


# --- masses over the 256 levels of 8-bit pixels ---------------------------------------------------------------------


@final
@dataclass(frozen=True)
class DiscretizedLogistic(Spec):
    """Likelihood of 8-bit pixels: a logistic of location loc(z), cut into 256 bins; one scale, learned or fixed."""

    word: ClassVar[str] = "discretized-logistic"
    scale: float = positive(0.15, "scale of the logistic, for pixels in [0, 1] (where learning starts from)")
    learn_scale: bool = option(True, "learn the scale with the network")


@final
@dataclass(frozen=True)
class LogisticMixture(Spec):
    """Likelihood of 8-bit pixels: a mixture of logistics for each channel of each pixel, cut into 256 bins."""

    word: ClassVar[str] = "logistic-mixture"
    num_components: int = positive(5, "logistics in the mixture of a channel")


@final
@dataclass(frozen=True)
class Categorical256(Spec):
    """Likelihood of 8-bit pixels: a probability for each of the 256 levels of a channel."""

    word: ClassVar[str] = "categorical"
