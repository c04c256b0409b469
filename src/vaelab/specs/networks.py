"""Specs of encoders and decoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from vaelab.specs.spec import Activation, Spec, option, positive


@final
@dataclass(frozen=True)
class MLPEncoder(Spec):
    """Fully connected layers on the flattened image."""

    word: ClassVar[str] = "mlp"
    hidden_dims: tuple[int, ...] = positive((512,), "units of each hidden layer")
    activation: Activation = option("relu", "non-linearity between layers")


@final
@dataclass(frozen=True)
class MLPDecoder(Spec):
    """Fully connected layers from the latent vector to the parameters of every pixel."""

    word: ClassVar[str] = "mlp"
    hidden_dims: tuple[int, ...] = positive((512,), "units of each hidden layer")
    activation: Activation = option("relu", "non-linearity between layers")


@final
@dataclass(frozen=True)
class ConvEncoder(Spec):
    """3x3 convolutions of stride 2, each halving the image, then optional fully connected layers."""

    word: ClassVar[str] = "conv"
    conv_channels: tuple[int, ...] = positive((32, 64, 128), "channels of each stride-2 convolution")
    hidden_dims: tuple[int, ...] = positive((), "units of fully connected layers after the convolutions")
    batch_norm: bool = option(False, "batch normalisation after each convolution")
    dropout: float = option(0.0, "probability of dropping an activation", below=1)
    activation: Activation = option("relu", "non-linearity between layers")


@final
@dataclass(frozen=True)
class ConvDecoder(Spec):
    """Optional fully connected layers, then 3x3 transposed convolutions of stride 2 back to the exact image size.

    ``conv_channels`` is in the order of the flow: (128, 64, 32) ends in an image made from 32 channels.
    """

    word: ClassVar[str] = "conv"
    conv_channels: tuple[int, ...] = positive((128, 64, 32), "channels that enter each transposed convolution")
    hidden_dims: tuple[int, ...] = positive((), "units of fully connected layers before the convolutions")
    batch_norm: bool = option(False, "batch normalisation after each transposed convolution but the last")
    activation: Activation = option("relu", "non-linearity between layers")


@final
@dataclass(frozen=True)
class ResidualEncoder(Spec):
    """4x4 convolutions of stride 2, each halving the image, then residual blocks; no dense layer."""

    word: ClassVar[str] = "residual"
    conv_channels: tuple[int, ...] = positive((32, 64), "channels of each stride-2 convolution")
    residual_blocks: int = option(2, "residual blocks after the convolutions")
    residual_channels: int = positive(32, "channels between the two convolutions of a block")


@final
@dataclass(frozen=True)
class ResidualDecoder(Spec):
    """Residual blocks, then 4x4 transposed convolutions of stride 2 back to the exact image size.

    ``conv_channels`` is in the order of the flow: (64, 32) ends in an image made from 32 channels.
    """

    word: ClassVar[str] = "residual"
    conv_channels: tuple[int, ...] = positive((64, 32), "channels that enter each transposed convolution")
    residual_blocks: int = option(2, "residual blocks before the transposed convolutions")
    residual_channels: int = positive(32, "channels between the two convolutions of a block")
    from_grid: bool = option(False, "read latents as channels of the smallest resolution, without a dense layer")
