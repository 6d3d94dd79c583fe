"""Shipped Triton kernels compile for chips that are not here, within each chip's shared memory.

Modules of `kernels/` that launch Triton kernels offer `configurations()`. The compiler runs in a process of its own:
this one has Triton in interpreter mode. By default every kernel is compiled in its most demanding bf16 configuration
for every chip; `-m slow` compiles every configuration.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
MODULES = sorted(
    f"{path.parent.name}.{path.stem}" for path in KERNELS.glob("*/*.py") if "\ndef configurations(" in path.read_text()
)

# Bytes a thread may spill on sm_90, by module and whether the inputs are narrow (bf16). Most kernels spill nothing in
# bf16. The most: 384 for one decay per head at width 256, 800 for window's gradients at that width (tiles that
# spill less were slower), 224 for the selective scan's gradients (the tile that was fastest), 2,400 for KDA's, 860 for
# `gla` with value gates (300 in chunks that forget nearly everything, 100 otherwise). fp32 products without tensor
# cores cost window 8,760 (all options at width 128, 3,350 otherwise), the delta rule's walks 3,200; as three tf32
# products, `gla` 2,970.
STACK_LIMITS = {
    ("decay.simple_triton", True): 420,
    ("decay.simple_triton", False): 32,
    ("decay.slot_softmax_triton", True): 0,
    ("decay.slot_softmax_triton", False): 0,
    ("decay.slot_writes_triton", True): 32,
    ("decay.slot_writes_triton", False): 320,
    ("decay.triton_impl", True): 900,
    ("decay.triton_impl", False): 3000,
    ("delta.triton_impl", True): 2500,
    ("delta.triton_impl", False): 3300,
    ("feature.triton_impl", True): 400,
    ("feature.triton_impl", False): 2500,
    ("feature.triton_step", True): 0,
    ("feature.triton_step", False): 0,
    ("fused.attend_one_triton", True): 310,
    ("fused.attend_one_triton", False): 310,
    ("fused.matvec_launch", True): 0,
    ("fused.matvec_launch", False): 0,
    ("scan.triton_impl", True): 240,
    ("scan.triton_impl", False): 16,
    ("window.triton_impl", True): 850,
    ("window.triton_impl", False): 8800,
}

# Shared memory that one block may use, in bytes.
LIMITS = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

PROGRAM = r"""
import importlib, inspect, json, re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

everything, modules, limits, *targets = sys.argv[1:]
limits = json.loads(limits)


def demand(configuration):
    signature, constexprs = configuration[2:4]
    narrow = "*bf16" in signature.values()
    given = sum(kind != "constexpr" for kind in signature.values())
    return narrow, given, sum(value for value in constexprs.values() if isinstance(value, int))


def selected(module, target):
    found = {}
    configurations = importlib.import_module(f"fla_swap.kernels.{module}").configurations
    target_facts = {"large": limits[target] >= 200 << 10, "amd": target.startswith("gfx")}
    known = inspect.signature(configurations).parameters
    for configuration in configurations(**{name: fact for name, fact in target_facts.items() if name in known}):
        key = configuration[0] if everything == "all" else configuration[1].fn.__name__
        if key not in found or demand(configuration) > demand(found[key]):
            found[key] = configuration
    return [(module, *configuration) for configuration in found.values()]


def target_of(name):
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def spilled(compiled):
    cubin = compiled.asm.get("cubin")
    if cubin is None:
        match = re.search(r"vgpr_spill_count:\s*(\d+)", compiled.asm.get("amdgcn", ""))
        return int(match.group(1)) if match else 0
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", text))


for target in targets:
    chosen = [configuration for module in modules.split(",") for configuration in selected(module, target)]
    for module, name, kernel, signature, constexprs, num_warps, num_stages, *registers in chosen:
        row = {"module": module, "kernel": kernel.fn.__name__, "name": name, "target": target}
        row["narrow"] = "*bf16" in signature.values()
        if target.startswith("gfx"):  # as the kernels' own choice there: AMD multiplies fp32 exactly
            exact = {"tf32": "ieee", "tf32x3": "ieee"}
            constexprs = {key: exact.get(v, v) if isinstance(v, str) else v for key, v in constexprs.items()}
        try:
            aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
            source = triton.compiler.ASTSource(kernel, signature, constexprs, aligned)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            options |= {"maxnreg": most for most in registers if most is not None}
            compiled = triton.compile(source, target=target_of(target), options=options)
            row |= {"shared": compiled.metadata.shared, "spilled": spilled(compiled)}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
        sys.stdout.write(json.dumps(row) + "\n")
"""


def compile_all(modules: list[str], which: str, targets: list[str]) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, which, ",".join(modules), json.dumps(LIMITS), *targets]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict[str, Any]]) -> None:
    assert rows, "configurations() yielded no kernel"
    wrong = []
    for row in rows:
        limit = STACK_LIMITS[row["module"], row["narrow"]]
        if "error" in row:
            wrong.append(f"{row['name']} on {row['target']}: {row['error']}")
        elif row["target"] == "sm_90" and row["spilled"] > limit:
            wrong.append(f"{row['name']} on {row['target']}: {row['spilled']} bytes of registers spilled")
        elif row["shared"] > LIMITS[row["target"]]:
            wrong.append(f"{row['name']} on {row['target']}: {row['shared']} bytes of shared memory")
    assert not wrong, "\n".join(wrong)


def test_every_kernel_compiles() -> None:
    rows = compile_all(MODULES, "one", list(LIMITS))
    assert {row["module"] for row in rows} == set(MODULES) >= set(next(zip(*STACK_LIMITS, strict=True)))
    check(rows)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", list(LIMITS))
@pytest.mark.parametrize("module", MODULES)
def test_every_configuration_compiles(module: str, target: str) -> None:
    check(compile_all([module], "all", [target]))


LENGTHS = {"T", "Tq", "Tk", "tokens", "count", "slots", "step"}


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*/*.py")), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_lengths_are_never_compiled_in(path: Path) -> None:
    """Triton makes a constant of an integer that is 1 unless the kernel says otherwise: T = 1 would not compile."""
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef) or not function.name.endswith("_kernel"):
            continue
        spared = {s.value for d in function.decorator_list for s in ast.walk(d) if isinstance(s, ast.Constant)}
        runtime = {a.arg for a in function.args.args if a.annotation is None}
        loaded = {n.left.id for n in ast.walk(function) if isinstance(n, ast.BinOp) and isinstance(n.left, ast.Name)}
        pointers = {name for name in runtime & loaded if f"tl.load({name}" in ast.unparse(function)}
        assert not (runtime & LENGTHS) - spared - pointers, function.name
