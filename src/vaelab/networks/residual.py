"""Convolutional networks with residual blocks at their smallest resolution, as those of VQ-VAE.

Shapes: B batch, N any number of latent vectors, C H W image, P parameters per channel, D latent dimensions, F features,
h w the smallest resolution.
"""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vaelab import specs
from vaelab.errors import UsageError
from vaelab.networks.network import check_sides, dense_layers, set_bias
from vaelab.specs import Shape


@final
class ResidualBlock(nn.Module):
    r"""One residual block: :math:`x + W_{1 \times 1}\, \mathrm{relu}(W_{3 \times 3}\, \mathrm{relu}(x))`.

    Args:
        channels: of x.
        inner: between the two convolutions.
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, channels, 1)
        )

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """The images of features, and what is added to them."""
        return x + self.layers(x)


@final
class ResidualEncoder(nn.Module):
    """Stride-2 4x4 convolutions, each mapping a side s to floor(s/2), then residual blocks; flattened, channels first.

    Every pixel is seen, also those of an odd side: a window is two pixels wider than its step.

    Reference:
        van den Oord, Vinyals & Kavukcuoglu (2017), Neural Discrete Representation Learning, section 4.1.
        https://arxiv.org/abs/1711.00937
    """

    def __init__(self, spec: specs.ResidualEncoder, shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        height, width = _halvings(shape, len(spec.conv_channels))[-1]
        layers: list[nn.Module] = []
        for before, after in zip((shape[0], *spec.conv_channels), spec.conv_channels, strict=False):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        channels = spec.conv_channels[-1]
        layers[-1:] = _blocks(channels, spec.residual_blocks, spec.residual_channels)
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.out_features = channels * height * width
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Features of a batch of images."""
        return self.layers(x.contiguous(memory_format=torch.channels_last))


@final
class ResidualDecoder(nn.Module):
    """The mirror of ``ResidualEncoder``: residual blocks, then stride-2 4x4 transposed convolutions to the exact size.

    A side s was halved to floor(s/2); the transposed convolution returns 2*floor(s/2), and one more (its output
    padding) where s was odd.

    Raises:
        UsageError: if the latent vector is to be read as a grid, and h w does not divide D.

    Reference:
        van den Oord, Vinyals & Kavukcuoglu (2017), section 4.1. https://arxiv.org/abs/1711.00937
    """

    def __init__(self, spec: specs.ResidualDecoder, latent_dim: int, out_shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        sides = _halvings(out_shape, len(spec.conv_channels))[::-1]
        first, *_ = spec.conv_channels
        layers = _from_grid(latent_dim, sides[0], first) if spec.from_grid else [
            *dense_layers([latent_dim, first * math.prod(sides[0])], "relu"), nn.Unflatten(1, (first, *sides[0]))
        ]  # fmt: skip
        layers += _blocks(first, spec.residual_blocks, spec.residual_channels)
        widths = (*spec.conv_channels[1:], out_shape[0])
        for before, after, (height, width) in zip(spec.conv_channels, widths, sides[1:], strict=True):
            grow = (height % 2, width % 2)
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, output_padding=grow), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N PC H W"]:
        """Parameters of every pixel."""
        return self.layers(z)

    def start_at(self, params: Tensor) -> None:
        """Set the last layer's bias to the pixels' mean of these parameters (P*C, H, W): it has one a channel."""
        set_bias(self.layers[-1], params.mean((1, 2)))


def _blocks(channels: int, count: int, inner: int) -> list[nn.Module]:
    return [*(ResidualBlock(channels, inner) for _ in range(count)), nn.ReLU()]


def _from_grid(latent_dim: int, sides: tuple[int, int], channels: int) -> list[nn.Module]:
    height, width = sides
    depth, rest = divmod(latent_dim, height * width)
    if rest or not depth:
        raise UsageError(
            f"--decoder residual with --from-grid reads latents as channels of {height}x{width}, and {latent_dim} "
            f"numbers are no multiple of {height * width}: choose the posterior's --grid {height} {width}, or "
            "--no-from-grid"
        )
    return [nn.Unflatten(1, (depth, height, width)), nn.Conv2d(depth, channels, 3, padding=1)]


def _halvings(shape: Shape, times: int) -> list[tuple[int, int]]:
    """The sides before and after each of ``times`` stride-2 convolutions."""
    check_sides(shape)
    if times == 0:
        raise UsageError("a residual network needs at least one entry in conv_channels")
    if min(shape[1:]) >> times == 0:
        raise UsageError(f"{times} entries in conv_channels halve images of {shape[1]}x{shape[2]} to nothing")
    return [(shape[1] >> i, shape[2] >> i) for i in range(times + 1)]
