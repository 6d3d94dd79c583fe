"""What must hold for every mixer, as functions of its class: each raises AssertionError, or returns what it measured.

Layers are those of the papers, with all parameters moved away from their neutral start. Written once for the table
(`bench.mixers`) and for the tests.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import fla_swap as fs
from fla_swap.bench.tiny_configs import tiny_config
from fla_swap.distillation.calibration import calibrate
from fla_swap.distillation.config import CalibrationConfig
from fla_swap.mixers import Softmax, State, TokenMixer

Kind = type[TokenMixer]
HIDDEN, HEADS, VOCAB = 32, 2, 61
TIME = 70
"""More than a chunk of the operators."""
ANGLES = 1e-5
"""Rotary angles are made in fp32: the same distance between other positions."""
MARGIN = 0.1
STEPS, BATCH, LENGTH, RATE = 60, 8, 64, 5e-3


class NotApplicable(Exception):
    """This check says nothing about this mixer; the message says why."""


def layer(kind: Kind, dtype: torch.dtype = torch.float64, **options: Any) -> TokenMixer:
    """The paper's layer, small, the same every time."""
    torch.manual_seed(0)
    shared = {"hidden_size": HIDDEN, "num_heads": HEADS, "layer": 1, "num_layers": 3}
    mixer = kind(kind.config_class.paper(**shared, **options)).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def tokens(time: int = TIME, rows: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, time, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(1))


def close(a: Any, b: Any, tolerance: float = 1e-6) -> None:
    assert_close(a, b, rtol=tolerance, atol=tolerance)


def rows_of(state: State, row: int) -> State:
    return {name: tensor[row : row + 1].clone() for name, tensor in state.items()}


def with_state(kind: Kind) -> None:
    if kind.uses_kv_cache:
        raise NotApplicable("its keys and values are in the model's cache")


