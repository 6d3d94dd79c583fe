"""One operator against its float64 reference on one shape. `numerics` runs all of them and writes the table."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fla_swap.kernels.common import triton_interpreted

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
# Modules whose NUMERICS_CASES are compared. A case is a dict: "op", "reference", "make" (device, dtype, T, H, D, seed →
# tensor arguments), "kwargs" (static arguments), and optionally "name", "gates" (arguments with the gate bar), "shapes"
# ((T, D), …: these instead of `shapes()`, in a quick run the short ones) and "seeds" (how many, from the run's on).
CASE_MODULES = tuple(
    "fla_swap." + ".".join(path.relative_to(KERNELS.parent).with_suffix("").parts)
    for path in sorted(KERNELS.rglob("*.py"))
    if "NUMERICS_CASES" in path.read_text(encoding="utf-8")
)

GATES = ("g", "gv")
HEADS = 2
BARS = {
    "float32": {"output": 1e-5, "state": 1e-5, "gradient": 1e-5, "gate gradient": 1e-4},
    "bfloat16": {"output": 5e-3, "state": 5e-3, "gradient": 8e-3, "gate gradient": 2e-2},
}
ZERO_BAR = 1e-5
QUICK_TIME = 300


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One input shape. `bounds`: packed sequences. `extreme`: gates from 0 to −10 a step, both ends included."""

    time: int
    width: int
    bounds: tuple[int, ...] | None = None
    extreme: bool = False

    @property
    def label(self) -> str:
        extra = (" packed" if self.bounds else "") + (" extreme gates" if self.extreme else "")
        return f"T {self.time} D {self.width}{extra}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. `error` is None when the operator crashed or gave a NaN or an infinity (see `note`)."""

    case: str
    implementation: str
    dtype: str
    shape: str
    quantity: str
    kind: str
    error: float | None
    bar: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.bar


@dataclass(frozen=True, kw_only=True)
class Settings:
    device: str
    quick: bool
    seed: int = 0
    time_limit: float = 240.0
    workers: int = 4
    only: tuple[str, ...] = field(default_factory=tuple)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def shapes(device: str, quick: bool) -> tuple[Shape, ...]:
    """The shapes of a run: lengths around the chunk size, widths that need padding, packing, extreme gates."""
    packed = Shape(time=200, width=64, bounds=(0, 63, 63, 128, 190))
    extreme = Shape(time=130, width=64, extreme=True)
    if quick:
        return (Shape(time=1, width=64), Shape(time=65, width=60), packed, extreme)
    small = tuple(Shape(time=t, width=64) for t in (1, 63, 64, 65))
    wide = tuple(Shape(time=65, width=d) for d in (60, 100, 128))
    gpu = device.startswith("cuda")
    long = (Shape(time=1000, width=128), Shape(time=4096, width=64)) if gpu else (Shape(time=1000, width=64),)
    return (*small, *wide, packed, extreme, *long)


def load_cases() -> dict[str, Mapping[str, Any]]:
    """All cases by name; a duplicate name raises."""
    cases: dict[str, Mapping[str, Any]] = {}
    for module in CASE_MODULES:
        for case in importlib.import_module(module).NUMERICS_CASES:
            options = ", ".join(f"{name}={value}" for name, value in case["kwargs"].items())
            name = case.get("name") or case["op"].__name__ + (f"({options})" if options else "")
            if name in cases:
                raise ValueError(f"two numerics cases are called {name!r}; give one a 'name' ({module})")
            cases[name] = case
    return cases


def compare(name: str, case: Mapping[str, Any], shape: Shape, dtype: torch.dtype, settings: Settings) -> Iterator[Row]:
    """Compare every implementation of one operator on one shape with the float64 reference, which runs on the CPU."""
    inputs = _inputs(case, shape, dtype, settings)
    exact = {n: _leaf(x.double().cpu(), x) if x.is_floating_point() else x.cpu() for n, x in inputs.items()}
    kwargs = dict(case["kwargs"])
    if accepts(case, "output_final_state"):
        kwargs.setdefault("output_final_state", True)
    expected = _flatten(case["reference"](**exact, **kwargs))
    generator = torch.Generator().manual_seed(settings.seed + 1)
    cotangents = {
        n: torch.randn(x.shape, generator=generator).to(dtype if n == "output" else torch.float32)
        for n, x in expected.items()
    }
    expected |= _gradients(expected, exact, cotangents)
    expected = {n: x.detach() for n, x in expected.items()}
    for implementation in _implementations(case, settings.device):
        chosen = kwargs if implementation == "only" else kwargs | {"implementation": implementation}
        poison(settings.device)
        got = _flatten(case["op"](**inputs, **chosen))
        poison(settings.device)
        got |= _gradients(got, inputs, cotangents)
        for quantity, reference in expected.items():
            kind = _kind(quantity, case.get("gates", GATES))
            zero = not reference.any()
            error = _error(got[quantity].detach().cpu(), reference)
            yield Row(
                case=name,
                implementation=implementation,
                dtype=_name(dtype),
                shape=shape.label,
                quantity=quantity,
                kind=kind,
                error=error,
                bar=ZERO_BAR if zero else BARS[_name(dtype)][kind],
                note="" if error is not None else f"{quantity}, {shape.label}: NaN or infinity",
            )


