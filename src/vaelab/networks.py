"""Encoder and decoder networks. Each takes any image of C x H x W with both sides at least 8, odd and unequal ones too.

An encoder maps images to features, of which a posterior makes a distribution; a decoder maps latent vectors to the
parameters of every pixel, of which a likelihood makes one. Neither knows which.

Shapes: B batch, N any number of latent vectors, C H W image, P parameters per channel, D latent dimensions, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vaelab import specs
from vaelab.errors import UsageError
from vaelab.specs import Activation, Shape

MIN_SIDE = 8


class Encoder(Protocol):
    """What a VAE needs of an encoder: ``out_features`` features of a batch of images."""

    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) in [0, 1] to (B, F)."""
        ...


class Decoder(Protocol):
    """What a VAE needs of a decoder."""

    def start_at(self, params: Tensor) -> None:
        """Set the last layer's bias to these parameters (P*C, H, W), or as near as it can come."""
        ...

    def __call__(self, z: Tensor) -> Tensor:
        """Map (N, D) to the pixels' parameters (N, P*C, H, W)."""
        ...


@final
class Dropout(nn.Dropout):
    r"""Drop each activation with probability :math:`p`, and divide the others by :math:`1 - p`; on CPUs, cheaply.

    There torch draws a floating-point number for each activation, one after the other, which took a seventh of a
    training step of ``conv-beta``. Fifteen bits are enough: p is rounded to a multiple of :math:`2^{-15}`, in the mask
    and in the division alike. The bits come from torch's global generator, as torch's own.

    Args:
        p: the probability.

    Reference:
        Srivastava et al. (2014), Dropout. https://jmlr.org/papers/v15/srivastava14a.html
    """

    def forward(self, input: Tensor) -> Tensor:
        """The activations, some of them 0; outside of training all of them."""
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        dropped = round(self.p * 2**15)
        return (input / (1 - dropped / 2**15)).masked_fill(_dropped(input.detach(), dropped), 0)


# An operation of its own, which the compiler leaves alone: 16-bit integers would keep it from using vectors.
@torch.library.custom_op(
    "vaelab::dropped", mutates_args=(), schema="(Tensor x, int dropped) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)  # fmt: skip
def _dropped(x: Tensor, dropped: int) -> Tensor:
    """Where activations are dropped, in the shape of x: each with probability dropped / 2**15."""
    count = x.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_()  # 63 random bits: 15 in each of four parts
    mask = (words.view(torch.int16)[:count] & 0x7FFF) < dropped
    return _as_in_memory(mask, x)


def _dropped_shape(x: Tensor, dropped: int) -> Tensor:
    return _as_in_memory(torch.empty(x.numel(), dtype=torch.bool, device=x.device), x)


torch.library.register_fake("vaelab::dropped", _dropped_shape)  # pyright: ignore[reportUnknownMemberType]


def _as_in_memory(flat: Tensor, x: Tensor) -> Tensor:
    """A value for each element of x, one after the other in the order in which channels-last images lie in memory."""
    if x.ndim != 4:
        return flat.view(x.shape)
    batch, channels, height, width = x.shape
    return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)


