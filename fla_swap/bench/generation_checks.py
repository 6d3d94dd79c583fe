"""Generation with a state against generation without: every mixer, alone, mixed with softmax, and by every search.

Each function takes a mixer's class and raises AssertionError, or returns what it saw. Models are those of
`model_checks.model_of`: one whose layers are all of that mixer, and one whose second layer is softmax attention.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import fla_swap as fs
from fla_swap.bench.layer_checks import Kind, NotApplicable
from fla_swap.bench.model_checks import model_of, prompt, softmax_model
from fla_swap.cache import StateLayer
from fla_swap.mixers import Softmax, mixer_class
from fla_swap.mixers.base import is_quantised

NEW = 10
PADDING = 4
STACKS: dict[str, dict[str, Any]] = {"all": {}, "mixed": {"attn": {"layers": [1]}}}
"""Options of the model: every layer of the mixer; softmax attention in the second."""


@functools.lru_cache(maxsize=2 * len(STACKS))
def _model(name: str, stack: str) -> Any:
    return model_of(mixer_class(name), **STACKS[stack])


def model_in(kind: Kind, stack: str) -> Any:
    return _model(kind.name, stack)


def models(kind: Kind) -> Iterator[Any]:
    for stack in STACKS:
        if not (kind is Softmax and stack == "mixed"):
            yield model_in(kind, stack)


@torch.no_grad()
def tokens_of(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """The generated ids [B, T + NEW], always with the same random numbers."""
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": NEW, "do_sample": False, **options})


def padded() -> tuple[Tensor, Tensor]:
    """Two prompts [2, 11], the first with four tokens of padding on the left."""
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return ids, mask


def search(kind: Kind, cached: dict[str, Any] | None = None, **options: Any) -> str:
    """One search with and without a cache; `cached`: further arguments of the former alone."""
    seen = []
    for model in models(kind):
        ids, mask = padded()
        expected = tokens_of(model, ids, mask, use_cache=False, **options)
        assert torch.equal(tokens_of(model, ids, mask, **options, **(cached or {})), expected)
        seen.append(expected[:, ids.shape[1] :].unique().numel())
    assert max(seen) > 2, f"{seen} different tokens prove little"
    return "/".join(map(str, seen))


def greedy(kind: Kind) -> str:
    """Greedy, left-padded."""
    return search(kind)


def sampled(kind: Kind) -> str:
    """Sampling, two sequences for each prompt, the same random numbers."""
    return search(kind, do_sample=True, num_return_sequences=2)


def beams(kind: Kind) -> str:
    """Three beams, whose states are reordered at every step; all three returned."""
    return search(kind, num_beams=3, num_return_sequences=3)


def static(kind: Kind) -> str:
    """A static cache: states and keys at fixed addresses."""
    return search(kind, {"cache_implementation": "static"})


def pieces(kind: Kind) -> str:
    """The prompt read in pieces of four tokens."""
    return search(kind, {"prefill_chunk_size": 4})


def padding(kind: Kind) -> str:
    """Each row of a left-padded batch as that prompt alone."""
    for model in models(kind):
        ids, mask = padded()
        batch = tokens_of(model, ids, mask)
        assert torch.equal(batch[0, PADDING:], tokens_of(model, ids[:1, PADDING:])[0])
        assert torch.equal(batch[1], tokens_of(model, ids[1:])[0])
    return "ok"


def lookup(kind: Kind) -> str:
    """Prompt lookup: guesses from the prompt, and the state rolled back behind the wrong ones."""
    for model in models(kind):
        ids = prompt()[1:]
        options: dict[str, Any] = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
        assert torch.equal(tokens_of(model, ids, **options), tokens_of(model, ids, use_cache=False))
    return "ok"


def assisted(kind: Kind) -> str:
    """Guesses of another model, whose state rolls back too: it is the stack with softmax that helps the other."""
    assistant = model_in(kind, "all" if kind is Softmax else "mixed")
    for model in models(kind):
        ids = prompt()[1:]
        assert torch.equal(tokens_of(model, ids, assistant_model=assistant), tokens_of(model, ids, use_cache=False))
    return "ok"


@torch.no_grad()
def offloaded(kind: Kind) -> str:
    """Every layer's state moved away and back after every token."""
    for model in models(kind):
        ids = prompt()
        expected = tokens_of(model, ids, use_cache=False)
        cache = DynamicCache(config=model.config)
        token = ids
        for step in range(NEW):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            assert torch.equal(token[:, 0], expected[:, ids.shape[1] + step])
            for layer in cache.layers:
                layer.offload()
                layer.prefetch()
    return "ok"


