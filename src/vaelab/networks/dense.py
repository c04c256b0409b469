"""Fully connected networks.

Shapes: B batch, N any number of latent vectors, C H W image, P parameters per channel, D latent dimensions, F features.
"""

from __future__ import annotations

import math
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from vaelab import specs
from vaelab.networks.network import check_sides, dense_layers, set_bias
from vaelab.specs import Shape


@final
class MLPEncoder(nn.Module):
    """Flatten the image, then a linear layer and a non-linearity for each of ``hidden_dims``."""

    def __init__(self, spec: specs.MLPEncoder, shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        check_sides(shape)
        dims = [math.prod(shape), *spec.hidden_dims]
        self.layers = nn.Sequential(nn.Flatten(), *dense_layers(dims, spec.activation))
        self.out_features = dims[-1]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Features of a batch of images."""
        return self.layers(x)


@final
class MLPDecoder(nn.Module):
    """A linear layer and a non-linearity for each of ``hidden_dims``, then a linear layer to all pixels."""

    def __init__(self, spec: specs.MLPDecoder, latent_dim: int, out_shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        check_sides(out_shape)
        dims = [latent_dim, *spec.hidden_dims]
        self.layers = nn.Sequential(
            *dense_layers(dims, spec.activation),
            nn.Linear(dims[-1], math.prod(out_shape)),
            nn.Unflatten(1, out_shape),
        )

    def forward(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N PC H W"]:
        """Parameters of every pixel."""
        return self.layers(z)

    def start_at(self, params: Tensor) -> None:
        """Set the last layer's bias to these parameters (P*C, H, W)."""
        set_bias(self.layers[-2], params.flatten())
