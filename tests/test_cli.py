"""The commands of `fla-swap`: their options, and what each does with a small model."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from console import fla_swap
from saved import save_teacher, save_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from fla_swap.cli import app, read_keep, read_options
from fla_swap.errors import CheckpointError
from fla_swap.planning import load_plan

COMMANDS = {
    "inspect": "model --html --explain --json",
    "plan": "model --mixer --options --keep --local --out --json",
    "convert": "model --out --data --mixer --options --keep --local --plan --minutes --start --select --block-size "
    "--batch-size --max-tokens --eval-tokens --prompt --device --dtype --seed --compile/--no-compile --resume "
    "--overwrite --json",
    "demo": "--out --model --data --minutes --device --seed --compile/--no-compile --resume --overwrite",
    "distill": "model --out --teacher --data --minutes --block-size --batch-size --learning-rate "
    "--rest-learning-rate --max-tokens --device --seed --resume --overwrite",
    "generate": "model --prompt --new-tokens --temperature --top-p --compile/--no-compile --device --dtype --seed",
    "package": "model --out --rows --context --device --dtype",
    "eval": "models --data --block-size --eval-tokens --device --dtype --json",
    "serve": "model --host --port --slots --tokens --waiting --max-body --grace --compile/--no-compile --device "
    "--dtype",
    "bench": "",
}


def test_commands_and_options_are_these():
    found = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        options = []
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                options.append(parameter.name)
            elif parameter.name != "help":
                options.append("/".join((*parameter.opts, *parameter.secondary_opts)))
            assert parameter.param_type_name == "argument" or parameter.help, (name, parameter.name)
        found[name] = " ".join(options)
        assert command.help
    assert found == COMMANDS


def test_how_keep_and_options_are_read():
    assert read_keep("1/4") == "1/4" and read_keep("0") == 0 and read_keep("0,7") == [0, 7] and read_keep("3,") == [3]
    assert read_options('{"window": 8}') == {"window": 8}
    for read, text in ((read_keep, "0,x"), (read_options, "{"), (read_options, "[1]")):
        with pytest.raises(typer.BadParameter):
            read(text)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_teacher(folder / "teacher")
    save_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def converted(places) -> Path:
    """What `fla-swap convert` makes in three seconds of training."""
    with pytest.MonkeyPatch.context() as patch, CapturedOutput() as captured:
        ended = fla_swap(
            captured, patch, "convert", places / "teacher", "--data", places / "text", "--out", places / "student",
            "--mixer", "gla", "--keep", "1/4", "--minutes", "0.05", "--block-size", "64", "--batch-size", "4",
            "--eval-tokens", "1024", "--json",
        )  # fmt: skip
    assert ended.status == 0, ended.err
    (places / "said.json").write_text(ended.out)
    return places / "student"


class CapturedOutput:
    """capsys, for a fixture that lives longer than a test."""

    def __enter__(self):
        import contextlib
        import io

        self.streams = io.StringIO(), io.StringIO()
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(contextlib.redirect_stdout(self.streams[0]))
        self.stack.enter_context(contextlib.redirect_stderr(self.streams[1]))
        return self

    def __exit__(self, *error):
        self.stack.close()

    def readouterr(self):
        import types

        return types.SimpleNamespace(out=self.streams[0].getvalue(), err=self.streams[1].getvalue())


def test_inspect(places, capsys, monkeypatch):
    ended = fla_swap(capsys, monkeypatch, "inspect", places / "teacher", "--json")
    report = json.loads(ended.out)
    assert ended.status == 0 and len(report["sites"]) == 4 and report["near_misses"] == []
    assert all(site["proved"] and site["heads"] == 2 and site["mask"]["kind"] == "causal" for site in report["sites"])
    table = fla_swap(capsys, monkeypatch, "inspect", places / "teacher").out
    assert "model.layers.3.self_attn" in table


def test_inspect_writes_a_page_and_explains_a_layer(places, tmp_path, capsys, monkeypatch):
    page = tmp_path / "report.html"
    options = ("--html", page, "--explain", "model.layers.2")
    ended = fla_swap(capsys, monkeypatch, "inspect", places / "teacher", *options)
    assert ended.out.startswith("model.layers.2.self_attn: attention layer 2, proved\n") and "layers.1" not in ended.out
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and "model.layers.3.self_attn.q_proj.weight" in text
    ended = fla_swap(capsys, monkeypatch, "inspect", places / "teacher", "--explain", "model.layer.9")
    assert ended.status == 1 and "names near it: ['model.layers." in ended.error
    ended = fla_swap(capsys, monkeypatch, "inspect", places / "teacher", "--html", tmp_path / "no" / "report.html")
    assert ended.status == 1 and "report.html" in ended.error


def test_nothing_but_the_answer_is_printed(places):
    """No bars and no notes of other libraries; seen from outside, since importing them is what prints."""
    command = [sys.executable, "-c", "from fla_swap.cli import main; main()", "inspect", str(places / "teacher")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and len(json.loads(done.stdout)["sites"]) == 4


def test_a_warning_that_matters_is_not_hidden(places, tmp_path, capsys, monkeypatch, caplog):
    fla_swap(capsys, monkeypatch, "plan", "--help")
    logging.getLogger("torchao").warning("something else")
    logging.getLogger("torchao").warning("Failed to load /a/library.so: it is for another chip")
    assert caplog.messages == ["something else"]


def test_help_answers_without_loading_models(capsys):
    code = "import sys; from fla_swap.cli import app; app(['plan', '--help'], standalone_mode=False)\n"
    code += "print([m for m in ('transformers.modeling_utils', 'torchao', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "--keep" in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_plan(places, tmp_path, capsys, monkeypatch):
    file = tmp_path / "plan.json"
    options = ("--mixer", "window", "--options", '{"window": 32}', "--keep", "0,3", "--out", file, "--json")
    ended = fla_swap(capsys, monkeypatch, "plan", places / "teacher", *options)
    said, saved = json.loads(ended.out), load_plan(file)
    assert (
        [layer["site"]["layer"] for layer in said["layers"]] == [layer.site.layer for layer in saved.layers] == [1, 2]
    )
    assert {layer.mixer for layer in saved.layers} == {"window"} and saved.layers[0].options["window"] == 32
    assert saved.kept == ("model.layers.0.self_attn", "model.layers.3.self_attn")


def test_convert_writes_a_model_a_report_and_a_picture(converted):
    report = json.loads((converted / "report.json").read_text())
    assert json.loads((converted.parent / "said.json").read_text()) == report
    assert report["swapped"] and len(report["kept"]) == 1 and report["selection"]["kept"]
    losses = report["losses"]
    assert list(losses) == ["teacher", "start", "0-calibrate", "1-align", "2-distil", "student"]
    assert losses["student"] < losses["start"] - 0.05
    assert report["delta"] == losses["student"] - losses["teacher"] and report["reload"] == {"bitwise_equal": True}
    assert (converted / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not (converted / "training").exists()
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.config.fla_swap["base_model_type"] == "llama"
    assert AutoTokenizer.from_pretrained(converted).eos_token == "<|end|>"


def test_generate(converted, capsys, monkeypatch):
    greedy = [
        fla_swap(capsys, monkeypatch, "generate", converted, "--prompt", "line 1 of", "--new-tokens", "12")
        for _ in range(2)
    ]
    assert greedy[0].status == 0 and greedy[0].out == greedy[1].out and greedy[0].out.startswith("line 1 of")
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = tokenizer("line 1 of", return_tensors="pt")["input_ids"]
    expected = AutoModelForCausalLM.from_pretrained(converted).generate(ids, max_new_tokens=12, do_sample=False)
    assert greedy[0].out.strip("\n") == tokenizer.decode(expected[0]).strip("\n")
    hot = ("--temperature", "3", "--new-tokens", "12", "--prompt", "line", "--seed")
    one, other, again = (fla_swap(capsys, monkeypatch, "generate", converted, *hot, s).out for s in (0, 1, 0))
    assert one == again != other


def test_eval(converted, capsys, monkeypatch):
    teacher = converted.parent / "teacher"
    sizes = ("--data", converted.parent / "text", "--block-size", "64", "--eval-tokens", "1024", "--json")
    losses = json.loads(fla_swap(capsys, monkeypatch, "eval", teacher, converted, *sizes).out)
    report = json.loads((converted / "report.json").read_text())
    assert losses[str(teacher)] == pytest.approx(report["losses"]["teacher"], abs=1e-5)
    assert losses[str(converted)] == pytest.approx(report["losses"]["student"], abs=1e-5)


def test_distill_trains_a_converted_model_further(converted, tmp_path, capsys, monkeypatch):
    places = converted.parent
    out = tmp_path / "further"
    ended = fla_swap(
        capsys, monkeypatch, "distill", converted, "--teacher", places / "teacher", "--data", places / "text",
        "--out", out, "--minutes", "0.03", "--block-size", "64", "--batch-size", "4",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (converted, out))
    assert after.config.fla_swap == before.config.fla_swap and not (out / "training").exists()
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
    sizes = ("--data", places / "text", "--block-size", "64", "--eval-tokens", "1024", "--json")
    losses = list(json.loads(fla_swap(capsys, monkeypatch, "eval", converted, out, *sizes).out).values())
    assert losses[1] < losses[0] + 0.05


class TestDemo:
    """The command around `convert`: what it asks for in which folder. The job itself is `make demo`."""

    @pytest.fixture
    def asked(self, places, capsys, monkeypatch):
        """Run `fla-swap demo` up to the checks of the folder; says what it ended with."""
        from fla_swap import conversion

        def load(job):
            raise CheckpointError("the folder was accepted")

        monkeypatch.setattr(conversion.Conversion, "load", load)
        words = ("demo", "--data", places / "text", "--no-compile", "--model", places / "teacher", "--out")
        return lambda out, *more: fla_swap(capsys, monkeypatch, *words, out, *more).error

    def test_only_an_earlier_demo_makes_room_by_itself(self, places, asked, tmp_path):
        accepted = "the folder was accepted"
        assert accepted in asked(tmp_path / "new")
        out = tmp_path / "out"
        out.mkdir()
        (out / "config.json").write_text('{"model_type": "llama"}')
        refusal = asked(out)
        assert "holds a model already" in refusal and "--overwrite" in refusal
        assert accepted in asked(out, "--overwrite")
        (out / "config.json").write_text('{"model_type": "fla_swap"}')
        (out / "report.json").write_text('{"model": "another"}')
        assert "holds a model already" in asked(out)
        (out / "report.json").write_text(json.dumps({"model": str(places / "teacher")}))
        assert accepted in asked(out)

    def test_an_interrupted_demo_is_resumed_or_started_again_only_when_told(self, places, asked, tmp_path):
        (tmp_path / "training").mkdir()
        (tmp_path / "training" / "run.json").write_text("{}")
        (tmp_path / "config.json").write_text('{"model_type": "fla_swap"}')
        (tmp_path / "report.json").write_text(json.dumps({"model": str(places / "teacher")}))
        refusal = asked(tmp_path)
        assert "--resume continues it, --overwrite starts again" in refusal
        for option in ("--resume", "--overwrite"):
            assert "the folder was accepted" in asked(tmp_path, option)
        assert (tmp_path / "training" / "run.json").exists()
        assert "nothing to resume" in asked(tmp_path / "mistyped", "--resume")

    def test_without_the_shipped_teacher_it_asks_for_a_model(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setattr("fla_swap.cli.TEACHER", Path("/nowhere/teacher"))
        ended = fla_swap(capsys, monkeypatch, "demo", "--model", "/nowhere/teacher", "--out", tmp_path / "out")
        assert ended.status == 1 and "pass --model" in ended.error


def test_a_plan_and_what_it_stands_for_exclude_each_other(places, tmp_path, capsys, monkeypatch):
    words = ("convert", places / "teacher", "--data", places / "text", "--out", tmp_path / "out", "--plan", "p.json")
    ended = fla_swap(capsys, monkeypatch, *words, "--mixer", "gated_deltanet", "--keep", "0")
    assert ended.status == 2 and "leave out --mixer, --keep" in " ".join(ended.err.replace("│", " ").split())
    ended = fla_swap(capsys, monkeypatch, *words)
    assert ended.status == 1 and "PlanError: p.json: cannot read the plan" in ended.error
