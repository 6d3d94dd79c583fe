"""What must hold for models of every mixer, swapped and from scratch; see `mixer_checks`."""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fla_swap as fs
from fla_swap.bench.layer_checks import HEADS, HIDDEN, Kind, NotApplicable, close
from fla_swap.bench.tiny_configs import tiny_config
from fla_swap.distillation.calibration import calibrate
from fla_swap.distillation.config import CalibrationConfig
from fla_swap.mixers import Softmax, TokenMixer

VOCAB = 61
MARGIN = 0.1
STEPS, BATCH, LENGTH, RATE = 60, 8, 64, 5e-3


@functools.cache
def softmax_model() -> tuple[Any, Any, Tensor, Tensor]:
    """A small pretrained-like model, its report, token ids and its logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    ids = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, fs.inspect(model, {"input_ids": ids}), ids, model(ids).logits


@torch.no_grad()
def swap(kind: Kind) -> str:
    """The site's projections arrive unchanged; softmax changes nothing; the original comes back bitwise."""
    original, report, ids, before = softmax_model()
    model = copy.deepcopy(original)
    windowed = kind.config_class.from_options({}).to_options().get("window") is not None
    config = kind.config_class.from_options({"window": 5} if windowed else {})
    fs.swap_(model, fs.plan(report, mixer=config, keep=0))
    after = model(ids).logits
    for site in report.sites:
        mixer = model.get_submodule(site.fqn).mixer
        assert type(mixer) is kind
        for own in ("q_proj", "v_proj", "o_proj"):
            _arrived(mixer, own, original.get_submodule(site.fqn).get_parameter(f"{own}.weight"))
    difference = (after - before).abs().max().item()
    assert after.isfinite().all() and (difference < 1e-5 if kind is Softmax else difference > 1e-6), difference
    fs.restore_(model)
    assert torch.equal(model(ids).logits, before)
    return f"{len(report.sites)} layers"


def _arrived(mixer: TokenMixer, name: str, weight: Tensor) -> None:
    """That every row of the original's projection is a row of the mixer's."""
    own = getattr(mixer, name, None)
    if own is None:
        return
    rows = {tuple(row.tolist()) for row in own.weight}
    assert all(tuple(row.tolist()) in rows for row in weight), f"{name} does not hold the site's weight"


def calibrated(kind: Kind) -> str:
    """Fitted to data before training: no layer's error against its attention rises by 1%, some fall (worst shown).

    None need fall where all start below 1e-4.
    """
    if not kind.calibratable:
        raise NotApplicable("nothing to fit: it starts as the attention that it replaces, or has no gates")
    original, report, _, _ = softmax_model()
    model = copy.deepcopy(original)
    fs.swap_(model, fs.plan(report, mixer=kind.name, keep=0))
    text = torch.randint(1, 50, (4, 64), generator=torch.Generator().manual_seed(0))
    layers = calibrate(model, text, CalibrationConfig())
    assert all(layer.after <= 1.01 * layer.before for layer in layers), layers
    assert any(layer.kept for layer in layers) or all(layer.before < 1e-4 for layer in layers), layers
    worst = max(layers, key=lambda layer: layer.after)
    return f"{worst.before:.2g} → {worst.after:.2g}"


def model_of(kind: Kind, **options: Any) -> Any:
    """A two-layer model from scratch, weights large enough for its tokens to vary."""
    torch.manual_seed(0)
    config = fs.HybridConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        mixer=kind.name,
        num_heads=HEADS,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def prompt(length: int = 11) -> Tensor:
    return torch.randint(1, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def scratch(kind: Kind) -> str:
    """A model of such layers: finite logits and a gradient in every parameter."""
    model, ids = model_of(kind), prompt(24)
    model.train()
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    assert out.logits.isfinite().all()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not dead, dead
    return f"{sum(p.numel() for p in model.parameters()) / 1000:.0f}k"


@torch.no_grad()
def generate(kind: Kind) -> str:
    """Greedy, left-padded, beams, a static cache, prompt lookup (rolls back): with the cache as without one."""
    model, ids = model_of(kind), prompt()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options), expected), "greedy"
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), expected), "static"
    single = {**options, "attention_mask": None}
    alone = model.generate(ids[:1, 4:], **single)
    assert torch.equal(alone[0], expected[0, 4:]), "padded against alone"
    lookup = model.generate(ids[1:], **single, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert torch.equal(lookup, expected[1:]), "prompt lookup"
    options["num_beams"] = 3
    beams = model.generate(ids, **options)
    assert torch.equal(beams, model.generate(ids, **options, use_cache=False)), "beams"
    kinds = expected[:, ids.shape[1] :].unique().numel()
    assert kinds > 3, f"{kinds} different tokens prove little"
    return f"{kinds} tokens"


@torch.no_grad()
def saved(kind: Kind) -> str:
    """Saved and loaded through the Auto classes, bitwise."""
    model, ids = model_of(kind), prompt()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(model) and torch.equal(again(ids).logits, model(ids).logits)
    return "bitwise"


@torch.no_grad()
def compiled_model(kind: Kind, backend: str = "aot_eager") -> str:
    """`fs.compile`: whole graphs for the forward and a left-padded `generate`, with the same logits and tokens."""
    torch._dynamo.reset()
    model, ids = model_of(kind), prompt()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    logits, expected = model(ids).logits, model.generate(ids, **options)
    fs.compile(model, backend=backend)
    close(model(ids).logits, logits, 1e-3)
    assert torch.equal(model.generate(ids, **options), expected)
    fs.uncompile(model)
    return backend


def training(kind: Kind) -> str:
    """A byte model of Python source, 60 steps: held-out loss at most 0.1 nats above that of softmax attention."""
    own, softmax = trained_loss(kind.name), trained_loss(Softmax.name)
    assert own <= softmax + MARGIN, f"{own:.3f} nats, softmax {softmax:.3f}"
    return f"{own:.2f} (softmax {softmax:.2f})"


@functools.cache
def trained_loss(name: str) -> float:
    """Held-out loss in nats a byte of a two-layer model after `STEPS` steps."""
    torch.manual_seed(0)
    config = fs.HybridConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, mixer=name, num_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    data = torch.tensor(list(inspect.getsource(argparse).encode("ascii", "replace")))
    border = len(data) * 9 // 10
    places = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 10) * (1 - step / STEPS)
        at = torch.randint(0, border - LENGTH, (BATCH,), generator=places)
        ids = torch.stack([data[i : i + LENGTH] for i in at])
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    held = torch.stack([data[i : i + LENGTH] for i in range(border, len(data) - LENGTH, LENGTH)])
    with torch.no_grad():
        return model.eval()(held, labels=held, use_cache=False).loss.item()
