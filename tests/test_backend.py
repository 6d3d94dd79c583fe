"""`torch.compile(model, backend="fla_swap")`: inference, training, one graph for all lengths, what is left alone."""

from __future__ import annotations

import logging
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from attentions import FUSED, WINDOWED, build, difference, hand, tokens

import fla_swap as fs
import fla_swap.rewriting
from fla_swap.errors import RewriteError

PLAIN = {"inductor": False}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_plainly(model, **options):
    return torch.compile(model, backend="fla_swap", fullgraph=True, options=PLAIN, **options)


def test_the_package_names_the_backend_as_torch_looks_for_it():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    entry = EntryPoint(
        "fla_swap", project["entry-points"]["torch_dynamo_backends"]["fla_swap"], "torch_dynamo_backends"
    )
    assert entry.load() is fla_swap.rewriting.fla_swap_backend and "fla_swap" in torch._dynamo.list_backends()


def compilations() -> int:
    return len(fs.last_rewrites())


@pytest.mark.parametrize(("family", "replacement"), [("gemma2", WINDOWED), ("gpt_oss", WINDOWED), ("llama", FUSED)])
def test_every_core_is_rewritten_and_the_outputs_are_equal(family, replacement):
    model = build(family)
    ids = tokens(2, 21)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        found = compile_plainly(model)(input_ids=ids, use_cache=False).logits
    assert difference(wanted, found) < 1e-5
    rewrite = fs.last_rewrites()[-1]
    assert [r.replacement for r in rewrite.records] == [replacement] * 2 and not rewrite.skipped
    assert not any(n.meta["val"].shape[-2:] == (21, 21) for n in rewrite.program.graph.nodes if is_matrix(n))


def is_matrix(node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].dim() > 1


def test_gradients_are_those_of_the_model():
    model = build("gpt_oss").train()
    ids = tokens(2, 21)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compile_plainly(model)(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(fs.last_rewrites()[-1].records) == 2
    assert "model.layers.0.self_attn.sinks" in wanted
    for name, gradient in wanted.items():
        assert difference(gradient, model.get_parameter(name).grad) < 1e-4, name


def test_one_graph_serves_every_length_from_the_second_on():
    model = build("gemma2")
    fast = compile_plainly(model)
    before = compilations()
    with torch.no_grad():
        for length in (21, 34, 40, 57):
            ids = tokens(2, length)
            wanted = model(input_ids=ids, use_cache=False).logits
            assert difference(wanted, fast(input_ids=ids, use_cache=False).logits) < 1e-5
    assert compilations() - before == 2


def test_dynamic_from_the_start_compiles_once_although_scale_and_softcap_are_inputs_then():
    model = build("gemma2")
    fast = compile_plainly(model, dynamic=True)
    with torch.no_grad():
        for length in (21, 34):
            ids = tokens(2, length)
            wanted = model(input_ids=ids, use_cache=False).logits
            assert difference(wanted, fast(input_ids=ids, use_cache=False).logits) < 1e-5
    records = fs.last_rewrites()[-1].records
    assert [r.facts["softcap"] for r in records] == [50.0, 50.0] and records[0].facts["window"] == 6


def test_a_mask_that_is_an_input_of_the_graph_is_left_alone(caplog):
    model = build("llama")
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad(), caplog.at_level(logging.INFO, "fla_swap"):
        wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = compile_plainly(model)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(wanted, found) or difference(wanted, found) < 1e-6
    rewrite = fs.last_rewrites()[-1]
    assert not rewrite.records and "its mask depends on the input" in rewrite.skipped[0].reason
    assert "0 attention cores rewritten, 2 left as they are" in caplog.text and "compiled as it came" in caplog.text


def test_a_stored_mask_is_watched():
    model, x = hand()
    fast = compile_plainly(model)
    with torch.no_grad():
        assert difference(model(x), fast(x)) < 1e-5 and len(fs.last_rewrites()[-1].records) == 1
        model.seen.mul_(1.0)
        assert difference(model(x), fast(x)) < 1e-5
        model.seen[..., 3, 1] = 0
        with pytest.raises(RewriteError, match=r"seen.* has changed since attention was compiled"):
            fast(x)


def test_a_graph_without_attention_is_compiled_as_it_came():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    x = torch.randn(2, 4)
    assert torch.equal(compile_plainly(model)(x), model(x))
    assert "no attention" in fs.last_rewrites()[-1].note


@pytest.mark.slow
def test_inductor_compiles_what_was_rewritten_forwards_and_backwards():
    model = build("gemma2").train()
    fast = torch.compile(model, backend="fla_swap", fullgraph=True)
    ids = tokens(2, 21)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fast(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(difference(g, model.get_parameter(n).grad) < 1e-4 for n, g in wanted.items())
