"""One stage on transformers' `Trainer` (DDP, mixed precision, resume): time budget, safe checkpoints, clear ends."""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from fla_swap.distillation.config import DistillConfig, StageConfig
from fla_swap.distillation.progress import Progress, ProgressEvent
from fla_swap.errors import TrainingError

WEIGHTS = "model.safetensors"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Schedule:
    """Factor of the learning rate: a linear rise, then a cosine down to `final`, over max(steps done, time used).

    So a stage that ends by its time budget has decayed as one that ends by its steps. With `seconds=None` no clock is
    read. `LambdaLR` stores this object's attributes in checkpoints: plain numbers only.
    """

    now = staticmethod(time.monotonic)

    def __init__(self, *, steps: int | None, seconds: float | None, warmup: float, final: float):
        self.steps, self.seconds, self.warmup, self.final = steps, seconds, warmup, final
        self.elapsed, self.last = 0.0, 0.0

    def start(self) -> None:
        """Begin, or go on after an interruption, to count time."""
        self.last = self.now()

    def tick(self) -> float:
        """Read the clock: seconds since the start, interruptions left out."""
        now = self.now()
        self.elapsed, self.last = self.elapsed + now - self.last, now
        return self.elapsed

    def fraction(self, step: int) -> float:
        by_steps = 0.0 if self.steps is None else step / self.steps
        by_time = 0.0 if self.seconds is None else self.elapsed / self.seconds
        return min(1.0, max(by_steps, by_time))

    def __call__(self, step: int) -> float:
        done = self.fraction(step)
        # The very first steps must move, whatever share of the stage they are.
        rise = 1.0 if self.warmup == 0 else min(1.0, max(done, 1e-2 * self.warmup) / self.warmup)
        return rise * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))


