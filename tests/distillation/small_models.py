"""A tiny swapped Llama, made without the matcher: its sites are written down by hand."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fla_swap.swapping import swap_
from fla_swap.types import (
    ArgPath,
    AttentionSite,
    CallContract,
    LayerPlan,
    Mask,
    Projection,
    Rope,
    SwapPlan,
    WeightRef,
)

torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 32, 4, 2, 8, 3, 64


def llama(seed: int = 0) -> LlamaForCausalLM:
    """Random weights, large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def site(layer: int) -> AttentionSite:
    fqn = f"model.layers.{layer}.self_attn"
    q, k, v, o = (Projection(weight=WeightRef(name=f"{fqn}.{n}_proj.weight")) for n in "qkvo")
    return AttentionSite(
        fqn=fqn,
        layer=layer,
        q=q,
        k=k,
        v=v,
        o=o,
        hidden_size=HIDDEN,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5,
        mask=Mask(kind="causal"),
        rope=Rope(inv_freq=tuple(10000 ** -(2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2))),
        call=CallContract(
            hidden=ArgPath(keyword="hidden_states"),
            mask=ArgPath(keyword="attention_mask"),
            cos=ArgPath(keyword="position_embeddings", item=0),
            sin=ArgPath(keyword="position_embeddings", item=1),
            cache=ArgPath(keyword="past_key_values"),
            cache_index=layer,
            outputs=2,
        ),
    )


def swapped_llama(mixer: str = "gated_deltanet", layers: tuple[int, ...] = (0, 2), seed: int = 0) -> LlamaForCausalLM:
    plan = SwapPlan(layers=tuple(LayerPlan(site=site(i), mixer=mixer) for i in layers))
    return swap_(llama(seed), plan)


def text(rows: int = 64, length: int = 32, seed: int = 1) -> torch.Tensor:
    """Token blocks in which each token says much about the next: [rows, length] int64."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (rows, length), generator=generator)
    return (steps.cumsum(1) + torch.randint(0, VOCABULARY, (rows, 1), generator=generator)) % VOCABULARY
