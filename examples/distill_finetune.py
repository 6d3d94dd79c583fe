"""Teach a hybrid what its original knows, then fine-tune it on text of your own, with transformers' own Trainer.

    python examples/distill_finetune.py --model examples/teacher --text notes/ --steps 200 --out out/tuned

`--data` is what the hybrid learns the original's behaviour on; the more it looks like the original's training data, the
better. `--text` (a file or a folder) is what it is fine-tuned on afterwards.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

import fla_swap as fs
from fla_swap.distillation.data import load_blocks


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/teacher", help="folder or hub id of the original")
    parser.add_argument("--mixer", default="gated_deltanet", help="what replaces the attention")
    parser.add_argument("--data", default="stdlib", help="text to distil on: a file, a folder or a dataset id")
    parser.add_argument("--text", default="examples", help="text to fine-tune on: a file or a folder")
    parser.add_argument("--steps", type=int, default=20, help="steps of each of the three stages")
    parser.add_argument("--block-size", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a step")
    parser.add_argument("--max-tokens", type=int, default=200_000, help="read no more text than this")
    parser.add_argument("--out", default="out/tuned", help="folder for the result")
    args = parser.parse_args(arguments)

    model: Any = fs.load(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sizes: dict[str, Any] = {"limit_tokens": args.max_tokens}
    train = load_blocks(args.data, tokenizer, args.block_size, split="train", **sizes)
    held_out = load_blocks(args.data, tokenizer, args.block_size, split="eval", **sizes).blocks[:16]

    # Swap three quarters of the layers, then distil: first each layer against its original (cheap, and it fixes most),
    # then the whole model against the original's predictions. The stages of a real run take minutes, not a few
    # steps: StageConfig(kind="distil", minutes=60, ...), and `output_dir=` makes it resumable.
    fs.swap_(model, fs.plan(fs.inspect(model), mixer=args.mixer, keep="1/4"))
    common: dict[str, Any] = {"steps": args.steps, "batch_size": args.batch_size}
    stages = (
        fs.StageConfig(kind="align", learning_rate=5e-4, **common),
        fs.StageConfig(kind="distil", train="all", learning_rate=2e-4, rest_learning_rate=5e-5, **common),
    )
    calibration = fs.CalibrationConfig(sequences=8)
    result = fs.distill(model, train, fs.DistillConfig(calibrate=calibration, stages=stages), eval_blocks=held_out)
    for moment, loss in result.losses.items():
        print(f"{moment}: {loss:.3f} nats a token on held-out text")

    # A hybrid is an ordinary transformers model: fine-tuning it needs nothing of fla_swap.
    own = load_blocks(args.text, tokenizer, args.block_size, split="train", **sizes).blocks
    rows = [{"input_ids": row, "labels": row} for row in own]
    before = fs.held_out_loss(model, own[:8])
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"max_steps": args.steps, "per_device_train_batch_size": args.batch_size}
        silent: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "dataloader_pin_memory": False}
        trainer = Trainer(
            model=model,
            args=TrainingArguments(folder, learning_rate=3e-4, seed=0, **settings, **silent),
            train_dataset=rows,  # type: ignore[arg-type]
        )
        trainer.train()
    after = fs.held_out_loss(model, own[:8])
    print(f"the text it was tuned on: {before:.3f} before, {after:.3f} after")

    fs.save(model, args.out, tokenizer=tokenizer)
    print(f"saved to {args.out}")
    return {**result.losses, "tuned from": before, "tuned to": after}


if __name__ == "__main__":
    main()
