"""Exact rewrites of attention on a graph: the same values, no mask left, and a reason for whatever stays."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attentions import FUSED, WINDOW, WINDOWED, Twice, build, difference, hand, tokens
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import fla_swap as fs
from fla_swap.errors import RewriteError
from fla_swap.rewriting import exact
from fla_swap.types import LayerPlan, Mask, Projection, WeightRef


def export(model: nn.Module, *, dynamic: bool = False, **inputs: torch.Tensor) -> torch.export.ExportedProgram:
    given = {"input_ids": tokens(2, 21), "use_cache": False, **inputs}
    sizes = None
    if dynamic:
        batch, time = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("time", min=2, max=4096)
        sizes = {"input_ids": {0: batch, 1: time}, "use_cache": None}
    return torch.export.export(model, (), given, dynamic_shapes=sizes, strict=False)


def square_tensors(program: torch.export.ExportedProgram) -> list[str]:
    """Nodes of the shape of scores or masks: the last two dimensions are the length."""
    return square_tensors_of(
        program, next(n for n in program.graph.nodes if n.name == "input_ids").meta["val"].shape[1]
    )


def square_tensors_of(program: torch.export.ExportedProgram, length: int) -> list[str]:
    found = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[-2] == value.shape[-1] == length:
            found.append(node.name)
    return found


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


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_padding_mask_is_left_alone_with_the_reason(implementation):
    mask = torch.ones(2, 21, dtype=torch.int64)
    mask[1, :4] = 0
    program = export(build("llama", implementation), attention_mask=mask)
    result = fs.rewrite(program)
    assert result.program is program and not result.records and len(result.skipped) == 2
    assert "its mask depends on the input 'attention_mask' (padding)" in result.skipped[0].reason
    assert "unchanged" in result.note and "modeling_llama.py" in result.skipped[0].source


def test_what_the_matcher_fails_on_is_left_alone_with_the_error(monkeypatch):
    def fail(*args):
        raise TypeError("unhashable")

    monkeypatch.setattr(exact, "choose", fail)
    model, x = hand()
    (skipped,) = fs.rewrite(torch.export.export(model, (x,))).skipped
    assert "could not read this code, TypeError: unhashable (test_rewriting.py:" in skipped.reason


def test_a_graph_without_attention_passes_through_and_says_so():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    program = torch.export.export(model, (torch.randn(3, 4),))
    result = fs.rewrite(program)
    assert result.program is program and not result.records and not result.skipped
    assert result.note == "no attention was found: the program is unchanged"


@pytest.mark.parametrize("einsum", [False, True])
def test_hand_written_attention_with_a_stored_mask_is_rewritten(einsum):
    model, x = hand(einsum=einsum)
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
        ({"turned": True}, False, "transpose.int among the scores is not understood"),
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


class Flex(nn.Module):
    """FlexAttention under a window of 40 tokens, or with other blocks than its function says."""

    def __init__(self, blocks=None):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.blocks = blocks

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        size = x.shape[1]
        mask = create_block_mask(self.mod, None, None, size, size, device="cpu", BLOCK_SIZE=64)
        if self.blocks is not None:
            mask = BlockMask.from_kv_blocks(
                torch.tensor([[[self.blocks] * 2]]),
                torch.arange(2).expand(1, 1, 2, 2),
                BLOCK_SIZE=64,
                mask_mod=self.mod,
            )
        return flex_attention(q, k, v, block_mask=mask).transpose(1, 2).flatten(2)

    @staticmethod
    def mod(b, h, i, j):
        return (i >= j) & (i - j < 40)


@torch.no_grad()
def test_flex_attention_whose_functions_are_read_is_rewritten_with_its_block_mask():
    model, x = Flex().eval(), torch.randn(2, 100, 16)
    result = fs.rewrite(torch.export.export(model, (x,), strict=False), check=True)
    (record,) = result.records
    assert record.replacement == WINDOWED and record.checked_length == 100
    assert record.facts == {"mask": "window", "window": 40, "scale": pytest.approx(8**-0.5), "heads": (2,), "groups": 1}
    assert "flex_attention" in record.nodes and not square_tensors_of(result.program, 100)
    assert difference(model(x), result.module()(x)) < 1e-5


@torch.no_grad()
def test_blocks_that_say_something_else_than_the_function_are_a_reason_to_leave_it():
    x = torch.randn(2, 128, 16)
    (skipped,) = fs.rewrite(torch.export.export(Flex(blocks=1).eval(), (x,), strict=False)).skipped
    assert skipped.reason == "a block mask whose blocks leave out what its mask_mod shows"
    assert len(fs.rewrite(torch.export.export(Flex(blocks=2).eval(), (x,), strict=False), check=True).records) == 1


def plan_of(model: nn.Module, mixer: str) -> fs.SwapPlan:
    return fs.plan(fs.inspect(model), mixer=mixer, keep=0, local=True)


@pytest.mark.parametrize(("family", "dynamic"), [("llama", True), ("gpt_oss", False), ("gemma2", False)])
def test_softmax_in_every_planned_place_changes_nothing(family, dynamic):
    model = build(family)
    result = fs.rewrite(export(model, dynamic=dynamic), plan_of(model, "softmax"), check=True)
    assert [r.replacement for r in result.records] == ["mixers.0", "mixers.1"]
    assert [r.facts["site"] for r in result.records] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    ids = tokens(2, 21)
    wanted = model(input_ids=ids, use_cache=False).logits
    assert difference(wanted, result.module()(input_ids=ids, use_cache=False).logits) < 1e-5


def test_attention_without_a_module_gets_a_mixer_that_trains_and_the_rest_stays_shared():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(2, 13, 16)
    plan = fs.SwapPlan(layers=tuple(LayerPlan(site=model.site(n), mixer=m) for n, m in enumerate(("gla", "softmax"))))
    result = fs.rewrite(torch.export.export(model, (x,)), plan)
    module = result.module()
    module(x).square().mean().backward()
    mixer = module.get_submodule("mixers.0")
    assert mixer.name == "gla" and float(mixer.q_proj.weight.grad.abs().max()) > 0
    assert torch.equal(mixer.q_proj.weight, model.weights[0][:8])
    assert {n for n, _ in module.named_parameters() if not n.startswith("mixers.")} == set()
    both = fs.SwapPlan(layers=tuple(LayerPlan(site=model.site(n), mixer="softmax") for n in (0, 1)))
    assert difference(model(x), fs.rewrite(torch.export.export(model, (x,)), both).module()(x)) < 1e-5


class FarWindow(Twice):
    """Causal, and from the 200th token on only the last 200."""

    @staticmethod
    def hidden(length):
        place = torch.arange(length)
        return (place[None] > place[:, None]) | (place[:, None] - place[None] >= 200)


def test_a_planned_site_is_held_against_a_program_of_dynamic_length_at_two_lengths():
    torch.manual_seed(0)
    model, x = FarWindow(), torch.randn(2, 13, 16)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: torch.export.Dim("time", min=2, max=4096)},))
    causal = fs.SwapPlan(layers=(LayerPlan(site=model.site(0), mixer="softmax"),))
    with pytest.raises(RewriteError, match="differs from the planned site"):
        fs.rewrite(program, causal)
    right = dataclasses.replace(model.site(0), mask=Mask(kind="window", window=200))
    result = fs.rewrite(program, fs.SwapPlan(layers=(LayerPlan(site=right, mixer="softmax"),)))
    assert result.records[0].checked_length == 1027
    x = torch.randn(2, 300, 16)
    assert difference(model(x), result.module()(x)) < 1e-5
    (record,) = fs.rewrite(torch.export.export(model, (x[:, :13],)), causal).records
    assert record.checked_length == 13  # that program takes 13 tokens, never more


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": 0.71}, "differs from the planned site"),
        ({"mask": Mask(kind="window", window=5)}, "differs from the planned site"),
        ({"o": Projection(weight=WeightRef(name="outs.1"))}, "no attention of this program goes through"),
    ],
)
def test_a_site_that_the_program_does_not_compute_is_an_error(change, reason):
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(2, 13, 16)
    plan = fs.SwapPlan(layers=(LayerPlan(site=dataclasses.replace(model.site(0), **change), mixer="gla"),))
    with pytest.raises(RewriteError, match=reason):
        fs.rewrite(torch.export.export(model, (x,)), plan)
