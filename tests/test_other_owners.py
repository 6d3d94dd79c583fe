"""Owners that do more or less than attention; models with linear layers of their own: found, swapped, generating."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from models import SMALL
from torch import nn

from fla_swap.inspection import inspect
from fla_swap.planning import plan
from fla_swap.swapping import restore_, swap_
from fla_swap.types import AttentionReport, AttentionSite, Mask

DECODER = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"} | {"is_decoder": True}
MIXED = {**SMALL, "num_hidden_layers": 3}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# family → config class, its options, the numbers of the model's softmax layers, what its first site states
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], dict[str, Any]]] = {
    "bloom": (
        "BloomConfig",
        {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
        (0, 1),
        {"fqn": "transformer.h.0.self_attention", "alibi": (0.25, 0.0625, 0.015625, 0.00390625)},
    ),
    "mpt": (
        "MptConfig",
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "vocab_size": 128},
        (0, 1),
        {"fqn": "transformer.blocks.0.attn", "mask": Mask(kind="causal")},
    ),
    "bert": ("BertConfig", DECODER, (0, 1), {"fqn": "bert.encoder.layer.0.attention.self", "o": None}),
    "electra": ("ElectraConfig", {**DECODER, "embedding_size": 64}, (0, 1), {"o": None}),
    "bitnet": ("BitNetConfig", SMALL, (0, 1), {"fqn": "model.layers.0.self_attn"}),
    "afmoe": (
        "AfmoeConfig",
        {**SMALL, **MOE, "head_dim": 16, "num_dense_layers": 1, "sliding_window": 21, "global_attn_every_n_layers": 2},
        (0, 1),
        {"mask": Mask(kind="window", window=21)},
    ),
    "bamba": (
        "BambaConfig",
        {**MIXED, **MAMBA, "mamba_d_head": 32, "mamba_n_groups": 1, "attn_layer_indices": [1]},
        (1,),
        {"fqn": "model.layers.1.self_attn"},
    ),
    "falcon_h1": (
        "FalconH1Config",
        {**SMALL, **MAMBA, "head_dim": 16, "mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_n_groups": 1},
        (0, 1),
        {"fqn": "model.layers.0.self_attn"},
    ),
    "lfm2": (
        "Lfm2Config",
        {**MIXED, "layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 96},
        (1,),
        {"fqn": "model.layers.1.self_attn"},
    ),
    "minimax": (
        "MiniMaxConfig",
        {**SMALL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8},
        (0,),
        {"fqn": "model.layers.0.self_attn"},
    ),
    "zamba2": (
        "Zamba2Config",
        {
            **SMALL,
            "num_key_value_heads": 4,
            "mamba_d_state": 16,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "mamba_headdim": 32,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "adapter_rank": 8,
        },
        (1,),
        {"hidden_size": 128, "output_size": 64},
    ),
}
ONLY_EAGER = ("bloom", "mpt")
LONG = ("bamba", "falcon_h1", "minimax", "zamba2")
CASES = [
    *((f, "eager") for f in FAMILIES),
    *(pytest.param(f, "sdpa", marks=[pytest.mark.slow] if f in LONG else []) for f in FAMILIES if f not in ONLY_EAGER),
]


def model_of(family: str, implementation: str) -> nn.Module:
    """A tiny model, its vectors moved away from ones and zeros, which would hide errors."""
    name, options, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and len(parameter) > 4:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@cache
def report_of(family: str, implementation: str) -> AttentionReport:
    return inspect(model_of(family, implementation))


def numbers_of(sites: tuple[AttentionSite, ...]) -> tuple[int, ...]:
    return tuple(next(int(part) for part in s.fqn.split(".") if part.isdigit()) for s in sites)


@pytest.mark.parametrize(("family", "implementation"), CASES)
@torch.no_grad()
def test_softmax_layers_are_found_and_rebuilding_them_changes_nothing(family: str, implementation: str) -> None:
    """Logits with and without padding within 1e-5, the same greedy text from the model's own cache, and back again."""
    _, _, layers, facts = FAMILIES[family]
    model = model_of(family, implementation)
    report = report_of(family, implementation)
    # Falcon-H1's state spaces, which are no softmax layers, are not read: a constant stands before their projection.
    missed = [m for m in report.near_misses if "mixes tokens without a softmax" not in m.reason]
    assert numbers_of(report.sites) == layers and not missed
    assert all(s.proved and s.kind == "self" for s in report.sites)
    assert {name: getattr(report.sites[0], name) for name in facts} == facts
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    greedy = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before, padded, text = model(ids).logits, model(ids, attention_mask=mask).logits, model.generate(ids, **greedy)
    swap_(model, plan(report, mixer="softmax", keep=0, local=True))
    assert (model(ids).logits - before).abs().max() <= 1e-5
    assert (model(ids, attention_mask=mask).logits - padded)[mask.bool()].abs().max() <= 1e-5
    assert torch.equal(model.generate(ids, **greedy), text)
    restore_(model)
    assert torch.equal(model(ids).logits, before)


def test_what_the_owners_do_besides_is_stated() -> None:
    bitnet, afmoe = (report_of(f, "eager").sites[0] for f in ("bitnet", "afmoe"))
    assert bitnet.o_norm is not None and bitnet.o_norm.across_heads and bitnet.gate is None
    assert afmoe.gate is not None and (afmoe.gate.activation, afmoe.gate.per_head) == ("sigmoid", False)
    assert afmoe.gate.projection.weight.name == "model.layers.0.self_attn.gate_proj.weight"
    bloom = report_of("bloom", "eager").sites[0].call
    assert bloom.residual is not None and bloom.residual != bloom.hidden
    assert report_of("mpt", "eager").sites[0].call.hides


@pytest.mark.parametrize("family", ["bloom", "afmoe", "falcon_h1", "minimax", "zamba2"])
@torch.no_grad()
def test_linear_layers_live_in_the_models_own_cache_and_survive_a_file(family: str, tmp_path: Any) -> None:
    """Token by token equals the whole sequence at once; so do the logits of the saved and loaded model."""
    model = model_of(family, "eager")
    swap_(model, plan(report_of(family, "eager"), mixer="gated_deltanet", keep=0, local=True))
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    text = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    logits = model(text).logits
    assert torch.equal(logits[:, 11:-1].argmax(-1), text[:, 12:])
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(again(text).logits, logits, atol=1e-5, rtol=1e-5)
