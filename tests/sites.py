"""Attention sites stated by hand, and a toy linear mixer: what the tests of the stages after `inspect` start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fla_swap import mixers, planning
from fla_swap.mixers.base import MixerConfig, TokenMixer, copy_linear, read_projection, repeat_heads
from fla_swap.types import (
    ArgPath,
    AttentionReport,
    AttentionSite,
    CallContract,
    Mask,
    Norm,
    Projection,
    Rope,
    WeightRef,
)

VOCAB = 97
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def tiny(family: str, *, layers: int = 2, attn: str = "sdpa", seed: int = 0, tied: bool = False):
    """A randomly initialised model in fp32, its biases and norms random too (zeros and ones would hide errors)."""
    torch.manual_seed(seed)
    common = {**SMALL, "num_hidden_layers": layers, "attn_implementation": attn, "tie_word_embeddings": tied}
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=8))
    elif family == "phi3":
        model = Phi3ForCausalLM(Phi3Config(**common))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=6, head_dim=8))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_embd=32,
                n_head=4,
                n_layer=layers,
                n_positions=128,
                attn_implementation=attn,
                bos_token_id=1,
                eos_token_id=None,
                pad_token_id=0,
            )
        )
    for name, p in model.named_parameters():
        if p.dim() == 1:
            nn.init.normal_(p, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.1)
        else:
            nn.init.normal_(p, std=0.2)
    return model.eval()


def rows(name: str, start: int, stop: int, *, transposed: bool = False) -> WeightRef:
    return WeightRef(name=name, rows=((start, stop),), transposed=transposed)


LLAMA_CALL = {
    "hidden": ArgPath(keyword="hidden_states"),
    "mask": ArgPath(keyword="attention_mask"),
    "positions": ArgPath(keyword="position_ids"),
    "cos": ArgPath(keyword="position_embeddings", item=0),
    "sin": ArgPath(keyword="position_embeddings", item=1),
    "cache": ArgPath(keyword="past_key_values"),
    "outputs": 2,
}
GPT2_CALL = {
    "hidden": ArgPath(position=0),
    "mask": ArgPath(keyword="attention_mask"),
    "cache": ArgPath(keyword="past_key_values"),
    "outputs": 2,
}


def llama_like_site(model, layer: int) -> AttentionSite:
    """A layer of Llama, Qwen3, Mistral (three projections, rotary) or Phi-3 (one fused projection)."""
    config, fqn = model.config, f"model.layers.{layer}.self_attn"
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, 8
    if config.model_type == "phi3":
        name, a, b = f"{fqn}.qkv_proj.weight", heads * dim, (heads + kv) * dim
        q, k, v = (Projection(weight=rows(name, *r)) for r in ((0, a), (a, b), (b, b + kv * dim)))
    else:
        q, k, v = (Projection(weight=WeightRef(name=f"{fqn}.{n}_proj.weight")) for n in "qkv")
    norms = {}
    if config.model_type == "qwen3":
        norms = {
            f"{n}_norm": Norm(kind="rms", eps=config.rms_norm_eps, weight=WeightRef(name=f"{fqn}.{n}_norm.weight"))
            for n in "qk"
        }
    window = getattr(config, "sliding_window", None)
    return AttentionSite(
        fqn=fqn,
        layer=layer,
        q=q,
        k=k,
        v=v,
        o=Projection(weight=WeightRef(name=f"{fqn}.o_proj.weight")),
        hidden_size=32,
        heads=heads,
        kv_heads=kv,
        head_dim=dim,
        v_head_dim=dim,
        scale=dim**-0.5,
        mask=Mask(kind="window", window=window) if window else Mask(kind="causal"),
        call=CallContract(**LLAMA_CALL, cache_index=layer),
        rope=Rope(inv_freq=tuple(10000.0 ** -(i / dim) for i in range(0, dim, 2))),
        **norms,
    )


def gpt2_site(model, layer: int) -> AttentionSite:
    """A layer of GPT-2: Conv1D weights [in, out], biases, no rotary."""
    fqn = f"transformer.h.{layer}.attn"
    fused = [
        Projection(
            weight=rows(f"{fqn}.c_attn.weight", 32 * i, 32 * (i + 1), transposed=True),
            bias=rows(f"{fqn}.c_attn.bias", 32 * i, 32 * (i + 1)),
        )
        for i in range(3)
    ]
    return AttentionSite(
        fqn=fqn,
        layer=layer,
        q=fused[0],
        k=fused[1],
        v=fused[2],
        o=Projection(
            weight=WeightRef(name=f"{fqn}.c_proj.weight", transposed=True),
            bias=WeightRef(name=f"{fqn}.c_proj.bias"),
        ),
        hidden_size=32,
        heads=4,
        kv_heads=4,
        head_dim=8,
        v_head_dim=8,
        scale=8**-0.5,
        mask=Mask(kind="causal"),
        call=CallContract(**GPT2_CALL, cache_index=layer),
    )


def report_of(model) -> AttentionReport:
    """The report that `inspect` would give for one of the `tiny` models."""
    build = gpt2_site if model.config.model_type == "gpt2" else llama_like_site
    layers = model.config.num_hidden_layers
    return AttentionReport(model=type(model).__name__, sites=tuple(build(model, i) for i in range(layers)))


@dataclass(frozen=True, kw_only=True)
class ToyConfig(MixerConfig):
    """Linear attention with one constant decay."""

    decay: float = 0.9


class Toy(TokenMixer):
    """s_t = decay · s_{t−1} + k_t v_tᵀ, y_t = s_tᵀ q_t, token by token: obviously right, and slow."""

    name = "toy"
    config_class = ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        heads, dim = config.num_heads, config.head_dim
        self.heads = heads
        self.q_proj = nn.Linear(config.hidden_size, heads * dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, heads * dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)

    def init_state(self, batch_size, *, device, dtype):
        dim = self.config.head_dim
        return {"s": torch.zeros(batch_size, self.heads, dim, dim, device=device, dtype=dtype)}

    def load_attention(self, site, weights):
        repeats = self.heads // site.kv_heads
        copy_linear(self.q_proj, *read_projection(weights, site.q))
        copy_linear(self.o_proj, *read_projection(weights, site.o))
        for own, projection in ((self.k_proj, site.k), (self.v_proj, site.v)):
            weight, _ = read_projection(weights, projection)
            copy_linear(own, repeat_heads(weight, site.kv_heads, repeats), None)

    def forward(
        self,
        hidden_states,
        *,
        state=None,
        output_state=False,
        valid=None,
        starts=None,
        cu_seqlens=None,
        positions=None,
        cos_sin=None,
    ):
        batch, tokens, _ = hidden_states.shape
        q, k, v = (p(hidden_states).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        keep_state = state is not None or output_state
        if cu_seqlens is not None:
            marks = torch.arange(tokens, device=hidden_states.device)[:, None] == cu_seqlens[None]
            starts = marks.any(1)[None]
        s = q.new_zeros(batch, self.heads, q.shape[-1], v.shape[-1]) if state is None else state["s"].clone()
        outputs = []
        for t in range(tokens):
            if starts is not None:
                s = torch.where(starts[:, t, None, None, None], torch.zeros_like(s), s)
            new = self.config.decay * s + k[:, t, :, :, None] * v[:, t, :, None, :]
            s = new if valid is None else torch.where(valid[:, t, None, None, None], new, s)
            outputs.append((s * q[:, t, :, :, None]).sum(-2))
        y = self.o_proj(torch.stack(outputs, 1).flatten(2))
        if state is not None:
            state["s"].copy_(s)
            return y, state
        return y, {"s": s} if keep_state else None


@contextmanager
def toy_registered() -> Iterator[None]:
    """While open, `mixer="toy"` works as if it were one of fla_swap's own mixers."""
    places = [mixers, planning]
    before = [place.MIXERS for place in places]
    for place in places:
        place.MIXERS = (*place.MIXERS, Toy)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.MIXERS = value


def prompts(batch: int = 2, length: int = 11, padding: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask; the first row is left-padded."""
    ids = torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def toy_plan(model, **arguments):
    return planning.plan(report_of(model), mixer="toy", **{"keep": 0, "local": True, **arguments})


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits
