"""Stages: schedules, time budgets, stopping and going on bitwise, and what bad luck leaves behind."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import signal
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from small_models import llama, site, swapped_llama, text
from transformers import LlamaForCausalLM, TrainerCallback, TrainerControl, TrainerState

from fla_swap.distillation import DistillConfig, StageConfig, distill, held_out_loss
from fla_swap.distillation.trainer import Schedule, StageCallback
from fla_swap.errors import DataError, TrainingError
from fla_swap.swapping import original_attention, restore_, swap_
from fla_swap.types import LayerPlan, SwapPlan

ALIGN = StageConfig(kind="align", steps=4, batch_size=4, learning_rate=1e-2)
DISTIL = StageConfig(kind="distil", steps=8, batch_size=4, train="all", learning_rate=1e-2, rest_learning_rate=1e-3)


def config(*stages: StageConfig, **options) -> DistillConfig:
    given = {"calibrate": None, "stages": stages or (ALIGN, DISTIL), "device": "cpu", "precision": "float32"}
    return DistillConfig(**{**given, **options})


def losses(result):
    return [(h["stage"], h["step"], h["loss"]) for h in result.history]


class At(TrainerCallback):
    """Do something at the end of one step of one stage (told apart by its number of steps)."""

    def __init__(self, step: int, steps: int, action):
        self.step, self.steps, self.action = step, steps, action

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step and args.max_steps == self.steps:
            self.action(model)


def press_ctrl_c(model):
    os.kill(os.getpid(), signal.SIGINT)


def poison(model):
    with torch.no_grad():
        model.model.model.norm.weight.fill_(float("nan"))


# ---- learning rate and time


def test_the_learning_rate_rises_then_falls_to_its_floor_by_steps():
    schedule = Schedule(steps=100, seconds=None, warmup=0.1, final=0.1)
    factors = [schedule(step) for step in range(101)]
    assert factors[5] == pytest.approx(0.5, rel=0.02)
    assert max(factors) == factors[10] > 0.97
    assert factors[50] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)


def test_the_learning_rate_falls_by_whichever_of_steps_and_time_is_further():
    schedule = Schedule(steps=100, seconds=50.0, warmup=0.0, final=0.0)
    schedule.elapsed = 25.0
    assert schedule.fraction(10) == 0.5
    assert schedule.fraction(80) == 0.8
    schedule.elapsed = 60.0
    assert schedule(10) == pytest.approx(0.0)


def test_a_time_budget_ends_the_stage_with_a_decayed_learning_rate(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(Schedule, "now", staticmethod(lambda: float(next(clock))))
    stage = StageConfig(kind="align", minutes=0.5, batch_size=4, learning_rate=1e-2, final=0.05)
    result = distill(swapped_llama(), text(), config(stage, save_minutes=None))
    last = result.history[-1]
    assert 30 <= last["seconds"] < 33
    assert last["step"] < 32
    assert last["learning_rate"] < 0.08 * 1e-2


def test_ranks_whose_clocks_differ_save_at_the_same_steps(monkeypatch):
    agreed = []  # the later rank's clock, which wins

    def saves(seconds_a_step, all_reduce):
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        clock = itertools.count(0, seconds_a_step)
        schedule = Schedule(steps=100, seconds=None, warmup=0.0, final=0.0)
        schedule.now = lambda: float(next(clock))
        callback = StageCallback("1-align", schedule, config(output_dir="unused", save_minutes=0.1), 1, [])
        args = SimpleNamespace(world_size=2, device=torch.device("cpu"))
        callback.on_train_begin(args, TrainerState(), TrainerControl())
        steps = []
        for step in range(1, 31):
            control = TrainerControl()
            callback.on_optimizer_step(args, TrainerState(global_step=step), control)
            callback.on_step_end(args, TrainerState(global_step=step), control)
            steps += [step] if control.should_save else []
        return steps

    later = saves(2, lambda facts, op: agreed.append(facts.clone()))
    earlier = saves(1, lambda facts, op: torch.maximum(facts, agreed.pop(0), out=facts))
    assert later == earlier == list(range(3, 31, 3))


def test_mixers_and_the_rest_have_their_own_learning_rates():
    seen = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {id(p): n for n, p in model.named_parameters()}
            for group in optimizer.param_groups:
                seen.update({names[id(p)]: group["initial_lr"] for p in group["params"]})

    distill(swapped_llama(), text(), config(DISTIL), callbacks=[Look()])
    assert {lr for n, lr in seen.items() if ".mixer." in n} == {1e-2}
    assert {lr for n, lr in seen.items() if ".mixer." not in n} == {1e-3}
    assert len(seen) == len(list(swapped_llama().parameters()))


# ---- what distillation achieves and leaves alone


def test_distillation_brings_the_student_to_the_teacher_and_the_teacher_stays_what_it_was():
    model, held_out = swapped_llama(), text(rows=16, seed=9)
    calls = []
    stage = StageConfig(kind="distil", steps=60, batch_size=8, train="all", learning_rate=1e-2, rest_learning_rate=1e-3)
    result = distill(model, text(rows=256), config(stage), eval_blocks=held_out, progress=calls.append)
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.losses["teacher"] == pytest.approx(held_out_loss(llama(), held_out), rel=1e-6)
    assert calls[-1].fraction == 1.0 and calls[-1].tokens == 60 * 8 * 32 and calls[-1].tokens_per_second > 0
    assert not model.training


def test_the_teacher_of_the_kl_does_not_drift_while_the_student_trains(monkeypatch):
    import fla_swap.distillation.run as run

    teachers = []
    monkeypatch.setattr(run, "copy_original", lambda m, make=run.copy_original: teachers.append(make(m)) or teachers[0])
    distill(swapped_llama(), text(), config(DISTIL))
    plain, ids = llama(), text(rows=2)
    with torch.no_grad():
        torch.testing.assert_close(teachers[0](input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=0)


def test_training_mixers_only_needs_no_second_model_and_learns_the_same_target(monkeypatch):
    import fla_swap.distillation.run as run

    monkeypatch.setattr(run, "copy_original", lambda model: pytest.fail("no copy is needed"))
    stage = StageConfig(kind="distil", steps=40, batch_size=8, learning_rate=1e-2)
    model = swapped_llama()
    frozen = model.model.layers[1].mlp.up_proj.weight.clone()
    result = distill(model, text(rows=256), config(stage))
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, frozen)


def test_a_second_run_does_not_take_the_trained_weights_for_the_original():
    model = swapped_llama()
    distill(model, text(), config(DISTIL))
    with pytest.raises(TrainingError, match="its original is no teacher any more"):
        distill(model, text(), config(DISTIL))
    distill(model, text(), config(DISTIL), teacher=llama())


def test_bfloat16_weights_train_in_float32_and_come_back_in_bfloat16():
    model = swapped_llama().bfloat16()
    result = distill(model, text(), config(ALIGN))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_the_originals_of_a_bfloat16_model_come_back_in_bfloat16_too(tmp_path):
    llama().save_pretrained(tmp_path)
    # Loaded, not cast: the rotary frequencies stay float32, so the model's tensors have two dtypes.
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = text(rows=2)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    swap_(model, SwapPlan(layers=tuple(LayerPlan(site=site(i), mixer="gated_deltanet") for i in (0, 2))))
    distill(model, text(), config(ALIGN))
    with torch.no_grad(), original_attention(model):
        assert torch.equal(model(input_ids=ids).logits, before)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(restore_(model)(input_ids=ids).logits, before)


# ---- stopping and going on


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_interrupted_run_goes_on_with_bitwise_the_same_losses(tmp_path, precision):
    whole = distill(swapped_llama(), text(), config(output_dir=tmp_path / "whole", precision=precision))
    stopped = config(output_dir=tmp_path / "stopped", precision=precision)
    with pytest.raises(TrainingError, match=r"interrupted at step 3 of stage 2-distil; resume=True .*checkpoint-3"):
        distill(swapped_llama(), text(), stopped, callbacks=[At(3, 8, press_ctrl_c)])
    resumed = distill(swapped_llama(), text(), dataclasses.replace(stopped, resume=True))
    assert losses(resumed) == losses(whole)
    assert losses(resumed)[-1][:2] == ("2-distil", 8)
    assert json.loads((tmp_path / "stopped" / "history.json").read_text())[-1]["loss"] == resumed.history[-1]["loss"]
    assert resumed.tokens == whole.tokens == 12 * 4 * 32


def test_a_finished_run_resumed_gives_its_weights_and_trains_nothing(tmp_path):
    done = distill(swapped_llama(), text(), config(output_dir=tmp_path))
    again = swapped_llama()
    result = distill(again, text(), config(output_dir=tmp_path, resume=True), callbacks=[At(1, 8, press_ctrl_c)])
    assert losses(result) == losses(done)
    for name, tensor in done.model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with pytest.raises(TrainingError, match="its original is no teacher any more"):
        distill(again, text(), config(DISTIL))


def test_an_earlier_run_is_not_overwritten_and_changed_settings_are_named(tmp_path):
    distill(swapped_llama(), text(), config(ALIGN, output_dir=tmp_path))
    with pytest.raises(TrainingError, match="holds an earlier run"):
        distill(swapped_llama(), text(), config(ALIGN, output_dir=tmp_path))
    with pytest.raises(TrainingError, match=r"config\.seed: 0 → 7"):
        distill(swapped_llama(), text(), config(ALIGN, output_dir=tmp_path, resume=True, seed=7))
    with pytest.raises(TrainingError, match="original_weights"):
        distill(swapped_llama(seed=3), text(), config(ALIGN, output_dir=tmp_path, resume=True))
    with pytest.raises(TrainingError, match=r"data\.digest"):
        distill(swapped_llama(), text(seed=2), config(ALIGN, output_dir=tmp_path, resume=True))
    with pytest.raises(TrainingError, match=r"data\.blocks\[0\]: 64 → 63"):
        distill(swapped_llama(), text()[1:], config(ALIGN, output_dir=tmp_path, resume=True))
    options = {"negative_eigenvalues": True}
    layers = tuple(LayerPlan(site=site(i), mixer="gated_deltanet", options=options) for i in (0, 2))
    with pytest.raises(TrainingError, match=r"self_attn\.options\.negative_eigenvalues: False → True"):
        distill(swap_(llama(), SwapPlan(layers=layers)), text(), config(ALIGN, output_dir=tmp_path, resume=True))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match="not empty"):
        distill(swapped_llama(), text(), config(ALIGN, output_dir=tmp_path / "other"))


def test_a_source_is_read_once_and_must_stay_the_same_text(tmp_path):
    class Letters:
        eos_token_id = 0

        def __call__(self, batch, **kwargs):
            return {"input_ids": [[1 + ord(letter) % 60 for letter in document] for document in batch]}

    file, options = tmp_path / "text.jsonl", {"output_dir": tmp_path / "run"}
    file.write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(60)))
    short = dataclasses.replace(ALIGN, block_size=32)
    distill(swapped_llama(), str(file), config(short, **options), tokenizer=Letters())
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert facts["source"] == str(file) and facts["blocks"][1] == 32
    distill(swapped_llama(), str(file), config(short, **options, resume=True), tokenizer=Letters())
    file.write_text(file.read_text().replace("document", "Document"))
    with pytest.raises(TrainingError, match=r"data\.(blocks|digest)"):
        distill(swapped_llama(), str(file), config(short, **options, resume=True), tokenizer=Letters())


# ---- bad luck


def test_a_loss_that_is_not_finite_names_its_step_and_the_checkpoint_before_it(tmp_path):
    broken = config(DISTIL, output_dir=tmp_path, save_steps=2)
    with pytest.raises(TrainingError, match=r"loss of step 6 is nan.*last good checkpoint is .*checkpoint-4"):
        distill(swapped_llama(), text(), broken, callbacks=[At(6, 8, poison)])
    assert sorted(p.name for p in (tmp_path / "1-distil").iterdir()) == ["checkpoint-4"]
    resumed = distill(swapped_llama(), text(), config(DISTIL, output_dir=tmp_path, save_steps=2, resume=True))
    assert [h["step"] for h in resumed.history] == list(range(1, 9))


@pytest.mark.parametrize("save", [3, 8])
def test_weights_that_are_not_finite_are_never_saved_though_the_loss_is(tmp_path, save):
    class BadGradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == 8:
                for parameter in model.parameters():
                    parameter.grad.fill_(float("nan"))

    options = {"output_dir": tmp_path, "save_steps": save}
    kept = "last good checkpoint is .*checkpoint-6" if save == 3 else "no checkpoint of this stage"
    with pytest.raises(
        TrainingError, match=rf"after step 8 of stage 1-distil, .*embed_tokens.weight, .* more; .*{kept}"
    ):
        distill(swapped_llama(), text(), config(DISTIL, **options), callbacks=[BadGradient()])
    assert not list(tmp_path.glob("1-distil/*.json")) and not list(tmp_path.glob("1-distil/checkpoint-8"))
    resumed = distill(swapped_llama(), text(), config(DISTIL, **options, resume=True))
    assert all(torch.isfinite(p).all() for p in resumed.model.parameters())


def test_a_model_that_is_given_with_nan_weights_is_refused_by_name():
    model = swapped_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    message = r"before distillation, weights of .*Llama.* are not finite: model\.layers\.1\.mlp\.up_proj\.weight;"
    with pytest.raises(TrainingError, match=message):
        distill(model, text(), config(ALIGN))


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(tmp_path, monkeypatch):
    write, calls = safetensors.torch.save_file, []

    def full(*args, **kwargs):
        calls.append(args[1])
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kwargs)

    stage = StageConfig(kind="align", steps=8, batch_size=4)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    options = {"output_dir": tmp_path, "save_steps": 3}
    # The first file is the end of calibration's (empty) stage, the second checkpoint-3's.
    with pytest.raises(TrainingError, match=r"the disk is full: .*checkpoint-3 .*no checkpoint of this stage"):
        distill(swapped_llama(), text(), config(stage, **options))
    assert not list((tmp_path / "1-align").glob("*"))
    resumed = distill(swapped_llama(), text(), config(stage, **options, resume=True))
    assert resumed.history[-1]["step"] == 8


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(DataError, match="3 blocks of 32 tokens, not one batch of 4"):
        distill(swapped_llama(), text(rows=3), config(ALIGN))
    with pytest.raises(DataError, match="give the tokenizer"):
        distill(swapped_llama(), "stdlib", config(ALIGN))


def test_stages_may_read_the_text_in_blocks_of_their_own_length():
    stage = StageConfig(kind="distil", steps=2, batch_size=2, block_size=128)
    result = distill(swapped_llama(), text(), config(stage))
    assert result.history[-1]["tokens"] == 2 * 2 * 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dream", "steps": 1}, "stage kind is 'dream'"),
        ({"kind": "align"}, "needs steps or minutes"),
        ({"kind": "align", "steps": 1, "train": "all"}, "alignment trains mixers only"),
        ({"kind": "align", "steps": 1, "gradient_checkpointing": True}, "no effect in alignment"),
        ({"kind": "distil", "steps": 1, "kl_weight": 0.0}, "nothing to learn from"),
    ],
)
def test_stages_that_make_no_sense_are_refused_when_built(options, message):
    with pytest.raises(TrainingError, match=message):
        StageConfig(**options)


def test_alignment_after_everything_was_trained_is_refused():
    with pytest.raises(TrainingError, match="stage 1 aligns to the original layers after"):
        config(DISTIL, ALIGN)
