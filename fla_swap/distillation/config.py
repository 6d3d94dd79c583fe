"""What a distillation run is made of: calibration, then stages. Frozen, JSON-able, checked when built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fla_swap.errors import TrainingError

KINDS = ("align", "distil")
TRAINED = ("mixers", "all")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16")


def check(condition: bool, message: str) -> None:
    if not condition:
        raise TrainingError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """The gradient-free start: decay, write strength, head scales and output map, fitted on a few sequences.

    `sequences` blocks of at most `length` tokens are read from the training data. `half_lives`: multiples of each
    head's mean attention distance that are tried. `betas`: write strengths that are tried, 0 standing for the one read
    from the attention's entropy. `output_map`: also fit o_proj by ridge regression.
    """

    sequences: int = 16
    length: int = 256
    half_lives: tuple[float, ...] = (0.5, 1.0, 2.0, 8.0, 32.0, 128.0)
    betas: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75)
    output_map: bool = True

    def __post_init__(self) -> None:
        check(self.sequences >= 1 and self.length >= 2, f"calibration needs text: {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stage of training. It ends after `steps` or `minutes`, whichever comes first (at least one must be given).

    kind: "align" (each swapped layer against its original, on the original's inputs) or "distil" (KL on the logits).
    batch_size: sequences a step on each device, `accumulation` times.
    block_size: tokens of a sequence; None keeps the data's own blocks.
    learning_rate: of the mixers; `rest_learning_rate` of everything else (`train="all"`).
    warmup: fraction of the stage in which the learning rate rises; then a cosine down to `final` times the peak.
    gradient_checkpointing: less memory for more time; only for "distil" (alignment keeps no graph between layers).
    kl_weight, ce_weight: loss = kl_weight · KL(teacher ‖ student) + ce_weight · cross entropy, in nats a token.
    """

    kind: str
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    block_size: int | None = None
    train: str = "mixers"
    learning_rate: float = 1e-3
    rest_learning_rate: float = 1e-4
    warmup: float = 0.05
    final: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check(self.kind in KINDS, f"stage kind is {self.kind!r}; the kinds are {list(KINDS)}")
        check(self.train in TRAINED, f"train is {self.train!r}; it must be one of {list(TRAINED)}")
        check(self.kind == "distil" or self.train == "mixers", "alignment trains mixers only: train must be 'mixers'")
        check(
            self.kind == "distil" or not self.gradient_checkpointing,
            "gradient_checkpointing has no effect in alignment, which trains each layer by itself: leave it False, and "
            "take a smaller batch_size with more accumulation to save memory",
        )
        check(self.steps is not None or self.minutes is not None, f"a stage needs steps or minutes: {self}")
        check(self.steps is None or self.steps >= 1, f"steps is {self.steps}; it must be at least 1")
        check(self.minutes is None or self.minutes > 0, f"minutes is {self.minutes}; it must be positive")
        check(self.batch_size >= 1 and self.accumulation >= 1, "batch_size and accumulation must be at least 1")
        check(self.block_size is None or self.block_size >= 2, f"block_size is {self.block_size}; at least 2")
        check(0 <= self.warmup < 1 and 0 <= self.final <= 1, "warmup must lie in [0, 1) and final in [0, 1]")
        check(self.kl_weight >= 0 and self.ce_weight >= 0, "kl_weight and ce_weight must not be negative")
        check(self.kl_weight + self.ce_weight > 0, "kl_weight and ce_weight are both 0: nothing to learn from")


ALIGN = StageConfig(kind="align", steps=500, learning_rate=1e-3)
DISTIL = StageConfig(kind="distil", steps=1000, train="all", learning_rate=1e-3, rest_learning_rate=1e-4)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """A whole run. With `output_dir`, it can be interrupted and continued with `resume=True`.

    calibrate: None starts from the weights as they were copied.
    save_steps, save_minutes: how often a stage writes a checkpoint (always at Ctrl-C and at the end of a stage).
    log_steps: steps between two entries of the history and of the progress report.
    loss_chunk: tokens whose logits exist at one time; None chooses by the size of the vocabulary.
    device: "auto" takes a GPU if there is one.
    precision: of the layers' arithmetic; the weights are float32 while they train. "auto" is bfloat16 on a GPU and on a
        CPU with bfloat16 instructions (AVX-512 BF16, AMX; about 1.5 times as fast there), float32 elsewhere.
    """

    calibrate: CalibrationConfig | None = field(default_factory=CalibrationConfig)
    stages: tuple[StageConfig, ...] = (ALIGN, DISTIL)
    output_dir: str | Path | None = None
    resume: bool = False
    save_steps: int | None = None
    save_minutes: float | None = 10.0
    log_steps: int = 1
    loss_chunk: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        check(self.device in DEVICES, f"device is {self.device!r}; it must be one of {list(DEVICES)}")
        check(self.precision in PRECISIONS, f"precision is {self.precision!r}; it must be one of {list(PRECISIONS)}")
        check(self.log_steps >= 1, "log_steps must be at least 1")
        check(not self.resume or self.output_dir is not None, "resume=True needs the output_dir of the interrupted run")
        rest_trained = False
        for number, stage in enumerate(self.stages):
            bad = stage.kind == "align" and rest_trained
            check(not bad, f"stage {number} aligns to the original layers after a stage that trained all weights")
            rest_trained = rest_trained or stage.train == "all"

    def stage_name(self, number: int) -> str:
        """The name of stage `number` in the history and on disk, such as "2-distil"."""
        return f"{number + 1}-{self.stages[number].kind}"

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between an interrupted run and the one that continues it."""
        facts = dataclasses.asdict(self)
        for name in ("output_dir", "resume", "save_steps", "save_minutes", "log_steps", "device"):
            del facts[name]
        return facts
