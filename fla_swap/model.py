"""Causal language models of token mixers, built from scratch by a `HybridConfig`. Pre-norm blocks, as in Llama.

Legend for shapes: B batch, T time, D hidden size, S tokens that a mask covers, N sequences.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from fla_swap.arguments import read_mask
from fla_swap.cache import state_layer
from fla_swap.errors import ConfigError, MixerError
from fla_swap.feed_forward import ChannelMixing, SwiGLU
from fla_swap.hybrid_config import HybridConfig
from fla_swap.kernels.fused.ops import rms_norm
from fla_swap.mixers import Softmax, State, TokenMixer, mixer_class
from fla_swap.mixers.parts import Tokens
from fla_swap.stateful import GeneratesWithStates, StatefulLayer, run_on_state

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (1910.07467)."""

    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SoftmaxAttention(Softmax):
    """A mixer with keys and values, called as transformers calls attention: so it can be found, proved and swapped."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config)
        self.layer_idx = layer_idx

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] → [B, T, D]; the mask is None, or [B or 1, 1, T, S] as transformers makes it."""
        # Without a mask, several tokens are a whole sequence: keys beyond them are the empty part of a static cache.
        tokens = hidden_states.shape[1]
        whole = attention_mask is None and tokens > 1
        cache, layer = past_key_values, self.layer_idx

        def update(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            assert cache is not None
            k, v = cache.update(k, v, layer)
            return (k[:, :, :tokens], v[:, :, :tokens]) if whole else (k, v)

        return super().forward(
            hidden_states,
            attention_mask=attention_mask,
            positions=position_ids,
            cu_seqlens=cu_seq_lens_q,
            kv_update=None if cache is None else update,
        )[0]


def build_mixer(config: HybridConfig, index: int) -> tuple[TokenMixer, str]:
    """The mixer of a layer, and the name of its feed-forward. Raises MixerError, naming the layer."""
    name, options, feed_forward = config.layer(index)
    try:
        kind = mixer_class(name)
        mixer_config = kind.config_class.paper(**options)
        mixer = SoftmaxAttention(mixer_config, index) if kind is Softmax else kind(mixer_config)
    except MixerError as error:
        raise MixerError(f"layer {index}: {error}") from error
    return mixer, feed_forward or kind.feed_forward


class HybridBlock(GradientCheckpointingLayer, StatefulLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)) unless the layer has no feed-forward.

    Its state is that of the mixer and, with channel mixing, the last token that this saw.
    """

    def __init__(self, config: HybridConfig, index: int):
        super().__init__()
        self.index = index
        self.mixer, kind = build_mixer(config, index)
        self.keeps_keys = self.mixer.uses_kv_cache
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if kind != "none" else None
        self.mlp: SwiGLU | ChannelMixing | None = None
        if kind == "swiglu":
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        elif kind == "channel_mixing":
            self.mlp = ChannelMixing(config.hidden_size, config.intermediate_size, index, config.num_hidden_layers)
        if isinstance(self.mlp, ChannelMixing) and self.keeps_keys:
            raise ConfigError(f"layer {index}: channel mixing keeps a state, which {self.mixer.name!r} layers do not")

    @property
    def state_owner(self) -> HybridBlock | None:
        return None if self.keeps_keys else self

    def cache_index(self) -> int:
        return self.index

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """The mixer's zero state and the feed-forward's, if it has one."""
        state = self.mixer.init_state(batch_size, device=device, dtype=dtype)
        if isinstance(self.mlp, ChannelMixing):
            state |= self.mlp.init_state(batch_size, device=device, dtype=dtype)
        return state

    def forward(
        self,
        hidden_states: Tensor,
        *,
        state: State | None = None,
        output_state: bool = False,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        keys: dict[str, Any] | None = None,
    ) -> tuple[Tensor, State | None]:
        """[B, T, D] → [B, T, D] and the state; arguments as of `TokenMixer.forward`.

        `keys`: of a layer with keys and values, what `SoftmaxAttention` is called with instead.
        """
        if state is None and output_state:
            sequences = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = self.init_state(sequences, device=hidden_states.device, dtype=hidden_states.dtype)
        marks = {"valid": valid, "starts": starts, "cu_seqlens": cu_seqlens}
        normed = self.mixer_norm(hidden_states)
        if keys is not None:
            mixed = self.mixer(normed, **keys)
        else:
            mixed, _ = self.mixer(normed, state=state, positions=positions, **marks)
        hidden_states = hidden_states + mixed
        if self.mlp is not None and self.mlp_norm is not None:
            hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states), Tokens(**marks), state)
        return hidden_states, state


class HybridPreTrainedModel(PreTrainedModel):
    """What the two model classes share with transformers' own."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HybridBlock}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights everywhere; the gates of a mixer keep the biases that the mixer gave them."""
        if not isinstance(module, TokenMixer):
            super()._init_weights(module)
            return
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear):
                initialization.normal_(part.weight, std=self.config.initializer_range)
                if part.bias is not None and name in PROJECTIONS:
                    initialization.zeros_(part.bias)


