"""The verb: calibrate, align, distil, with everything in place to stop and go on."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fla_swap.distillation.alignment import Alignment, Objective, layers_of
from fla_swap.distillation.calibration import Calibrated, LayerCalibration, calibrate
from fla_swap.distillation.config import CalibrationConfig, DistillConfig, StageConfig
from fla_swap.distillation.contexts import checkpointed_gradients, full_precision, stopping_at_ctrl_c, unchanged_flags
from fla_swap.distillation.data import TokenBlocks, load_blocks
from fla_swap.distillation.evaluation import LayerError, as_blocks, held_out_loss, layer_errors
from fla_swap.distillation.folder import RunFolder, digest
from fla_swap.distillation.progress import Progress, default_progress
from fla_swap.distillation.teacher import Distillation, Teacher, copy_original
from fla_swap.distillation.trainer import (
    Schedule,
    StageCallback,
    StageTrainer,
    check_finite,
    last_checkpoint,
    training_arguments,
)
from fla_swap.errors import DataError, TrainingError
from fla_swap.swapping import original_attention, swapped_layers

logger = logging.getLogger("fla_swap.distillation")
CALIBRATE = "0-calibrate"
DEFAULT_BLOCK = 512
MEASURED_LAYERS = 8  # held-out blocks on which the layers' errors are measured


@dataclass(kw_only=True)
class DistillResult:
    """What a run did.

    history: an entry per log: stage, step, tokens (of the stage), seconds (of the stage), loss, learning_rate.
    losses: held-out loss in nats a token of "teacher", "start", then after each stage by its name (with `eval_blocks`).
    errors: each swapped layer's relative error against its original, at the same moments, until the rest trains too.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    calibration: list[LayerCalibration] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    errors: dict[str, list[LayerError]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0


def distill(
    model: nn.Module,
    data: Any,
    config: DistillConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    tokenizer: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    eval_blocks: Any = None,
    progress: Progress | None = None,
    calibrated: Calibrated | None = None,
) -> DistillResult:
    """Train a swapped model (`swap_`) to behave as its original did. In place.

    Args:
        data: token blocks [n, T] int64, a `TokenBlocks` dataset, or a source as in `load_blocks` (with `tokenizer`).
        teacher: a frozen model with the same vocabulary; None is the original model itself.
        eval_blocks: held-out token blocks, to measure the loss and the layers' errors before and after every stage.
        progress: called with a `ProgressEvent` at every log; None shows a bar on a terminal and log lines elsewhere.
        calibrated: what `select_layers` calibrated already, instead of calibrating once more.
    Raises:
        TrainingError: nothing is swapped, the loss is not finite, the disk is full, Ctrl-C (after saving), or
            `output_dir` holds another run. DataError: too little text.
    """
    config = config or DistillConfig()
    return Run(model, data, config, teacher, tokenizer, callbacks, eval_blocks, progress, calibrated).go()