@torch.no_grad()
def forked(kind: Kind) -> str:
    """A prefix read once and saved, loaded, and gone on from by two forks, as from the whole text."""
    for model in models(kind):
        ids = prompt(16)[:1]
        expected = tokens_of(model, ids)
        prefix = fs.state(model, ids[:, :9])
        with tempfile.TemporaryDirectory() as folder:
            loaded = fs.load_state(prefix.save(Path(folder, "prefix.safetensors")), model)
        for state in (prefix, loaded):
            assert torch.equal(tokens_of(model, ids, past_key_values=state.fork()), expected)
    return "ok"


@torch.no_grad()
def constant(kind: Kind) -> str:
    """Bytes of the state, the same after 100 and 1,000 tokens, of a model whose layers are all of this mixer."""
    model = model_in(kind, "all")
    if kind.uses_kv_cache:
        raise NotApplicable("its keys and values are in the model's cache")
    short, long = (_state_bytes(model, prompt(tokens)) for tokens in (100, 1000))
    assert short == long, f"{short} bytes, {long} bytes"
    return f"{short / 1000:.1f} kB"


def _state_bytes(model: Any, ids: Tensor) -> int:
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)
    return fs.state(model, ids).bytes()


def _equal_compiled(model: Any) -> None:
    torch._dynamo.reset()
    (ids, mask), options = padded(), {"repetition_penalty": 1.3}
    expected = tokens_of(model, ids, mask, **options)
    fs.compile(model, backend="eager")
    assert torch.equal(tokens_of(model, ids, mask, **options), expected)


def compiled(kind: Kind) -> str:
    """`fs.compile`: greedy, left-padded, with processors on the device; equal to the uncompiled model."""
    for model in models(kind):
        _equal_compiled(copy.deepcopy(model))
    return "eager backend"


def formats() -> dict[str, Any]:
    """torchao's weight-only formats by name."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis

    int4 = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, "int4"),  # noqa: B009 - made by torch at run time
        granularity=PerAxis(0),
    )
    return {"int8": Int8WeightOnlyConfig(), "fp8": Float8WeightOnlyConfig(), "int4": int4}


@torch.no_grad()
def quantised(kind: Kind) -> str:
    """Saved, loaded as int8, fp8, int4 (`TorchAoConfig`): with a cache as without, saved and loaded again bitwise.

    Shown: the change of the logits of a random model. Every linear map's error is that of rounding its weights.
    """
    from transformers import TorchAoConfig

    model, (ids, mask) = model_in(kind, "all" if kind is Softmax else "mixed"), padded()
    before, seen = model(ids).logits, []
    for name, config in formats().items():
        with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as small:
            model.save_pretrained(plain)
            loaded = AutoModelForCausalLM.from_pretrained(plain, quantization_config=TorchAoConfig(config))
            after = loaded(ids).logits
            assert torch.equal(tokens_of(loaded, ids, mask), tokens_of(loaded, ids, mask, use_cache=False)), name
            loaded.save_pretrained(small)
            assert torch.equal(AutoModelForCausalLM.from_pretrained(small)(ids).logits, after), name
        linear = [m for n, m in loaded.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        left = sum(not is_quantised(m.weight) for m in linear)
        assert linear and not left, f"{name}: {left} of {len(linear)} linear maps were left as they are"
        seen.append(f"{name} {(after - before).norm() / before.norm():.1%}")
    return ", ".join(seen)


@functools.cache
def _padded_report() -> fs.AttentionReport:
    """Of a model that is called with a mask too."""
    return fs.inspect(softmax_model()[0])


def _unquantised(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and not is_quantised(module.weight)


@torch.no_grad()
def swapped_quantised(kind: Kind) -> str:
    """Quantised to int8 before the swap and after it: the same function, with a cache as without, and compiled."""
    from torchao.quantization import quantize_

    original, _, ids, _ = softmax_model()
    after = fs.swap_(copy.deepcopy(original), fs.plan(_padded_report(), mixer=kind.name, keep=[0]))
    before = copy.deepcopy(original)
    quantize_(before, formats()["int8"])
    fs.swap_(before, fs.plan(fs.inspect(before), mixer=kind.name, keep=[0]))
    for model in (before, after):
        quantize_(model, formats()["int8"], filter_fn=_unquantised)
        assert torch.equal(tokens_of(model, ids), tokens_of(model, ids, use_cache=False))
    difference = (before(ids).logits - after(ids).logits).norm() / after(ids).logits.norm()
    assert difference < 0.02, f"{difference:.1%}"
    _equal_compiled(after)
    return f"{difference:.2%} apart"


CHECKS: dict[str, Callable[[Kind], str]] = {
    "greedy": greedy,
    "sampling × 2": sampled,
    "3 beams": beams,
    "left padding": padding,
    "static cache": static,
    "prefill in pieces": pieces,
    "prompt lookup": lookup,
    "assisted": assisted,
    "offload": offloaded,
    "fork, save": forked,
    "state bytes": constant,
    "quantised": quantised,
    "swap, quantised": swapped_quantised,
    "compiled": compiled,
}
SLOW = ("swap, quantised", "compiled")
