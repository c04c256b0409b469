"""A prior and an objective of one's own: a ring in the plane, and a rate that is led to a target. A recipe of both.

    vaelab --parts examples/ring.py train on-a-ring --out runs/ring
    vaelab --parts examples/ring.py train mlp-2d --prior ring --radius 4 --out runs/larger
    vaelab --parts examples/ring.py evaluate runs/ring

In Python: ``import ring``, and ``vaelab.load_model("runs/ring")`` knows what they are.

Shapes: B batch; leading dimensions are free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import LogNormal

import vaelab as v
from vaelab.distribution import Unchecked
from vaelab.objectives import Objective
from vaelab.posteriors import Head
from vaelab.priors import Prior
from vaelab.runtime import Noise
from vaelab.specs import Shape, Spec, option, positive


@v.register("prior")
@dataclass(frozen=True)
class Ring(Spec):
    """Prior whose latents lie around a circle, at a distance from its centre that is log-normal."""

    part: ClassVar[str] = f"{__name__}:RingPrior"
    word: ClassVar[str] = "ring"
    radius: float = positive(3.0, "median distance of a latent from the centre")
    width: float = positive(0.1, "standard deviation of the logarithm of that distance")


class RingPrior(Prior[Ring]):
    r"""The module that makes ``OnRing``."""

    log_radius: Tensor

    def __init__(self, spec: Ring, head: Head[Any], shape: Shape) -> None:
        super().__init__(spec, head, shape)
        if head.latent_dim != 2:
            raise v.UsageError(f"--prior ring lies in the plane: --latent-dim 2, not {head.latent_dim}")
        self.register_buffer("log_radius", torch.tensor(math.log(spec.radius)), persistent=False)

    def forward(self, encode: Any = None, codebook: Tensor | None = None) -> OnRing:
        return OnRing(self.log_radius, self.spec.width)


class OnRing(Unchecked):
    r""":math:`p(z) = \mathrm{LogNormal}(r; \log R, w) / 2 \pi r`, with :math:`r = \Vert z \Vert`, of z in the plane."""

    def __init__(self, log_radius: Tensor, width: float) -> None:
        super().__init__([], [2])
        self.distance = LogNormal(log_radius, width, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (...) of latents (..., 2), in nats."""
        r = value.norm(dim=-1)
        return self.distance.log_prob(r) - (2 * math.pi * r).log()

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw (*sample_shape, 2) by torch's global generator: for figures."""
        return self._at(self.distance.rsample(torch.Size([*sample_shape, 1])), torch.rand(*sample_shape, 1))

    def rsample_from(self, noise: Noise, count: int) -> Tensor:
        """Draw (count, 2) from the noise of a training step: for objectives that need draws from the prior."""
        distance = (self.distance.loc + self.distance.scale * noise.normal("prior", (count, 1))).exp()
        return self._at(distance, noise.uniform("angle", (count, 1)))

    def _at(self, distance: Tensor, turns: Tensor) -> Tensor:
        angle = 2 * math.pi * turns
        return distance * torch.cat([angle.cos(), angle.sin()], -1)


@v.register("objective")
@dataclass(frozen=True)
class RateTarget(Objective):
    """Minimise distortion + pull (rate - target)^2: the mean rate is led to a number, in nats per image."""

    word: ClassVar[str] = "rate-target"
    target: float = option(10.0, "nats per image to which the mean rate is led")
    pull: float = positive(1.0, "weight of the square of what is missing")

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """The loss, of the means of what each image has (``Objective.parts``)."""
        return means["distortion"] + means["penalty"] + self.pull * (means["rate"] - self.target) ** 2


@v.register("recipe")
def on_a_ring() -> v.Run:
    """MLP VAE whose latents lie around a circle, at a rate of 6 nats an image."""
    return v.override(v.recipes.mlp_2d(), prior="ring", objective="rate-target", target=6.0)
