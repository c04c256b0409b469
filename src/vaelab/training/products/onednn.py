"""Matrix products of a traced step, by whichever of torch's two libraries makes more of the processor.

torch gives fp32 products to MKL, which takes AVX2 on processors that are not Intel's. oneDNN, which torch brings along
for convolutions and bf16, takes AVX-512 wherever it is: where that is 512 bits wide, the same products in half the
time, and with the same arithmetic up to the order of sums.

Shapes: N rows, K inputs, M outputs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule

from vaelab.training.products.graphs import operations

LEAST = 4e6  # floating-point operations: of smaller products the call itself (some 12 us) is the most


def by_onednn(graph: GraphModule) -> int:
    """Let oneDNN compute the fp32 products of a traced graph, in place; returns how many there are.

    Args:
        graph: as ``make_fx`` traces it. Products of bf16 stay as they are (torch gives them to oneDNN itself), and so
            do small ones.
    """
    replaced = {torch.ops.aten.mm.default: _product, torch.ops.aten.addmm.default: _affine}
    found = [node for node in graph.graph.nodes if node.target in replaced and operations(node, torch.float32) >= LEAST]
    for node in found:
        node.target = replaced[node.target]
    graph.recompile()
    return len(found)


def _onednn(a: Float[Tensor, "N K"], b: Float[Tensor, "K M"]) -> Float[Tensor, "N M"]:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def _onednn_affine(bias: Float[Tensor, " M"], a: Float[Tensor, "N K"], b: Float[Tensor, "K M"]) -> Float[Tensor, "N M"]:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias.contiguous(), "none", [], "")


# Operations of our own, since the compiler takes oneDNN's for a network's whose weights never change.
torch.library.define("vaelab::product", "(Tensor a, Tensor b) -> Tensor")
torch.library.define("vaelab::affine", "(Tensor bias, Tensor a, Tensor b) -> Tensor")
torch.library.impl("vaelab::product", "cpu", _onednn)
torch.library.impl("vaelab::affine", "cpu", _onednn_affine)
torch.library.register_fake("vaelab::product", lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
torch.library.register_fake("vaelab::affine", lambda bias, a, b: a.new_empty(a.shape[0], b.shape[1]))
_product = torch.ops.vaelab.product.default
_affine = torch.ops.vaelab.affine.default
