"""Weights that have several names: a site calls them as its own module does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fla_swap.types import AttentionSite, WeightRef


def with_own_names(sites: Sequence[AttentionSite], model: nn.Module) -> list[AttentionSite]:
    """The sites, with the names inside their owners for weights that distinct modules share.

    A captured graph knows one name for each tensor; the owner's copy, on which a site is proved, has its own alone.
    """
    names: dict[int, list[str]] = {}
    ids: dict[str, int] = {}
    for listed in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in listed:
            names.setdefault(id(tensor), []).append(name)
            ids[name] = id(tensor)

    def own(name: str, owner: str) -> str:
        aliases = names.get(ids[name], []) if name in ids else []
        inside = [a for a in aliases if a.startswith(f"{owner}.")] if owner else aliases
        return name if not inside or name in inside else inside[0]

    return [
        _renamed(site, lambda name, owner=site.fqn: own(name, owner)) if site.place == "module" else site
        for site in sites
    ]


def _renamed(value: Any, name: Callable[[str], str]) -> Any:
    """A dataclass with every WeightRef in it renamed; itself where none is."""
    if isinstance(value, tuple):
        items = tuple(_renamed(v, name) for v in value)
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    before = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    after = {k: _renamed(v, name) for k, v in before.items()}
    if isinstance(value, WeightRef):
        after["name"] = name(value.name)
    changed = {k: v for k, v in after.items() if v is not before[k]}
    return dataclasses.replace(value, **changed) if changed else value
