"""The config as a second witness: true sites pass, and each fact that differs is named with both numbers."""

from __future__ import annotations

import dataclasses
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from models import tiny
from torch import nn

from fla_swap import inspection
from fla_swap.crosscheck import check_config, unseen_layers
from fla_swap.errors import VerificationError
from fla_swap.inspection import inspect
from fla_swap.types import AttentionSite, Mask, Rope


@cache
def case(family: str, implementation: str = "eager") -> tuple[tuple[AttentionSite, ...], nn.Module]:
    model = tiny(family, implementation)
    return inspect(model, verify=False).sites, model


FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gemma2", "gpt_neox", "cohere", "olmo", "gptj", "gpt_oss", "phi3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_true_site_agrees(family: str) -> None:
    sites, model = case(family)
    assert len(sites) == 2
    check_config(sites, model)


def scaled(rope: Rope, base: float) -> Rope:
    count = len(rope.inv_freq)
    return dataclasses.replace(rope, inv_freq=tuple(base ** (-i / count) for i in range(count)))


# what is wrong: (family, fields of the second site, what the error says)
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "heads": ("llama", {"heads": 8}, "8 heads, the config says num_attention_heads = 4"),
    "heads by another name": ("gptj", {"heads": 8, "kv_heads": 8}, "8 heads, the config says n_head = 4"),
    "key/value heads": ("mistral", {"kv_heads": 4}, "4 key/value heads, the config says num_key_value_heads = 2"),
    "grouped where nothing is": ("gpt2", {"kv_heads": 2}, "2 key/value heads, the config says n_head = 4"),
    "head size": ("qwen3", {"head_dim": 16}, "16 channels a head, the config says head_dim = 32"),
    "window": (
        "mistral",
        {"mask": Mask(kind="window", window=7)},
        "7 tokens in the window, the config says sliding_window = 21",
    ),
    "a window in a layer that has none": (
        "gemma2",
        {"mask": Mask(kind="window", window=8)},
        "a window of 8, the config says layer_types[1] = 'full_attention'",
    ),
    "rotary base": ("llama", {"rope": 20000.0}, "a rotary base of 20000, the config says rope_theta = 10000"),
    "rotary width": (
        "gpt_neox",
        {"rope": Rope(inv_freq=tuple(10000 ** (-i / 4) for i in range(4)))},
        "8 of 16 channels turned, the config says partial_rotary_factor = 0.25",
    ),
    "softcap": ("gemma2", {"softcap": 30.0}, "a softcap of 30, the config says attn_logit_softcapping = 50"),
    "no softcap": ("gemma2", {"softcap": None}, "no softcap in eager code, the config says attn_logit_softcapping"),
    "scale": ("gemma2", {"scale": 0.25}, "scores times 0.25, the config says query_pre_attn_scalar = 256"),
    "no scale": ("gpt2", {"scale": 1.0}, "scores times 1, the config says scale_attn_weights = True, which is 0.25"),
    "clamp": ("olmo", {"clip": None}, "clamped to None, the config says clip_qkv = 0.5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_disagreement_names_the_layer_and_both_numbers(name: str) -> None:
    family, fields, said = WRONG[name]
    sites, model = case(family)
    site = sites[1]
    if isinstance(fields.get("rope"), float):
        assert site.rope is not None
        fields = {"rope": scaled(site.rope, fields["rope"])}
    with pytest.raises(VerificationError) as caught:
        check_config((sites[0], dataclasses.replace(site, **fields)), model)
    message = str(caught.value)
    assert said in message and f": {site.fqn}: " in message and sites[0].fqn not in message


def test_a_missing_window_is_named() -> None:
    sites, model = case("gemma2")
    with pytest.raises(
        VerificationError, match="no window, the config says layer_types\\[0\\] = 'sliding_attention' and"
    ):
        check_config((dataclasses.replace(sites[0], mask=Mask(kind="causal")),), model)


def test_inspect_runs_it_on_code_that_ignores_its_config() -> None:
    """Eager Gemma 2 with one layer's softcap taken out by hand: the graph is right, and the config says otherwise."""
    model: Any = tiny("gemma2", "eager")
    model.model.layers[0].self_attn.attn_logit_softcapping = None
    with pytest.raises(VerificationError, match=r"layers\.0\.self_attn: no softcap in eager code"):
        inspect(model)


def test_fused_code_that_drops_a_softcap_is_a_note_of_the_proof_not_an_error() -> None:
    sites, model = case("gemma2", "sdpa")
    assert [s.softcap for s in sites] == [None, None]
    check_config(sites, model)


def test_parts_of_a_model_are_held_to_their_own_config() -> None:
    """A composite: two models with other head counts under a module whose config states neither's."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = tiny("llama"), tiny("llama", num_attention_heads=8, head_dim=8)
            self.config = SimpleNamespace(num_attention_heads=3)

    sites = [
        dataclasses.replace(site, fqn=f"{name}.{site.fqn}")
        for name, model in (("first", tiny("llama")), ("second", tiny("llama", num_attention_heads=8, head_dim=8)))
        for site in inspect(model, verify=False).sites
    ]
    check_config(sites, Both())
    with pytest.raises(VerificationError, match=r"first.*8 heads, the config says num_attention_heads = 4"):
        check_config([dataclasses.replace(sites[0], heads=8)], Both())


def test_a_model_without_a_config_is_left_alone() -> None:
    sites, _ = case("llama")
    bare: Any = nn.Module()
    bare.model = nn.Module()
    bare.model.layers = nn.ModuleList(nn.ModuleDict({"self_attn": nn.Identity()}) for _ in range(2))
    check_config([dataclasses.replace(sites[0], heads=64)], bare)


def test_layers_whose_attention_was_not_seen_are_noted() -> None:
    model: Any = tiny("llama", num_hidden_layers=3)
    names = [f"model.layers.{n}.self_attn" for n in range(3)]
    assert unseen_layers(names, model) == [] and unseen_layers(names[:1], model) == names[1:]
    last = model.model.layers[2]
    last.forward = lambda hidden_states, **kwargs: hidden_states
    report = inspection.inspect(model)
    assert [s.fqn for s in report.sites] == names[:2]
    assert [n for n in report.notes if n.startswith(f"{names[2]}: it is built like modules whose attention was found")]