class Run:
    """One call of `distill`."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        config: DistillConfig,
        teacher: nn.Module | None,
        tokenizer: Any,
        callbacks: Sequence[TrainerCallback],
        eval_blocks: Any,
        progress: Progress | None,
        calibrated: Calibrated | None = None,
    ):
        self.model, self.config, self.callbacks = model, config, callbacks
        self.layers = check_layers(model, config, teacher)
        self.device = pick_device(config.device)
        self.bf16 = bfloat16_wanted(config.precision, self.device)
        self.data, self.tokenizer = data, tokenizer
        self.eval_blocks = None if eval_blocks is None else as_blocks(eval_blocks)
        self.progress = progress if progress is not None else default_progress()
        self.own_progress = progress is None
        self.given_teacher, self.calibrated = teacher, calibrated
        self.teacher: Teacher | None = None
        self.result = DistillResult(model=model, history=[])
        self.folder: RunFolder | None = None
        self.finished: dict[str, dict[str, Any]] = {}

    def go(self) -> DistillResult:
        self.model.to(self.device)  # type: ignore[call-overload]
        if self.config.output_dir is not None:
            self.open_folder(self.config.output_dir)
        with full_precision(self.model), unchanged_flags(self.model):
            self.make_teacher()
            try:
                self.start()
                for number, stage in enumerate(self.config.stages):
                    self.stage(number, stage)
            finally:
                if self.folder is not None:
                    self.folder.write_history(self.result.history)
                if self.own_progress:
                    self.progress.close()  # type: ignore[attr-defined]
        self.model.eval()
        return self.result

    def open_folder(self, path: str | Path) -> None:
        """Check the folder and read what it holds, in every process before any of them writes."""
        from accelerate import PartialState

        processes = PartialState(cpu=self.device.type == "cpu")
        main = processes.is_main_process
        self.folder = RunFolder(path, self.settings(), resume=self.config.resume, main=main)
        processes.wait_for_everyone()
        self.result.history = self.folder.read_history()
        names = [CALIBRATE, *(self.config.stage_name(n) for n in range(len(self.config.stages)))]
        self.finished = {name: facts for name in names if (facts := self.folder.finished(name)) is not None}
        processes.wait_for_everyone()

    def settings(self) -> dict[str, Any]:
        mixers = {id(p) for _, layer in self.layers for p in layer.mixer.parameters()}
        rest: dict[str, Tensor] = {n: p for n, p in self.model.named_parameters() if id(p) not in mixers}
        kinds = {n: {"name": m.mixer.name, "options": m.mixer.config.to_options()} for n, m in self.layers}
        facts = {"mixers": kinds, "original_weights": digest(rest), "bfloat16": self.bf16}
        return {"config": self.config.fingerprint(), "model": facts, "data": self.data_facts()}

    def data_facts(self) -> dict[str, Any]:
        """What tells the training text from another: the source, if it is one, and shape and digest of the blocks."""
        source = self.data if isinstance(self.data, str) else None
        blocks = self.loaded()
        return {"source": source, "blocks": list(blocks.shape), "digest": digest({"blocks": blocks})}

    def make_teacher(self) -> None:
        stages = [s for s in self.config.stages if s.kind == "distil" and s.kl_weight > 0]
        if not stages:
            return
        if self.given_teacher is not None:
            self.teacher = Teacher(self.given_teacher.to(self.device))  # type: ignore[call-overload]
        elif any(s.train == "all" for s in self.config.stages):
            self.teacher = Teacher(copy_original(self.model))
        else:
            self.teacher = Teacher(self.model, shared=True)

    # ---- the steps of a run

    def start(self) -> None:
        """Measure the teacher and the start, then calibrate; or take both from the folder of an interrupted run."""
        name = CALIBRATE
        if self.taken_from_folder(name):
            return
        begin = time.monotonic()
        if self.eval_blocks is not None:
            if self.given_teacher is not None:
                self.result.losses["teacher"] = held_out_loss(self.given_teacher, self.eval_blocks)
            else:
                with original_attention(self.model):
                    self.result.losses["teacher"] = held_out_loss(self.model, self.eval_blocks)
            self.measure("start")
        if self.config.calibrate is not None:
            calibrating = time.monotonic()
            self.result.calibration = self.calibrate(self.config.calibrate)
            check_finite(self.model, "after calibration", "nothing was saved; calibrate=None starts without it")
            self.result.seconds[name] = time.monotonic() - calibrating
            self.measure(name)
        logger.info("start: %.1f s", time.monotonic() - begin)
        self.record(name)

    def calibrate(self, config: CalibrationConfig) -> list[LayerCalibration]:
        if self.calibrated is None:
            return calibrate(self.model, self.blocks(config.length), config)
        for fqn, layer in self.layers:
            layer.mixer.load_state_dict(self.calibrated.weights[fqn])
        swapped = {fqn for fqn, _ in self.layers}
        return [record for record in self.calibrated.layers if record.fqn in swapped]

    def stage(self, number: int, stage: StageConfig) -> None:
        name = self.config.stage_name(number)
        if stage.train == "all":
            self.model._rest_trained = True  # type: ignore[assignment]
        if self.taken_from_folder(name):
            return
        begin = time.monotonic()
        mixers = [p for _, layer in self.layers for p in layer.mixer.parameters()]
        self.model.requires_grad_(stage.train == "all")
        for parameter in mixers:
            parameter.requires_grad_(True)
        with contextlib.ExitStack() as stack:
            folder = (
                self.folder.stage(name) if self.folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            )
            stack.enter_context(checkpointed_gradients(self.model, stage))
            self.train(number, stage, self.objective(stage), mixers, folder)
        self.result.seconds[name] = time.monotonic() - begin
        self.measure(name)
        self.record(name)

    def objective(self, stage: StageConfig) -> Objective:
        if stage.kind == "align":
            return Alignment(self.model)
        return Distillation(
            self.model,
            self.teacher,
            kl_weight=stage.kl_weight,
            ce_weight=stage.ce_weight,
            chunk=self.config.loss_chunk,
            keep_training_mode=stage.gradient_checkpointing,
        )

    def train(
        self, number: int, stage: StageConfig, objective: Objective, mixers: list[nn.Parameter], folder: Path
    ) -> None:
        blocks = self.blocks(stage.block_size)
        name = self.config.stage_name(number)
        arguments = training_arguments(stage, self.config, folder, number=number, device=self.device, bf16=self.bf16)
        sequences = stage.batch_size * arguments.world_size
        if blocks.shape[0] < sequences:
            raise DataError(
                f"stage {name}: {blocks.shape[0]} blocks of {blocks.shape[1]} tokens, not one batch of {sequences}: "
                "give more text, or a smaller batch_size or block_size"
            )
        seconds = None if stage.minutes is None else 60 * stage.minutes
        schedule = Schedule(steps=stage.steps, seconds=seconds, warmup=stage.warmup, final=stage.final)
        step_tokens = sequences * stage.accumulation * blocks.shape[1]
        callback = StageCallback(name, schedule, self.config, step_tokens, self.result.history)
        callback.progress = self.progress
        trainer = StageTrainer(
            objective,
            name=name,
            stage=stage,
            mixers=mixers,
            schedule=schedule,
            args=arguments,
            train_dataset=TokenBlocks(blocks),
            data_collator=stack_blocks,
            callbacks=[callback, *self.callbacks],
        )
        with stopping_at_ctrl_c(callback):
            trainer.train(resume_from_checkpoint=last_checkpoint(folder) if self.config.resume else None)
        trainer.check_losses()
        trainer.check_weights()
        if callback.interrupted:
            kept = (
                f"resume=True continues from {last_checkpoint(folder)}"
                if self.folder
                else "nothing was saved (no output_dir)"
            )
            raise TrainingError(f"interrupted at step {trainer.state.global_step} of stage {name}; {kept}")
        self.result.tokens += trainer.state.global_step * step_tokens

    # ---- data, measurements, the folder

    def blocks(self, length: int | None) -> Tensor:
        """The training text in blocks of `length` tokens (None: as given)."""
        blocks = self.loaded()
        if length is None or length == blocks.shape[1]:
            return blocks
        count = blocks.numel() // length
        if count == 0:
            raise DataError(f"{blocks.numel()} training tokens, fewer than one block of {length}")
        return blocks.reshape(-1)[: count * length].view(count, length)

    def loaded(self) -> Tensor:
        """The training text as given; a source is read once, in blocks whose length depends on the config only."""
        if isinstance(self.data, str):
            if self.tokenizer is None:
                raise DataError(f"data is the source {self.data!r}: give the tokenizer too")
            calibration, stages = self.config.calibrate, self.config.stages
            length = calibration.length if calibration is not None else stages[0].block_size if stages else None
            self.data = load_blocks(self.data, self.tokenizer, length or DEFAULT_BLOCK, split="train")
        return as_blocks(self.data)

    def measure(self, moment: str) -> None:
        if self.eval_blocks is None:
            return
        self.result.losses[moment] = held_out_loss(self.model, self.eval_blocks)
        if not getattr(self.model, "_rest_trained", False) and all(m.original is not None for _, m in self.layers):
            self.result.errors[moment] = layer_errors(self.model, self.eval_blocks[:MEASURED_LAYERS])

    def record(self, name: str) -> None:
        if self.folder is None:
            return
        result = self.result
        facts = {
            "losses": result.losses,
            "errors": {m: [dataclasses.asdict(e) for e in errors] for m, errors in result.errors.items()},
            "calibration": [dataclasses.asdict(c) for c in result.calibration],
            "seconds": result.seconds,
            "tokens": result.tokens,
        }
        self.folder.write_history(result.history)
        self.folder.finish(name, self.model, facts)

    def taken_from_folder(self, name: str) -> bool:
        """Whether a stage was finished by an earlier run of this folder; if so, take over its weights and figures."""
        facts = self.finished.get(name)
        if self.folder is None or facts is None:
            return False
        self.folder.load(name, self.model)
        result = self.result
        result.losses, result.seconds, result.tokens = facts["losses"], facts["seconds"], facts["tokens"]
        result.errors = {m: [LayerError(**e) for e in errors] for m, errors in facts["errors"].items()}
        result.calibration = [LayerCalibration(**{**c, "kept": tuple(c["kept"])}) for c in facts["calibration"]]
        return True


def check_layers(model: nn.Module, config: DistillConfig, teacher: nn.Module | None) -> list[tuple[str, Any]]:
    """The swapped layers, when this model can be distilled under this config."""
    check_finite(model, "before distillation", "load or convert the model again")
    if teacher is not None:
        check_finite(teacher, "in the teacher", "load it again")
    aligned = config.calibrate is not None or any(s.kind == "align" for s in config.stages)
    layers = layers_of(model) if aligned or teacher is None else list(swapped_layers(model))
    if not layers:
        raise TrainingError(f"{type(model).__name__} has no swapped layer: call fs.swap_(model, plan) first")
    if getattr(model, "_rest_trained", False) and (teacher is None or aligned):
        raise TrainingError(
            "all weights of this model were trained before, so its original is no teacher any more: load and swap the "
            "original model again (resume=True then continues an interrupted run), or pass teacher= and only stages of "
            "kind 'distil' with calibrate=None"
        )
    return layers


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device='cuda', but torch sees no CUDA device")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    from accelerate import PartialState

    return torch.device(str(PartialState().device))


def bfloat16_wanted(precision: str, device: torch.device) -> bool:
    """Whether layers run in bfloat16 under autocast."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return True
    ask = getattr(torch.cpu, "get_capabilities", None)  # from torch 2.12 on
    can = {} if ask is None else ask()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def stack_blocks(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([item["input_ids"] for item in items])}
