"""Exact rewrites of attention on a graph: the same values, no mask left, and a reason for whatever stays."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
)

import fla_swap as fs

WINDOW = 6
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gpt_oss": lambda: GptOssConfig(
        **SMALL, head_dim=8, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1
    ),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=WINDOW),
    "llama": lambda: LlamaConfig(**SMALL),
    "bloom": lambda: BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "llama4": lambda: Llama4TextConfig(
        **(SMALL | {"num_hidden_layers": 4}),
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=8,
        num_local_experts=2,
        moe_layers=[],
    ),
}
WINDOWED, FUSED = "fla_swap::window_attention_fwd", "scaled_dot_product_attention"


def build(family: str, implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=implementation).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def export(model: nn.Module, *, dynamic: bool = False, **inputs: torch.Tensor) -> torch.export.ExportedProgram:
    given = {"input_ids": tokens(2, 21), "use_cache": False, **inputs}
    sizes = None
    if dynamic:
        batch, time = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("time", min=2, max=4096)
        sizes = {"input_ids": {0: batch, 1: time}, "use_cache": None}
    return torch.export.export(model, (), given, dynamic_shapes=sizes, strict=False)


def square_tensors(program: torch.export.ExportedProgram) -> list[str]:
    """Nodes of the shape of scores or masks: the last two dimensions are the length."""
    length = next(n for n in program.graph.nodes if n.name == "input_ids").meta["val"].shape[1]
    found = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[-2] == value.shape[-1] == length:
            found.append(node.name)
    return found


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / a.detach().abs().max())


@pytest.mark.parametrize(
    ("family", "implementation", "replacements", "facts"),
    [
        ("gemma2", "eager", {WINDOWED}, {"mask": "window", "window": WINDOW, "softcap": 50.0, "groups": 2}),
        ("gpt_oss", "eager", {WINDOWED}, {"mask": "window", "window": WINDOW, "groups": 2}),
        ("mistral", "sdpa", {WINDOWED}, {"mask": "window", "window": WINDOW, "scale": 8**-0.5}),
        ("llama", "eager", {FUSED}, {"mask": "causal", "scale": 8**-0.5, "groups": 2}),
        ("bloom", "eager", {WINDOWED}, {"mask": "causal", "alibi": (2**-2.0, 2**-4.0, 2**-6.0, 2**-8.0)}),
        ("llama4", "sdpa", {WINDOWED, FUSED}, {"mask": "chunked", "window": 8}),
    ],
)
def test_attention_becomes_an_operator_and_the_mask_goes(family, implementation, replacements, facts):
    model = build(family, implementation)
    program = export(model)
    assert square_tensors(program)
    result = fs.rewrite(program, check=True)
    assert len(result.records) == model.config.num_hidden_layers and not result.skipped
    assert {r.replacement for r in result.records} == replacements
    assert facts.items() <= result.records[0].facts.items()
    assert not square_tensors(result.program)
    ids = tokens(2, 21)
    wanted = model(input_ids=ids, use_cache=False).logits
    assert difference(wanted, result.module()(input_ids=ids, use_cache=False).logits) < 1e-5


@pytest.mark.parametrize(("family", "implementation"), [("gemma2", "eager"), ("bloom", "eager"), ("llama4", "sdpa")])
def test_a_program_with_dynamic_sizes_is_right_at_every_length(family, implementation):
    model = build(family, implementation)
    result = fs.rewrite(export(model, dynamic=True))
    assert len(result.records) == model.config.num_hidden_layers and not square_tensors(result.program)
    for batch, length in ((2, 21), (1, 40), (3, 5)):
        ids = tokens(batch, length)
        wanted = model(input_ids=ids, use_cache=False).logits
        assert difference(wanted, result.module()(input_ids=ids, use_cache=False).logits) < 1e-5


def test_the_sinks_are_the_layers_own_and_the_record_names_them():
    result = fs.rewrite(export(build("gpt_oss")))
    assert [r.facts["sinks"] for r in result.records] == [f"model.layers.{n}.self_attn.sinks" for n in (0, 1)]
    assert [r.module for r in result.records] == [f"model.layers.{n}.self_attn" for n in (0, 1)]
    assert all(r.anchor in r.nodes for r in result.records)


def test_a_padding_mask_is_left_alone_with_the_reason():
    mask = torch.ones(2, 21, dtype=torch.int64)
    mask[1, :4] = 0
    program = export(build("llama"), attention_mask=mask)
    result = fs.rewrite(program)
    assert result.program is program and not result.records and len(result.skipped) == 2
    assert "depends on the values that the model reads" in result.skipped[0].reason
    assert "unchanged" in result.note and "modeling_llama.py" in result.skipped[0].source


def test_a_graph_without_attention_passes_through_and_says_so():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    program = torch.export.export(model, (torch.randn(3, 4),))
    result = fs.rewrite(program)
    assert result.program is program and not result.records and not result.skipped
    assert result.note == "no attention was found: the program is unchanged"


class Hand(nn.Module):
    """Attention that nobody registered anywhere, with a stored triangular mask (as in minimal GPTs)."""

    def __init__(self, *, dropout: float = 0.0, weights: bool = False, bias: float = 0.0, cap: bool = False):
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(16, 48), nn.Linear(16, 16), nn.Dropout(dropout)
        self.given = SimpleNamespace(weights=weights, bias=bias, cap=cap)
        self.register_buffer("seen", torch.ones(32, 32).tril().view(1, 1, 32, 32))

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (y.view(batch, length, 4, -1).transpose(1, 2) for y in self.qkv(x).split(width, 2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])
        if self.given.bias:
            place = torch.arange(length, device=x.device)
            scores = scores + self.given.bias * (place[None] - place[:, None]) ** 2
        if self.given.cap:
            scores = torch.tanh(scores)
        scores = scores.masked_fill(self.seen[:, :, :length, :length] == 0, float("-inf"))
        probabilities = self.drop(F.softmax(scores, -1))
        mixed = self.out((probabilities @ v).transpose(1, 2).reshape(batch, length, width))
        return (mixed, probabilities) if self.given.weights else mixed


def hand(**options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Hand(**options).eval(), torch.randn(2, 19, 16)


def test_hand_written_attention_with_a_stored_mask_is_rewritten():
    model, x = hand()
    result = fs.rewrite(torch.export.export(model, (x,)), check=True)
    (record,) = result.records
    assert record.replacement == FUSED and record.facts["mask"] == "causal" and record.facts["scale"] == 0.5
    assert difference(model(x), result.module()(x)) < 1e-5


@pytest.mark.parametrize(
    ("options", "training", "reason"),
    [
        ({"weights": True}, False, "used elsewhere too"),
        ({"dropout": 0.1}, True, "dropout acts on the probabilities"),
        ({"bias": -0.1}, False, "not ALiBi"),
        ({"cap": True}, False, "a tanh without a factor"),
    ],
)
def test_what_no_operator_computes_is_left_alone_with_the_reason(options, training, reason):
    model, x = hand(**options)
    program = torch.export.export(model.train(training), (x,))
    result = fs.rewrite(program)
    assert result.program is program and reason in result.skipped[0].reason


def test_dropout_that_drops_nothing_is_no_obstacle():
    model, x = hand(dropout=0.1)
    assert len(fs.rewrite(torch.export.export(model, (x,)), check=True).records) == 1
