"""What breaks delta rules, compared with float64 beside the plain cases of `reference.py`.

Repeated keys, β to 2 without decay, gates that forget all or nothing, 65,536 steps, many seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fla_swap.kernels.delta.reference import NUMERICS_CASES as PLAIN_CASES
from fla_swap.kernels.delta.reference import OPTIONS, make_inputs, operator


def _hard_inputs(
    device: torch.device | str,
    dtype: torch.dtype,
    T: int,
    H: int,
    D: int,
    seed: int,
    *,
    gates: tuple[float, ...] = (),
    channels: bool = False,
    repeated: bool = False,
    largest: float = 1.0,
) -> dict[str, Tensor]:
    """`make_inputs` with B = 1, every gate one of `gates`, β up to `largest`, and one key for all tokens if asked."""
    tensors = {name: x.detach() for name, x in make_inputs("cpu", torch.float32, T, H, D, seed).items()}
    tensors = {name: x[:1] for name, x in tensors.items() if name != "g"}
    tensors["beta"] *= largest / 2
    if repeated:
        tensors["k"] = tensors["k"][:, :1].expand(-1, T, -1, -1).clone()
    if gates:
        shape = (1, T, 2 * H, *((D,) if channels else ()))
        chosen = torch.randint(len(gates), shape, generator=torch.Generator().manual_seed(seed))
        tensors["g"] = torch.tensor(gates)[chosen]
    return {
        name: x.to(device, torch.float32 if name == "initial_state" else dtype).requires_grad_()
        for name, x in tensors.items()
    }


def _chunked(name: str) -> Callable[..., Any]:
    """The operator's PyTorch chunks in float64, where a loop over all steps would take too much memory."""
    return partial(operator(name), implementation="torch")


def _hard_cases() -> tuple[dict[str, Any], ...]:
    references = {case["name"]: case["reference"] for case in PLAIN_CASES}
    found = []
    for name, note, shapes, options in (
        ("delta_rule", "one key repeated, beta to 1", ((130, 64), (1000, 128)), {"repeated": True}),
        ("delta_rule", "random unit keys, beta to 2", ((130, 64), (1000, 128)), {"largest": 2.0}),
        ("gated_delta_rule", "gates 0 and -10", ((1, 64), (130, 64), (1000, 128)), {"gates": (0.0, -10.0)}),
        ("kda", "gates 0 and -10", ((1, 64), (130, 64), (1000, 128)), {"gates": (0.0, -10.0), "channels": True}),
        ("delta_rule", "65,536 steps", ((65_536, 64),), {}),
        ("gated_delta_rule", "65,536 steps", ((65_536, 64),), {"gates": (0.0, -0.001, -10.0)}),
        ("kda", "65,536 steps", ((65_536, 64),), {"gates": (0.0, -0.001, -10.0), "channels": True}),
        ("gated_delta_rule", "20 seeds", ((300, 64),), {"gates": (0.0, -0.01, -1.0, -10.0), "largest": 2.0}),
        ("kda", "20 seeds", ((300, 64),), {"gates": (0.0, -0.01, -1.0, -10.0), "channels": True, "largest": 2.0}),
    ):
        long = "steps" in note
        found.append(
            {
                "name": f"{name}, {note}",
                "op": operator(name),
                "reference": _chunked(name) if long else references[name],
                "make": partial(_hard_inputs, **options),
                "kwargs": OPTIONS,
                "shapes": shapes,
                "seeds": 20 if "seeds" in note else 1,
            }
        )
    return tuple(found)


NUMERICS_CASES = _hard_cases()
