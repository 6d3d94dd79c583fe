"""Rewrites of attention on a graph: exact ones, and trained mixers in place of an attention that has no module.

Importing it makes the backend known to `torch.compile`, where the package's entry point has not done so.
"""

from __future__ import annotations

from torch._dynamo.backends.registry import list_backends, register_backend

from fla_swap.rewriting.backend import fla_swap_backend, last_rewrites
from fla_swap.rewriting.program import rewrite
from fla_swap.rewriting.records import Rewrite, RewriteRecord, SkippedCore

__all__ = ["Rewrite", "RewriteRecord", "SkippedCore", "fla_swap_backend", "last_rewrites", "rewrite"]

if "fla_swap" not in list_backends(exclude_tags=()):
    register_backend(fla_swap_backend, name="fla_swap")
