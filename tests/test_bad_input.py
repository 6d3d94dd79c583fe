"""What bad input gets: one clear line, an exit status that is not 0, and nothing overwritten."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from console import Ended, fla_swap
from saved import byte_tokenizer, llama, save_teacher, save_text
from torch import nn
from transformers import AutoModelForCausalLM

import fla_swap as fs
from fla_swap import conversion
from fla_swap.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MixerError,
    NoAttentionFound,
    PlanError,
    TrainingError,
)

Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("bad") / "teacher", layers=2, taught=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return save_text(tmp_path_factory.mktemp("bad") / "text")


@pytest.fixture
def run(capsys, monkeypatch) -> Run:
    return lambda *arguments: fla_swap(capsys, monkeypatch, *arguments)


@pytest.fixture
def convert(run, teacher, text, tmp_path) -> Run:
    """`fla-swap convert` with small settings, some of them replaced."""

    def call(model=teacher, **changed) -> Ended:
        options = {"data": text, "out": tmp_path / "out", "mixer": "gla", "minutes": 0.02, "select": "uniform"}
        options |= {"keep": "1/2", "block_size": 64, "batch_size": 4, "eval_tokens": 256, **changed}
        words: list[object] = []
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, value]
        return run("convert", model, *words)

    return call


def save_model(folder: Path, model: nn.Module) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    byte_tokenizer().save_pretrained(folder)
    return folder


# ---- models


class TestModels:
    def test_one_without_attention(self, convert, tmp_path):
        shape = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**shape))
        ended = convert(save_model(tmp_path / "mamba", model))
        assert ended.status == 1 and not (tmp_path / "out").exists()
        assert "NoAttentionFound: MambaForCausalLM: 2 layers that mix tokens, none understood" in ended.error
        assert "without a softmax" in ended.error

    def test_one_without_attention_through_the_library(self):
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        with pytest.raises(NoAttentionFound, match="Sequential has no attention") as caught:
            fs.inspect(model, torch.randn(2, 11, 8))
        assert caught.value.report.sites == ()

    def test_a_sequence_to_sequence_model(self, run, tmp_path):
        config = transformers.T5Config(vocab_size=258, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
        ended = run("inspect", save_model(tmp_path / "t5", transformers.T5ForConditionalGeneration(config)))
        assert ended.status == 1 and "CheckpointError" in ended.error and "T5Config" in ended.error

    def test_one_whose_attention_is_refused_says_where_and_why(self, run, tmp_path, monkeypatch):
        # Scores are squared before the softmax: nothing that any mixer could be made from.
        def squared(module, query, key, value, attention_mask, scaling, **kwargs):
            key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
            scores = (query @ key.transpose(2, 3) * scaling).square()
            scores = scores if attention_mask is None else scores + attention_mask
            return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

        from transformers.models.llama import modeling_llama

        monkeypatch.setattr(modeling_llama, "eager_attention_forward", squared)
        model = llama(layers=2, attn_implementation="eager")
        with pytest.raises(
            NoAttentionFound, match=r"2 layers that mix tokens, none understood.*layers\.0\.self_attn"
        ) as caught:
            fs.inspect(model)
        misses = caught.value.report.near_misses
        assert len(misses) == 2 and all("square" in m.reason and "modeling_llama.py" in m.source for m in misses)

    def test_a_missing_folder(self, run, tmp_path):
        ended = run("inspect", tmp_path / "absent")
        assert ended.status == 1 and "is no folder with a saved model" in ended.error

    def test_a_name_that_neither_a_folder_nor_the_hub_has(self, run, monkeypatch):
        asked = []

        def offline(name, **options):
            asked.append(name)
            raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your internet connection.")

        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
        ended = run("inspect", "nowhere")
        assert ended.status == 1 and asked == ["nowhere"]
        assert "nowhere could not be loaded: it is no folder here, and from the hub: We couldn't connect" in ended.error
        assert len(ended.err.splitlines()) == 1

    def test_a_folder_without_a_model(self, run, text):
        ended = run("inspect", text)
        assert ended.status == 1 and "holds no model: there is no config.json" in ended.error

    def test_a_truncated_checkpoint(self, convert, tmp_path):
        folder = save_teacher(tmp_path / "cut", layers=2, taught=False)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        ended = convert(folder)
        assert ended.status == 1 and not (tmp_path / "out").exists()
        assert "model.safetensors is damaged or cut short" in ended.error

    def test_weights_that_are_not_numbers(self, convert, tmp_path):
        model = llama(layers=2)
        with torch.no_grad():
            model.model.norm.weight[3] = float("nan")
        ended = convert(save_model(tmp_path / "poisoned", model))
        assert ended.status == 1 and "has NaN or infinite weights in ['model.norm.weight']" in ended.error

    def test_no_tokenizer(self, convert, tmp_path):
        llama(layers=2).save_pretrained(tmp_path / "bare")
        ended = convert(tmp_path / "bare")
        assert ended.status == 1 and "DataError" in ended.error and "no tokenizer that loads" in ended.error

    def test_the_tokenizer_of_another_model(self, convert, tmp_path):
        torch.manual_seed(0)
        shape = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_hidden_layers=2))
        ended = convert(save_model(tmp_path / "mixed", model))
        assert ended.status == 1 and "the model has 100 embeddings" in ended.error


# ---- plans and settings


SETTINGS = [
    ({"mixer": "glaa"}, PlanError, "glaa"),
    ({"mixer": "window", "options": '{"windw": 4}'}, PlanError, "windw"),
    (
        {"mixer": "window", "options": '{"window": -4}'},
        PlanError,
        "window counts the token itself and must be at least 1, got -4",
    ),
    ({"keep": "0,9"}, PlanError, r"layers \[9\], which do not exist; the attention layers are \[0, 1\]"),
    ({"keep": "0,1"}, PlanError, "the plan swaps no layer"),
    ({"keep": "many"}, PlanError, "many"),
    ({"keep": "3/2"}, PlanError, "less than 1"),
    ({"start": "warm"}, ConfigError, "start is 'warm'; it must be one of"),
    ({"select": "best"}, ConfigError, "select is 'best'; it must be one of"),
    ({"dtype": "int8"}, ConfigError, "dtype is 'int8'; it must be one of"),
    ({"device": "tpu"}, ConfigError, "device is 'tpu'; it must be one of"),
    ({"minutes": 0}, ConfigError, "minutes is 0.0; it must be positive"),
    ({"minutes": "nan"}, ConfigError, "it must be positive"),
    ({"batch_size": 0}, ConfigError, "batch_size is 0; it must be at least 1"),
    ({"block_size": 1}, ConfigError, "block_size is 1; it must be at least 2"),
    ({"batch_size": 100_000}, DataError, "give more text, or a smaller batch_size"),
    ({"data": "missing.txt"}, DataError, "missing.txt: no such file"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), SETTINGS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_a_plan_or_setting_that_cannot_be(convert, tmp_path, changed, kind, message):
    ended = convert(**changed)
    assert ended.status == 1
    assert ended.error.startswith(f"error: {kind.__name__}: ")
    assert message.replace("\\", "") in ended.error
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("changed", [{"options": "{"}, {"options": "[1]"}, {"keep": "0,x"}, {"minutes": "soon"}])
def test_an_option_that_cannot_be_read(convert, changed):
    ended = convert(**changed)
    assert ended.status == 2 and "Invalid value" in ended.err and "Traceback" not in ended.err


def test_rules_that_name_nothing():
    report = fs.inspect(llama(layers=2))
    with pytest.raises(PlanError, match=r"'model\.layers\.7\.\*' matches no attention site; the sites are"):
        fs.plan(report, rules=[fs.Rule("model.layers.7.*", "gla")])
    with pytest.raises(PlanError, match="needs `mixer` or `rules`"):
        fs.plan(report)


@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet"])
def test_heads_that_a_mixer_cannot_take(mixer):
    model = llama(layers=2, hidden_size=64, head_dim=320, num_attention_heads=1)
    report = fs.inspect(model)
    assert report.sites[0].head_dim == 320
    with pytest.raises(PlanError, match=rf"self_attn cannot be swapped for '{mixer}': .*320"):
        fs.plan(report, mixer=mixer)
    assert issubclass(MixerError, ValueError)


def test_empty_data(convert, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    ended = convert(data=tmp_path / "empty.txt")
    assert ended.status == 1 and "empty.txt: no text" in ended.error


# ---- places


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


class TestPlaces:
    def test_an_output_folder_that_holds_another_model(self, convert, run, tmp_path, teacher, text):
        out = save_teacher(tmp_path / "out", layers=1, taught=False)
        before = contents(out)
        ended = convert()
        assert ended.status == 1 and f"{out} holds a model already" in ended.error and "--overwrite" in ended.error
        ended = convert(resume=True)
        assert ended.status == 1 and "nothing to resume" in ended.error
        assert contents(out) == before

    def test_overwriting_replaces_nothing_when_it_fails(self, convert, tmp_path, monkeypatch):
        out = save_teacher(tmp_path / "out", layers=1, taught=False)
        (out / "training").mkdir()
        (out / "training" / "run.json").write_text("{}")
        assert convert(overwrite=True, data="missing.txt").status == 1
        assert (out / "training" / "run.json").exists()

        def full(*arguments, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        before = (out / "model.safetensors").read_bytes()
        ended = convert(overwrite=True)
        assert ended.status == 1 and "No space left on device" in ended.error and "unchanged" in ended.error
        assert (out / "model.safetensors").read_bytes() == before
        assert "--resume continues it" in ended.err
        monkeypatch.undo()

    def test_an_output_that_is_a_file(self, convert, tmp_path):
        (tmp_path / "out").write_text("mine")
        ended = convert()
        assert ended.status == 1 and "is a file, not a folder" in ended.error
        assert (tmp_path / "out").read_text() == "mine"

    def test_a_plan_file_that_cannot_be_written(self, run, teacher, tmp_path):
        ended = run("plan", teacher, "--mixer", "gla", "--out", tmp_path / "absent" / "plan.json")
        assert ended.status == 1 and "No such file or directory" in ended.error and "plan.json" in ended.error


# ---- training


class TestTraining:
    def test_a_loss_that_is_not_a_number(self, run, teacher, text, tmp_path):
        model = fs.load(teacher)
        fs.swap_(model, fs.plan(fs.inspect(model), mixer="gla", keep=0))
        fs.save(model, tmp_path / "hybrid", tokenizer=byte_tokenizer())
        words = ("--teacher", teacher, "--data", text, "--out", tmp_path / "out", "--block-size", 64)
        ended = run("distill", tmp_path / "hybrid", *words, "--learning-rate", "1e30")
        assert ended.status == 1 and not (tmp_path / "out" / "config.json").exists()
        assert re.search(r"TrainingError: the loss of step \d+ is nan; nothing was written after that", ended.error)
        assert "a smaller learning rate, or a longer warmup, usually helps" in ended.error

    def test_a_full_disk_keeps_what_was_written_before(self, convert, tmp_path, monkeypatch):
        import safetensors.torch

        write, left = safetensors.torch.save_file, [2]

        def fill_up(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(*arguments, **options)

        monkeypatch.setattr(safetensors.torch, "save_file", fill_up)
        ended = convert()
        assert ended.status == 1 and "TrainingError: the disk is full" in ended.error and "then resume" in ended.error
        out = tmp_path / "out"
        assert (out / "training" / "1-align" / "done.json").exists() and not (out / "config.json").exists()
        monkeypatch.setattr(safetensors.torch, "save_file", write)
        # With room again, the same command goes on after the stage that was finished.
        aligned = json.loads((out / "training" / "1-align" / "done.json").read_text())
        assert convert().status == 1  # not silently from the start
        assert convert(resume=True).status == 0
        report = json.loads((out / "report.json").read_text())
        assert report["losses"]["1-align"] == aligned["losses"]["1-align"]
        assert report["reload"] == {"bitwise_equal": True}

    def test_ctrl_c_then_resume(self, teacher, text, tmp_path):
        out = tmp_path / "out"
        sizes = ["--block-size", "64", "--batch-size", "4", "--eval-tokens", "256", "--keep", "1/2", "--mixer", "gla"]
        command = [sys.executable, "-c", "from fla_swap.cli import main; main()", "convert", str(teacher)]
        command += ["--data", str(text), "--out", str(out), "--minutes", "0.15", "--select", "uniform", *sizes]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        deadline = time.monotonic() + 120
        while not (out / "training" / "1-align" / "done.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)  # somewhere in the middle of the second stage
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode != 0 and "Traceback" not in said
        assert "interrupted at step" in said and "--resume" in said
        assert list((out / "training" / "2-distil").glob("checkpoint-*")) and not (out / "config.json").exists()
        again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=200)
        assert again.returncode == 0, again.stderr
        report = json.loads((out / "report.json").read_text())
        steps = [entry["step"] for entry in report["history"] if entry["stage"] == "2-distil"]
        assert steps == list(range(1, len(steps) + 1))  # one unbroken run
        assert AutoModelForCausalLM.from_pretrained(out).config.fla_swap
        assert not (out / "training").exists()

    def test_resuming_with_other_settings(self, convert, tmp_path, monkeypatch):
        def stop(*arguments, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(conversion, "save", stop)
        assert convert().status != 0
        ended = convert(resume=True, mixer="gated_deltanet")
        assert ended.status == 1 and "was started with other settings" in ended.error
        assert (tmp_path / "out" / "training" / "run.json").exists()


def test_the_errors_are_one_family():
    for kind in (CheckpointError, ConfigError, DataError, NoAttentionFound, PlanError, TrainingError):
        assert issubclass(kind, fs.FlaSwapError)
