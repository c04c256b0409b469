"""What a VAE needs of an approximate posterior q(z|x), and of the head of an encoder that makes one.

Shapes: K samples, B batch, F features, D latent dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.distributions import Distribution

from vaelab.runtime import Noise
from vaelab.specs.spec import SpecT

LogDensity = Callable[[], Tensor]  # computes (K, B) when it is called: many objectives never ask for it


@runtime_checkable
class Posterior(Protocol):
    """A ``torch.distributions.Distribution`` over latent vectors that can be sampled from given noise.

    It knows its density at what it sampled, and besides what every distribution has:

    ``center`` is the latent (B, D) that stands for an example in pictures: a normal's mean, a code, a direction.
    ``penalty`` is what the posterior itself adds to a loss (B,), as a codebook's commitment; None for most.
    """

    @property
    def center(self) -> Tensor:
        """(B, D)."""
        ...

    @property
    def penalty(self) -> Tensor | None:
        """(B,), in nats."""
        ...

    def rsample_and_log_prob(
        self, shape: tuple[int, ...], noise: Noise, *, stop: bool = False
    ) -> tuple[Tensor, LogDensity | None]:
        """Draw ``(*shape, B, D)`` differentiably, with the log-density of the draw in nats.

        Args:
            shape: sample shape; ``(K,)`` for K samples per example.
            noise: where the randomness comes from (stream ``"z"``).
            stop: take the log-density with the distribution's parameters held constant, so that its gradient flows
                through the sample alone (sticking the landing).

        Returns:
            The sample, and a function that computes its log-density ``(*shape, B)``; None where there is no density.
        """
        ...


Space = Literal["real", "sphere", "categories", "codes"]
"""Where latents lie: R^D; the unit sphere in it; one-hot vectors of several sites; vectors of a codebook."""


class Head(nn.Module, ABC, Generic[SpecT]):
    """The module at an encoder's end: maps features to a posterior over latents of ``space``.

    It is built from a spec, its configuration, and F, the number of features.

    Args:
        spec: the configuration.
        latent_dim: D.
    """

    space: Space = "real"

    def __init__(self, spec: SpecT, latent_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.latent_dim = latent_dim

    @abstractmethod
    def forward(self, features: Tensor) -> Distribution:
        """Map features (B, F) to a ``Posterior`` of each example."""
