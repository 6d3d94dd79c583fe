"""Every operator once at an odd shape, forward, backward and one decode step, for the GPU's memory checker:

    compute-sanitizer python -m fla_swap.bench.sanitize [--ops gla,hgrn] [--dtype bfloat16]

No caching allocator, so that every tensor has bounds of its own. Packed sequences too, where the operator takes them.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import Annotated

import typer
from rich.console import Console

ODD = {"batch": 1, "time": 83, "heads": 3, "width": 72}
"""Nothing here is a multiple of a tile: partial chunks, padded widths."""


def exercise(name: str, device: str, dtype: str) -> str:
    """Run one operator every way; says what ran."""
    import torch

    from fla_swap.bench.catalogue import Shape, by_name

    case = by_name()[name]
    operator, step = case.load(), case.step()
    if operator is None:
        return f"fla_swap.ops has no {name} yet"
    inputs = case.inputs(Shape(**ODD), device, getattr(torch, dtype))
    bounds = torch.tensor([0, 1, 1, 66, 80], device=device)
    ran = []
    for packed in (False, True):
        if packed and "cu_seqlens" not in inspect.signature(operator).parameters:
            continue
        extra = {"cu_seqlens": bounds} if packed else {}
        o = operator(**inputs, **case.options, **extra)[0]
        torch.autograd.grad(o.float().square().sum(), list(inputs.values()), allow_unused=True)
        ran.append("packed" if packed else "forward, backward")
    if step is not None:
        token = case.inputs(Shape(**ODD | {"time": 1}), device, getattr(torch, dtype))
        with torch.no_grad():
            state = operator(**token, **case.options, output_final_state=True)[1]
            step(**token, **case.options, state=state)
        ran.append("step")
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return ", ".join(ran)


def sanitize_command(
    ops: Annotated[str | None, typer.Option(help="Only these operators, separated by commas.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Every operator once at an odd shape; status 1 when one fails."""
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    from fla_swap.bench.operators import names

    console, failures = Console(width=160), 0
    for name in names(ops):
        try:
            console.print(f"{name}: {exercise(name, device, dtype)}", highlight=False)
        except Exception as error:
            failures += 1
            console.print(f"{name}: FAILED: {type(error).__name__}: {error}", highlight=False, markup=False)
    sys.exit(min(failures, 1))


if __name__ == "__main__":
    typer.run(sanitize_command)
