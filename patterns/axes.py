"""How scores lie in a tensor: which of batch row, head, query and key each of its dimensions counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Axes = tuple[tuple[tuple[str, int], ...], ...]
"""For each dimension its letters, slowest first, with their sizes: b row, h head, t query, s key (−1: a length)."""


class AxesRefused(Exception):
    """The scores lie in no such way, or a closed tensor does not fit to them."""


class Coded(Protocol):
    @property
    def heads(self) -> int: ...
    @property
    def keys(self) -> int: ...
    @property
    def key_length(self) -> int: ...
    @property
    def length(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class _Coordinates:
    values: dict[str, Tensor]

    @staticmethod
    def of(code: Tensor, scores: Coded) -> _Coordinates:
        owner, key = code // scores.keys, code % scores.keys
        query, head = owner // scores.heads, owner % scores.heads
        return _Coordinates(
            values={"b": query // scores.length, "h": head, "t": query % scores.length, "s": key % scores.key_length}
        )


def axes_of(code: Tensor, scores: Coded) -> Axes:
    """Read off the codes of every entry (see `heads.Scores`); checked on all of them. Raises `AxesRefused`."""
    values = _Coordinates.of(code, scores).values
    found = tuple(_letters(values, dim, code.shape[dim]) for dim in range(code.dim()))
    for letter, value in values.items():
        if not torch.equal(_expected(letter, found, code), value):
            raise AxesRefused("the scores are laid out in an order of rows, heads, queries and keys that is not read")
    return found


def _letters(values: dict[str, Tensor], dim: int, size: int) -> tuple[tuple[str, int], ...]:
    """The letters that vary along a dimension, slowest first."""
    periods = []
    for letter, value in values.items():
        line = (value != value.narrow(dim, 0, 1)).movedim(dim, 0).reshape(size, -1).any(1)
        if bool(line.any()):
            periods.append((int(line.nonzero()[0]), letter))
    periods.sort(reverse=True)
    bounds = [size, *(p for p, _ in periods)]
    sizes = [bounds[i] // bounds[i + 1] for i in range(len(periods))]
    return tuple((c, -1 if c in "ts" else n) for (_, c), n in zip(periods, sizes, strict=True))


def _expected(letter: str, axes: Axes, code: Tensor) -> Tensor:
    """The coordinate `letter` of every entry, if the axes are as stated: earlier dimensions count slower."""
    result = torch.zeros(code.shape, dtype=torch.long)
    for dim, letters in enumerate(axes):
        index = torch.arange(code.shape[dim])
        place = [c for c, _ in letters]
        if letter not in place:
            continue
        sizes = [n for _, n in letters]
        if -1 in sizes:
            known = 1
            for n in sizes:
                known *= n if n > 0 else 1
            sizes[sizes.index(-1)] = code.shape[dim] // known
        for after in sizes[::-1][: len(sizes) - 1 - place.index(letter)]:
            index = index // after
        size = sizes[place.index(letter)]
        shaped = (index % size).reshape([-1 if d == dim else 1 for d in range(code.dim())])
        result = result * size + shaped
    return result


def arrange(value: Tensor, axes: Axes) -> Tensor:
    """A closed tensor that broadcasts against scores that lie as `axes` say, as [B or 1, H or 1, T or 1, S or 1]."""
    if value.dim() > len(axes):
        raise AxesRefused(f"a mask of shape {tuple(value.shape)} on scores of {len(axes)} dimensions (block-wise?)")
    value = value.reshape((1,) * (len(axes) - value.dim()) + tuple(value.shape))
    sizes: list[int] = []
    letters: list[tuple[str, int]] = []
    for dim, names in zip(value.shape, axes, strict=True):
        names = names or (("", 1),)
        known = 1
        for _, n in names:
            known *= n if n > 0 else 1
        if dim != 1 and (dim % known or (dim != known and all(n > 0 for _, n in names))):
            raise AxesRefused(f"a mask of shape {tuple(value.shape)} does not fit to the scores")
        sizes += [1 if dim == 1 else n if n > 0 else dim // known for _, n in names]
        letters += list(names)
    value = value.reshape(sizes)
    for wanted in "bhts":
        places = [i for i, (c, _) in enumerate(letters) if c == wanted]
        if any(sizes[i] != 1 for i in places):
            shape = list(value.shape)
            for i in places:
                shape[i] = letters[i][1] if letters[i][1] > 0 else shape[i]
            value = value.expand(shape)
    order = [i for c in ("", *"bhts") for i, (x, _) in enumerate(letters) if x == c]
    value = value.permute(order)
    counts = [sum(1 for x, _ in letters if x == c) for c in ("", *"bhts")]
    final, start = [], counts[0]
    for count in counts[1:]:
        size = 1
        for dim in value.shape[start : start + count]:
            size *= dim
        final.append(size)
        start += count
    return value.reshape(final)
