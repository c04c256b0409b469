"""What a VAE needs of a prior p(z).

Shapes: D latent dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.distributions import Distribution

from vaelab.posteriors.posterior import Space
from vaelab.runtime import Noise

Encode = Callable[[Tensor], Distribution]


@runtime_checkable
class PriorDistribution(Protocol):
    """A ``torch.distributions.Distribution`` over latent vectors that can be sampled from given noise.

    One object scores and samples, so that what is drawn is what was trained against.
    """

    def rsample_from(self, noise: Noise, count: int) -> Tensor:
        """Draw (count, D) from ``noise`` (stream ``"prior"``), differentiably where the distribution can."""
        ...


@runtime_checkable
class Prior(Protocol):
    """The module that makes one; built for a posterior's head and the shape of an image.

    ``is_encoded``: it is made of posteriors, and so of the encoder's parameters.
    """

    space: Space
    is_encoded: bool

    def __call__(self, encode: Encode | None = None, codebook: Tensor | None = None) -> Distribution:
        """The distribution, of event shape (D,).

        Args:
            encode: maps images to posteriors, for priors that are made of these.
            codebook: vectors that latents are made of, for priors over these.
        """
        ...
