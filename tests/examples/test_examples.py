"""The examples run as they stand, on a small model and with a small budget."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from saved import save_teacher, save_text
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("convert_to_hybrid", "distill_finetune", "compile_and_run")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("model") / "teacher")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return save_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_explains_itself(name, capsys):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 80
    assert f"python examples/{name}.py --model" in source
    with pytest.raises(SystemExit) as end:
        script(name).main(["--help"])
    assert end.value.code == 0 and "--model" in capsys.readouterr().out


def test_convert_to_hybrid(teacher, tmp_path, capsys):
    out = tmp_path / "hybrid"
    facts = script("convert_to_hybrid").main(["--model", str(teacher), "--mixer", "gla", "--out", str(out)])
    assert facts["identity"] < 1e-5 and facts["reload"] == 0.0
    said = capsys.readouterr().out
    assert "gla: [0, 1, 3]; kept: ['model.layers.2.self_attn']" in said and "saved to" in said
    assert AutoModelForCausalLM.from_pretrained(out).config.fla_swap["plan"]["layers"][0]["mixer"] == "gla"


def test_distill_finetune(teacher, text, tmp_path):
    out = tmp_path / "tuned"
    sizes = ["--mixer", "gla", "--steps", "10", "--block-size", "64", "--batch-size", "4", "--max-tokens", "20000"]
    places = ["--model", str(teacher), "--data", str(text), "--text", str(text), "--out", str(out)]
    facts = script("distill_finetune").main([*places, *sizes])
    # The student comes nearer to its teacher, layer by layer and then as a whole; tuned, it learns the text.
    assert facts["teacher"] < facts["2-distil"] < facts["1-align"] < facts["start"]
    assert facts["tuned to"] < facts["tuned from"]
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_and_run(teacher, backend, capsys):
    torch.compiler.reset()
    facts = script("compile_and_run").main(
        ["--model", str(teacher), "--mixer", "gla", "--new-tokens", "8", "--backend", backend, "--device", "cpu"]
    )
    assert facts["same"] and facts["tokens_per_second"] > 0
    prompt = facts["greedy"].shape[1] - 8
    # Left padding changes nothing: the first prompt continues as it does alone.
    assert torch.equal(facts["batch"][0, -8:], facts["greedy"][0, -8:])
    assert torch.equal(facts["sampled"][0, :prompt], facts["greedy"][0, :prompt])
    assert "swapped on the fly" in capsys.readouterr().out
