"""A swapped layer, and the classes of a model that has some: what `swap_` puts in, what a saved model is made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from fla_swap.arguments import HIDDEN, Signature, check_unmasked, check_zero, fetch, joined_masks, narrowed, read_mask
from fla_swap.cache import state_layer
from fla_swap.errors import CheckpointError, SwapError
from fla_swap.mixers import TokenMixer, mixer_class
from fla_swap.stateful import GeneratesWithStates, StatefulLayer, run_on_state
from fla_swap.types import ArgPath, AttentionSite, SwapPlan, from_jsonable, to_jsonable

MODEL_TYPE = "fla_swap"
SHIM = "modeling_fla_swap.py"
AUTO_MAP = {"AutoConfig": "modeling_fla_swap.FlaSwapConfig", "AutoModelForCausalLM": "modeling_fla_swap.FlaSwapModel"}


class SwappedAttention(StatefulLayer):
    """A mixer in the place of an attention module: called as that was called, returning what that returned.

    `mixer` is trained and saved. `original` is the module that stood here, or None in a model loaded from disk; it
    follows `.to()` and `.train()`, but is in neither `parameters()` nor `state_dict()`.
    """

    def __init__(self, site: AttentionSite, mixer: TokenMixer, original: nn.Module, *, keep_original: bool = True):
        super().__init__()
        for name, value in vars(original).items():
            if not name.startswith("_") and name != "training" and _is_plain(value):
                setattr(self, name, value)
        for name in original._parameters:  # code around may ask whether there is such a parameter: not any more
            setattr(self, name, None)
        self.site, self.call, self.mixer = site, site.call, mixer
        self._original: tuple[nn.Module, ...] = (original,) if keep_original else ()
        self.use_original = False
        self._takes = Signature.of(original.forward)
        self.tensors_seen: frozenset[str] | None = (
            None if self.call.seen is None else frozenset(self._takes.name(p) for p in self.call.seen)
        )
        self.train(original.training)

    @property
    def original(self) -> nn.Module | None:
        """The attention that stood here, or None."""
        return next(iter(self._original), None)

    def drop_original(self) -> None:
        """Free the attention that stood here; `restore_` is not possible any more."""
        self._original = ()

    def _apply(self, fn: Any, recurse: bool = True) -> SwappedAttention:
        super()._apply(fn, recurse)
        for module in self._original:
            module._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> SwappedAttention:
        super().train(mode)
        for module in getattr(self, "_original", ()):
            module.train(mode)
        return self

    def extra_repr(self) -> str:
        return f"{self.site.fqn}: {self.mixer.name}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the owner of `site` is called; `site.call` says where the arguments are and what is returned."""
        if self.use_original:
            return self._original[0](*args, **kwargs)
        call = self.call
        self._takes.check(self.site.fqn, args, kwargs, self.tensors_seen)
        given = partial(fetch, args=args, kwargs=kwargs, names=self._takes.names)
        for path in call.zeros:
            check_zero(self.site, self._takes.name(path), given(path))
        hidden = given(call.hidden)
        hidden = hidden.transpose(0, 1) if call.time_first else hidden
        packed = kwargs.get("cu_seq_lens_q")
        mask = self._mask(given, None if packed is not None or self._flash() else hidden.shape[1])
        cache = given(call.cache)
        cache = getattr(cache, "self_attention_cache", cache)
        cos, sin = given(call.cos), given(call.sin)
        tables = None if cos is None or sin is None else (cos, sin)
        where: dict[str, Any] = {"positions": given(call.positions), "cos_sin": tables}
        run = self._with_keys if self.mixer.uses_kv_cache else self._with_state
        mixed = run(hidden, mask, cache, packed, where)
        mixed = mixed.transpose(0, 1) if call.time_first else mixed
        mixed = F.dropout(mixed, self.site.output_dropout, self.training)
        residual = given(call.residual)
        return self._pack(mixed if residual is None else residual + mixed)

    def _mask(self, given: Callable[[ArgPath | None], Any], tokens: int | None) -> Any:
        """The model's mask: as it is, or made of one over pairs of tokens and one over the keys.

        `tokens`: how many there are, None where the attention needs no mask to know what it hides (flash, packed).
        """
        call = self.call
        if call.pairs is None and call.padding is None:
            mask = given(call.mask)
            if mask is None and tokens is not None:
                check_unmasked(self.site, tokens)
            if self.site.alibi is not None and isinstance(mask, Tensor) and mask.is_floating_point():
                mask = mask > HIDDEN  # it may hold the ALiBi bias, which the mixer adds itself
            if isinstance(mask, Tensor) and mask.dim() == 4 and not mask.is_floating_point():
                mask = mask > 0
            return ~mask if call.hides and isinstance(mask, Tensor) and mask.dtype == torch.bool else mask
        pairs, padding = given(call.pairs), given(call.padding)
        if call.pairs is not None and pairs is None and self.site.mask.kind != "bidirectional":
            raise SwapError(
                f"{self.site.fqn}: it was inspected under a {self.site.mask.kind} mask that is an argument, and is "
                "called without one now; inspect the model as it is called"
            )
        return joined_masks(pairs, padding, hides=call.hides)

    def _narrowed(self, mask: Any, tokens: int, seen: Any) -> Any:
        """A mask over pairs of tokens, less what the owner hides itself."""
        own = self.call.own_mask or (self.call.padding is not None and self.call.pairs is None)
        if not own or not isinstance(mask, Tensor) or mask.dim() != 4:
            return mask
        return narrowed(mask, self.site.mask, tokens, seen)

    def _pack(self, mixed: Tensor) -> Any:
        call = self.call
        if call.outputs is None:
            return mixed
        outputs = [mixed if i == call.output_index else None for i in range(call.outputs)]
        return outputs if call.listed else tuple(outputs)

    def _with_keys(self, hidden: Tensor, mask: Any, cache: Any, packed: Any, where: dict[str, Any]) -> Tensor:
        """A mixer that keeps keys and values, in the model's own cache and under the model's own mask."""
        tokens = hidden.shape[1]
        padding = mask is not None and mask.dim() == 2
        if padding and self.site.mask.kind == "bidirectional":
            mask, padding = (mask != 0)[:, None, None, :], False
        # Without a mask, several tokens are a whole sequence: keys beyond them are the empty part of a static cache.
        whole = mask is None and tokens > 1 and not self._flash()

        def update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = cache.update(keys, values, self.call.cache_index)
            return (keys[:, :, :tokens], values[:, :, :tokens]) if whole else (keys, values)

        starts = self._starts_from_positions(mask, cache, where)
        seen = None if cache is None else cache.get_seq_length(self.call.cache_index)
        mask = self._narrowed(mask, tokens, 0 if seen is None else seen)
        self._place(where, seen, hidden)
        mixed, _ = self.mixer(
            hidden,
            valid=mask != 0 if padding else None,
            starts=starts,
            cu_seqlens=packed if mask is None else None,
            attention_mask=None if padding else mask,
            kv_update=None if cache is None else update,
            **where,
        )
        return mixed

    def _with_state(self, hidden: Tensor, mask: Any, cache: Any, packed: Any, where: dict[str, Any]) -> Tensor:
        """A mixer with a state of constant size."""
        layer = None
        if cache is not None:
            layer = state_layer(cache, self.cache_index(), self.mixer, hidden)
        valid = starts = None
        if packed is None and not (layer is not None and layer.by_row):
            seen = 0 if layer is None else layer.get_seq_length()
            valid, starts = read_mask(self._narrowed(mask, hidden.shape[1], seen), hidden, seen)
            if self.site.mask.window == 1:
                starts = None  # every token sees itself alone: such a mask says nothing about documents
            if starts is None:
                starts = self._starts_from_positions(mask, cache, where)
        self._place(where, None if layer is None else layer.get_seq_length(), hidden)
        arguments = {**where, "valid": valid, "starts": starts, "cu_seqlens": packed}
        return run_on_state(self.mixer, layer, hidden, arguments)

    def _place(self, where: dict[str, Any], seen: Any, hidden: Tensor) -> None:
        """Positions after the `seen` tokens of a cache, for a mixer that needs them and is told none.

        A temperature that counts tokens of padding has them from here also without a cache (`seen` None).
        """
        temperature = self.site.temperature
        counts = temperature is not None and temperature.padding
        needs = temperature is not None or (self.site.rope is not None and where["cos_sin"] is None)
        if counts or (needs and seen is not None and where["positions"] is None):
            where["positions"] = torch.arange(hidden.shape[1], device=hidden.device)[None] + (
                0 if seen is None else seen
            )

    def _starts_from_positions(self, mask: Any, cache: Any, where: dict[str, Any]) -> Tensor | None:
        """Documents of a packed batch told by position 0: where attention gets no mask and reads the positions itself.

        Elsewhere the model turns packed positions into a mask, and no mask means one document.
        """
        positions = where["positions"]
        if mask is not None or cache is not None or positions is None or not self._flash():
            return None
        return positions == 0

    def _flash(self) -> bool:
        return "flash" in (getattr(getattr(self, "config", None), "_attn_implementation", None) or "")

    @property
    def state_owner(self) -> TokenMixer | None:
        return None if self.mixer.uses_kv_cache else self.mixer

    def cache_index(self) -> int:
        if self.call.cache_index is None:
            raise SwapError(
                f"{self.site.fqn}: a cache was passed, but its contract does not say which layer it is there"
            )
        return self.call.cache_index