class StageCallback(TrainerCallback):
    """Ends a stage by time or Ctrl-C at a step's border, asks for checkpoints, keeps the history, reports progress."""

    def __init__(
        self, name: str, schedule: Schedule, config: DistillConfig, step_tokens: int, history: list[dict[str, Any]]
    ):
        self.name, self.schedule, self.config, self.step_tokens = name, schedule, config, step_tokens
        self.history = history
        self.progress: Progress | None = None
        self.interrupted = False
        self.saved = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.schedule.start()
        self.saved = self.schedule.elapsed
        self.history[:] = [h for h in self.history if h["stage"] != self.name or h["step"] <= state.global_step]

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.schedule.tick()
        if args.world_size > 1:
            self._agree(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        used_up = self.schedule.seconds is not None and self.schedule.elapsed >= self.schedule.seconds
        if used_up or self.interrupted:
            control.should_training_stop = True
        if self.config.output_dir is not None and (self.interrupted or self._due(state.global_step)):
            control.should_save = True
            self.saved = self.schedule.elapsed
        control.should_log = control.should_log or control.should_training_stop

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        entry = {
            "stage": self.name,
            "step": state.global_step,
            "tokens": state.global_step * self.step_tokens,
            "seconds": round(self.schedule.elapsed, 3),
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
        }
        self.history.append(entry)
        if self.progress is not None:
            ended = control.should_training_stop and not self.interrupted
            fraction = 1.0 if ended else self.schedule.fraction(state.global_step)
            self.progress(ProgressEvent(**entry, steps=self.schedule.steps, fraction=fraction))

    def _due(self, step: int) -> bool:
        config = self.config
        by_steps = config.save_steps is not None and step % config.save_steps == 0
        # By the time all ranks agreed on, not this rank's clock: saving waits for every rank.
        return by_steps or (
            config.save_minutes is not None and self.schedule.elapsed - self.saved >= 60 * config.save_minutes
        )

    def _agree(self, device: torch.device) -> None:
        """All ranks use the same clock and stop at the same step."""
        facts = torch.tensor([self.schedule.elapsed, float(self.interrupted)], device=device, dtype=torch.float64)
        torch.distributed.all_reduce(facts, op=torch.distributed.ReduceOp.MAX)
        self.schedule.elapsed, self.interrupted = float(facts[0]), bool(facts[1])


class StageTrainer(Trainer):
    """`Trainer` for a module whose `forward(input_ids)` is the loss and whose `.model` is what is saved."""

    def __init__(self, module: nn.Module, *, name: str, stage: StageConfig, mixers: list[nn.Parameter], **rest: Any):
        self.name, self.stage, self.mixer_ids = name, stage, {id(p) for p in mixers}
        self.schedule: Schedule = rest.pop("schedule")
        self.unchecked: list[tuple[int, Tensor]] = []
        self.run_dir: str | None = None
        super().__init__(model=module, **rest)
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(inputs["input_ids"])

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            groups = parameter_groups(trained, self.mixer_ids, self.stage)
            fused = self.args.device.type in ("cpu", "cuda")
            self.optimizer = torch.optim.AdamW(groups, betas=self.stage.betas, fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(optimizer, [self.schedule] * len(optimizer.param_groups))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- a loss that is not finite ends the stage before anything is written

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.unchecked.append((self.state.global_step + 1, loss))
        # On a GPU the check stays one step behind, so that it does not wait for the step it follows.
        self.check_losses(keep=1 if loss.is_cuda else 0)
        return loss

    def check_losses(self, keep: int = 0) -> None:
        """Raise TrainingError when a loss, but for the last `keep`, is NaN or infinite."""
        while len(self.unchecked) > keep:
            step, loss = self.unchecked.pop(0)
            if not bool(torch.isfinite(loss)):
                raise TrainingError(
                    f"the loss of step {step} is {float(loss)}; nothing was written after that. {self.resumable()}; "
                    "a smaller learning rate, or a longer warmup, usually helps"
                )

    def check_weights(self) -> None:
        """Raise TrainingError when weights are NaN or infinite: a gradient can be, though its loss was not."""
        when = f"step {self.state.global_step} of stage {self.name}"
        check_finite(self.model.model, f"after {when}", f"they were not saved. {self.resumable()}")  # type: ignore[union-attr]

    def resumable(self) -> str:
        """What remains to go on from, in words."""
        last = last_checkpoint(self.args.output_dir)
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint of this stage"

    # ---- checkpoints: complete or absent

    def _get_output_dir(self, trial: Any) -> str:
        return self.run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_losses()
        self.check_weights()
        name = f"checkpoint-{self.state.global_step}"
        folder = Path(str(self.args.output_dir))
        final, unfinished = folder / name, folder / "unfinished"
        self.run_dir = str(unfinished)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                replace_folder(unfinished / name, final)
                for old in checkpoints(folder)[:-1]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise TrainingError(f"{save_problem(error, final)}. {self.resumable()}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            self.run_dir = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(own_weights(self.model.model), folder / WEIGHTS, metadata={"format": "pt"})  # type: ignore[union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model.model, Path(resume_from_checkpoint, WEIGHTS))  # type: ignore[union-attr]


def check_finite(model: nn.Module, moment: str, advice: str) -> None:
    """TrainingError with the names of the first parameters that hold NaN or infinite values."""
    plain = ((n, p) for n, p in model.named_parameters() if p.dtype in FLOATS and not p.is_meta)
    bad = [name for name, parameter in plain if not bool(torch.isfinite(parameter).all())]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise TrainingError(
            f"{moment}, weights of {type(model).__name__} are not finite: {', '.join(bad[:3])}{more}; {advice}"
        )


def parameter_groups(model: nn.Module, mixers: set[int], stage: StageConfig) -> list[dict[str, Any]]:
    """Mixers and the rest at their own learning rates, matrices with weight decay and vectors without."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in mixers, parameter.ndim >= 2), []).append(parameter)
    if not groups:
        raise TrainingError(
            f"nothing to train: stage {stage.kind!r} with train={stage.train!r} has no trainable parameter"
        )
    return [
        {
            "params": parameters,
            "lr": stage.learning_rate if mixer else stage.rest_learning_rate,
            "weight_decay": stage.weight_decay if matrix else 0.0,
        }
        for (mixer, matrix), parameters in groups.items()
    ]


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tied tensor once."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in seen:
            seen.add(key)
            found[name] = tensor.contiguous()
    return found


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what `own_weights` gave; TrainingError when the names are others."""
    try:
        weights = safetensors.torch.load_file(path, device="cpu")
    except (OSError, safetensors.SafetensorError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}): delete its folder to resume from an earlier one"
        ) from error
    expected = set(own_weights(model))
    if expected != set(weights):
        differing = sorted(expected ^ set(weights))
        raise TrainingError(f"{path} belongs to another model or plan: they differ in {differing[:5]}")
    model.load_state_dict(weights, strict=False)


def checkpoints(folder: str | Path | None) -> list[Path]:
    """The complete checkpoints of a stage's folder, oldest first."""
    found = Path(folder).glob("checkpoint-*") if folder else ()
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def last_checkpoint(folder: str | Path | None) -> str | None:
    return get_last_checkpoint(str(folder)) if folder and Path(folder).is_dir() else None


def replace_folder(source: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    os.replace(source, target)


def save_problem(error: Exception, path: Path) -> str:
    """What went wrong while writing `path`, for a TrainingError."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error)
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    if full or (isinstance(error, RuntimeError) and free < 1 << 20):
        return f"the disk is full: {path} could not be written ({error}); free some space, then resume"
    return f"{path} could not be written ({error})"


def training_arguments(
    stage: StageConfig, config: DistillConfig, folder: Path, *, number: int, device: torch.device, bf16: bool
) -> TrainingArguments:
    """The stage as `TrainingArguments`: no evaluation, no worker processes, no reports but ours."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps if stage.steps is not None else 10**9,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.accumulation,
        max_grad_norm=stage.max_grad_norm,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        seed=config.seed + number,
        data_seed=config.seed + number,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="steps",
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        dataloader_num_workers=0,
        dataloader_drop_last=True,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process per GPU: never nn.DataParallel
    return arguments