@final
class MLPEncoder(nn.Module):
    """Flatten the image, then a linear layer and a non-linearity for each of ``hidden_dims``.

    Args:
        spec: the configuration.
        shape: (C, H, W) of one image.
    """

    def __init__(self, spec: specs.MLPEncoder, shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        _check_sides(shape)
        dims = [math.prod(shape), *spec.hidden_dims]
        self.layers = nn.Sequential(nn.Flatten(), *_dense(dims, spec.activation))
        self.out_features = dims[-1]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Features of a batch of images."""
        return self.layers(x)


@final
class MLPDecoder(nn.Module):
    """A linear layer and a non-linearity for each of ``hidden_dims``, then a linear layer to all pixels.

    Args:
        spec: the configuration.
        latent_dim: D.
        out_shape: (P*C, H, W), what the likelihood asks for.
    """

    def __init__(self, spec: specs.MLPDecoder, latent_dim: int, out_shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        _check_sides(out_shape)
        dims = [latent_dim, *spec.hidden_dims]
        self.layers = nn.Sequential(
            *_dense(dims, spec.activation),
            nn.Linear(dims[-1], math.prod(out_shape)),
            nn.Unflatten(1, out_shape),
        )

    def forward(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N PC H W"]:
        """Parameters of every pixel."""
        return self.layers(z)

    def start_at(self, params: Tensor) -> None:
        """Set the last layer's bias to these parameters (P*C, H, W)."""
        _set_bias(self.layers[-2], params.flatten())


@final
class ConvEncoder(nn.Module):
    """Stride-2 3x3 convolutions, each mapping a side s to ceil(s/2), then optional linear layers.

    Order within a layer: convolution, batch norm, non-linearity, dropout.

    Args:
        spec: the configuration.
        shape: (C, H, W) of one image.
    """

    def __init__(self, spec: specs.ConvEncoder, shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        layers: list[nn.Module] = []
        channels = shape[0]
        for width in spec.conv_channels:
            # A bias before batch normalisation would be subtracted at once.
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=not spec.batch_norm)]
            layers += [nn.BatchNorm2d(width)] if spec.batch_norm else []
            layers += [_activation(spec.activation)]
            layers += [Dropout(spec.dropout)] if spec.dropout else []
            channels = width
        height, width = _halvings(shape, len(spec.conv_channels))[-1]
        dims = [channels * height * width, *spec.hidden_dims]
        self.layers = nn.Sequential(*layers, nn.Flatten(), *_dense(dims, spec.activation))
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

    Args:
        spec: the configuration.
        latent_dim: D.
        out_shape: (P*C, H, W), what the likelihood asks for.
    """

    def __init__(self, spec: specs.ConvDecoder, latent_dim: int, out_shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        sides = _halvings(out_shape, len(spec.conv_channels))[::-1]
        start = (spec.conv_channels[0], *sides[0])
        dims = [latent_dim, *spec.hidden_dims, math.prod(start)]
        layers: list[nn.Module] = [*_dense(dims, spec.activation), nn.Unflatten(1, start)]
        widths = [*spec.conv_channels[1:], out_shape[0]]
        for i, (channels, width) in enumerate(zip(spec.conv_channels, widths, strict=True)):
            last = i == len(widths) - 1
            normalised = spec.batch_norm and not last
            grow = (1 - sides[i + 1][0] % 2, 1 - sides[i + 1][1] % 2)
            layers += [nn.ConvTranspose2d(channels, width, 3, 2, 1, output_padding=grow, bias=not normalised)]
            layers += [nn.BatchNorm2d(width)] if normalised else []
            layers += [] if last else [_activation(spec.activation)]
        self.layers = nn.Sequential(*layers)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N PC H W"]:
        """Parameters of every pixel."""
        return self.layers(z)

    def start_at(self, params: Tensor) -> None:
        """Set the last layer's bias to the pixels' mean of these parameters (P*C, H, W): it has one a channel."""
        _set_bias(self.layers[-1], params.mean((1, 2)))


def initialise(model: nn.Module) -> None:
    r"""Glorot's initial weights, uniform in :math:`\pm\sqrt{6 / (n_{in} + n_{out})}`, and biases of 0.

    From torch's global generator, as torch's own initial weights.

    Reference:
        Glorot & Bengio (2010), Understanding the difficulty of training deep feedforward neural networks, eq. 16.
        https://proceedings.mlr.press/v9/glorot10a.html
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _set_bias(layer: nn.Module, values: Tensor) -> None:
    bias = layer.bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        bias.copy_(values)


def _dense(dims: Sequence[int], activation: Activation) -> list[nn.Module]:
    pairs = zip(dims[:-1], dims[1:], strict=True)
    wide = 2 if activation == "gated" else 1  # a gate halves what it is given
    return [
        layer for fan_in, fan_out in pairs for layer in (nn.Linear(fan_in, wide * fan_out), _activation(activation))
    ]


def _activation(name: Activation) -> nn.Module:
    return {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU, "gated": nn.GLU}[name]()


def _check_sides(shape: Shape) -> None:
    if min(shape[1:]) < MIN_SIDE:
        raise UsageError(f"images of {shape[1]}x{shape[2]} are too small: both sides must be at least {MIN_SIDE}")


def _halvings(shape: Shape, times: int) -> list[tuple[int, int]]:
    """The sides before and after each of ``times`` stride-2 convolutions."""
    _check_sides(shape)
    if times == 0:
        raise UsageError("a convolutional network needs at least one entry in conv_channels")
    sides = [(shape[1], shape[2])]
    for _ in range(times):
        sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
    return sides
