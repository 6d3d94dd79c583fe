"""Whether what surrounds an attention module reaches into it: it could not be replaced then."""

from __future__ import annotations

from torch import Tensor, fx, nn

from fla_swap.patterns.graph import CapturedGraph, modules_of, source_of


def read_outside(owner: str, graph: CapturedGraph, model: nn.Module) -> str | None:
    """Who reads a weight of the module `owner` while that is not being called, as a sentence; None when nobody does.

    A weight that another module holds as its own too (a tied one) stays there when the owner is replaced.
    """
    for node in graph.nodes:
        name = graph.weights.get(node.name, "") if node.op == "placeholder" else ""
        if not name.startswith(f"{owner}."):
            continue
        for user in _users(node):
            around = modules_of(user)
            if owner not in around and not _holds(model, around[-1], _tensor(model, name)):
                where = source_of(user) or around[-1] or "the model"
                return f"{where} reads {name} outside {owner}: a mixer in its place would have no such weight"
    return None


def _users(node: fx.Node) -> list[fx.Node]:
    """The calls that read a node in the model's own code; what the capture put between is looked through."""
    found: list[fx.Node] = []
    walks = [node]
    while walks:
        for user in walks.pop().users:
            if modules_of(user):
                found.append(user)
            elif user.op == "call_function":
                walks.append(user)
    return found


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    holder, _, own = name.rpartition(".")
    try:
        return getattr(model.get_submodule(holder), own, None)
    except AttributeError:
        return None


def _holds(model: nn.Module, module: str, tensor: Tensor | None) -> bool:
    try:
        holder = model.get_submodule(module)
    except AttributeError:
        return False
    return any(own is tensor for own in (*holder._parameters.values(), *holder._buffers.values()) if own is not None)
