"""A recogniser of one's own: q and k turned by one Hadamard matrix before their product (QuaRot, 2404.00456)."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from fla_swap.patterns.base import ABSENT, Found, Refused, Result
from fla_swap.patterns.graph import CapturedGraph

PRODUCTS = (torch.ops.aten.matmul.default, torch.ops.aten.linear.default)


@dataclass(frozen=True, kw_only=True)
class Hadamard:
    """x → x · R on heads [..., time, head_dim], R stored and orthogonal: (q R)(k R)ᵀ = q kᵀ, so no fact is needed."""

    name: str = "hadamard"
    slot: str = "path"

    def match(self, node: Node, graph: CapturedGraph) -> Result:
        if node.target not in PRODUCTS or len(node.all_input_nodes) != 2:
            return ABSENT
        x, stored = node.all_input_nodes
        if not graph.is_open(x) or graph.is_open(stored) or x.meta["val"].dim() != 4:
            return ABSENT  # a projection, or a product of two computed tensors: other recognisers know those
        matrix = graph.evaluate(stored).double()
        if not torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)).double(), atol=1e-5):
            return Refused("q or k is multiplied by a stored matrix that is not orthogonal", node)
        return Found(nodes=(node,), next=x)
