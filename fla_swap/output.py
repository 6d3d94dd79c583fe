"""The folder that a job writes to: what it may hold before, what goes and what stays, and the report in it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers

from fla_swap.errors import CheckpointError, ConfigError
from fla_swap.hybrid import MODEL_TYPE, refuse_other_model
from fla_swap.planning import load_plan
from fla_swap.types import SwapPlan

REPORT, PLOT, TRAINING = "report.json", "report.png", "training"
TRAINING_PLAN = "training-plan.json"
"""The plan of the run in `training/`; a resumed job takes it instead of selecting layers once more."""


def check_output(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse, before any work, a folder that holds something else or cannot be replaced. Nothing is removed.

    Raises:
        CheckpointError: with `resume`, there is no interrupted run; without it or `overwrite`, there is one, or a
            model; the folder is a file, the current folder, a mount point, or its parent is not writable.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file, not a folder")
    check_place(out)
    training = out / TRAINING
    interrupted = (training / "run.json").exists()
    if resume and not interrupted:
        raise CheckpointError(
            f"{out} holds no interrupted run: there is nothing to resume. Check the folder's name, or start without "
            "--resume"
        )
    if not interrupted and training.exists() and not (training.is_dir() and not any(training.iterdir())):
        raise CheckpointError(f"{training} exists and is no run of ours: move it away, or choose another folder")
    if resume or overwrite:
        return
    if interrupted:
        raise CheckpointError(f"{out} holds an interrupted conversion: --resume continues it, --overwrite starts again")
    if (out / "config.json").exists():
        raise CheckpointError(f"{out} holds a model already: choose another folder, or replace it with --overwrite")


def check_place(out: Path) -> None:
    """A model is saved beside its folder and then takes its place: the folder itself must be free to be renamed."""
    place = out.resolve()
    advice = f"the finished model takes its place by renaming: choose a folder inside it, such as {out / 'model'}"
    if place == Path.cwd().resolve():
        raise CheckpointError(f"{out} is the current folder, and {advice}")
    if os.path.ismount(place):
        raise CheckpointError(f"{out} is a mount point, and {advice}")
    parent = next(folder for folder in place.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{out} could not be written: {parent} is no folder that may be written to")


def make_room(out: Path, model: Any, *, resume: bool, overwrite: bool) -> None:
    """Right before training: its result may be saved in `out`; an interrupted run that is not resumed goes now."""
    if not overwrite:
        refuse_other_model(out, model.config)
    elif not resume:
        clear_training(out)


def earlier_plan(out: Path, everything: SwapPlan, keep: int) -> SwapPlan:
    """The plan of the interrupted run in `out`; ConfigError when `everything` less `keep` layers cannot give it."""
    plan = load_plan(out / TRAINING_PLAN)
    possible = {layer.site.fqn: (layer.mixer, layer.options) for layer in everything.layers}
    same = all(possible.get(layer.site.fqn) == (layer.mixer, layer.options) for layer in plan.layers)
    if not same or len(plan.layers) != len(everything.layers) - keep:
        raise ConfigError(
            f"{out / TRAINING} was started with other settings: its plan ({TRAINING_PLAN}) is none that these give "
            "(mixer, options, keep, local)"
        )
    return plan


def clear_training(out: Path) -> None:
    """Remove the checkpoints of a run and its plan, if `training/` is a run of ours."""
    if (out / TRAINING / "run.json").exists():
        shutil.rmtree(out / TRAINING, ignore_errors=True)
        (out / TRAINING_PLAN).unlink(missing_ok=True)


def holds_conversion_of(model: str, out: Path) -> bool:
    """Whether `out` holds a finished conversion of this very model."""
    report, config = (_read_object(out / name) for name in (REPORT, "config.json"))
    return report.get("model") == model and config.get("model_type") == MODEL_TYPE


def write_report(out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write `report.json` and `report.png`; returns the facts as JSON has them."""
    from fla_swap.plotting import plot_report

    text = json.dumps(facts, indent=1)
    (out / REPORT).write_text(text + "\n", encoding="utf-8")
    facts = json.loads(text)
    plot_report(facts, out / PLOT)
    return facts


def settings_of(config: Any) -> dict[str, Any]:
    """A `ConvertConfig` as JSON data."""
    facts = {**dataclasses.asdict(config), "options": dict(config.options or {})}
    return {name: str(value) if isinstance(value, (Path, Fraction)) else value for name, value in facts.items()}


def machine(device: torch.device) -> dict[str, Any]:
    """What made a figure: processor, cores, versions."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {platform.machine()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
