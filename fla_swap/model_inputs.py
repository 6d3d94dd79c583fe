"""What a model is captured and recorded on: inputs made from its signature and config, or the user's example."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.arguments import HIDDEN, Args, Kwargs, undisturbed
from fla_swap.errors import CaptureError, ConfigError
from fla_swap.wrappers import receiver

BATCH = 2
Inputs = tuple[Args, Kwargs]
Example = Mapping[str, Any] | Sequence[Any] | Tensor
NO_DRIVER = "0 active drivers"
"""What Triton says when a kernel is called without a GPU."""
KINDS = ("input_ids", "decoder_input_ids", "pixel_values", "input_features", "input_values")


def default_inputs(model: nn.Module, length: int, *, padded: int = 0) -> Inputs:
    """Inputs of two rows for what the model's forward asks for, no cache; sizes come from its config.

    Token ids [2, length] (for an encoder–decoder's decoder [2, length − 2]), each with an attention mask whose second
    row has `padded` positions of left padding; waveforms [2, 320 · length + 80]; images [2, channels, height, width]
    and mel features [2, bins, frames] of the one size that the config states. No images where they stand at tokens.

    Raises CaptureError when the forward takes none of these.
    """
    inner = receiver(model, KINDS) or model
    names = inspect.signature(inner.forward).parameters
    builder = _Defaults(inner, length, padded)
    kwargs: dict[str, Any] = {}
    placed = "input_ids" in names and builder.image_token is not None  # images stand at tokens: text alone does
    if "pixel_values" in names and not placed:
        kwargs |= builder.image()
    if "input_features" in names:
        kwargs |= builder.features()
    if "input_values" in names:
        kwargs |= builder.sound()
    if "input_ids" in names:
        kwargs |= builder.ids("", length, names)
    if "decoder_input_ids" in names:
        kwargs |= builder.ids("decoder_", length - 2, names)
    if not kwargs:
        raise CaptureError(
            f"{type(model).__name__}.forward takes none of {list(KINDS)}, of sizes that the config states (it takes "
            f"{list(names)}): pass example_inputs"
        )
    if "use_cache" in names:
        kwargs["use_cache"] = False
    return (), kwargs


class _Defaults:
    def __init__(self, model: nn.Module, length: int, padded: int):
        self.model, self.length, self.padded = model, length, padded
        self.config = getattr(model, "config", None)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.generator = torch.Generator().manual_seed(0)

    @property
    def image_token(self) -> int | None:
        """The token in whose place a model puts an image's features, where it has one."""
        stated = (getattr(self.config, name, None) for name in ("image_token_id", "image_token_index"))
        return next((token for token in stated if isinstance(token, int)), None)

    def ids(self, prefix: str, length: int, names: Mapping[str, Any]) -> dict[str, Any]:
        vocabulary = self._stated(f"{prefix}vocab_size", "text_config") or self._stated("vocab_size", "text_config")
        if vocabulary is None:
            tables = [m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding)]
            vocabulary = max(tables, default=2)
        ids = torch.randint(0, vocabulary, (BATCH, length), generator=self.generator).to(self.device)
        ids = ids.masked_fill(ids == self.image_token, 0) if self.image_token is not None else ids
        found: dict[str, Any] = {f"{prefix}input_ids": ids}
        if f"{prefix}attention_mask" in names:
            mask = torch.ones_like(ids)
            mask[1, : min(self.padded, length // 2)] = 0
            found[f"{prefix}attention_mask"] = mask
            if self.padded and f"{prefix}position_ids" in names:
                found[f"{prefix}position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return found

    def image(self) -> dict[str, Any]:
        size, channels = self._stated("image_size", "vision_config"), self._stated("num_channels", "vision_config")
        if size is None or not isinstance(channels, int):
            return {}
        height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
        return {"pixel_values": self._noise(BATCH, channels, height, width)}

    def features(self) -> dict[str, Any]:
        bins, positions = self._stated("num_mel_bins"), self._stated("max_source_positions")
        if isinstance(bins, int) and isinstance(positions, int):
            return {"input_features": self._noise(BATCH, bins, 2 * positions)}
        channels = self._stated("input_feat_per_channel")
        return {"input_features": self._noise(BATCH, 4 * self.length, channels)} if channels else {}

    def sound(self) -> dict[str, Any]:
        """A spectrogram of the stated size, or a waveform: 320 samples for a token, as wav2vec 2.0 has them."""
        bins, frames = self._stated("num_mel_bins"), self._stated("max_length")
        if isinstance(bins, int) and isinstance(frames, int):
            return {"input_values": self._noise(BATCH, frames, bins)}
        return {"input_values": self._noise(BATCH, 320 * self.length + 80)}

    def _noise(self, *size: int) -> Tensor:
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        return torch.randn(size, generator=self.generator).to(self.device, dtype)

    def _stated(self, name: str, part: str = "") -> Any:
        found = getattr(self.config, name, None)
        return getattr(getattr(self.config, part, None), name, None) if found is None and part else found


def check_example(example: Any) -> None:
    """Raises ConfigError for what cannot be one call's arguments."""
    fits = isinstance(example, Tensor | Mapping | Sequence) and not isinstance(example, str | bytes)
    if example is not None and not fits:
        raise ConfigError(
            f"example_inputs is {example!r}: it must be one call's arguments, as a mapping, a sequence or one tensor"
        )
    if isinstance(example, Mapping) and any(not isinstance(name, str) for name in example):
        raise ConfigError(f"example_inputs has the keys {list(example)}: they must be names of the forward's arguments")


def inputs_of_length(
    example: Example, length: int, *, padded: int = 0, resize: Sequence[int] | None = None, time_first: bool = False
) -> Inputs:
    """The user's example inputs with two rows and other token counts.

    `resize` are the token counts (`token_counts`) to change, the first of them to `length`, the next to two less, and
    so on; None: that of the first tensor [B, T, …]; none at all leaves every size as it is. Masks over pairs of
    tokens, [T, S], that are causal or all equal are made anew. A padding mask [B, T] (bool and hiding nothing, or a
    whole-number tensor called a mask, which becomes ones) gets `padded` hidden positions at the start of row 1.
    """
    named = _named(example)
    counts = token_counts(example, time_first=time_first)
    if not counts:
        given = ", ".join(f"{name}: {_described(value)}" for name, value in named.items()) or "nothing"
        raise CaptureError(f"example_inputs holds no tensor [batch, time, …] itself, but {given}")
    chosen = counts[:1] if resize is None else resize
    lengths = {count: length - 2 * i for i, count in enumerate(chosen)}
    first = next(v for v in named.values() if isinstance(v, Tensor) and v.dim() >= 2)
    rows = first.shape[1 - _token_dim(first, time_first)]
    done: dict[int, Tensor] = {}

    def change(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if id(value) not in done:
            done[id(value)] = _padded(name, _resized(value, lengths, rows, _token_dim(value, time_first)), padded)
        return done[id(value)]

    changed = {name: change(name, value) for name, value in named.items()}
    if isinstance(example, Mapping):
        return (), changed
    return tuple(changed.values()), {}


def token_counts(example: Example, *, time_first: bool = False) -> list[int]:
    """The distinct second dimensions of the tensors of two dimensions and more, in order.

    With `time_first` the first dimensions of the tensors of three and more; [T, B, D] and masks [B, T] go together.
    """
    tensors = [v for v in _named(example).values() if isinstance(v, Tensor) and v.dim() >= 2]
    return list(dict.fromkeys(v.shape[_token_dim(v, time_first)] for v in tensors))


def _token_dim(value: Tensor, time_first: bool) -> int:
    return 0 if time_first and value.dim() >= 3 else 1


def resizable(model: nn.Module, example: Example, length: int, *, time_first: bool = False) -> list[int]:
    """The token counts of the example that the model lets be changed: all of them, one of them, or none (tried out)."""
    counts = token_counts(example, time_first=time_first)
    for chosen in dict.fromkeys((tuple(counts), *((c,) for c in counts))):
        args, kwargs = inputs_of_length(example, length, resize=chosen, time_first=time_first)
        try:
            with undisturbed(model, use_cache=False):
                model(*args, **kwargs)
        except Exception:  # whatever the model does with sizes that it does not take
            continue
        return list(chosen)
    return []


def padding_masks(inputs: Inputs) -> list[Tensor]:
    """bool [B, n], true for tokens, of every padding mask among the inputs."""
    found = []
    for name, value in (*((str(i), v) for i, v in enumerate(inputs[0])), *inputs[1].items()):
        if isinstance(value, Tensor) and value.dim() == 2 and _is_padding(name, value):
            found.append(value != value[0, -1])
    return [~mask for mask in found]


def sizes_of(inputs: Inputs) -> list[Any]:
    return [v.shape for v in (*inputs[0], *inputs[1].values()) if isinstance(v, Tensor)]


def given_tokens(inputs: Inputs, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """bool [B, T] of the tokens that are no padding, and the positions, as the model was given them."""
    given = [*inputs[0], *inputs[1].values()]
    device = next((v.device for v in given if isinstance(v, Tensor)), None)
    valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    valid = next((m for m in padding_masks(inputs) if m.shape == valid.shape), valid)
    named = [v for n, v in inputs[1].items() if "position_ids" in n and isinstance(v, Tensor)]
    counted = torch.arange(length, device=device).expand(batch, length)
    return valid, next((v for v in named if v.shape == valid.shape), counted)


def closed_input(name: str, value: Any) -> bool:
    """Whether an input says which tokens there are and where, instead of what they are: masks and positions."""
    if not isinstance(value, Tensor):
        return True
    if any(word in name for word in ("attention_mask", "position_ids", "cache_position")):
        return True
    return value.dim() >= 2 and (value.dtype == torch.bool or _hides(value))


def _named(example: Example) -> dict[str, Any]:
    if isinstance(example, Tensor):
        return {"0": example}
    return dict(example) if isinstance(example, Mapping) else {str(i): v for i, v in enumerate(example)}


def _resized(value: Tensor, lengths: Mapping[int, int], rows: int, dim: int) -> Tensor:
    if not lengths:
        return value
    if _is_pairs(value):
        return _new_pairs(value, lengths)
    if value.shape[1 - dim] == rows:
        value = _cycled(value, 1 - dim, BATCH)
    return _cycled(value, dim, lengths.get(value.shape[dim], value.shape[dim]))


def _cycled(value: Tensor, dim: int, size: int) -> Tensor:
    """The value repeated or cut along a dimension."""
    return value.index_select(dim, torch.arange(size, device=value.device) % value.shape[dim])


def _padded(name: str, value: Tensor, padded: int) -> Tensor:
    if value.dim() != 2 or _is_pairs(value) or not _is_padding(name, value):
        return value
    if value.dtype != torch.bool:
        value = torch.ones_like(value)
    if padded and len(value) > 1 and bool((value == value[0, 0]).all()):
        value = value.clone()
        value[1, : min(padded, value.shape[1] // 2)] = _hidden_value(value)
    return value


def _is_padding(name: str, value: Tensor) -> bool:
    return value.dtype == torch.bool or (not value.is_floating_point() and "mask" in name)


def _hidden_value(value: Tensor) -> Any:
    return ~value[0, 0] if value.dtype == torch.bool else 1 - value[0, 0]


def _hides(value: Tensor) -> bool:
    """Whether a floating tensor is a mask to be added: zeros, and numbers that hide."""
    if not value.is_floating_point():
        return False
    hidden = value <= HIDDEN
    return bool(hidden.any()) and bool((hidden | (value == 0)).all())


def _is_pairs(value: Tensor) -> bool:
    """Whether it is one mask [T, S] over pairs of tokens."""
    return value.dim() == 2 and value.shape[0] > BATCH and (value.dtype == torch.bool or _hides(value))


def _new_pairs(value: Tensor, lengths: Mapping[int, int]) -> Tensor:
    """The mask [T, S] at other lengths, where it is causal or all equal; else unchanged."""
    size = tuple(lengths.get(n, n) for n in value.shape)
    if bool((value == value[0, 0]).all()):
        return value[:1, :1].expand(size).clone()
    low = torch.ones_like(value, dtype=torch.bool).tril()
    seen, later = value[0, 0], value[0, -1]
    if bool((value == torch.where(low, seen, later)).all()):
        below = torch.ones(size, dtype=torch.bool, device=value.device).tril()
        return torch.where(below, seen, later)
    return value


def takes_cache(model: nn.Module) -> bool:
    """Whether a cache can be given to the model, or through it to the model that it wraps."""
    return receiver(model, ("past_key_values",)) is not None


def own_failure(model: nn.Module, inputs: Inputs, error: Exception) -> str:
    """What to say where the model's own forward raises `error` on these inputs."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    given = [*((f"argument {i}", v) for i, v in enumerate(inputs[0])), *inputs[1].items()]
    passed = ", ".join(f"{name}: {_described(value)}" for name, value in given) or "nothing"
    if NO_DRIVER in str(error):
        return (
            f"{type(model).__name__}'s own forward calls Triton kernels of an installed package, and they find no GPU: "
            f"{type(error).__name__}: {lines[0]}. Inspect it on a GPU, or where that package is not installed: the "
            "model's code then takes its own PyTorch path"
        )
    return (
        f"{type(model).__name__}'s own forward fails, before anything is captured: {type(error).__name__}: "
        f"{lines[0] if lines else 'without a message'}. It was given {passed}. Pass example_inputs with which it runs"
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value) if value is None or isinstance(value, int | float | str) else f"a {type(value).__name__}"
