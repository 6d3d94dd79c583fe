"""Compile a hybrid (whole graphs, no breaks; a CUDA graph per decode step on a GPU) and generate with it.

    python examples/compile_and_run.py --model out/demo

A model that was not converted yet is swapped on the fly, untrained: its speed is that of a hybrid, its text is not.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoTokenizer

import fla_swap as fs

PROMPTS = ["def read_config(path):", "class Server:\n    def __init__(self, host, port):"]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/teacher", help="a converted model, or one to swap on the fly")
    parser.add_argument("--mixer", default="gated_deltanet", help="the mixer, when it is swapped on the fly")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate for each prompt")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)

    # On a CPU, float32 is the faster type; on a GPU the model's own (None).
    model: Any = fs.load(args.model, dtype=torch.float32 if args.device == "cpu" else None, device=args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not hasattr(model.config, "fla_swap"):
        fs.swap_(model, fs.plan(fs.inspect(model), mixer=args.mixer, keep="1/4"))
        print("swapped on the fly, not trained: expect its speed, not its text")

    # Prompts of different lengths are padded on the left, so that all of them end where the new tokens begin.
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    one = tokenizer(PROMPTS[:1], return_tensors="pt", return_token_type_ids=False).to(args.device)
    both = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False).to(args.device)
    length: dict[str, Any] = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}

    with torch.no_grad():
        expected = model.generate(**one, **length, do_sample=False)
        # In place: `generate` is called as before. The first call of each kind compiles, the next ones are fast.
        fs.compile(model, backend=args.backend)
        begin = time.perf_counter()
        greedy = model.generate(**one, **length, do_sample=False)
        print(f"compiled in {time.perf_counter() - begin:.1f} s")
        begin = time.perf_counter()
        greedy = model.generate(**one, **length, do_sample=False)
        speed = args.new_tokens / (time.perf_counter() - begin)
        torch.manual_seed(0)
        sampled = model.generate(**one, **length, do_sample=True, temperature=0.8, top_p=0.95)
        batch = model.generate(**both, **length, do_sample=False)

    same = bool((greedy == expected).all())
    print(f"greedy, {speed:.1f} tokens/s, {'the same' if same else 'not the same'} tokens as before compiling:")
    print(tokenizer.decode(greedy[0]))
    print("sampled:", tokenizer.decode(sampled[0]), sep="\n")
    for row in batch:
        print("batched:", tokenizer.decode(row, skip_special_tokens=True), sep="\n")
    return {"tokens_per_second": speed, "same": same, "greedy": greedy, "sampled": sampled, "batch": batch}


if __name__ == "__main__":
    main()
