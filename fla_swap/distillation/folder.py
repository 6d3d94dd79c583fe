"""The folder of a run: what is done, with which settings, and the weights at the end of each stage."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fla_swap.distillation.trainer import WEIGHTS, checkpoints, load_weights, own_weights, save_problem
from fla_swap.errors import TrainingError


class RunFolder:
    """`run.json` (settings), `history.json` (losses); a folder per stage: checkpoints, then weights and `done.json`.

    Only the main process (`main`) checks and writes. Raises TrainingError when the folder holds another run, or an
    unfinished one and `resume` is False.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], *, resume: bool, main: bool = True):
        self.path, self.main = Path(path), main
        if not main:
            return
        settings = json.loads(json.dumps(settings))
        file = self.path / "run.json"
        if file.exists():
            if not resume:
                raise TrainingError(
                    f"{self.path} holds an earlier run: resume=True continues it; or choose another folder"
                )
            differing = differences(json.loads(file.read_text(encoding="utf-8")), settings)
            if differing:
                raise TrainingError(f"{self.path} was started with other settings: {'; '.join(differing)}")
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise TrainingError(f"{self.path} is not empty and holds no run of fs.distill: choose another folder")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(file, settings)

    def stage(self, name: str) -> Path:
        return self.path / name

    def finished(self, name: str) -> dict[str, Any] | None:
        """What `finish` recorded for a stage, or None."""
        file = self.stage(name) / "done.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def finish(self, name: str, model: nn.Module, record: dict[str, Any]) -> None:
        """Write a stage's final weights, mark it as done, and delete its checkpoints and the weights before it."""
        if not self.main:
            return
        folder = self.stage(name)
        partial = folder / f"{WEIGHTS}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(own_weights(model), partial, metadata={"format": "pt"})
            os.replace(partial, folder / WEIGHTS)
            write_json(folder / "done.json", record)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise TrainingError(f"{save_problem(error, folder / WEIGHTS)}; what was saved before is kept") from error
        for old in checkpoints(folder):
            shutil.rmtree(old)
        for other in self.path.glob(f"*/{WEIGHTS}"):
            if other.parent != folder:
                other.unlink()

    def load(self, name: str, model: nn.Module) -> None:
        """Load the weights a finished stage left; those of earlier stages are gone, and not needed."""
        if (self.stage(name) / WEIGHTS).exists():
            load_weights(model, self.stage(name) / WEIGHTS)

    def read_history(self) -> list[dict[str, Any]]:
        file = self.path / "history.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []

    def write_history(self, history: list[dict[str, Any]]) -> None:
        if self.main:
            write_json(self.path / "history.json", history)


def write_json(path: Path, data: Any) -> None:
    """Write whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(save_problem(error, path)) from error


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, as "path: old → new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        return [d for n in names for d in differences(old.get(n), new.get(n), f"{where}.{n}" if where else n)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{where}[{i}]")]
    return [] if old == new else [f"{where}: {old} → {new}"]


def digest(tensors: dict[str, Tensor]) -> str:
    """A short hash of named tensors: shapes and up to 4096 elements of each, evenly spaced."""
    state = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].to(
            "cpu", torch.float32 if flat.is_floating_point() else flat.dtype
        )
        state.update(f"{name}{tuple(tensors[name].shape)}".encode())
        state.update(sample.contiguous().numpy().tobytes())
    return state.hexdigest()
