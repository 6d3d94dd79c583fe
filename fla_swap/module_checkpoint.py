"""Save and load modules that are no transformers models: plan.json and model.safetensors, no pickle.

The folder holds no code: whoever loads it builds the module as it was before the swap; the mixers are put in as the
plan says, and every parameter and buffer gets the stored value, bitwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fla_swap.errors import CheckpointError, FlaSwapError
from fla_swap.folders import WEIGHTS, check_safetensors, read_json, written_beside
from fla_swap.hybrid import install, install_structure
from fla_swap.mixers.base import is_quantised
from fla_swap.planning import load_plan, plan_to_json
from fla_swap.swapping import swapped_layers
from fla_swap.types import LayerPlan, SwapPlan

PLAN, TENSORS = "plan.json", "model.safetensors"


def plan_of(model: nn.Module) -> SwapPlan:
    """The plan by which a module was swapped, read off its swapped layers; no layers when it was not."""
    layers = [
        LayerPlan(
            site=layer.site, mixer=layer.mixer.name, options=json.loads(json.dumps(layer.mixer.config.to_options()))
        )
        for _, layer in swapped_layers(model)
    ]
    return SwapPlan(layers=tuple(layers))


def save_module(model: nn.Module, folder: Path, side_files: tuple[str, ...], *, overwrite: bool) -> Path:
    """Write `folder`, whole or not at all. `side_files`: what a model of another kind may have left there.

    Raises CheckpointError when the folder holds another model and `overwrite` is False, or cannot be written.
    """
    plan = plan_of(model)
    same = _holds(folder, plan)
    if not (same or overwrite) and any((folder / name).exists() for name in (PLAN, TENSORS, "config.json")):
        raise CheckpointError(f"{folder} holds another model; save elsewhere, or pass overwrite=True")
    tensors, aliases = _distinct(model)
    with written_beside(folder, WEIGHTS if same else (*WEIGHTS, *side_files, "config.json")) as fresh:
        (fresh / PLAN).write_text(plan_to_json(plan) + "\n", encoding="utf-8")
        save_file(tensors, fresh / TENSORS, metadata={"format": "pt", "tied": json.dumps(aliases)})
    return folder


def load_module(folder: Path, model: nn.Module) -> None:
    """Put the mixers of the folder's plan into a freshly built module and fill it. In place, all or nothing.

    Raises CheckpointError: no such folder, a damaged file, another module, weights that are missing or left over.
    """
    if not (folder / PLAN).exists():
        raise CheckpointError(f"{folder} holds no module that fs.save wrote: there is no {PLAN}")
    plan = _read_plan(folder / PLAN)
    check_safetensors(folder / TENSORS)
    if swapped := swapped_layers(model):
        raise CheckpointError(f"this module is swapped already ({swapped[0][0]}): load into a freshly built one")
    try:
        originals = {layer.site.fqn: model.get_submodule(layer.site.fqn) for layer in plan.layers}
    except AttributeError as error:
        raise CheckpointError(
            f"{folder} was saved from another module: this {type(model).__name__} has no attention there ({error})"
        ) from error
    try:
        install_structure(model, plan)
        stored = _read_tensors(folder / TENSORS)
        _check(model, stored, folder)
    except BaseException:
        for fqn, original in originals.items():
            install(model, fqn, original)
        raise
    _fill(model, stored)


def _read_plan(path: Path) -> SwapPlan:
    read_json(path)
    try:
        return load_plan(path)
    except FlaSwapError as error:
        raise CheckpointError(str(error)) from error


def _holds(folder: Path, plan: SwapPlan) -> bool:
    """Whether the folder holds a module swapped by this very plan."""
    try:
        return plan_to_json(load_plan(folder / PLAN)) == plan_to_json(plan)
    except FlaSwapError:
        return False


def _slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(full name, module, name, tensor) of everything that is saved; a tied tensor comes once for each name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, module, name, tensor


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, each once, and for every other name of a tied one the name under which it is stored."""
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for full, module, _, tensor in _slots(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"{full}: {type(module).__name__} has state that is no tensor (get_extra_state)")
        if tensor.is_meta or is_quantised(tensor):
            what = "has no values (meta device)" if tensor.is_meta else "is quantised: dequantise it first"
            raise CheckpointError(f"{full} {what}, so it cannot be saved")
        if id(tensor) in names:
            aliases[full] = names[id(tensor)]
        else:
            names[id(tensor)] = full
            tensors[full] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Every stored name with its tensor; names that were tied share one."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    return {**tensors, **{name: tensors[kept] for name, kept in tied.items()}}


def _check(model: nn.Module, stored: dict[str, Tensor], folder: Path) -> None:
    """CheckpointError unless the stored names, shapes and ties are the module's."""
    slots = {full: tensor for full, _, _, tensor in _slots(model)}
    missing, extra = sorted(set(slots) - set(stored)), sorted(set(stored) - set(slots))
    if missing or extra:
        what = f"has no weights for {missing[:3]}" if missing else f"has weights that this module lacks, {extra[:3]}"
        raise CheckpointError(f"{folder} {what} ({len(missing or extra)} in all): it was saved from another module")
    empty = [n for n, b in model.named_buffers() if b.is_meta and n not in slots]
    if empty:
        raise CheckpointError(
            f"buffer {empty[0]!r} is not saved with a model, and has no value on the meta device: build the "
            f"{type(model).__name__} with its buffers (accelerate.init_empty_weights() leaves them)"
        )
    values: dict[int, tuple[str, Tensor]] = {}
    for full, tensor in slots.items():
        if tensor.shape != stored[full].shape:
            raise CheckpointError(
                f"{folder}: {full} is {list(stored[full].shape)} there and {list(tensor.shape)} in this "
                f"{type(model).__name__}: it was saved from another module"
            )
        first, value = values.setdefault(id(tensor), (full, stored[full]))
        if value is not stored[full] and not torch.equal(value, stored[full]):
            raise CheckpointError(f"{folder}: {first} and {full} differ there, and are one tensor in this module")


def _fill(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Replace every tensor by its stored value, where it was. Tied ones stay tied.

    From the meta device they come to the CPU, tied as they were saved (accelerate unties).
    """
    filled: dict[int, Tensor] = {}
    for full, module, name, tensor in list(_slots(model)):
        key = id(stored[full] if tensor.is_meta else tensor)
        if key not in filled:
            value = stored[full].to("cpu" if tensor.is_meta else tensor.device)
            is_parameter = isinstance(tensor, nn.Parameter)
            filled[key] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
        setattr(module, name, filled[key])
