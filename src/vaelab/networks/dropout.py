"""Dropout that is cheap on CPUs.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn


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