def _is_plain(value: Any) -> bool:
    """Facts that the code around an attention module may read from it: numbers, names, the model's config."""
    return value is None or isinstance(value, (bool, int, float, str, PreTrainedConfig))


def install(model: nn.Module, fqn: str, module: nn.Module) -> None:
    """Put `module` at `fqn` of `model`."""
    parent, _, name = fqn.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def install_structure(model: nn.Module, plan: SwapPlan) -> None:
    """Replace the planned layers by untrained mixers, without originals: what loading a checkpoint fills in."""
    for layer in plan.layers:
        kind = mixer_class(layer.mixer)
        owner = model.get_submodule(layer.site.fqn)
        mixer = kind(kind.config_for(layer.site, layer.options))
        dtype = next((p.dtype for p in owner.parameters() if p.is_floating_point()), None)
        swapped = SwappedAttention(layer.site, mixer.to(dtype=dtype), owner, keep_original=False)
        install(model, layer.site.fqn, swapped)


class SwappedConfig:
    """Mixed in before a model's own config class. In memory the model type stays; on disk it is ours, with the plan."""

    fla_swap: dict[str, Any]

    def to_json_string(self, use_diff: bool = True) -> str:
        data = json.loads(cast(Any, super()).to_json_string(use_diff))
        return json.dumps({**data, "model_type": MODEL_TYPE, "auto_map": AUTO_MAP}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        data = {**config_dict, "model_type": cls.model_type}  # type: ignore[attr-defined]
        data.pop("auto_map", None)
        return cast(Any, super()).from_dict(data, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """As its base class: transformers renames the layer types of custom code."""
        return cast(Any, cls.__bases__[1]).is_custom_code()

    def swap_plan(self) -> SwapPlan:
        """The plan that this model was swapped by."""
        return from_jsonable(SwapPlan, self.fla_swap["plan"])


class SwappedModel(GeneratesWithStates):
    """Mixed in before a model's own class: builds the swapped structure, and does not overwrite another model."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        cast(Any, super()).__init__(config, *args, **kwargs)
        model = cast(PreTrainedModel, self)
        install_structure(model, config.swap_plan())
        model.post_init()
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tied = model.all_tied_weights_keys  # swapped layers share no weights
        model.all_tied_weights_keys = {a: b for a, b in tied.items() if {a, b} <= names}

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """As transformers', with a CheckpointError when the folder holds another model."""
        refuse_other_model(Path(save_directory), cast(Any, self).config)
        result = cast(Any, super()).save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            shim = '"""Loads this model when trust_remote_code=True; needs the package fla_swap."""\n\n'
            shim += "from fla_swap.checkpoint import FlaSwapConfig, FlaSwapModel  # noqa: F401\n"
            (Path(save_directory) / SHIM).write_text(shim, encoding="utf-8")
        return result


_classes: dict[type, type] = {}


def hybrid_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The subclass of a config class that carries a plan; the same one every time."""
    if issubclass(base, SwappedConfig):
        return base
    if base not in _classes:
        _classes[base] = type(f"FlaSwap{base.__name__}", (SwappedConfig, base), {"__module__": __name__})
    return _classes[base]


def hybrid_model_class(base: type[PreTrainedModel], config_base: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The subclass of a model class whose `__init__` installs the plan of its config; the same one every time.

    It claims the module of its base, because transformers treats models from elsewhere as custom code and then skips
    its weight conversions.
    """
    if issubclass(base, SwappedModel):
        return base
    if base not in _classes:
        content = {"__module__": base.__module__, "config_class": hybrid_config_class(config_base)}
        _classes[base] = type(f"FlaSwap{base.__name__}", (SwappedModel, base), content)
    return _classes[base]


def become_hybrid(model: PreTrainedModel, plan: SwapPlan) -> None:
    """Give a model and its config their hybrid classes, in place."""
    config = model.config
    described = {
        "base_model_type": config.model_type,
        "base_architecture": type(model).__name__,
        "plan": json.loads(json.dumps(to_jsonable(plan))),
    }
    model.__class__ = hybrid_model_class(type(model), type(config))
    config.__class__ = hybrid_config_class(type(config))
    cast(Any, config).fla_swap = described


def become_plain(model: PreTrainedModel) -> None:
    """Undo `become_hybrid`."""
    ours = type(model).__name__
    model.__class__ = type(model).__bases__[1]
    if model.config.architectures == [ours]:  # as save_pretrained noted it
        model.config.architectures = [type(model).__name__]
    model.config.__class__ = type(model.config).__bases__[1]
    del cast(Any, model.config).fla_swap


def refuse_other_model(folder: Path, config: Any) -> None:
    """CheckpointError when `folder` holds a model that is not the one `config` describes (plan and base type)."""
    path = folder / "config.json"
    if not path.exists():
        weights = sorted(p.name for p in folder.glob("*.safetensors")) if folder.is_dir() else []
        if weights:
            raise CheckpointError(f"{folder} holds weights ({weights[0]}) without a config.json; save elsewhere")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); save elsewhere") from error
    if found.get("model_type") != MODEL_TYPE or found.get("fla_swap") != getattr(config, "fla_swap", None):
        what = found.get("model_type")
        raise CheckpointError(
            f"{folder} holds another model (model_type {what!r}{', another plan' if what == MODEL_TYPE else ''}); "
            "nothing was written. Save elsewhere, or replace it: fs.save(…, overwrite=True)"
        )
