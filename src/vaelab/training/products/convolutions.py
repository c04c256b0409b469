r"""bf16 convolutions of a traced step as matrix products, where the processor has tile units (AMX).

oneDNN's convolutions reach a tenth of what its products do on these units, backward above all. A convolution of 3x3 and
stride 2 is a product with the windows of its images; its transpose is a product whose parts are added where windows
overlap. Both ways of going between images and windows are copies of whole pixels (``tiles.cpp``).

Shapes: B batch, C channels of the larger image, O of the smaller; H W the larger, h w the smaller; P = B h w places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.vaelab


def _is_ours(large: Tensor, small: Tensor, weight: Tensor, stride: Sequence[int], *, padding: Sequence[int],
             dilation: Sequence[int], groups: int) -> bool:  # fmt: skip
    """Whether a convolution between these images is one of 3x3 and stride 2 in bf16 on a CPU."""
    return (
        all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.ndim == 4 for x in (large, small, weight))
        and tuple(weight.shape[2:]) == (3, 3)
        and (tuple(stride), tuple(padding), tuple(dilation), groups) == ((2, 2), (1, 1), (1, 1), 1)
        and all((side + 1) // 2 == half for side, half in zip(large.shape[2:], small.shape[2:], strict=True))
    )


def _places(image: Tensor) -> Tensor:
    """The pixels (B * H * W, C) of images (B, C, H, W)."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _windows(image: Tensor) -> Tensor:
    """The windows (P, 9 * C) of images (B, C, H, W)."""
    return _ops.windows(image.permute(0, 2, 3, 1).contiguous())


def _spread(parts: Tensor, size: Sequence[int]) -> Tensor:
    """Images (B, C, H, W) of this size from the parts (P, 9 * C) of their windows."""
    return _ops.spread(parts, *size).permute(0, 3, 1, 2)


def _matrix(weight: Tensor) -> Tensor:
    """The weight (O, C, 3, 3) as a matrix (O, 9 * C), in the order of windows."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _as_weight(matrix: Tensor) -> Tensor:
    """A matrix (O, 9 * C) as a weight (O, C, 3, 3)."""
    return matrix.view(matrix.shape[0], 3, 3, -1).permute(0, 3, 1, 2)


def _with_bias(image: Tensor, bias: Tensor | None) -> Tensor:
    return image if bias is None else image + bias[:, None, None]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> Any:  # fmt: skip
    if transposed:
        size = [2 * side - 1 + more for side, more in zip(x.shape[2:], output_padding, strict=True)]
        large, small = x.new_empty(len(x), weight.shape[1], *size), x
    else:
        large, small = x, x.new_empty(len(x), len(weight), *((side + 1) // 2 for side in x.shape[2:]))
    if not _is_ours(large, small, weight, stride, padding=padding, dilation=dilation, groups=groups):
        return NotImplemented
    if transposed:
        return _with_bias(_spread(_places(x) @ _matrix(weight), large.shape[2:]), bias)
    places = _windows(x) @ _matrix(weight).t()
    return _with_bias(places.view(len(x), *small.shape[2:], -1).permute(0, 3, 1, 2), bias)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int, wanted: list[bool],
) -> Any:  # fmt: skip
    large, small = (grad, x) if transposed else (x, grad)
    if not _is_ours(large, small, weight, stride, padding=padding, dilation=dilation, groups=groups):
        return NotImplemented
    windows = _windows(large) if wanted[1] or (transposed and wanted[0]) else None
    of_input, of_weight = None, None
    if wanted[1] and windows is not None:
        of_weight = _as_weight(_places(small).t() @ windows)
    if wanted[0] and windows is not None and transposed:
        of_input = (windows @ _matrix(weight).t()).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
    elif wanted[0]:
        of_input = _spread(_places(grad) @ _matrix(weight), x.shape[2:])
    return of_input, of_weight, grad.sum([0, 2, 3]) if wanted[2] else None


CONVOLUTIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.convolution.default: _forward,
    torch.ops.aten.convolution_backward.default: _backward,
}
"""What ``make_fx`` is to trace in place of convolutions; others stay as they are."""
