"""The config of a model built from scratch: a mixer for each layer, with the options of its paper. Light."""

from __future__ import annotations

import difflib
from dataclasses import fields
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig

from fla_swap.errors import ConfigError

FEED_FORWARDS = ("swiglu", "channel_mixing", "none")


class HybridConfig(PreTrainedConfig):
    """A causal language model of token mixers: `AutoModelForCausalLM.from_config(HybridConfig(…))`.

    Layers are those of the papers: options overlay `<Mixer>Config.PAPER`.

    Args:
        mixer: name of the mixer of all layers but those that `attn` and `layers` name.
        mixer_options: its options, as of its config (`fs.mixers.GLAConfig`).
        attn: softmax layers of a hybrid: "layers", and any of "num_heads", "num_kv_heads", "window_size" (tokens that a
            query sees; None or absent: all of them, with a key/value cache) and the other options of `WindowConfig`.
        layers: layer number → "mixer", "feed_forward" and mixer options of that layer alone.
        feed_forward: "swiglu", "channel_mixing" (RWKV6's), "none", or None: as the paper of each layer's mixer.
        intermediate_size: None: 8/3 of the hidden size for SwiGLU, 7/2 for channel mixing, rounded up to 32.
        num_heads, num_kv_heads: of every mixer whose options do not say otherwise; None: hidden_size / 64, and as many.
        num_attention_heads, num_key_value_heads: for transformers to read; they follow from the layers.
        rms_norm_eps, initializer_range, tie_word_embeddings, use_cache: as in Llama's config.
    Raises:
        ConfigError: an unknown option, a layer that does not exist, or one that is named twice.
    """

    model_type = "fla_swap_hybrid"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    intermediate_size: int | None = None
    mixer: str = "gla"
    mixer_options: dict[str, Any] | None = None
    attn: dict[str, Any] | None = None
    layers: dict[Any, dict[str, Any]] | None = None
    feed_forward: str | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        import_module("fla_swap.model")  # a swapped model's config: its model is known by then

    def __post_init__(self, **kwargs: Any) -> None:
        own = [f.name for f in fields(HybridConfig)]
        for name in kwargs:
            close = difflib.get_close_matches(name, own, 1, 0.8)
            if close and not name.startswith("_"):
                raise ConfigError(f"HybridConfig has no option {name!r}; did you mean {close[0]!r}?")
        self.mixer_options = dict(self.mixer_options or {})
        self.layers = {int(index): dict(options) for index, options in (self.layers or {}).items()}
        self.num_heads = self.num_heads or max(1, self.hidden_size // 64)
        super().__post_init__(**kwargs)
        self._check()
        self._state_heads()
        import_module("fla_swap.model")  # which tells the Auto classes the model

    def _check(self) -> None:
        numbers = [*(self.layers or {}), *(self.attn or {}).get("layers", ())]
        if self.attn is not None and "layers" not in self.attn:
            raise ConfigError(
                f'HybridConfig: attn needs "layers", the numbers of its layers; it has {sorted(self.attn)}'
            )
        outside = sorted(n for n in numbers if not 0 <= n < self.num_hidden_layers)
        if outside:
            raise ConfigError(f"HybridConfig: there is no layer {outside}; num_hidden_layers={self.num_hidden_layers}")
        twice = sorted(n for n in set(numbers) if numbers.count(n) > 1)
        if twice:
            raise ConfigError(f"HybridConfig: layers {twice} stand both in `attn` and in `layers`, or twice in `attn`")
        for layer in range(self.num_hidden_layers):
            kind = self.layer(layer)[2]
            if kind is not None and kind not in FEED_FORWARDS:
                raise ConfigError(f"HybridConfig: feed_forward must be one of {FEED_FORWARDS}, got {kind!r}")

    def _state_heads(self) -> None:
        """The heads as transformers asks for them: of the first layer with attention, or else of the mixers."""
        for index in range(self.num_hidden_layers):
            name, options, _ = self.layer(index)
            if name in ("softmax", "window"):
                break
        else:
            options = self.layer(0)[1] if self.num_hidden_layers else {"num_heads": self.num_heads}
        heads = options["num_heads"]
        stated = {"num_attention_heads": heads, "num_key_value_heads": options.get("num_kv_heads") or heads}
        for field, value in stated.items():
            if getattr(self, field) not in (None, value):
                raise ConfigError(
                    f"HybridConfig: {field} follows from the layers and is {value} here, not {getattr(self, field)}; "
                    f"the option is {'num_heads' if field == 'num_attention_heads' else 'num_kv_heads'}"
                )
            setattr(self, field, value)

    def layer(self, index: int) -> tuple[str, dict[str, Any], str | None]:
        """Mixer, its options and the feed-forward (None: as the mixer's paper) of a layer."""
        shared: dict[str, Any] = {
            "hidden_size": self.hidden_size,
            "num_heads": self.num_heads,
            "layer": index,
            "num_layers": self.num_hidden_layers,
        }
        if self.num_kv_heads is not None:
            shared["num_kv_heads"] = self.num_kv_heads
        feed_forward = self.feed_forward
        if self.attn is not None and index in self.attn["layers"]:
            options = {name: value for name, value in self.attn.items() if name != "layers"}
            window = options.pop("window_size", None)
            name = "softmax" if window is None else "window"
            options |= {} if window is None else {"window": window}
        else:
            own = dict((self.layers or {}).get(index, {}))
            name = own.pop("mixer", self.mixer)
            feed_forward = own.pop("feed_forward", feed_forward)
            options = {**((self.mixer_options or {}) if name == self.mixer else {}), **own}
        return name, {**shared, **options}, feed_forward
