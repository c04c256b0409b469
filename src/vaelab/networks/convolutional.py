"""Convolutions of stride 2, one after the other.

Shapes: B batch, N any number of latent vectors, C H W image, P parameters per channel, D latent dimensions, F features.
"""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vaelab import specs
from vaelab.errors import UsageError
from vaelab.networks.dropout import Dropout
from vaelab.networks.narrow import DoublingConv, HalvingConv
from vaelab.networks.network import check_sides, dense_layers, nonlinearity, set_bias
from vaelab.specs import Shape


@final
class ConvEncoder(nn.Module):
    """Stride-2 3x3 convolutions, each mapping a side s to ceil(s/2), then optional linear layers.

    Order within a layer: convolution, batch norm, non-linearity, dropout.
    """

    def __init__(self, spec: specs.ConvEncoder, shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        layers: list[nn.Module] = []
        channels = shape[0]
        for width in spec.conv_channels:
            # A bias before batch normalisation would be subtracted at once.
            layers += [HalvingConv(channels, width, bias=not spec.batch_norm)]
            layers += [nn.BatchNorm2d(width)] if spec.batch_norm else []
            layers += [nonlinearity(spec.activation, "convolutions")]
            layers += [Dropout(spec.dropout)] if spec.dropout else []
            channels = width
        height, width = _halvings(shape, len(spec.conv_channels))[-1]
        dims = [channels * height * width, *spec.hidden_dims]
        self.layers = nn.Sequential(*layers, nn.Flatten(), *dense_layers(dims, spec.activation))
        self.out_features = dims[-1]
        # Channels-last convolutions are a quarter faster on CPUs and the native layout of tensor cores.
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Features of a batch of images."""
        return self.layers(x.contiguous(memory_format=torch.channels_last))


@final
class ConvDecoder(nn.Module):
    """Optional linear layers, then stride-2 3x3 transposed convolutions that undo the encoder's halvings exactly.

    A side s was halved to ceil(s/2); the transposed convolution returns 2*ceil(s/2) - 1 and one more (its output
    padding) where s was even, so every image size is restored without cropping. Order within a layer: transposed
    convolution, batch norm, non-linearity; the last layer is a transposed convolution alone.
    """

    def __init__(self, spec: specs.ConvDecoder, latent_dim: int, out_shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        sides = _halvings(out_shape, len(spec.conv_channels))[::-1]
        start = (spec.conv_channels[0], *sides[0])
        dims = [latent_dim, *spec.hidden_dims, math.prod(start)]
        layers: list[nn.Module] = [*dense_layers(dims, spec.activation), nn.Unflatten(1, start)]
        widths = [*spec.conv_channels[1:], out_shape[0]]
        for i, (channels, width) in enumerate(zip(spec.conv_channels, widths, strict=True)):
            last = i == len(widths) - 1
            normalised = spec.batch_norm and not last
            grow = (1 - sides[i + 1][0] % 2, 1 - sides[i + 1][1] % 2)
            layers += [DoublingConv(channels, width, grow, bias=not normalised)]
            layers += [nn.BatchNorm2d(width)] if normalised else []
            layers += [] if last else [nonlinearity(spec.activation, "convolutions")]
        self.layers = nn.Sequential(*layers)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N PC H W"]:
        """Parameters of every pixel."""
        return self.layers(z)

    def start_at(self, params: Tensor) -> None:
        """Set the last layer's bias to the pixels' mean of these parameters (P*C, H, W): it has one a channel."""
        set_bias(self.layers[-1], params.mean((1, 2)))


def _halvings(shape: Shape, times: int) -> list[tuple[int, int]]:
    """The sides before and after each of ``times`` stride-2 convolutions: each half of the last, rounded up."""
    check_sides(shape)
    if times == 0:
        raise UsageError("a convolutional network needs at least one entry in conv_channels")
    return [(-(-shape[1] >> i), -(-shape[2] >> i)) for i in range(times + 1)]
