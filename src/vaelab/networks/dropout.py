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
    training step of ``conv-beta``. Here two numbers from torch's global generator are the key of a hash, and what the
    hash makes of an activation's place decides: nothing is drawn one after the other, and a compiled step computes
    masks where it needs them, and keeps none. Of 31 bits: p is met to :math:`2^{-31}`.

    Args:
        p: the probability.

    Reference:
        Srivastava et al. (2014), Dropout. https://jmlr.org/papers/v15/srivastava14a.html
        Wellons (2018), Prospecting for Hash Functions (the constants). https://nullprogram.com/blog/2018/07/31/
    """

    def forward(self, input: Tensor) -> Tensor:
        """The activations, some of them 0; outside of training all of them."""
        if not self.training or input.device.type != "cpu" or self.p == 1:
            return super().forward(input)
        bits = _hashed(input.numel(), _key(input.detach()))
        dropped = _as_in_memory(bits < round(self.p * 2**31), input)
        return (input * (1 / (1 - self.p))).masked_fill(dropped, 0)


def _hashed(count: int, key: Tensor) -> Tensor:
    """31 bits for each of ``count`` places (int32); products wrap around, and shifts are of unsigned numbers."""
    x = torch.arange(count, dtype=torch.int32) ^ key[0]
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D + key[1]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return (x ^ ((x >> 16) & 0xFFFF)) & 0x7FFFFFFF


def _draw_key(x: Tensor) -> Tensor:
    """Two numbers of 31 bits from torch's global generator."""
    return torch.empty(2, dtype=torch.int32).random_()


def _key_shape(x: Tensor) -> Tensor:
    return torch.empty(2, dtype=torch.int32, device=x.device)


# An operation of its own, so that a compiled step draws the plain one's numbers. (It has an input because the compiler
# would take what depends on nothing for a constant. A ``custom_op`` would load the compiler when it is called.)
torch.library.define("vaelab::dropout_key", "(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
torch.library.impl("vaelab::dropout_key", "cpu", _draw_key)
torch.library.register_fake("vaelab::dropout_key", _key_shape)  # pyright: ignore[reportUnknownMemberType]
_key = torch.ops.vaelab.dropout_key.default


def _as_in_memory(flat: Tensor, x: Tensor) -> Tensor:
    """A value for each element of x, one after the other in the order in which channels-last images lie in memory."""
    if x.ndim != 4:
        return flat.view(x.shape)
    batch, channels, height, width = x.shape
    return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
