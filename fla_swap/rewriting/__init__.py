"""Rewrites of attention on a graph: exact ones, and trained mixers in place of an attention that has no module."""

from __future__ import annotations

from fla_swap.rewriting.program import rewrite
from fla_swap.rewriting.records import Rewrite, RewriteRecord, SkippedCore

__all__ = ["Rewrite", "RewriteRecord", "SkippedCore", "rewrite"]
