"""Small pretrained models as folders, with a tokenizer of bytes, and text: what a user's command starts from."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits

END, PAD = "<|end|>", "<|pad|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; 0 ends a text, 1 pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([END, PAD, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD)


def llama(layers: int = 4, seed: int = 0, **options) -> LlamaForCausalLM:
    """A Llama of some 40 thousand random weights, large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape["max_position_embeddings"] = 512
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = LlamaConfig(
        vocab_size=258,
        num_hidden_layers=layers,
        tie_word_embeddings=True,
        **{**shape, **ends, **options},
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def sentence(text: int, line: int) -> str:
    return f"line {line} of text {text} says {(text * line) % 7} and {'abc'[line % 3] * 5}.\n"


def teach(model: LlamaForCausalLM, steps: int = 150) -> LlamaForCausalLM:
    """Train on the lines of `save_text`, so that there is something to distil."""
    tokenizer = byte_tokenizer()
    rows = [tokenizer("".join(sentence(i, j) for j in range(3)))["input_ids"][:80] for i in range(64)]
    batches = torch.tensor(rows).split(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        batch = batches[step % len(batches)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def save_teacher(folder: Path, *, taught: bool = True, **options) -> Path:
    """A `llama` with its tokenizer, as a folder for `from_pretrained`."""
    model = llama(**options)
    (teach(model) if taught else model).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_text(folder: Path, files: int = 24) -> Path:
    """A folder of short texts with something to learn in them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        (folder / f"{i:02}.txt").write_text("".join(sentence(i, j) for j in range(40)), encoding="utf-8")
    return folder