def accepts(case: Mapping[str, Any], argument: str) -> bool:
    """Whether the operator takes this keyword (a wrapper of `**arguments` takes what the operator behind it takes)."""
    parameters = inspect.signature(case["op"]).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        parameters = inspect.signature(case["reference"]).parameters
        return argument == "implementation" or argument in parameters or "options" in parameters
    return argument in parameters


def _implementations(case: Mapping[str, Any], device: str) -> tuple[str, ...]:
    if not accepts(case, "implementation"):
        return ("only",)
    if device.startswith("cuda"):
        return "triton", "torch"
    return ("triton", "torch") if triton_interpreted() else ("torch",)


def _inputs(case: Mapping[str, Any], shape: Shape, dtype: torch.dtype, settings: Settings) -> dict[str, Tensor]:
    """The case's tensors for this shape: packed into one row and with extreme gates where asked for."""
    inputs: dict[str, Tensor] = case["make"](settings.device, dtype, shape.time, HEADS, shape.width, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed + 2)
    if shape.extreme:
        for name in set(case.get("gates", GATES)) & set(GATES) & set(inputs):
            uniform = torch.rand(inputs[name].shape, generator=generator).to(inputs[name]) * 14 - 2
            inputs[name] = _leaf(-uniform.clamp(0, 10), inputs[name])
    if shape.bounds:
        for name, x in inputs.items():
            if name == "initial_state":
                fresh = torch.randn(len(shape.bounds) - 1, *x.shape[1:], generator=generator)
                inputs[name] = _leaf(fresh.to(x), x)
            elif x.ndim >= 3 and x.shape[1] == shape.time:
                inputs[name] = _leaf(x[:1], x)
        inputs["cu_seqlens"] = torch.tensor(shape.bounds, device=settings.device)
    return inputs


def _leaf(x: Tensor, like: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(like.requires_grad)


def _flatten(result: Any) -> dict[str, Tensor]:
    """{"output": o, "state": …} of an operator's result; a state of several tensors is numbered."""
    leaves = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]
    names = ["output", "state", *(f"state {n}" for n in range(2, len(leaves)))]
    return dict(zip(names, leaves, strict=False))


def _gradients(
    outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor], cotangents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    names = [n for n, x in inputs.items() if x.requires_grad]
    differentiable = [n for n, x in outputs.items() if x.requires_grad]
    gradients = torch.autograd.grad(
        [outputs[n] for n in differentiable],
        [inputs[n] for n in names],
        [cotangents[n].to(outputs[n]) for n in differentiable],
        allow_unused=True,
        materialize_grads=True,
    )
    return {f"d {n}": gradient for n, gradient in zip(names, gradients, strict=True)}


def _kind(quantity: str, gates: tuple[str, ...]) -> str:
    if not quantity.startswith("d "):
        return "output" if quantity == "output" else "state"
    return "gate gradient" if quantity[2:] in gates else "gradient"


def _error(got: Tensor, reference: Tensor) -> float | None:
    """RMS(got − reference) / RMS(reference), RMS(got) where the reference is zero, None where got is not finite."""
    size = reference.square().mean().sqrt().item()
    wrong = (got.double() - reference).square().mean().sqrt().item()
    if not math.isfinite(wrong):
        return None
    return wrong / size if size else wrong


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def poison(device: str) -> None:
    """Leave NaN in the GPU memory that the next allocations will get."""
    if not device.startswith("cuda"):
        return
    sizes = [1 << power for power in range(9, 20) for _ in range(16)] + [1 << 24] * 16 + [1 << 28] * 4
    blocks = [torch.full((size // 4,), float("nan"), device=device) for size in sizes]
    torch.cuda.synchronize(device)
    del blocks


def run_case(name: str, case: Mapping[str, Any], settings: Settings) -> Iterator[Row]:
    """Every shape and dtype of one case."""
    if "shapes" in case:
        yield from _run_own_shapes(name, case, settings)
        return
    for shape in shapes(settings.device, settings.quick):
        if shape.extreme and not set(case.get("gates", GATES)) & _arguments(case):
            continue
        if shape.bounds and not accepts(case, "cu_seqlens"):
            continue
        for dtype in settings.dtypes:
            yield from compare(name, case, shape, getattr(torch, dtype), settings)


def _run_own_shapes(name: str, case: Mapping[str, Any], settings: Settings) -> Iterator[Row]:
    longest = QUICK_TIME if settings.quick else max(time for time, _ in case["shapes"])
    for time, width in case["shapes"]:
        for seed in range(settings.seed, settings.seed + (1 if settings.quick else case.get("seeds", 1))):
            for dtype in settings.dtypes if time <= longest else ():
                chosen = replace(settings, seed=seed)
                for row in compare(name, case, Shape(time=time, width=width), getattr(torch, dtype), chosen):
                    yield replace(row, shape=f"{row.shape} seed {seed}") if case.get("seeds", 1) > 1 else row


def _arguments(case: Mapping[str, Any]) -> set[str]:
    return set(case["make"]("cpu", torch.float32, 1, HEADS, 8, 0))