@contextmanager
def looped() -> Iterator[int]:
    """While open, every operator of a mixer runs as its reference, a plain loop over time; yields their number."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("fla_swap.mixers.")]
    found = [(m, n, v) for m in modules for n, v in vars(m).items() if _is_operator(v)]
    for module, name, value in found:
        setattr(module, name, functools.partial(value, implementation="reference"))
    try:
        yield len(found)
    finally:
        for module, name, value in found:
            setattr(module, name, value)


def _is_operator(value: Any) -> bool:
    return inspect.isfunction(value) and "implementation" in inspect.signature(value).parameters


def operator(kind: Kind) -> str:
    """Output, state and every gradient of the chunked operator are those of a plain loop over time."""
    with_state(kind)
    mixer, x = layer(kind), tokens().requires_grad_()
    readout = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))

    def run() -> tuple[Tensor, State, tuple[Tensor, ...]]:
        y, state = mixer(x, output_state=True)
        assert state is not None
        trained = [p for p in mixer.parameters() if p.requires_grad]
        return y, state, torch.autograd.grad((y * readout).sum(), [x, *trained])

    chunked = run()
    with looped() as operators:
        assert operators
        loop = run()
    close(chunked, loop)
    return f"{max((a - b).abs().max().item() for a, b in zip(chunked[2], loop[2], strict=True)):.0e}"


@torch.no_grad()
def chunks(kind: Kind) -> str:
    """One call, pieces and single tokens agree; the state keeps its size and its addresses."""
    with_state(kind)
    mixer, x = layer(kind), tokens()
    whole, last = mixer(x, output_state=True)
    assert last is not None
    for sizes in ((41, 29), (1, 64, 1, 1, 1, 1, 1)):
        state = mixer.init_state(2, device=x.device, dtype=x.dtype)
        places = {name: tensor.data_ptr() for name, tensor in state.items()}
        close(torch.cat([mixer(piece, state=state)[0] for piece in x.split(sizes, 1)], 1), whole)
        close(state, last)
        assert places == {name: tensor.data_ptr() for name, tensor in state.items()}
    return f"{sum(t[0].numel() * 4 for t in last.values()) / 1024:.1f} kB"


@torch.no_grad()
def padding(kind: Kind) -> str:
    """Left padding, full of garbage, changes nothing; documents that start inside a row see nothing before."""
    mixer, x = layer(kind), tokens()
    valid = torch.ones(2, TIME, dtype=torch.bool)
    valid[0, :9] = False
    padded = torch.where(valid[..., None], x, 100.0)
    y, _ = mixer(padded, valid=valid)
    close(y[:1, 9:], mixer(x[:1, 9:])[0], ANGLES)
    close(y[1:], mixer(x[1:])[0])
    starts = torch.zeros(2, TIME, dtype=torch.bool)
    starts[0, 30], starts[1, [5, 66]] = True, True
    y, _ = mixer(x, starts=starts)
    close(y[:1, 30:], mixer(x[:1, 30:])[0], ANGLES)
    close(y[1:, 5:66], mixer(x[1:, 5:66])[0], ANGLES)
    return "ok"


@torch.no_grad()
def packed(kind: Kind) -> str:
    """Documents end to end in one row are the documents apart, an empty one and rows after the last included."""
    mixer, x = layer(kind), tokens()
    line = torch.cat((x[:1, :50], x[1:, :67], x[:1, :3]), 1)
    borders = torch.tensor([0, 50, 50, 117])
    y, state = mixer(line, cu_seqlens=borders, output_state=not kind.uses_kv_cache)
    apart = [mixer(part, output_state=not kind.uses_kv_cache) for part in (x[:1, :50], x[1:, :67])]
    close(y[:, :117], torch.cat([part for part, _ in apart], 1), ANGLES)
    if state is not None:
        for row, (_, alone) in ((0, apart[0]), (2, apart[1])):
            close(rows_of(state, row), alone)
    return "ok"


def gradients(kind: Kind) -> str:
    """Of every parameter and the input, against finite differences along a random direction."""
    mixer, x = layer(kind), tokens(9).requires_grad_()
    readout = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    named = {"hidden_states": x, **{n: p for n, p in mixer.named_parameters() if p.requires_grad}}

    def loss() -> Tensor:
        return (mixer(x)[0] * readout).sum()

    found = torch.autograd.grad(loss(), list(named.values()))
    torch.manual_seed(3)
    step, worst = 1e-5, 0.0
    for (name, tensor), gradient in zip(named.items(), found, strict=True):
        direction = torch.randn_like(tensor)
        with torch.no_grad():
            tensor.add_(step * direction)
            above = loss()
            tensor.sub_(2 * step * direction)
            below = loss()
            tensor.add_(step * direction)
        expected, got = (above - below) / (2 * step), (gradient * direction).sum()
        assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        worst = max(worst, ((got - expected).abs() / (1 + expected.abs())).item())
    return f"{worst:.0e}"


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


def compiled(kind: Kind, backend: str = "aot_eager") -> str:
    """The layer as one graph: forward, backward, and a decode step that keeps its addresses."""
    torch._dynamo.reset()
    mixer, own = layer(kind, torch.float32), layer(kind, torch.float32)
    x = tokens(9, dtype=torch.float32)
    fast = torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
    for module in (mixer, fast):
        module(x)[0].pow(2).sum().backward()
    for (name, a), b in zip(mixer.named_parameters(), own.parameters(), strict=True):
        if a.grad is not None:
            assert b.grad is not None, name
            assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3 * max(a.grad.abs().max().item(), 1e-3), msg=name)
    if kind.uses_kv_cache:
        return backend
    with torch.no_grad():
        _, state = mixer(x, output_state=True)
        assert state is not None
        mine = {name: tensor.clone() for name, tensor in state.items()}
        places = {name: tensor.data_ptr() for name, tensor in mine.items()}
        for token in x[:, :3].split(1, 1):
            close(fast(token, state=mine)[0], mixer(token, state=state)[0], 1e-4)
        close(mine, state, 1e-4)
        assert places == {name: tensor.data_ptr() for name, tensor in mine.items()}
    return backend


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


CHECKS: dict[str, Callable[[Kind], str]] = {
    "operator = loop": operator,
    "layer": chunks,
    "padding, documents": padding,
    "packed = separate": packed,
    "gradients": gradients,
    "swap": swap,
    "calibrate": calibrated,
    "from scratch": scratch,
    "generate": generate,
    "save, load": saved,
    "compile: layer": compiled,
    "compile: model": compiled_model,
    "training": training,
}
SLOW = ("compile: model",)
"""What tests run only when asked for slow ones."""
