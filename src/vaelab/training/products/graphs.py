"""What the products of a traced graph are."""

from __future__ import annotations

import torch
from torch.fx import Node


def operations(node: Node, dtype: torch.dtype) -> int:
    """The floating-point operations of a plain product on a CPU, with a bias of one row or none; 0 of any other.

    Args:
        node: ``mm`` or ``addmm`` in a graph as ``make_fx`` traces it.
        dtype: of the matrices and the bias; a product of others counts as none.
    """
    values = [argument.meta["val"] for argument in node.args if isinstance(argument, Node)]
    (rows, inner), (_, columns) = (value.shape for value in values[-2:])
    plain = not node.kwargs and all(value.dtype == dtype and value.device.type == "cpu" for value in values)
    bias_is_row = all(value.shape == (columns,) for value in values[:-2])
    return 2 * rows * inner * columns if plain and bias_is_row else 0
