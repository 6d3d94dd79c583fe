"""A prefix is read once; what follows it gives the tokens of reading it all, here and in another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sites import report_of, tiny

import fla_swap as fs
from fla_swap.errors import CheckpointError, SwapError


def hybrid(family="llama", mixer="gated_deltanet", keep=(1,)):
    model = tiny(family)
    return fs.swap_(model, fs.plan(report_of(model), mixer=mixer, keep=keep, local=True))


def ids(batch=1, length=20, seed=0):
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("family", "mixer", "keep"),
    [("llama", "gated_deltanet", (1,)), ("mistral", "gla", (0,)), ("qwen3", "window", 0), ("llama", "softmax", 0)],
)
def test_forks_of_one_prefix_go_on_like_the_whole_text(family, mixer, keep):
    model = hybrid(family, mixer, keep)
    prefix = ids()
    state = fs.state(model, prefix, chunk=7)
    assert state.tokens == 20
    for seed in (1, 2):
        text = torch.cat((prefix, ids(length=5, seed=seed)), 1)
        expected = model.generate(text, do_sample=False, max_new_tokens=6)
        assert torch.equal(
            model.generate(text, past_key_values=state.fork(), do_sample=False, max_new_tokens=6), expected
        )
        both = model.generate(text.expand(2, -1), past_key_values=state.fork(rows=2), do_sample=False, max_new_tokens=6)
        assert torch.equal(both, expected.expand(2, -1))


def test_a_state_of_linear_layers_does_not_grow():
    model = hybrid(keep=0)
    assert fs.state(model, ids(length=5)).bytes() == fs.state(model, ids(length=120)).bytes()


def test_another_process_goes_on_from_a_saved_state(tmp_path):
    model = hybrid("mistral", "gla", (0,))
    prefix, text = ids(), torch.cat((ids(), ids(length=3, seed=5)), 1)
    fs.save(model, tmp_path / "model")
    fs.state(model, prefix).save(tmp_path / "prefix.safetensors")
    expected = model.generate(text, do_sample=False, max_new_tokens=5)
    code = f"""
import torch, fla_swap as fs
model = fs.load({str(tmp_path / "model")!r}).eval()
state = fs.load_state({str(tmp_path / "prefix.safetensors")!r}, model)
text = torch.tensor({text.tolist()})
out = model.generate(text, past_key_values=state.fork(), do_sample=False, max_new_tokens=5)
print(out.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(expected.tolist())


def test_states_of_other_models_and_damaged_files_are_refused(tmp_path):
    model = hybrid()
    path = fs.state(model, ids()).save(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="another model"):
        fs.load_state(path, hybrid(mixer="gla"))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(CheckpointError, match="other weights"):
        fs.load_state(path, model)
    Path(path).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="can be read"):
        fs.load_state(path, model)
    with pytest.raises(SwapError, match="input_ids"):
        fs.state(model, torch.zeros(1, 0, dtype=torch.long))
