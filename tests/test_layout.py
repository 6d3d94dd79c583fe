"""The import rule: dependencies point one way, and importing fla_swap neither loads Triton nor touches CUDA."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

BASE = ("types", "errors", "arguments", "model_inputs", "exporting", "lengths", "noise", "naming", "wrappers")
LEAVES = ("kernels", "patterns")
STAGES = (
    "capture",
    "recording",
    "ownership",
    "train_mode",
    "call_proof",
    "contract",
    "matching",
    "captures",
    "finishing",
    "linear_proof",
    "linear_sites",
    "exportable",
    "parts",
    "structure",
    "verification",
    "graph_proof",
    "crosscheck",
    "planning",
    "swapping",
    "rewriting",
    "folders",
    "module_checkpoint",
    "checkpoint",
    "decoding",
    "whole_prompts",
    "regions",
    "few_tokens",
    "prompt_state",
    "compilation",
    "packaging",
    "distillation",
)
# Modules that compose stages into a verb; everything else that imports several stages is a mistake.
COMPOSERS = {
    "contract": {"recording"},
    "graph_proof": {"verification"},
    "verification": {"train_mode", "call_proof"},
    "captures": {"capture", "matching", "parts", "verification"},
    "finishing": {
        "captures",
        "contract",
        "graph_proof",
        "matching",
        "ownership",
        "recording",
        "structure",
        "verification",
    },
    "linear_proof": {"call_proof", "train_mode", "verification"},
    "linear_sites": {"captures", "contract", "linear_proof", "ownership", "recording", "structure", "verification"},
    "packaging": {"decoding", "folders"},
    "decoding": {"whole_prompts"},
    "compilation": {"decoding", "few_tokens", "regions", "rewriting"},
    "distillation": {"swapping"},
    "parts": {"recording", "model_inputs"},
    "module_checkpoint": {"planning", "swapping", "folders"},
    "checkpoint": {"planning", "swapping", "registration", "folders", "module_checkpoint"},
}

# Models with mixers: swapped ones, and those built from scratch.
WHOLE_MODELS = {
    "hybrid": {"hybrid"},
    "feed_forward": {"feed_forward"},
    "hybrid_config": {"hybrid_config", "model"},
    "model": {"hybrid_config", "feed_forward", "model"},
}

# A report prints and explains itself: its methods import what does so when they are called.
LAZY = {"types": {"reporting"}}


def part(path: Path) -> str:
    """The part of the project that a file belongs to: `kernels`, `mixers`, `capture`, …"""
    relative = path.relative_to(ROOT)
    if relative.parts[0] in LEAVES:
        return relative.parts[0]
    return relative.parts[1].removesuffix(".py")


def sources() -> list[Path]:
    own = [p for p in (ROOT / "fla_swap").rglob("*.py") if p.relative_to(ROOT).parts[1] not in LEAVES]
    return sorted(own + list((ROOT / "kernels").rglob("*.py")) + list((ROOT / "patterns").rglob("*.py")))


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it (also inside functions)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_parts(path: Path) -> set[str]:
    names = {m.split(".")[1] for m in imported_modules(path) if m.startswith("fla_swap.") and m.count(".")}
    return {name for name in names if (ROOT / "fla_swap" / name).exists() or (ROOT / f"fla_swap/{name}.py").exists()}


def allowed(own: str) -> set[str]:
    if own in BASE:
        return {*BASE, *LAZY.get(own, set())}
    if own == "reporting":
        return {*BASE, own}
    if own in LEAVES:
        return {*BASE, own}
    if own in ("mixers", "cache", "ops", "stateful"):
        return {*BASE, "kernels", "mixers", "cache", "ops", *({"stateful"} if own == "stateful" else ())}
    if own in ("hybrid", "model", "feed_forward", "hybrid_config"):
        return {*BASE, "kernels", "mixers", "cache", "stateful", *WHOLE_MODELS[own]}
    if own in STAGES:
        return {*BASE, *LEAVES, "mixers", "cache", "ops", "stateful", "hybrid", own, *COMPOSERS.get(own, set())}
    return {p.stem for p in (ROOT / "fla_swap").iterdir()}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    extra = imported_parts(path) - allowed(part(path))
    assert not extra, f"{path.relative_to(ROOT)} may not import {sorted(extra)}"


@pytest.mark.parametrize("path", [p for p in sources() if part(p) in LEAVES], ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_and_patterns_know_nothing_of_transformers(path):
    assert not [m for m in imported_modules(path) if m.split(".")[0] == "transformers"]


def test_no_file_is_too_long():
    long = {
        str(p.relative_to(ROOT)): lines
        for p in sources()
        if (lines := len(p.read_text(encoding="utf-8").splitlines())) > (600 if "triton" in p.name else 400)
    }
    assert not long


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_importing_fla_swap_starts_neither_triton_nor_cuda():
    code = (
        "import sys, torch\n"
        "import fla_swap\n"
        "used = [getattr(fla_swap, name) for name in fla_swap.__all__]\n"
        "loaded = [m for m in sys.modules if m.startswith('fla_swap') and m.endswith('triton_impl')]\n"
        "print(loaded, torch.cuda.is_initialized())"
    )
    assert run_python(code) == "[] False"


def test_transformers_still_sees_hugging_faces_kernels_package_from_the_repository_root():
    """A top-level package named `kernels` would shadow it; ours must not be one."""
    code = (
        "import fla_swap, transformers\n"
        "from transformers.utils import is_kernels_available\n"
        "import importlib.util\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(is_kernels_available() == (spec is not None and spec.origin is not None))"
    )
    assert run_python(code) == "True"
