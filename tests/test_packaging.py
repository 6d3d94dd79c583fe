"""`fs.package`: prefill and decode as libraries that run without transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from sites import prompts, report_of, tiny
from transformers import StaticCache

import fla_swap as fs
from fla_swap.decoding import allocate
from fla_swap.errors import CheckpointError, ConfigError, SwapError
from fla_swap.packaging import _exported, _places, _Step

MODELS = [("llama", "gla", [1]), ("qwen3", "gated_deltanet", [0]), ("llama", "mamba", 0), ("phi3", "window", 0)]


def swapped(family, mixer, keep) -> Any:
    model = tiny(family)
    return fs.swap_(model, fs.plan(report_of(model), mixer=mixer, keep=keep))


@pytest.mark.parametrize(("family", "mixer", "keep"), MODELS)
def test_the_exported_steps_are_the_model_on_states_that_change_in_place(family, mixer, keep):
    model = swapped(family, mixer, keep)
    ids = torch.cat([prompts(padding=0)[0]] * 2, 1)[:, :19]
    cache = StaticCache(config=model.config, max_cache_len=32)
    allocate(model, cache, 2)
    step, states = _Step(model, cache), [own[name] for own, name in _places(cache)]
    with torch.no_grad():
        prefill, decode = (_exported(step, states, 2, tokens, 32).module() for tokens in (13, 1))
        expected = model(ids, use_cache=False).logits
        states = [s.clone() for s in states]
        for start, stop, part in ((0, 8, prefill), (8, 9, decode), (9, 18, prefill), (18, 19, decode)):
            positions = torch.arange(start, stop).expand(2, -1)
            logits = part(ids[:, start:stop], positions, states)
            torch.testing.assert_close(logits, expected[:, stop - 1], atol=2e-5, rtol=1e-5)
    assert all(not own[name].any() for own, name in _places(cache)), "the cache that was traced is untouched"


@pytest.mark.slow
def test_a_package_generates_in_a_process_without_transformers(tmp_path):
    """Two rows, prefill of two lengths, tied weights stored once; the child process cannot import transformers."""
    model: Any = tiny("llama", tied=True)
    fs.swap_(model, fs.plan(report_of(model), mixer="gated_deltanet", keep=[1]))
    ids = prompts(padding=0)[0]
    expected = [model.generate(i, max_new_tokens=8, do_sample=False) for i in (ids, ids[:, :4])]
    folder = fs.package(model, tmp_path / "served", rows=2, context=32)
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import json, torch, fla_swap as fs\n"
        f"package = fs.load_package({str(folder)!r})\n"
        f"ids = torch.tensor({ids.tolist()})\n"
        "print(json.dumps([package.generate(i, max_new_tokens=8).tolist() for i in (ids, ids[:, :4])]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [e.tolist() for e in expected]

    package = fs.load_package(folder)
    assert package.facts["rows"] == 2 and len({*package.facts["constants"]["prefill"].values()}) < len(
        dict(model.named_parameters(remove_duplicate=False))
    )
    drawn = [package.generate(ids, max_new_tokens=6, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with pytest.raises(ConfigError, match="1 rows; this package was made for rows=2"):
        package.read(ids[:1])
    with pytest.raises(ConfigError, match="room for context=32"):
        package.generate(ids, max_new_tokens=40)
    (folder / "decode.pt2").unlink()
    with pytest.raises(CheckpointError, match=r"decode\.pt2 is missing"):
        fs.load_package(folder)
    facts = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    (folder / "package.json").write_text(json.dumps({**facts, "torch": "2.0.0"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"made for torch 2\.0\.0.*package it again"):
        fs.load_package(folder)


def test_what_cannot_be_packaged_says_why(tmp_path):
    model = swapped("llama", "gla", 0)
    with pytest.raises(ConfigError, match="rows=0"):
        fs.package(model, tmp_path / "a", rows=0)
    fs.compile(model, backend="eager")
    with pytest.raises(SwapError, match="uncompile"):
        fs.package(model, tmp_path / "a")
    with pytest.raises(SwapError, match="StaticSlidingWindowLayer"):
        fs.package(tiny("mistral"), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"there is no package\.json"):
        fs.load_package(tmp_path)
    assert not any(tmp_path.iterdir())
