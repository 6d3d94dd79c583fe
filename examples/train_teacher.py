"""Train the teacher that the demo converts: a small Llama, from scratch, on Python's standard library.

    python examples/train_teacher.py --preset small --out examples/teacher

Everything comes from the machine it runs on: text, a byte-level BPE tokenizer made from it, the model. Whole packages
of the library are never trained on (fla_swap.distillation.data.HELD_OUT); the card's perplexity is measured on them.
`--source` takes other text too (see fla_swap.distillation.data), several times; the first one gives the held-out text.

Why a plain loop and not transformers' Trainer, which distillation uses: all tokens live on the GPU and every epoch cuts
them at a new random offset, so a step costs a few milliseconds and a data loader would be most of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from fla_swap.distillation.data import HELD_OUT, load_texts, token_stream
from fla_swap.errors import DataError

EOS, PAD = "<|endoftext|>", "<|pad|>"
EOS_ID, PAD_ID = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A model's shape and how long, how fast and in which batches it learns."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 64
    positions: int = 2048
    block: int = 1024
    batch_blocks: int = 64
    epochs: float = 16.0
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    evaluations: int = 20


PRESETS = {
    "tiny": Preset(
        vocab=384, head_dim=16, hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, positions=256,
        block=64, batch_blocks=4, epochs=1.0, warmup_steps=2, evaluations=2,
    ),  # for tests
    "small": Preset(
        vocab=4096, hidden=256, layers=8, heads=4, kv_heads=2, intermediate=704, epochs=10.0, weight_decay=1.0
    ),  # 7.0M, shipped
    "medium": Preset(
        vocab=8192, hidden=512, layers=12, heads=8, kv_heads=4, intermediate=1024,
        epochs=10.0, learning_rate=1.5e-3, warmup_steps=200,
    ),  # 32.5M
    "large": Preset(
        vocab=16384, hidden=768, layers=16, heads=12, kv_heads=4, intermediate=1792, batch_blocks=32,
        epochs=6.0, learning_rate=1e-3, warmup_steps=300,
    ),  # 104M
}  # fmt: skip


def read_texts(sources: list[str], split: Any, limit_bytes: int | None) -> list[str]:
    texts, size = [], 0
    for source in sources:
        for text in load_texts(source, split=split):
            texts.append(text)
            size += len(text.encode("utf-8", "surrogatepass"))
            if limit_bytes is not None and size >= limit_bytes:
                return texts
    return texts


def train_tokenizer(texts: list[str], preset: Preset) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string round-trips. The end-of-text token, a trained one, also starts a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=preset.vocab,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=preset.positions,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(preset: Preset) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=preset.vocab,
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        head_dim=preset.head_dim,
        intermediate_size=preset.intermediate,
        max_position_embeddings=preset.positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    # Under torch.compile transformers writes the causal mask out, which rules flash attention out. An attention of
    # another name gets no mask and is causal by itself.
    AttentionInterface.register("causal_sdpa", sdpa_attention_forward)
    return LlamaForCausalLM._from_config(config, attn_implementation="causal_sdpa")


def batches(tokens: torch.Tensor, preset: Preset, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Blocks [batch_blocks, block] for ever; every epoch starts at a random offset and in a random order."""
    while True:
        offset = int(torch.randint(preset.block, (1,), generator=generator))
        count = (tokens.numel() - offset) // preset.block
        blocks = tokens[offset : offset + count * preset.block].view(count, preset.block)
        order = torch.randperm(count, generator=generator).to(tokens.device)
        for rows in order.split(preset.batch_blocks):
            if len(rows) == preset.batch_blocks:  # one shape, one compiled graph
                yield blocks[rows].long()


@torch.no_grad()
def held_out_loss(model: Any, tokens: torch.Tensor, block: int) -> float:
    """Mean next-token loss in nats over all full blocks of the held-out text, in the model's precision."""
    count = tokens.numel() // block
    total = 0.0
    for rows in tokens[: count * block].view(count, block).split(16):
        logits = model(input_ids=rows.long(), use_cache=False).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].long().flatten(), reduction="sum"))
    return total / (count * (block - 1))


