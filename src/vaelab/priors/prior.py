"""What a VAE needs of a prior p(z).

Shapes: D latent dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vaelab.posteriors.posterior import Head, Space
from vaelab.runtime import Noise
from vaelab.specs import Shape
from vaelab.specs.spec import SpecT

Encode = Callable[[Tensor], Distribution]


@runtime_checkable
class PriorDistribution(Protocol):
    """A ``torch.distributions.Distribution`` over latent vectors that can be sampled from given noise.

    One object scores and samples, so that what is drawn is what was trained against.
    """

    def rsample_from(self, noise: Noise, count: int) -> Tensor:
        """Draw (count, D) from ``noise`` (stream ``"prior"``), differentiably where the distribution can."""
        ...


class Prior(nn.Module, ABC, Generic[SpecT]):
    """The module that makes one; built for a posterior's head and the shape of an image.

    ``is_encoded``: it is made of posteriors, and so of the encoder's parameters.

    Args:
        spec: the configuration.
        head: the posterior's, for D and what else a prior over its latents has to know.
        shape: (C, H, W) of an image.
    """

    space: Space = "real"
    is_encoded: bool = False

    def __init__(self, spec: SpecT, head: Head[Any], shape: Shape) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, encode: Encode | None = None, codebook: Tensor | None = None) -> Distribution:
        """The distribution, of event shape (D,).

        Args:
            encode: maps images to posteriors, for priors that are made of these.
            codebook: vectors that latents are made of, for priors over these.
        """


class StandardisedPrior(Prior[SpecT]):
    """A prior of latents that are standardised first, by ``loc`` and ``scale`` (D,): 0 and 1, until ``start_at``."""

    loc: Tensor
    scale: Tensor

    def __init__(self, spec: SpecT, head: Head[Any], shape: Shape) -> None:
        super().__init__(spec, head, shape)
        self.register_buffer("loc", torch.zeros(head.latent_dim))
        self.register_buffer("scale", torch.ones(head.latent_dim))

    def start_at(self, loc: Tensor, scale: Tensor) -> None:
        """Standardise latents by these (D,) from now on."""
        self.loc.copy_(loc)
        self.scale.copy_(scale)
