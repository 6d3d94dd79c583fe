"""The mechanics of a saved model's folder: written whole or not at all, and checked before it is read."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fla_swap.errors import CheckpointError

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*")


@contextmanager
def written_beside(folder: Path, stale: tuple[str, ...]) -> Iterator[Path]:
    """A new folder to write to; it takes `folder`'s place when the block ends, and nothing changes when that fails.

    stale: patterns of the files in `folder` that go; the others are moved along unless they were written anew.

    Raises CheckpointError when something cannot be written.
    """
    fresh: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".saving", dir=folder.parent))
        yield fresh
        fresh.chmod(0o777 & ~_umask())
        _take_place(fresh, folder, stale)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written ({error}); what was there before is unchanged") from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)


def _take_place(fresh: Path, folder: Path, parts: tuple[str, ...]) -> None:
    """Move `fresh` to `folder`; what was there makes room first and comes back when that fails.

    parts: patterns of the files that are the old model's own, and go.
    """
    if not folder.exists():
        os.replace(fresh, folder)
        return
    old = fresh.with_suffix(".old")
    os.replace(folder, old)
    try:
        os.replace(fresh, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    stale = {p for pattern in parts for p in old.glob(pattern)}
    for path in old.iterdir():
        if path not in stale and not (folder / path.name).exists():
            os.replace(path, folder / path.name)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_safetensors(path: Path) -> None:
    """The header of a safetensors file says how long the file must be."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing, though the index names it")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no readable safetensors file ({error}); it is damaged or cut short"
        ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(f"{path} is damaged or cut short: {size} bytes, its header says {expected}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return data