class HybridModel(HybridPreTrainedModel):
    """Embedding, blocks and norm."""

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([HybridBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for block in self.blocks:
            for part in block.mixer.modules():  # a mixer gives its parts their values, in `_init_weights`
                vars(part)["_is_hf_initialized"] = not isinstance(part, TokenMixer)
        self.post_init()

    @property
    def blocks(self) -> list[HybridBlock]:
        return cast(list[HybridBlock], list(self.layers))

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As Llama's.

        Args:
            attention_mask: [B, S] or [B, 1, T, S], as transformers makes them.
            position_ids: [B, T]; without mask and cache, position 0 starts a document of a packed batch.
            cu_seq_lens_q: int [N+1], borders of a packed batch (B = 1).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        given = past_key_values
        if self.training and self.blocks[0].gradient_checkpointing:
            past_key_values = None
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        marks = self._documents(hidden, attention_mask, position_ids, given, cu_seq_lens_q)
        keys = self._keys(hidden, attention_mask, position_ids, given, cu_seq_lens_q)
        for block in self.blocks:
            if block.keeps_keys:
                hidden, _ = block(hidden, keys={**keys, "past_key_values": past_key_values})
                continue
            layer = None if past_key_values is None else state_layer(past_key_values, block.index, block, hidden)
            hidden = run_on_state(block, layer, hidden, {**marks, "positions": position_ids})
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    def _documents(
        self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache | None, packed: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Padding and documents, for layers with a state."""
        by_row = cache is not None and any(getattr(layer, "by_row", False) for layer in cache.layers)
        if packed is not None or by_row:
            return {"valid": None, "starts": None, "cu_seqlens": packed}
        valid, starts = read_mask(mask, hidden, 0 if cache is None else cache.get_seq_length())
        if mask is None and cache is None and positions is not None:
            starts = positions == 0
        return {"valid": valid, "starts": starts, "cu_seqlens": None}

    def _keys(
        self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache | None, packed: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Mask and positions, for layers with keys and values."""
        if not any(block.keeps_keys for block in self.blocks):
            return {}
        seen = 0 if cache is None else cache.get_seq_length()
        places = torch.arange(hidden.shape[1], device=hidden.device)[None] + seen if positions is None else positions
        if packed is None:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=mask,
                past_key_values=cache,
                position_ids=places,
            )
        return {"attention_mask": mask, "cu_seq_lens_q": packed, "position_ids": places}


class HybridForCausalLM(GeneratesWithStates, HybridPreTrainedModel, GenerationMixin):
    """A causal language model of token mixers; state of constant size in `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `HybridModel.forward`; with labels [B, T] (−100: ignored) also the mean loss of the next token."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, last, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _get_static_cache_init_shape(self) -> tuple[int, int] | None:
        """Heads and width of the keys in a static cache; None where no layer keeps any, or they differ."""
        mixers = [block.mixer for block in self.model.blocks]
        shapes = {(mixer.kv_heads, mixer.head_dim) for mixer in mixers if isinstance(mixer, Softmax)}
        return shapes.pop() if len(shapes) == 1 else None


AutoModel.register(HybridConfig, HybridModel, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