def make_optimizer(model: torch.nn.Module, preset: Preset, cuda: bool) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": preset.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=preset.learning_rate, betas=(0.9, 0.95), fused=cuda)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, preset: Preset, args: Any) -> dict:
    """Train in place; the model ends with the weights of its best evaluation. Returns the history.

    A stop, by Ctrl-C, SIGTERM or the time limit, loses nothing: what is best so far is kept and saved.
    """
    cuda = tokens.is_cuda
    step_tokens = preset.block * preset.batch_blocks
    steps = args.steps or max(1, round(args.epochs * tokens.numel() / step_tokens))
    optimizer = make_optimizer(model, preset, cuda)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=cuda):
            return model(input_ids=rows, labels=rows, use_cache=False).loss

    step_loss = torch.compile(loss_of) if args.compile else loss_of
    stream = batches(tokens, preset, torch.Generator().manual_seed(args.seed))
    history: list[dict[str, float]] = []
    best: dict[str, Any] = {"loss": math.inf, "step": 0, "weights": {}}
    start, step, progress, evaluated_at = time.monotonic(), 0, 0.0, 0
    window = torch.zeros((), device=tokens.device)
    try:
        while step < steps and progress < 1.0:
            warm = min(1.0, (step + 1) / min(preset.warmup_steps, max(1, steps // 4)))
            for group in optimizer.param_groups:
                group["lr"] = preset.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
            loss = step_loss(next(stream))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            window += loss.detach()
            step += 1
            if step == 1:  # compilation is over: the time that is left is for training
                loss.item()
                start = time.monotonic()
            progress = max(step / steps, time_fraction(start, args.deadline))
            if progress >= min(1.0, (len(history) + 1) / preset.evaluations):
                running = float(window) / (step - evaluated_at)
                evaluated_at = step
                window.zero_()
                with torch.autocast(tokens.device.type, torch.bfloat16, enabled=cuda):
                    evaluated = held_out_loss(model, held_out, preset.block)
                if not math.isfinite(running + evaluated):
                    raise SystemExit(f"step {step}: the loss is not finite; lower --learning-rate. Nothing written.")
                seconds = time.monotonic() - start
                rate = (step - 1) * step_tokens / max(seconds, 1e-9)
                history.append({"step": step, "train": running, "held_out": evaluated, "seconds": round(seconds, 2)})
                print(f"step {step}/{steps}  train {running:.4f}  held-out {evaluated:.4f}  {rate / 1e3:.0f}k tokens/s")
                if evaluated < best["loss"]:
                    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
                    best = {"loss": evaluated, "step": step, "weights": weights}
    except KeyboardInterrupt:
        print(f"interrupted at step {step}: saving what is best so far")
    if best["weights"]:
        model.load_state_dict(best["weights"])
    return {"history": history, "steps": step, "best_step": best["step"], "tokens_seen": step * step_tokens}


def time_fraction(start: float, deadline: float | None) -> float:
    return 0.0 if deadline is None else min(1.0, (time.monotonic() - start) / max(1e-9, deadline - start))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.bfloat16().save_pretrained(out)
    GenerationConfig(bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID).save_pretrained(out)
    tokenizer.save_pretrained(out)


CARD = """\
---
language: code
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
---
# A small Llama trained on Python's standard library

{parameters:,} parameters: {layers} layers, hidden {hidden}, {heads} query heads and {kv_heads} key/value heads of
{head_dim}, byte-level BPE with {vocab} tokens, tied embeddings, bf16. `examples/train_teacher.py` trained it from
scratch, so that the examples have a real pretrained Transformer to convert where no hub can be reached. It completes
Python code; it is no assistant.

    model = AutoModelForCausalLM.from_pretrained("examples/teacher")

| | |
| --- | --- |
| held-out loss | **{loss:.4f} nats a token**, perplexity **{perplexity:.3f}** |
| held-out text | {held_out_tokens:,} tokens in blocks of {block}, fp32; {bits_per_byte:.4f} bits a byte |
| training text | {sources}: {train_bytes:,} bytes, {train_tokens:,} tokens |
| tokens seen | {tokens_seen:,} in {steps} steps of {batch_tokens:,} ({epochs:.1f} epochs) |
| weights | of step {best_step}, the best of {evaluations} held-out evaluations, which favours the loss a little |
| held out, never trained on | {held_out_names} |
| made with | Python {python}, torch {torch}, transformers {transformers}, {device}, {seconds:.0f} s in all |

The held-out packages' own tests are left out of training too. The loss is measured on the saved bf16 weights, loaded
again by `AutoModelForCausalLM` in fp32. `training.json` holds the settings and the loss along the way.

Licence: the standard library is © Python Software Foundation, under the Python Software Foundation License version 2;
other sources, where any is named above, keep their own.
"""


def write_card(out: Path, facts: dict[str, Any]) -> None:
    (out / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def sample(model: Any, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="small")
    parser.add_argument("--source", action="append", help="training text, repeatable (default: stdlib)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="time limit of the whole run; the learning rate decays in time")
    parser.add_argument("--epochs", type=float, help="passes over the text (default: the preset's)")
    parser.add_argument("--steps", type=int, help="steps, instead of epochs")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--weight-decay", type=float, help="default: the preset's")
    parser.add_argument("--batch-blocks", type=int, help="sequences a step (default: the preset's)")
    parser.add_argument("--limit-bytes", type=int, help="read only so much text, for a trial")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.out.exists() and any(args.out.iterdir()) and not args.overwrite:
        parser.error(f"{args.out} is not empty: give another --out, or --overwrite")
    args.out.mkdir(parents=True, exist_ok=True)
    args.source = args.source or ["stdlib"]
    args.compile = args.device.startswith("cuda") if args.compile is None else args.compile
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    begin = time.monotonic()
    args = parse(argv)
    changes = {name: getattr(args, name) for name in ("learning_rate", "weight_decay", "batch_blocks", "epochs")}
    preset = dataclasses.replace(PRESETS[args.preset], **{k: v for k, v in changes.items() if v is not None})
    args.epochs = preset.epochs
    # The last twentieth of a limited run is for saving, reloading and measuring.
    args.deadline = None if args.minutes is None else begin + 57 * args.minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    texts = read_texts(args.source, "train", args.limit_bytes)
    eval_texts = read_texts(args.source[:1], "eval", args.limit_bytes)
    tokenizer = train_tokenizer(texts, preset)
    tokens = token_stream(texts, tokenizer).to(args.device, torch.int32)
    held_out = token_stream(eval_texts, tokenizer).to(args.device, torch.int32)
    train_bytes, eval_bytes = (
        sum(len(t.encode("utf-8", "surrogatepass")) for t in part) for part in (texts, eval_texts)
    )
    if tokens.numel() < preset.block * (preset.batch_blocks + 1) or held_out.numel() < preset.block:
        raise DataError(
            f"{tokens.numel()} training and {held_out.numel()} held-out tokens: too few for batches of "
            f"{preset.batch_blocks} blocks of {preset.block} tokens"
        )
    model = make_model(preset).to(args.device)  # type: ignore[arg-type]
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters; {tokens.numel():,} training tokens of {train_bytes / tokens.numel():.2f} bytes, "
        f"{held_out.numel():,} held out; {time.monotonic() - begin:.0f} s so far"
    )

    done = train(model, tokens, held_out, preset, args)
    save(model, tokenizer, args.out)
    del model
    torch.set_float32_matmul_precision("highest")
    loaded = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device).eval()
    loss = held_out_loss(loaded, held_out, preset.block)
    facts = dataclasses.asdict(preset) | done | {
        "preset": args.preset,
        "parameters": parameters,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) * held_out.numel() / eval_bytes,
        "held_out_tokens": held_out.numel() // preset.block * preset.block,
        "sources": ", ".join(describe(source) for source in args.source),
        "train_bytes": train_bytes,
        "train_tokens": tokens.numel(),
        "batch_tokens": preset.block * preset.batch_blocks,
        "epochs": done["tokens_seen"] / tokens.numel(),
        "held_out_names": held_out_names(args.source[0]),
        "seed": args.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
        "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip
    write_card(args.out, facts)
    print(
        f"held-out loss {loss:.4f}, perplexity {facts['perplexity']:.3f}; {facts['seconds']} s; written to {args.out}"
    )
    print("--- greedy sample\n" + sample(loaded, AutoTokenizer.from_pretrained(args.out), "def parse_"))
    return facts


def held_out_names(source: str) -> str:
    return ", ".join(HELD_OUT) if source.startswith("stdlib") else "5% of the documents, chosen by hash"


def describe(source: str) -> str:
    """How the card names a source: no local path in it."""
    kind, _, folder = source.partition(":")
    if kind == "stdlib":
        version = Path(folder).name if folder else f"python{platform.python_version()}"
        return f"Python standard library ({version})"
    return Path(source).name if Path(source).exists() else source


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
