"""Convolutions with few channels on one side, as matrix products.

A product of many places and few numbers is what a library of convolutions is worst at: on CPUs the last layer of a
decoder, 32 channels to one, took longer than layers of twenty times its work. Weights, results and gradients are those
of torch's layers, up to rounding.

Shapes: B batch, C channels in, O channels out, H W image, h w its half.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from vaelab.runtime import widened

FEW = 4  # channels


@final
class HalvingConv(nn.Conv2d):
    """A convolution of 3x3 and stride 2 that maps a side s to ceil(s/2).

    Args:
        channels: C.
        out_channels: O.
        bias: whether it has one.
    """

    def __init__(self, channels: int, out_channels: int, bias: bool) -> None:
        super().__init__(  # pyright: ignore[reportUnknownMemberType]
            channels, out_channels, 3, stride=2, padding=1, bias=bias
        )

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O h w"]:
        """Feature maps, channels last in memory."""
        if not _is_narrow(self.in_channels, input):
            return super().forward(input)
        windows = pad(input, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2)  # B C h w 3 3
        places = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)
        return linear(places, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


@final
class DoublingConv(nn.ConvTranspose2d):
    """A transposed convolution of 3x3 and stride 2 that maps a side s to 2s - 1, or to 2s where it is told to grow.

    Args:
        channels: C.
        out_channels: O.
        grow: whether height and width get one more.
        bias: whether it has one.
    """

    def __init__(self, channels: int, out_channels: int, grow: tuple[int, int], bias: bool) -> None:
        super().__init__(  # pyright: ignore[reportUnknownMemberType]
            channels, out_channels, 3, 2, 1, output_padding=grow, bias=bias
        )

    def forward(
        self, input: Float[Tensor, "B C h w"], output_size: list[int] | None = None
    ) -> Float[Tensor, "B O H W"]:
        """Feature maps of twice the size; those of few channels in fp32, whatever is multiplied in bf16."""
        if output_size is not None or not _is_narrow(self.out_channels, input):
            return super().forward(input, output_size)
        weight = self.weight.permute(1, 2, 3, 0).flatten(0, 2)
        # What each place adds to the 3x3 places around its double; sums of these are taken in fp32.
        parts = widened(linear(input.permute(0, 2, 3, 1), weight))
        parts = parts.reshape(*parts.shape[:3], self.out_channels, 3, 3).permute(4, 5, 0, 3, 1, 2)  # 3 3 B O h w
        rows = _interleave(parts, 3, self.output_padding[0])  # 3 B O H w
        image = _interleave(rows, 3, self.output_padding[1])
        return image if self.bias is None else image + self.bias[:, None, None]


def _is_narrow(channels: int, input: Tensor) -> bool:
    """Whether to multiply matrices. Exported graphs say what they are: convolutions."""
    return channels <= FEW and input.device.type == "cpu" and not torch.compiler.is_exporting()


def _interleave(parts: Tensor, axis: int, grow: int) -> Tensor:
    """Sum what every place i adds to 2i - 1, 2i and 2i + 1 of an axis: 2s - 1 places of s, or 2s.

    Args:
        parts: these three, one after the other.
        axis: of each of them.
        grow: whether there is one place more.
    """
    before, at, after = parts[0], parts[1], parts[2]
    size = at.shape[axis]
    following = torch.cat([before.narrow(axis, 1, size - 1), torch.zeros_like(before.narrow(axis, 0, 1))], axis)
    both = torch.stack([at, after + following], axis + 1).flatten(axis, axis + 1)
    return both.narrow(axis, 0, 2 * size - 1 + grow)
