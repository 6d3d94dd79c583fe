"""The main job as one verb: a pretrained model in, a distilled hybrid and a report out.

load → inspect → plan → swap → calibrate → align → distil → save → reload → generate. `fla-swap convert` and
`fla-swap demo` are this function with a console around it.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fla_swap.checkpoint import load, save
from fla_swap.compilation import compile as compile_model
from fla_swap.distillation import CalibrationConfig, DistillConfig, DistillResult, StageConfig, distill, held_out_loss
from fla_swap.distillation.data import load_blocks
from fla_swap.distillation.run import pick_device
from fla_swap.distillation.selection import Selection, select_layers
from fla_swap.errors import CheckpointError, ConfigError, DataError
from fla_swap.inspection import inspect
from fla_swap.output import (
    TRAINING,
    TRAINING_PLAN,
    check_output,
    clear_training,
    earlier_plan,
    machine,
    make_room,
    settings_of,
    write_report,
)
from fla_swap.planning import Keep, load_plan, plan, save_plan
from fla_swap.swapping import swap_
from fla_swap.types import AttentionReport, SwapPlan

STARTS = ("calibrated", "naive")
SELECTORS = ("greedy", "leave_one_out", "uniform")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HELD_OUT_BLOCK = 512
PLANNING = ("mixer", "options", "keep", "local", "select")  # settings that a finished plan stands for


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """One conversion.

    mixer, options, keep, local: as in `fs.plan`.
    plan: a file of `save_plan` or `fla-swap plan --out`, instead of those four and `select`.
    data: text to train and to evaluate on, as in `fla_swap.distillation.data` (held-out documents are split off).
    minutes: time for training (alignment and distillation together); compilation, evaluation and loading come on top.
    start: "calibrated" or "naive" (weights as copied).
    select: which layers a fraction `keep` keeps: "greedy" or "leave_one_out" (measured, see
        `fla_swap.distillation.selection`), or "uniform" (evenly spaced).
    block_size, batch_size: tokens a sequence and sequences a step; None chooses by device.
    max_tokens: read no more training text than this. eval_tokens: held-out tokens measured, evenly spread.
    dtype: "auto" is float32 on a CPU and the model's own on a GPU; it is also what is saved.
    prompt: continued greedily, by `new_tokens` tokens, by teacher and student ("" skips it).
    compile: generate with `fs.compile` too (given a prompt); on a CPU that needs a C++ compiler.
    """

    mixer: str = "gated_deltanet"
    options: Mapping[str, Any] | None = None
    keep: Keep = "1/4"
    local: bool = False
    plan: str | Path | None = None
    data: str = "stdlib"
    minutes: float = 10.0
    start: str = "calibrated"
    select: str = "greedy"
    block_size: int | None = None
    batch_size: int | None = None
    max_tokens: int = 50_000_000
    eval_tokens: int = 32_768
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    prompt: str = ""
    new_tokens: int = 48
    compile: bool = True

    def __post_init__(self) -> None:
        check_choice("start", self.start, STARTS)
        check_choice("select", self.select, SELECTORS)
        check_choice("device", self.device, DEVICES)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        if not self.minutes > 0:
            raise ConfigError(f"minutes is {self.minutes}; it must be positive")
        fields = type(self).__dataclass_fields__
        ignored = [n for n in PLANNING if getattr(self, n) != fields[n].default]
        if self.plan is not None and ignored:
            raise ConfigError(f"plan={str(self.plan)!r} says what is swapped already: leave out {', '.join(ignored)}")
        least = {"block_size": 2, "batch_size": 1, "max_tokens": 2, "eval_tokens": 1, "new_tokens": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ConfigError(f"{name} is {value}; it must be at least {bound}")


@dataclass(kw_only=True)
class Listener:
    """What a console may want to hear about: a line per step of the job, the report, the plan, training progress."""

    say: Callable[[str], None] = lambda line: None
    found: Callable[[AttentionReport], None] = lambda report: None
    planned: Callable[[SwapPlan], None] = lambda chosen: None
    progress: Any = None


def convert(
    model: str | Path,
    out: str | Path,
    config: ConvertConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Convert a pretrained causal language model to a hybrid and distil it.

    Args:
        model: folder or hub id, for `AutoModelForCausalLM` and `AutoTokenizer`.
        out: receives the model, its tokenizer, `report.json` and `report.png`; while it trains, `training/`.
        resume: continue an interrupted conversion into `out`, with the same settings and its plan.
        overwrite: replace what `out` holds.
    Returns:
        The report, as written to `report.json`.
    Raises:
        FlaSwapError: see the stages; nothing in `out` is overwritten by a job that fails.
    """
    return Conversion(str(model), Path(out), config or ConvertConfig(), listener or Listener()).run(resume, overwrite)


