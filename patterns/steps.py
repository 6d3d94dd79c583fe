"""Arithmetic by name: the operators of one kind, in every overload."""

from __future__ import annotations

import operator

from fla_swap.patterns.graph import _ops

MUL = _ops("mul", "mul_") | frozenset({operator.mul})
DIV = _ops("div", "div_", "true_divide") | frozenset({operator.truediv})
ADD = _ops("add", "add_") | frozenset({operator.add})
SUB = _ops("sub", "sub_") | frozenset({operator.sub})
