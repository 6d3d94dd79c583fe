"""`fs.convert`: what it reports, what it leaves behind, and what a resumed conversion gives."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from saved import byte_tokenizer, llama, save_teacher, save_text

import fla_swap as fs
from fla_swap import conversion
from fla_swap.conversion import Conversion, Listener, check_vocabulary, held_out_blocks, pick_dtype, recipe
from fla_swap.distillation import StageConfig
from fla_swap.errors import CheckpointError, ConfigError, DataError
from fla_swap.output import check_output, make_room, settings_of
from fla_swap.planning import load_plan, save_plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("conversion") / "teacher")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return save_text(tmp_path_factory.mktemp("conversion") / "text")


@pytest.fixture
def by_steps(monkeypatch):
    """Stages that end by steps and not by the clock, so that two runs are the same."""
    stages = (
        StageConfig(kind="align", steps=6, batch_size=4, learning_rate=3e-3),
        StageConfig(kind="distil", steps=8, batch_size=4, train="all", learning_rate=2e-3, rest_learning_rate=3e-4),
    )
    monkeypatch.setattr(conversion, "recipe", lambda *arguments: stages)


def settings(text: Path, **changed) -> fs.ConvertConfig:
    small = {"mixer": "gla", "data": str(text), "block_size": 64, "eval_tokens": 512, "compile": False}
    return fs.ConvertConfig(**{**small, "device": "cpu", "select": "uniform", **changed})


def test_an_interrupted_conversion_goes_on_as_if_nothing_had_happened(teacher, text, tmp_path, by_steps):
    config = settings(text)
    whole = fs.convert(teacher, tmp_path / "whole", config)

    class PowerCut(Exception):
        pass

    class Cut(Listener):
        def __init__(self):
            super().__init__()
            self.progress = self.stop

        def stop(self, event):
            if event.stage == "2-distil" and event.step == 4:
                raise PowerCut

    out = tmp_path / "cut"
    with pytest.raises(PowerCut):
        fs.convert(teacher, out, config, listener=Cut())
    assert (out / "training").is_dir() and not (out / "config.json").exists()
    with pytest.raises(CheckpointError, match="interrupted conversion: --resume continues it"):
        fs.convert(teacher, out, config)
    resumed = fs.convert(teacher, out, config, resume=True)
    assert resumed["losses"] == whole["losses"]
    assert resumed["layer_errors"] == whole["layer_errors"]
    one, other = (fs.load(folder).state_dict() for folder in (tmp_path / "whole", out))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_report_says_what_was_done(teacher, text, tmp_path, by_steps):
    heard: list[str] = []
    events: list[str] = []
    listener = Listener(
        say=heard.append,
        found=lambda report: events.append(f"{len(report.sites)} sites"),
        planned=lambda plan: events.append(f"{len(plan.layers)} swapped"),
        progress=lambda event: events.append(event.stage),
    )
    config = settings(text, select="greedy", prompt="line 3", new_tokens=5)
    report = fs.convert(teacher, tmp_path / "out", config, listener=listener)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(dict.fromkeys(events)) == ["4 sites", "3 swapped", "1-align", "2-distil"]
    assert any("training tokens" in line for line in heard) and any("kept: layer" in line for line in heard)
    assert report["config"] == {**dataclasses.asdict(config), "options": {}}
    assert report["tokens"] == (6 + 8) * 4 * 64
    assert report["kept"] == [f"model.layers.{report['selection']['kept'][0]}.self_attn"]
    assert report["perplexities"]["teacher"] == pytest.approx(torch.tensor(report["losses"]["teacher"]).exp().item())
    assert set(report["texts"]) == {"prompt", "teacher", "student"}
    again = fs.load(tmp_path / "out")
    tokens = byte_tokenizer()("line 3", return_tensors="pt")["input_ids"]
    generated = again.generate(tokens, max_new_tokens=5, do_sample=False)[0, tokens.shape[1] :]
    assert report["texts"]["student"] == byte_tokenizer().decode(generated, skip_special_tokens=True)
    assert set(report["seconds"]) >= {"load", "text", "inspect", "select", "distil", "save"}


def test_blocks_are_no_longer_than_the_models_positions(tmp_path, text, by_steps):
    model = llama(layers=2, max_position_embeddings=48)
    model.save_pretrained(tmp_path / "short")
    byte_tokenizer().save_pretrained(tmp_path / "short")
    report = fs.convert(tmp_path / "short", tmp_path / "out", settings(text, block_size=None, keep="1/2"))
    assert report["tokens"] == (6 + 8) * 4 * 48


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_recipe_shares_the_minutes(device):
    align, distil = recipe(9.0, torch.device(device))
    assert (align.kind, align.train, distil.kind, distil.train) == ("align", "mixers", "distil", "all")
    assert align.minutes is not None and distil.minutes is not None
    assert align.minutes + distil.minutes == pytest.approx(9.0) and align.minutes <= distil.minutes
    assert [stage.batch_size for stage in recipe(9.0, torch.device(device), 3)] == [3, 3]


def test_dtypes_by_device():
    assert pick_dtype("auto", CPU) == torch.float32 and pick_dtype("auto", torch.device("cuda")) is None
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype is 'int4'; it must be one of"):
        pick_dtype("int4", CPU)


def test_held_out_blocks_are_spread_over_what_there_is(tmp_path):
    for i in range(200):
        (tmp_path / f"{i:03}.txt").write_text(f"{i:03}" * 40)
    everything = held_out_blocks(str(tmp_path), byte_tokenizer(), 32, 10**6)
    some = held_out_blocks(str(tmp_path), byte_tokenizer(), 32, 4 * 32)
    assert some.shape == (4, 32) and everything.shape[0] > 20
    assert torch.equal(some[0], everything[0]) and torch.equal(some[-1], everything[-1])


def test_a_vocabulary_that_does_not_fit():
    model, tokenizer = llama(layers=1), byte_tokenizer()
    check_vocabulary(model, tokenizer, torch.tensor([0, 257]), "it")
    with pytest.raises(DataError, match="gives token 258, but the model has 258 embeddings"):
        check_vocabulary(model, tokenizer, torch.tensor([0, 258]), "it")


def test_what_an_output_folder_may_hold(tmp_path):
    check_output(tmp_path / "new", resume=False, overwrite=False)
    (tmp_path / "notes.txt").write_text("kept")
    check_output(tmp_path, resume=False, overwrite=False)
    (tmp_path / "config.json").write_text("{}")
    check_output(tmp_path, resume=False, overwrite=True)
    for resume, message in ((False, "holds a model already"), (True, "nothing to resume")):
        with pytest.raises(CheckpointError, match=message):
            check_output(tmp_path, resume=resume, overwrite=False)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        check_output(tmp_path / "mistyped", resume=True, overwrite=True)


def test_a_training_folder_of_someone_else_is_not_touched(tmp_path):
    (tmp_path / "training").mkdir()
    check_output(tmp_path, resume=False, overwrite=True)
    (tmp_path / "training" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is no run of ours"):
        check_output(tmp_path, resume=False, overwrite=True)
    make_room(tmp_path, None, resume=False, overwrite=True)
    assert (tmp_path / "training" / "notes.txt").read_text() == "mine"
    (tmp_path / "training" / "run.json").write_text("{}")
    make_room(tmp_path, None, resume=False, overwrite=True)
    assert not (tmp_path / "training").exists()


def test_folders_that_a_model_cannot_replace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (Path("."), tmp_path, Path("sub/..")):
        with pytest.raises(CheckpointError, match=r"is the current folder.*choose a folder inside it"):
            check_output(out, resume=False, overwrite=True)
    with pytest.raises(CheckpointError, match="is a mount point"):
        check_output(Path("/"), resume=False, overwrite=True)
    monkeypatch.setattr("fla_swap.output.os.access", lambda *arguments: False)
    with pytest.raises(CheckpointError, match=f"{tmp_path} is no folder that may be written to"):
        check_output(tmp_path / "new" / "out", resume=False, overwrite=False)


def test_a_share_of_layers_is_selected_and_named_layers_are_not(teacher, text):
    model = fs.load(teacher)
    report = fs.inspect(model)
    blocks = torch.randint(2, 258, (80, 64), generator=torch.Generator().manual_seed(0))
    for keep, selects in (("1/4", True), (Fraction(1, 4), True), (0.25, True), ("0,1", False), ([0, 1], False)):
        job = Conversion("teacher", Path("out"), settings(text, keep=keep, select="greedy"), Listener())
        chosen = job.plan(model, report, blocks, resume=False)
        assert (job.selection is not None) == selects
        if not selects:
            assert [layer.site.layer for layer in chosen.layers] == [2, 3]
        json.dumps(settings_of(job.config))


def test_a_resumed_conversion_keeps_the_plan_that_was_selected(teacher, text, tmp_path, by_steps, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    config, out = settings(text, select="greedy"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            fs.convert(teacher, out, config)
    selected = load_plan(out / "training-plan.json")
    monkeypatch.setattr(conversion, "select_layers", stop)
    with pytest.raises(ConfigError, match="was started with other settings"):
        fs.convert(teacher, out, settings(text, select="greedy", keep="1/2"), resume=True)
    report = fs.convert(teacher, out, config, resume=True)
    assert report["kept"] == list(selected.kept)
    assert not (out / "training").exists() and not (out / "training-plan.json").exists()


def test_a_failed_reload_keeps_the_training(teacher, text, tmp_path, by_steps, monkeypatch):
    def differs(*arguments):
        raise CheckpointError("differs")

    monkeypatch.setattr(Conversion, "check_reload", differs)
    with pytest.raises(CheckpointError, match="differs"):
        fs.convert(teacher, tmp_path / "out", settings(text))
    assert (tmp_path / "out" / "training" / "run.json").exists()


def test_a_given_plan_is_used_and_says_everything(teacher, text, tmp_path, by_steps):
    file = tmp_path / "plan.json"
    save_plan(fs.plan(fs.inspect(fs.load(teacher)), mixer="gla", keep=[0, 2]), file)
    quick = {"data": str(text), "block_size": 64, "eval_tokens": 512, "device": "cpu"}
    report = fs.convert(teacher, tmp_path / "out", fs.ConvertConfig(plan=file, **quick))
    assert report["swapped"] == ["model.layers.1.self_attn: gla", "model.layers.3.self_attn: gla"]
    assert report["selection"] is None and report["config"]["plan"] == str(file)
    with pytest.raises(ConfigError, match="leave out mixer, keep"):
        fs.ConvertConfig(plan=file, mixer="gla", keep=0)


def test_no_compiler_is_an_error_before_any_work(teacher, text, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler.*--no-compile"):
        fs.convert(teacher, tmp_path / "out", settings(text, compile=True, prompt="line"))
    assert not (tmp_path / "out").exists()
