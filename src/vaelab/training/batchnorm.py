r"""Batch normalisation of a traced step, in operations that the compiler spreads over all cores.

Left alone, the compiler sums over images and places with one loop for each channel, and shares out channels: the 32 of
a vector are one share, and one core does it all. Here images are summed in groups first, and the groups' sums after.

Shapes: B batch, C channels, \* places, G groups of images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vaelab.runtime import widened

GROUPS = 16  # at most: enough for as many cores, and few enough that the second sum is nothing


def _means(x: Tensor) -> Tensor:
    """The mean of each channel (C,) of images (B, C, *), in two stages (in one, if B is a prime above ``GROUPS``)."""
    images = x.shape[0]
    groups = next(count for count in range(min(GROUPS, images), 0, -1) if images % count == 0)
    sums = x.unflatten(0, (groups, -1)).sum([1, *range(3, x.ndim + 1)])
    return sums.sum(0) / (x.numel() / x.shape[1])


def _of_channels(x: Tensor) -> Callable[[Tensor], Tensor]:
    """What brings numbers of channels (C,) into the shape of images."""
    return lambda values: values.reshape(-1, *(1 for _ in x.shape[2:]))


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> Any:  # fmt: skip
    if not training or weight is None or bias is None:
        return NotImplemented
    wide, shaped = widened(x), _of_channels(x)
    mean = _means(wide)
    centred = wide - shaped(mean)
    var = _means(centred.square())
    rstd = (var + eps).rsqrt()
    if running_mean is not None and running_var is not None:
        count = x.numel() / x.shape[1]
        running_mean.lerp_(mean.to(running_mean), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var), momentum)
    return (centred * shaped(rstd * weight) + shaped(bias)).to(x.dtype), mean, rstd


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, training: bool, eps: float, wanted: list[bool],
) -> Any:  # fmt: skip
    if not training or weight is None or mean is None or rstd is None:
        return NotImplemented
    wide, shaped = widened(grad), _of_channels(x)
    standard = (widened(x) - shaped(mean)) * shaped(rstd)
    of_bias, of_weight = _means(wide), _means(wide * standard)
    back = (wide - shaped(of_bias) - standard * shaped(of_weight)) * shaped(rstd * weight)
    count = x.numel() / x.shape[1]
    return back.to(x.dtype), of_weight * count, of_bias * count


BATCH_NORM: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _forward,
    torch.ops.aten.native_batch_norm_backward.default: _backward,
}
