"""Save and load: swapped models through transformers' own `save_pretrained` and `AutoModelForCausalLM`, checked and
without half-written folders through `save` and `load`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, overload

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fla_swap.errors import CheckpointError, FlaSwapError
from fla_swap.folders import WEIGHTS, check_safetensors, read_json, written_beside
from fla_swap.hybrid import MODEL_TYPE, SwappedConfig, hybrid_config_class, hybrid_model_class, refuse_other_model
from fla_swap.module_checkpoint import PLAN, load_module, save_module
from fla_swap.planning import plan_from_dict
from fla_swap.registration import FlaSwapConfig as FlaSwapConfig  # saved models name it as part of this module
from fla_swap.wrappers import uncompiled

M = TypeVar("M", bound=nn.Module)
Device = str | torch.device | None
SIDE_FILES = (
    PLAN,
    "adapter_config.json",
    "adapter_model.*",
    "added_tokens.json",
    "chat_template.*",
    "configuration_*.py",
    "generation_config.json",
    "merges.txt",
    "modeling_*.py",
    "special_tokens_map.json",
    "tokenization_*.py",
    "tokenizer*",
    "vocab.*",
)
"""What belongs to a model beside its weights and config; it goes with the model when another one takes its place."""


def hybrid_config(config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """The config that a saved model's config.json describes; the Auto classes know its model from then on."""
    described = config_dict.get("fla_swap")
    if not isinstance(described, dict) or {"base_model_type", "base_architecture", "plan"} - set(described):
        raise CheckpointError(f'config.json says model_type "{MODEL_TYPE}", but its entry "fla_swap" is missing parts')
    try:
        plan_from_dict(described["plan"])
        base = CONFIG_MAPPING[described["base_model_type"]]
    except KeyError as error:
        raise CheckpointError(
            f"the model was swapped from a {described['base_model_type']!r}, which this transformers "
            f"{transformers.__version__} does not know"
        ) from error
    except FlaSwapError as error:
        raise CheckpointError(f"config.json: {error}") from error
    config_class = hybrid_config_class(base)
    _register(base, config_class, described["base_architecture"])
    return config_class.from_dict(config_dict, **kwargs)


class FlaSwapModel(AutoModelForCausalLM):
    """Stands in the `auto_map` of a saved model; loads the class that the folder's config describes."""


def save(model: nn.Module, folder: str | Path, *, tokenizer: Any = None, overwrite: bool = False) -> Path:
    """Save a model (swapped or not) so that the folder is either the old one or the new one, never half of each.

    Everything is written beside `folder` first and then takes its place; a full disk or Ctrl-C leaves the old folder as
    it was. Files in an old folder that are no part of a model (reports, plots, training) are kept; a tokenizer and the
    like stay only when the same swapped model is saved again.

    A module that is no transformers model is saved as plan.json and model.safetensors, without its code.

    Args:
        tokenizer: saved along, with its chat template.
        overwrite: replace whatever model `folder` holds. Without it only the same swapped model may be saved again.
    Raises:
        CheckpointError: `folder` holds another model, or could not be written.
    """
    folder, model = Path(folder), uncompiled(model)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder")
    if not isinstance(model, PreTrainedModel):
        if tokenizer is not None:
            raise CheckpointError(f"a tokenizer is saved with a transformers model; this is a {type(model).__name__}")
        return save_module(model, folder, SIDE_FILES, overwrite=overwrite)
    if not overwrite:
        _refuse(folder, model)
    with written_beside(folder, WEIGHTS if _same(folder, model) else WEIGHTS + SIDE_FILES) as fresh:
        model.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
    return folder


@overload
def load(
    name: str | Path, model: None = None, *, dtype: torch.dtype | None = None, device: Device = None
) -> PreTrainedModel: ...


@overload
def load(name: str | Path, model: M, *, dtype: torch.dtype | None = None, device: Device = None) -> M: ...


def load(
    name: str | Path, model: nn.Module | None = None, *, dtype: torch.dtype | None = None, device: Device = None
) -> nn.Module:
    """Load a causal language model, swapped or not, from a folder or a hub id; or fill a module of your own. Checked.

    Args:
        model: a freshly built module (on the meta device, if you like), for a folder that `save` wrote of one that is
            no transformers model: the mixers of the folder's plan are put in and every weight is loaded, in place.
        dtype: None keeps the dtype on disk.
        device: where to put it; None leaves it where it was built, on the CPU.
    Raises:
        CheckpointError: no such model, a file is missing or truncated, or the weights do not fill the model.
    """
    if model is not None:
        if not isinstance(model, nn.Module):
            raise CheckpointError(
                f"model={model!r} is no module: build one and pass that, fs.load({str(name)!r}, Model())"
            )
        if isinstance(model, PreTrainedModel):
            raise CheckpointError(f"{type(model).__name__} is built by transformers: load it without `model`")
        load_module(Path(name), model)
        model = model if dtype is None else model.to(dtype)
        return model if device is None else model.to(device)
    folder = Path(name)
    if folder.is_dir():
        check_folder(folder)
    elif folder.exists() or str(name).startswith((".", "/", "~")):
        raise CheckpointError(f"{name} is no folder with a saved model")
    try:
        if not folder.is_dir():
            AutoConfig.from_pretrained(str(name))  # a name that does not exist fails here once, not file by file
        found: Any = AutoModelForCausalLM.from_pretrained(
            str(name), dtype=dtype if dtype is not None else "auto", output_loading_info=True
        )
    except FlaSwapError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        where = "" if folder.is_dir() else "it is no folder here, and from the hub: "
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{name} could not be loaded: {where}{reason}") from error
    loaded, info = found
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{name} has no weights for {missing[:3]} ({len(missing)} in all); it is incomplete")
    return loaded if device is None else loaded.to(device)


def check_folder(folder: Path) -> None:
    """CheckpointError, naming the file, when a saved model lacks a file or one is cut short."""
    config = folder / "config.json"
    if not config.exists():
        if (folder / PLAN).exists():
            raise CheckpointError(f"{folder} holds a module of your own: build it, then fs.load(folder, module)")
        raise CheckpointError(f"{folder} holds no model: there is no config.json")
    read_json(config)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        names = [p.name for p in sorted(folder.glob("*.safetensors"))]
        if not names and not list(folder.glob("pytorch_model*.bin")):
            raise CheckpointError(f"{folder} holds a config.json, but no weights (model.safetensors)")
    for name in names:
        check_safetensors(folder / name)


def _refuse(folder: Path, model: PreTrainedModel) -> None:
    if isinstance(model.config, SwappedConfig):
        refuse_other_model(folder, model.config)
    elif (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds a model already; save elsewhere, or pass overwrite=True")


def _same(folder: Path, model: PreTrainedModel) -> bool:
    """Whether saving would not replace another model: the folder holds none, or this swapped one."""
    try:
        _refuse(folder, model)
    except CheckpointError:
        return False
    return True


def _register(base: type[PreTrainedConfig], config_class: type[PreTrainedConfig], architecture: str) -> None:
    """Make every Auto class that knows the base model under this architecture know its hybrid."""
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is None or base not in mapping or config_class in mapping:
            continue
        found = mapping[base]
        for model in found if isinstance(found, (tuple, list)) else (found,):
            if model.__name__ == architecture:
                auto.register(config_class, hybrid_model_class(model, base), exist_ok=True)
