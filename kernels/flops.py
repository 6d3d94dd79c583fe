"""Floating-point operations of the custom operators, for `torch.utils.flop_counter` (2 for a multiply-add).

Formulas, for each token and head, with chunks of C = 64 tokens; the same that `fla_swap.bench.work` takes for floors:

- decay family: 4KV + C(K + V): the state written and read, the causal half of the chunk's scores;
- delta family: 6KV + 2C(3K + 2V);
- feature maps: the decay family with the features in K's place for the state;
- window of W: 2(K + V) for each pair of tokens that sees each other;
- scans: 2 for each element of `hgrn`, 6 for each element of `selective_scan`'s states.

Backward: twice the forward's, 2.5 times for the window, which computes its scores once more. Packed sequences count as
one of the whole length: their bounds are on the device. Decode steps: 4KV, 6KV for the delta family.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"
CHUNK = 64
Arguments = Mapping[str, Any]


def decay(keys: float, values: float, scores: float) -> float:
    """A token and head of the decay family: state K×V, scores over K or over what K was made from."""
    return 4 * keys * values + CHUNK * (scores + values)


def delta(keys: float, values: float) -> float:
    return 6 * keys * values + 2 * CHUNK * (3 * keys + 2 * values)


def pairs(queries: int, keys: int, window: int | None) -> int:
    """Pairs (i, j) of which i sees j; the queries are the last of the keys."""
    most = keys if window is None else min(window, keys)
    first = keys - queries + 1  # seen by the first query
    rising = min(max(most - first, 0), queries)
    return rising * first + rising * (rising - 1) // 2 + (queries - rising) * most


def _decay(x: Arguments) -> float:
    batch, time, heads, values = x["v"].shape
    keys = x["q"].shape[3]
    return batch * time * heads * decay(keys, values, keys)


def _delta(x: Arguments) -> float:
    batch, time, heads, values = x["v"].shape
    return batch * time * heads * delta(x["q"].shape[3], values)


def _feature(x: Arguments) -> float:
    batch, time, heads, values = x["v"].shape
    width = x["q"].shape[3]
    features = width * (width + 1) // 2 + (width + 1) * bool(x["taylor"])
    return batch * time * heads * decay(features, values, width)


def _feature_step(x: Arguments) -> float:
    width = x["q"].shape[3]
    return 4 * x["v"].numel() * (width * (width + 1) // 2 + (width + 1) * bool(x["taylor"]))


def _window(x: Arguments) -> float:
    batch, time, heads, width = x["q"].shape
    return batch * heads * pairs(time, x["k"].shape[1], x["window"]) * 2 * (width + x["v"].shape[3])


def _window_step(x: Arguments) -> float:
    batch, time, heads, width = x["q"].shape
    return batch * heads * time * x["state_k"].shape[2] * 2 * (width + x["v"].shape[3])


def _decay_step(x: Arguments) -> float:
    return x["v"].numel() * 4 * x["q"].shape[3]


def _delta_step(x: Arguments) -> float:
    return x["v"].numel() * 6 * x["q"].shape[3]


def _hgrn(x: Arguments) -> float:
    return 2 * x["g"].numel()


def _selective_scan(x: Arguments) -> float:
    return 6 * x["x"].numel() * x["A"].shape[1]


def _few_linears(x: Arguments) -> float:
    return 2 * x["x"].numel() * sum(weight.shape[0] for weight in x["weights"])


def _attend_one(x: Arguments) -> float:
    batch, heads = x["q"].shape[:2]
    return 2 * batch * heads * x["k"].shape[2] * (x["k"].shape[3] + x["v"].shape[3])


def _linear_loss(x: Arguments) -> float:
    """Logits of one or two models, and the gradients that were asked for (made in the forward pass)."""
    own = 2 * x["hidden"].numel() * x["weight"].shape[0] * (1 + bool(x["to_hidden"]) + bool(x["to_weight"]))
    return own + (2 * x["teacher_hidden"].numel() * x["teacher_weight"].shape[0] if "teacher_hidden" in x else 0)


def _times(factor: float, formula: Callable[[Arguments], float]) -> Callable[[Arguments], float]:
    return lambda x: factor * formula(x)


FORMULAS: dict[str, Callable[[Arguments], float]] = {
    "gla_fwd": _decay,
    "gla_bwd": _times(2, _decay),
    "gla_step": _decay_step,
    "simple_gla_fwd": _decay,
    "simple_gla_bwd": _times(2, _decay),
    "simple_gla_step": _decay_step,
    "gated_delta_rule_fwd": _delta,
    "gated_delta_rule_bwd": _times(2, _delta),
    "gated_delta_rule_step": _delta_step,
    "feature_fwd": _feature,
    "feature_bwd": _times(2, _feature),
    "feature_step": _feature_step,
    "window_attention_fwd": _window,
    "window_attention_bwd": _times(2.5, _window),
    "window_attention_step": _window_step,
    "hgrn_fwd": _hgrn,
    "hgrn_bwd": _times(2, _hgrn),
    "hgrn_step": _hgrn,
    "selective_scan_fwd": _selective_scan,
    "selective_scan_bwd": _times(2, _selective_scan),
    "selective_scan_step": _selective_scan,
    "linear_kl": _linear_loss,
    "linear_cross_entropy": _linear_loss,
    "few_linears": _few_linears,
    "attend_one": _attend_one,
}
"""By the name of the custom operator; what has no products (a softmax over slots) is not counted."""


def register() -> None:
    """Make the formulas known to torch's counter: now, or when it is imported (importing it here would load Triton)."""
    if COUNTER in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Registers the formulas as soon as the counter is imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _register()

            loader.exec_module = exec_module
        return spec


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in FORMULAS.items():
        packet = getattr(torch.ops.fla_swap, name, None)  # None: its module is not imported, and registers it then
        if packet is not None and packet not in flop_registry:
            register_flop_formula(packet, get_raw=True)(_bound(packet, formula))


def _bound(packet: Any, formula: Callable[[Arguments], float]) -> Callable[..., int]:
    names = [argument.name for argument in packet.default._schema.arguments]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return int(formula({**dict(zip(names, args, strict=False)), **kwargs}))

    return count
