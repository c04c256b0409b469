"""Latents that are a function of the image.

Shapes: B batch, F features, D latent dimensions.
"""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from vaelab import specs
from vaelab.distribution import NoDensityError, PointMass
from vaelab.posteriors.posterior import Head
from vaelab.runtime import Noise


@final
class PointPosterior(PointMass):
    r"""All mass on one vector: :math:`q(z|x) = \delta(z - f(x))`. It has a mean and no density, so no KL and no bound.

    Args:
        loc: (B, D).
    """

    penalty: Tensor | None = None

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises ``NoDensityError``."""
        raise NoDensityError("all of a deterministic encoder's mass lies on one point: it has no density")

    def rsample_and_log_prob(self, shape: tuple[int, ...], noise: Noise, *, stop: bool = False) -> tuple[Tensor, None]:
        """The vector, repeated; no noise is drawn, and there is no density."""
        return self.rsample(shape), None


@final
class Deterministic(Head[specs.Deterministic]):
    """Head of an encoder: a linear map of the features is the latent vector."""

    def __init__(self, spec: specs.Deterministic, in_features: int) -> None:
        super().__init__(spec, spec.latent_dim)
        self.loc = nn.Linear(in_features, spec.latent_dim)

    def forward(self, features: Float[Tensor, "B F"]) -> PointPosterior:
        """The posterior of each example."""
        return PointPosterior(self.loc(features).float())
