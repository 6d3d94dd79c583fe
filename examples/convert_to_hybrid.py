"""Turn a pretrained Transformer into a hybrid: find its attention, prove it, choose layers, swap them, save.

    python examples/convert_to_hybrid.py --model examples/teacher --mixer gated_deltanet --keep 1/4 --out out/hybrid

The weights are carried over as far as they go, but nothing is trained here: `distill_finetune.py` does that.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fla_swap as fs


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/teacher", help="folder or hub id of a causal language model")
    parser.add_argument("--mixer", default="gated_deltanet", help="what replaces the attention")
    parser.add_argument("--keep", default="1/4", help='layers that stay: a fraction, "0,7", or 0')
    parser.add_argument("--out", default="out/hybrid", help="folder for the hybrid")
    args = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenizer("import os\n\n\ndef read(path):", return_tensors="pt")["input_ids"]
    original = logits(model, tokens)

    # 1. Inspect: every attention layer, as read from the model's graph, with the proof that it was read correctly.
    report = fs.inspect(model)
    for site in report.sites:
        shape = f"{site.heads} heads, {site.kv_heads} for keys and values, of {site.head_dim}"
        print(f"{site.fqn}: {shape}, {site.mask.kind}, rebuilt within {site.max_error:.0e}")

    # 2. What that proof means: with every layer replaced by attention rebuilt from the report, nothing changes.
    fs.swap_(model, fs.plan(report, mixer="softmax", keep=0))
    identity = float((logits(model, tokens) - original).abs().max())
    print(f"all {len(report.sites)} layers rebuilt: logits differ by {identity:.1e}")
    fs.restore_(model)

    # 3. Plan: which layers get the mixer, which stay. `rules=` names single layers; `fs.save_plan` writes it as JSON.
    plan = fs.plan(report, mixer=args.mixer, keep=args.keep)
    print(f"{args.mixer}: {[layer.site.layer for layer in plan.layers]}; kept: {list(plan.kept)}")

    # 4. Swap, in place. The model is still a transformers model: generate, Trainer, peft, save_pretrained.
    fs.swap_(model, plan)
    swapped = logits(model, tokens)
    print(f"swapped, before any training: logits differ by {float((swapped - original).abs().max()):.1e}")

    # 5. Save and load: `AutoModelForCausalLM` reads the folder after `import fla_swap`.
    fs.save(model, args.out, tokenizer=tokenizer)
    reloaded = AutoModelForCausalLM.from_pretrained(args.out).eval()
    reload = float((logits(reloaded, tokens) - swapped).abs().max())
    print(f"saved to {args.out}; reloaded, logits differ by {reload}")
    return {"identity": identity, "reload": reload}


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


if __name__ == "__main__":
    main()