class Conversion:
    """One call of `convert`; the steps in the order of the job."""

    def __init__(self, name: str, out: Path, config: ConvertConfig, listener: Listener):
        self.name, self.out, self.config, self.listener = name, out, config, listener
        self.device = find_device(config.device)
        self.seconds: dict[str, float] = {}
        self.selection: Selection | None = None
        self.given = None if config.plan is None else load_plan(config.plan)
        self.clock = time.monotonic()

    def run(self, resume: bool, overwrite: bool) -> dict[str, Any]:
        check_output(self.out, resume=resume, overwrite=overwrite)
        if self.config.compile and self.config.prompt:
            check_compiler(self.device)
        torch.manual_seed(self.config.seed)
        model, tokenizer = self.load()
        train, held_out = self.text(model, tokenizer)
        report = inspect(model)
        self.listener.found(report)
        self.lap("inspect")
        chosen = self.plan(model, report, train, resume)
        self.listener.planned(chosen)
        texts = {"prompt": self.config.prompt, "teacher": self.generate(model, tokenizer)}
        swap_(model, chosen)
        make_room(self.out, model, resume=resume, overwrite=overwrite)
        if not resume:
            self.out.mkdir(parents=True, exist_ok=True)
            save_plan(chosen, self.out / TRAINING_PLAN)
        result = self.distil(model, train, held_out, resume)
        losses = dict(result.losses)
        save(model, self.out, tokenizer=tokenizer, overwrite=overwrite)
        reloaded = load(self.out, device=self.device)
        self.lap("save")
        check = self.check_reload(model, reloaded, held_out)
        clear_training(self.out)
        losses["student"] = list(losses.values())[-1]  # measured in float32; the reloaded model is bitwise the same
        if reloaded.dtype != torch.float32:
            losses["student"] = held_out_loss(reloaded, held_out)
        texts["student"] = self.generate(reloaded, tokenizer)
        self.lap("check")
        facts = write_report(self.out, self.facts(report, chosen, result, losses, check, texts))
        if self.config.compile and self.config.prompt:
            self.listener.say("compiling the forward and the decode step …")
            fast = compile_model(load(self.out, device=self.device))
            texts["student, compiled"] = self.generate(fast, tokenizer)
            self.lap("compile and generate")
            facts = write_report(self.out, self.facts(report, chosen, result, losses, check, texts))
        return facts

    # ---- the steps

    def load(self) -> tuple[Any, Any]:
        model = load(self.name, dtype=pick_dtype(self.config.dtype, self.device), device=self.device).eval()
        bad = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
        if bad:
            raise CheckpointError(f"{self.name} has NaN or infinite weights in {bad[:3]} ({len(bad)} in all)")
        tokenizer = load_tokenizer(self.name)
        size = sum(p.numel() for p in model.parameters())
        self.listener.say(f"{self.name}: {size:,} parameters, {model.dtype}, on {self.device}")
        self.lap("load")
        return model, tokenizer

    def text(self, model: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
        """Training and held-out token blocks, no longer than the model's positions unless `block_size` says so."""
        longest = getattr(model.config, "max_position_embeddings", None) or HELD_OUT_BLOCK
        size = self.config.block_size or min(longest, 256 if self.device.type == "cpu" else 512)
        limit = self.config.max_tokens
        train = load_blocks(self.config.data, tokenizer, size, split="train", limit_tokens=limit).blocks
        train = train[torch.randperm(train.shape[0], generator=torch.Generator().manual_seed(self.config.seed))]
        measured = min(longest, HELD_OUT_BLOCK, self.config.block_size or HELD_OUT_BLOCK)
        held_out = held_out_blocks(self.config.data, tokenizer, measured, self.config.eval_tokens)
        check_vocabulary(model, tokenizer, torch.cat((train.flatten(), held_out.flatten())), self.name)
        self.listener.say(f"{self.config.data}: {train.numel():,} training tokens, {held_out.numel():,} held out")
        self.lap("text")
        return train, held_out

    def plan(self, model: nn.Module, report: AttentionReport, train: Tensor, resume: bool) -> SwapPlan:
        """The plan; a share of layers to keep is filled with the layers that `select` chooses."""
        if self.given is not None:
            return self.given
        config = self.config
        shared: dict[str, Any] = {"mixer": config.mixer, "options": config.options, "local": config.local}
        uniform = plan(report, keep=config.keep, **shared)
        everything = plan(report, keep=0, **shared)
        keep = len(everything.layers) - len(uniform.layers)
        if keep == 0 or config.select == "uniform" or not is_share(config.keep):
            return uniform
        if resume and (self.out / TRAINING_PLAN).exists():
            self.listener.say("the layers that the interrupted run selected")
            return earlier_plan(self.out, everything, keep)
        self.selection = select_layers(model, everything, train, keep, method=config.select)
        self.lap("select")
        steps = ", then ".join(f"{layer} (KL {kl:.3f})" for layer, kl in self.selection.steps)
        self.listener.say(f"all swapped: KL {self.selection.start:.3f} nats a token; kept: layer {steps}")
        return plan(report, keep=self.selection.kept, **shared)

    def distil(self, model: nn.Module, train: Tensor, held_out: Tensor, resume: bool) -> DistillResult:
        config = DistillConfig(
            calibrate=CalibrationConfig() if self.config.start == "calibrated" else None,
            stages=recipe(self.config.minutes, self.device, self.config.batch_size),
            output_dir=self.out / TRAINING,
            resume=resume,
            save_minutes=2.0 if self.device.type == "cpu" else 10.0,
            seed=self.config.seed,
            device="cpu" if self.device.type == "cpu" else "cuda",
        )
        calibrated = None if self.selection is None else self.selection.calibrated
        result = distill(
            model, train, config, eval_blocks=held_out, progress=self.listener.progress, calibrated=calibrated
        )
        self.lap("distil")
        return result

    def check_reload(self, model: nn.Module, reloaded: nn.Module, held_out: Tensor) -> dict[str, Any]:
        rows = held_out[:2].to(self.device)
        with torch.no_grad():
            mine, theirs = (m.eval()(input_ids=rows, use_cache=False).logits for m in (model, reloaded))
        equal = bool(torch.equal(mine, theirs))
        if not equal:
            worst = float((mine - theirs).abs().max())
            raise CheckpointError(f"{self.out}: reloaded, the model's logits differ by up to {worst:.3g}")
        return {"bitwise_equal": equal}

    def generate(self, model: Any, tokenizer: Any) -> str:
        if not self.config.prompt:
            return ""
        inputs = tokenizer(self.config.prompt, return_tensors="pt", return_token_type_ids=False).to(self.device)
        tokens = model.generate(**inputs, max_new_tokens=self.config.new_tokens, do_sample=False)
        return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def facts(
        self,
        report: AttentionReport,
        chosen: SwapPlan,
        result: DistillResult,
        losses: dict[str, float],
        check: dict[str, Any],
        texts: dict[str, str],
    ) -> dict[str, Any]:
        return {
            "model": self.name,
            "config": settings_of(self.config),
            "machine": machine(self.device),
            "sites": len(report.sites),
            "largest_proof_error": max((s.max_error or 0.0 for s in (*report.sites, *report.linear)), default=0.0),
            "swapped": [f"{layer.site.fqn}: {layer.mixer}" for layer in chosen.layers],
            "kept": list(chosen.kept),
            "selection": None if self.selection is None else self.selection.to_dict(),
            "losses": losses,
            "perplexities": {name: float(torch.tensor(loss).exp()) for name, loss in losses.items()},
            "delta": losses["student"] - losses["teacher"],
            "layer_errors": {m: [dataclasses.asdict(e) for e in errors] for m, errors in result.errors.items()},
            "tokens": result.tokens,
            "reload": check,
            "texts": texts,
            "seconds": {name: round(value, 1) for name, value in {**self.seconds, **result.seconds}.items()},
            "history": result.history,
        }

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.clock = now - self.clock, now


def recipe(minutes: float, device: torch.device, batch_size: int | None = None) -> tuple[StageConfig, ...]:
    """The stages that share `minutes` of training: half aligns each layer, half distils the whole model."""
    cpu = device.type == "cpu"
    size = batch_size or (4 if cpu else 64)
    return (
        StageConfig(kind="align", minutes=minutes / 2, batch_size=size, learning_rate=3e-3),
        StageConfig(
            kind="distil",
            minutes=minutes / 2,
            batch_size=size,
            train="all",
            learning_rate=5e-4 if cpu else 1e-3,
            rest_learning_rate=1e-4 if cpu else 3e-4,
            warmup=0.1,
        ),
    )


def is_share(keep: Keep) -> bool:
    """Whether `keep` says how many layers stay ("1/4", 0.25, a Fraction), and not which ("0,7", [0, 7])."""
    if isinstance(keep, str):
        return "," not in keep
    return isinstance(keep, (int, float, Fraction))


def check_compiler(device: torch.device) -> None:
    """Before any work: `fs.compile` on a CPU writes C++."""
    from torch._inductor import config

    names = [config.cpp.cxx] if isinstance(config.cpp.cxx, str) else [name for name in config.cpp.cxx if name]
    if device.type == "cpu" and not any(shutil.which(name) for name in names):
        raise ConfigError(
            f"compiling on a CPU needs a C++ compiler, and there is no {' or '.join(names)} here: install one, name "
            "one in $CXX, or leave compiling out (--no-compile, ConvertConfig(compile=False))"
        )


def pick_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype that a name means; None is the model's own."""
    check_choice("dtype", name, tuple(DTYPES))
    return torch.float32 if name == "auto" and device.type == "cpu" else DTYPES[name]


def find_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means here."""
    check_choice("device", name, DEVICES)
    return pick_device(name)


def check_choice(setting: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{setting} is {value!r}; it must be one of {list(choices)}")


def check_vocabulary(model: Any, tokenizer: Any, tokens: Tensor, name: str) -> None:
    """Refuse a tokenizer that is not this model's."""
    rows = model.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= rows:
        raise DataError(
            f"{name}: its tokenizer ({len(tokenizer)} entries) gives token {int(tokens.max())}, but the model has "
            f"{rows} embeddings: the folder holds another model's tokenizer"
        )


def held_out_blocks(data: str, tokenizer: Any, block_size: int, tokens: int) -> Tensor:
    """About `tokens` held-out tokens [n, block_size], evenly spread over all there are."""
    blocks = load_blocks(data, tokenizer, block_size, split="eval", limit_tokens=50 * tokens).blocks
    wanted = max(1, tokens // block_size)
    if blocks.shape[0] <= wanted:
        return blocks
    return blocks[torch.linspace(0, blocks.shape[0] - 1, wanted).round().long()]


def held_out_of(name: str, data: str, block_size: int, tokens: int, device: str, dtype: str) -> float:
    """Held-out loss of a saved model, in nats a token."""
    where = find_device(device)
    model = load(name, dtype=pick_dtype(dtype, where), device=where).eval()
    return held_out_loss(model, held_out_blocks(data, load_tokenizer(name), block_size, tokens))


def load_tokenizer(name: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a different class for each kind of damage, plain Exception among them
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{name} has no tokenizer that loads ({reason}); save one into the folder") from error
