"""What a model has read, as a value: computed once, forked, saved, and gone on from in another process.

    state = fs.state(model, ids)                       # read a long prefix once
    model.generate(more_ids, past_key_values=state.fork(rows=4))
    state.save("prefix.safetensors"); fs.load_state("prefix.safetensors", model)

`more_ids` holds the prefix and what follows it, as everywhere in transformers.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from fla_swap.cache import StateLayer
from fla_swap.errors import CheckpointError, SwapError
from fla_swap.stateful import prepare_cache

FORMAT = "fla_swap prompt state 1"


class PromptState:
    """The state of a model after `tokens` tokens, one row or several.

    ids: int64 [B, T], what was read.
    """

    def __init__(self, cache: DynamicCache, ids: Tensor, fingerprint: str):
        self._cache, self.ids, self.fingerprint = cache, ids, fingerprint

    @property
    def tokens(self) -> int:
        """Tokens read, T."""
        return self.ids.shape[1]

    def bytes(self) -> int:
        """Memory of the state: constant in T where every layer has a state of constant size."""
        return sum(t.numel() * t.element_size() for t in _tensors(self._cache).values())

    def fork(self, rows: int = 1) -> DynamicCache:
        """A cache of its own to go on from, each row repeated `rows` times; the state itself stays as it is."""
        if rows < 1:
            raise SwapError(f"fork(rows={rows}): at least one row")
        cache = copy.deepcopy(self._cache)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file, whole or not at all; returns its path. Raises CheckpointError."""
        path = Path(path)
        counts = [
            layer.cumulative_length if isinstance(layer, DynamicSlidingWindowLayer) else None
            for layer in self._cache.layers
        ]
        facts = {"format": FORMAT, "fingerprint": self.fingerprint, "counts": json.dumps(counts)}
        tensors = {n: t.detach().cpu().contiguous() for n, t in _tensors(self._cache).items()}
        beside = path.with_name(path.name + ".saving")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({**tensors, "ids": self.ids.cpu()}, beside, metadata=facts)
            beside.replace(path)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise CheckpointError(f"{path} could not be written ({error})") from error
        return path


@torch.no_grad()
def state(model: nn.Module, input_ids: Tensor, *, chunk: int = 4096) -> PromptState:
    """Read input_ids [B, T] (no padding) and return the model's state after them.

    Args:
        chunk: tokens that are read at a time, which bounds the memory of a long prefix.
    Raises:
        SwapError: input_ids is empty, or `chunk` is not positive.
    """
    if input_ids.dim() != 2 or not input_ids.numel() or chunk < 1:
        raise SwapError(
            f"state needs input_ids of shape (B, T), T ≥ 1, and chunk ≥ 1; got {tuple(input_ids.shape)}, {chunk}"
        )
    cache = _empty_cache(model)
    target: Any = model
    for part in input_ids.split(chunk, 1):
        target(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return PromptState(cache, input_ids.clone(), fingerprint(model))


def load_state(path: str | Path, model: nn.Module) -> PromptState:
    """Read a state that `PromptState.save` wrote, onto the model's device.

    Raises:
        CheckpointError: the file is missing, damaged, or the state of another model (other weights count as another).
    """
    device = next(model.parameters()).device
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no prompt state that can be read ({error})") from error
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a prompt state (format {facts.get('format')!r}, expected {FORMAT!r})")
    if facts["fingerprint"] != fingerprint(model):
        raise CheckpointError(f"{path} is the state of another model, or of these layers with other weights")
    ids = tensors.pop("ids")
    cache = _empty_cache(model)
    prepare_cache(model, cache, ids.shape[0])
    for index, (layer, count) in enumerate(zip(cache.layers, json.loads(facts["counts"]), strict=True)):
        own = {n.split(".", 2)[2]: t for n, t in tensors.items() if n.startswith(f"layers.{index}.")}
        if isinstance(layer, StateLayer):
            for name, tensor in layer.state.items():
                tensor.copy_(own[name])
            layer.advance(ids.shape[1])
            continue
        layer.update(own["keys"], own["values"])  # type: ignore[union-attr]
        if count is not None:
            layer.cumulative_length = count  # type: ignore[union-attr]
    return PromptState(cache, ids, facts["fingerprint"])


def fingerprint(model: nn.Module) -> str:
    """Equal for models with the same parameter names and shapes and, in a sample of each, the same values."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 16)][:16]
        digest.update(str(some.float().cpu().tolist()).encode())
    return digest.hexdigest()


def _empty_cache(model: nn.Module) -> DynamicCache:
    config: Any = model.config
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    prepare_cache(model, cache)
    return cache


def _tensors(cache: DynamicCache) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        own: Any = layer
        parts = own.state if isinstance(own, StateLayer) else {"keys": own.keys, "values": own.values}
        found.update({f"layers.{index}.{name}": tensor for name, tensor in parts.items()})
    return found
