"""What a VAE needs of a decoder, and what all networks are made with.

Shapes: N any number of latent vectors, C H W image, P parameters per channel, D latent dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]

from vaelab.errors import UsageError
from vaelab.specs import Activation, Shape

MIN_SIDE = 8


class Decoder(Protocol):
    """What a VAE needs of a decoder."""

    def start_at(self, params: Tensor) -> None:
        """Set the last layer's bias to these parameters (P*C, H, W), or as near as it can come."""
        ...

    def __call__(self, z: Tensor) -> Tensor:
        """Map (N, D) to the pixels' parameters (N, P*C, H, W)."""
        ...


def initialise(model: nn.Module, how: Literal["glorot", "normal"]) -> None:
    r"""Draw the initial weights of all dense layers and convolutions.

    ``glorot``: uniform in :math:`\pm\sqrt{6 / (n_{in} + n_{out})}`, biases of 0. ``normal``: weights and biases from
    :math:`N(0, 0.01^2)`. From torch's global generator, as torch's own.

    Reference:
        Glorot & Bengio (2010), Understanding the difficulty of training deep feedforward neural networks, eq. 16.
        https://proceedings.mlr.press/v9/glorot10a.html
        Kingma & Welling (2014), section 5: "N(0, 0.01)", read as its standard deviation.
        https://arxiv.org/abs/1312.6114
    """
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            continue
        if how == "glorot":
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias) if how == "glorot" else nn.init.normal_(module.bias, std=0.01)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The layers that normalise by the mean and variance of a batch."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def has_dropout(model: nn.Module) -> bool:
    """Whether a layer draws masks in training."""
    return any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules())


def set_bias(layer: nn.Module, values: Tensor) -> None:
    """Set a layer's bias to these numbers."""
    bias = layer.bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        bias.copy_(values)


def dense_layers(dims: Sequence[int], activation: Activation) -> list[nn.Module]:
    """A linear layer and a non-linearity from each of these widths to the next."""
    pairs = zip(dims[:-1], dims[1:], strict=True)
    wide = 2 if activation == "gated" else 1  # a gate halves what it is given
    return [
        layer for fan_in, fan_out in pairs for layer in (nn.Linear(fan_in, wide * fan_out), nonlinearity(activation))
    ]


def nonlinearity(name: Activation, of: Literal["dense layers", "convolutions"] = "dense layers") -> nn.Module:
    """The layer of that name.

    Raises:
        UsageError: for a gate over convolutions, whose channels it would not halve but their width.
    """
    if name == "gated" and of == "convolutions":
        raise UsageError("--activation gated is for dense layers (--encoder mlp): convolutions take relu, silu, ...")
    return {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU, "gated": nn.GLU}[name]()


def check_sides(shape: Shape) -> None:
    """Refuse images that are too small, with a ``UsageError``."""
    if min(shape[1:]) < MIN_SIDE:
        raise UsageError(f"images of {shape[1]}x{shape[2]} are too small: both sides must be at least {MIN_SIDE}")
