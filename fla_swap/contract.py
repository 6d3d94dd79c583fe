"""How an owner module is called and what it returns: read off observed calls, never guessed from names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fla_swap.arguments import HIDDEN, get_argument, leaves
from fla_swap.patterns.mask_kinds import expected
from fla_swap.recording import CacheRecord, CallRecord
from fla_swap.types import ArgPath, AttentionSite, CallContract, Rope

ROUNDED = 2e-2
"""How far a table in half precision may be from the exact one, relative to its largest value."""
_EXACT = 1e-5


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where the hidden states and the memory of a cross-attention stand in a call, and how many tokens they are.

    `residual`: what the owner adds to its output, where the site says that it adds something.
    """

    hidden: ArgPath
    batch: int
    length: int
    memory: ArgPath | None = None
    keys: int | None = None
    residual: ArgPath | None = None


def find_entry(site: AttentionSite, record: CallRecord) -> Entry | str:
    """The arguments that a site's projections read, told by shape (equal tensors are one), or why they cannot be."""
    first = 1 if site.call.time_first else 0
    returned = {tuple(v.shape[:2]) for v in _items(record.output) if isinstance(v, Tensor) and v.dim() == 3}
    streams = _distinct([(p, v) for p, v in leaves(record.args, record.kwargs) if _is_stream(v)])
    hidden = [(p, v) for p, v in streams if v.shape[-1] == site.hidden_size and tuple(v.shape[:2]) in returned]
    if site.kind == "cross":
        pairs = [
            (h, m)
            for h in hidden
            for m in streams
            if m[0] != h[0] and m[1].shape[-1] == site.memory_size and m[1].shape[first] == h[1].shape[first]
        ]
        if len(pairs) != 1:
            return (
                f"of its arguments, {len(pairs)} pairs could be the hidden states and the memory: give them different "
                "lengths in the example inputs"
            )
        (path, value), (memory, other) = pairs[0]
        length, keys = value.shape[1 - first], other.shape[1 - first]
        return Entry(hidden=path, batch=value.shape[first], length=length, memory=memory, keys=keys)
    if not returned:
        kinds = ", ".join(type(v).__name__ for v in _items(record.output))
        return f"it returns no hidden states, [batch, time, width], that stand by themselves, but: {kinds}"
    if not hidden:
        return f"no argument has the shape of the hidden state: {site.hidden_size} wide, as long as the output"
    if site.call.residual is not None and site.call.residual.position == 1:
        passed = [p for p, v in leaves(record.args, record.kwargs) if _is_stream(v) and v.shape == hidden[0][1].shape]
        if len(passed) != 2:
            return f"{len(passed)} arguments could be the hidden state and the residual, expected 2"
        value = hidden[0][1]
        length = value.shape[1 - first]
        return Entry(hidden=passed[0], batch=value.shape[first], length=length, residual=passed[1])
    if len(hidden) != 1:
        size = f"{site.hidden_size} wide, as long as the output"
        return f"{len(hidden)} arguments have the shape of the hidden state: {size}"
    ((path, value),) = hidden
    residual = None if site.call.residual is None else path
    return Entry(hidden=path, batch=value.shape[first], length=value.shape[1 - first], residual=residual)


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3


def _distinct(found: list[tuple[ArgPath, Tensor]]) -> list[tuple[ArgPath, Tensor]]:
    """The first of each set of equal tensors."""
    kept: list[tuple[ArgPath, Tensor]] = []
    for path, value in found:
        if not any(value is v or (value.shape == v.shape and torch.equal(value, v)) for _, v in kept):
            kept.append((path, value))
    return kept


def _items(output: Any) -> list[Any]:
    return list(output) if isinstance(output, tuple | list) else [output]


def derive_contract(
    site: AttentionSite,
    record: CallRecord,
    valid: Tensor,
    positions: Tensor | None,
    cache: CacheRecord | None,
    *,
    memory_valid: Tensor | None = None,
) -> CallContract | str:
    """The contract that the observed call shows, or a sentence saying what could not be told.

    `valid` bool [B, T] and `positions` int [B, T] are what the model was given, `memory_valid` [B, S] tells the padding
    of a cross-attention's memory; arguments are matched by value.
    """
    entry = find_entry(site, record)
    if isinstance(entry, str):
        return entry
    batch, length = valid.shape
    width = (site.output_size or site.hidden_size) if site.o is not None else site.heads * site.v_head_dim
    size = (length, batch, width) if site.call.time_first else (batch, length, width)
    places = _outputs(record.output, size)
    if isinstance(places, str):
        return places
    outputs, index = places
    contract = dataclasses.replace(
        site.call,
        hidden=entry.hidden,
        memory=entry.memory,
        residual=entry.residual,
        outputs=outputs,
        output_index=index,
        listed=isinstance(record.output, list),
    )
    keys = valid if memory_valid is None else memory_valid
    streams = (entry.hidden, entry.memory, entry.residual)
    read = {id(get_argument(p, record.args, record.kwargs)) for p in streams if p is not None}
    facts: dict[str, Any] = {}
    zeros: list[ArgPath] = []
    for path, value in leaves(record.args, record.kwargs):
        if not isinstance(value, Tensor) or id(value) in read:
            continue
        name = _meaning(value, site, valid, keys, positions)
        if name is not None:
            facts.setdefault(name.removesuffix(" hidden"), path)
            if name.endswith(" hidden"):
                facts["hides"] = True
        elif is_own_alibi(value, site, keys):
            continue
        elif _looks_like_a_mask(value, length, keys.shape[1]):
            if value.dtype != torch.bool and not bool(value.any()):
                zeros.append(path)
                continue
            where, rounded = path.keyword or f"number {path.position}", rounded_alibi(site, record, keys)
            if rounded is not None:
                return rounded
            return f"argument {where} {tuple(value.shape)} is a mask, but not the site's own with the padding hidden"
        elif _wider_mask(value, length, keys.shape[1]):
            where = f"argument {path.keyword or f'number {path.position}'} {tuple(value.shape)}"
            return f"{where} is a mask for more than {length} queries and {keys.shape[1]} keys: pass it cut to size"
        if name == "mask" and value.dim() == 2 and site.mask.kind != "bidirectional":
            facts["own_mask"] = True
    if ("cos" in facts) != ("sin" in facts):
        facts.pop("cos", None)
        facts.pop("sin", None)
    contract = dataclasses.replace(contract, **facts)
    contract = dataclasses.replace(contract, seen=tensors_of(record), zeros=tuple(zeros))
    if cache is not None:
        contract = dataclasses.replace(contract, cache=cache.path, cache_index=cache.index)
    return contract


def tensors_of(record: CallRecord) -> tuple[ArgPath, ...]:
    """Every argument that is a tensor, or a tuple that holds one."""
    found = [p for p, v in leaves(record.args, record.kwargs) if isinstance(v, Tensor)]
    return tuple(dict.fromkeys(dataclasses.replace(p, item=None) for p in found))


def readings(contract: CallContract) -> tuple[CallContract, ...]:
    """The contract, and again with hidden state and residual exchanged: only the proof tells which is which."""
    if contract.residual in (None, contract.hidden):
        return (contract,)
    assert contract.residual is not None
    return contract, dataclasses.replace(contract, hidden=contract.residual, residual=contract.hidden)


def _outputs(output: Any, size: tuple[int, ...]) -> tuple[int | None, int] | str:
    if isinstance(output, Tensor):
        return (None, 0) if tuple(output.shape) == size else f"it returns {tuple(output.shape)}, expected {size}"
    if not isinstance(output, tuple | list):
        return f"it returns a {type(output).__name__}, expected a tensor or a tuple"
    places = [i for i, v in enumerate(output) if isinstance(v, Tensor) and tuple(v.shape) == size]
    if len(places) != 1:
        return f"{len(places)} of its {len(output)} outputs have the shape {size}"
    return len(output), places[0]


def _meaning(value: Tensor, site: AttentionSite, valid: Tensor, keys: Tensor, positions: Tensor | None) -> str | None:
    if positions is not None and _are_positions(value, positions):
        return "positions"
    if site.rope is not None and value.is_floating_point() and positions is not None:
        name = _table(value, site.rope, positions)
        if name is not None:
            return name
    return _mask_kind(value, site, valid, keys)


def _are_positions(value: Tensor, positions: Tensor) -> bool:
    if value.is_floating_point() or value.dtype == torch.bool or value.dim() > 2:
        return False
    if value.shape[-1:] != positions.shape[-1:] or (value.dim() == 2 and value.shape[0] not in (1, len(positions))):
        return False
    return torch.equal(value.expand(positions.shape).long(), positions.to(value.device))


def is_own_alibi(value: Tensor, site: AttentionSite, keys: Tensor) -> bool:
    """Whether an argument is the site's own ALiBi bias, which a mixer makes itself: up to a constant for each row, and
    one factor (the owner may multiply the scores after it has added the bias).

    `value` [H, T or 1, S], [B, H, T or 1, S] or [B · H, T or 1, S]; only keys that are no padding (`keys` bool [B, S])
    count, because a model may number the tokens from the first of them.
    """
    tolerance = 1e-4 if value.dtype in (torch.float32, torch.float64) else ROUNDED
    error = alibi_error(value, site, keys)
    return error is not None and error <= tolerance


def alibi_error(value: Tensor, site: AttentionSite, keys: Tensor) -> float | None:
    """How far an argument is from the site's ALiBi bias, relative to its largest value; None where it is no such thing.

    `value`, `keys` as in `is_own_alibi`.
    """
    batch, size = keys.shape
    if site.alibi is None or not value.is_floating_point() or value.dim() < 3 or value.shape[-1] != size:
        return None
    heads = len(site.alibi)
    if value.shape[:-2].numel() not in (heads, batch * heads) or value.shape[-2] not in (1, size):
        return None
    bias = value.double().reshape(-1, heads, *value.shape[-2:])
    seen = keys[: len(bias), None, None, :].to(value.device)
    if value.shape[-2] == size:
        seen = seen & wanted_pairs(site, size, size, value.device)
    line = torch.tensor(site.alibi, device=value.device)[:, None, None] * torch.arange(size, device=value.device)
    bias, line = _from_mean(bias, seen), _from_mean(line.double().expand(bias.shape), seen)
    factor = (bias * line).sum() / line.square().sum()
    if not bool(factor > 0):
        return None
    return float((bias - factor * line).abs().max() / (factor * line).abs().max())


def rounded_alibi(site: AttentionSite, record: CallRecord, keys: Tensor) -> str | None:
    """A sentence about an argument that is the site's ALiBi bias in half precision, which a mixer adds unrounded."""
    for path, value in leaves(record.args, record.kwargs):
        error = alibi_error(value, site, keys) if isinstance(value, Tensor) else None
        if error is not None and _EXACT < error <= ROUNDED:
            where = f"argument {path.keyword or f'number {path.position}'} {tuple(value.shape)}"
            return (
                f"{where} is the ALiBi bias rounded to half precision (by {error:.1e} of its largest value): the "
                "slopes are no numbers of that precision, and a mixer would add the bias unrounded"
            )
    return None


def _from_mean(rows: Tensor, seen: Tensor) -> Tensor:
    """What is seen of each row, less its mean; 0 elsewhere."""
    mean = rows.masked_fill(~seen, 0.0).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
    return (rows - mean).masked_fill(~seen, 0.0)


def _looks_like_a_mask(value: Tensor, length: int, keys: int) -> bool:
    if value.shape[-1:] != (keys,) or value.dim() < 2:
        return False
    floating = value.is_floating_point() and (value.dim() == 2 or value.shape[-2] == length)
    return value.dtype == torch.bool or value.dim() == 4 or floating


def _wider_mask(value: Tensor, length: int, keys: int) -> bool:
    """Whether an argument hides something of more pairs of tokens than there are: the owner cuts it itself."""
    if value.dim() not in (2, 3, 4) or value.is_complex() or value.shape[-2] < length or value.shape[-1] <= keys:
        return False
    return value.dtype == torch.bool or (value.is_floating_point() and bool((value <= HIDDEN).any()))


def _mask_kind(value: Tensor, site: AttentionSite, valid: Tensor, keys: Tensor) -> str | None:
    """What a mask argument is, None when it is not the site's mask: "mask" ([B, S] of whole numbers or truth values, or
    [B or 1, 1 or H, T or 1, S], of which the owner may hide more itself), "padding" ([B, S] to be added, or
    [B, 1, 1, S] beside a mask that the owner makes itself), "pairs" ([T, S]); with " hidden" after it when it is true
    where a key is hidden."""
    batch, length = valid.shape
    if value.is_complex() or value.shape[-1:] != keys.shape[-1:] or value.dim() not in (2, 4):
        return None
    pairs = _pairs(site, valid, keys)
    wanted = pairs & keys[:, None, None, :]
    rows = valid[:, None, :, None]
    truth = value if value.dtype == torch.bool else value > HIDDEN if value.is_floating_point() else value > 0
    for seen, suffix in ((truth, ""), (~truth, " hidden")):
        if suffix and value.dtype != torch.bool:
            break
        if value.dim() == 4:
            if value.shape[-2] in (1, length) and bool(((seen == wanted) | ~rows).all()):
                return "mask" + suffix
            plain = not value.is_floating_point() or bool(((value == 0) | ~seen).all())
            more = plain and value.shape[-2] == length and not bool(seen.all())
            if more and bool((((seen & pairs) == wanted) | ~rows).all()):
                return "mask" + suffix
            over_keys = value.shape[:3] == (batch, 1, 1) and (value.dtype == torch.bool or value.is_floating_point())
            if over_keys and torch.equal(seen[:, 0, 0], keys):
                return "padding" + suffix
            continue
        if len(value) in (1, batch) and torch.equal(seen.expand(keys.shape), keys):
            return "padding" + suffix if suffix or value.is_floating_point() else "mask"
        if len(value) == length and torch.equal(seen, wanted_pairs(site, length, keys.shape[1], seen.device)):
            return "pairs" + suffix
    return None


def wanted_pairs(site: AttentionSite, length: int, keys: int, device: torch.device) -> Tensor:
    """bool [T, S] of the site's mask without padding."""
    return expected(site.mask, length, keys=keys).to(device)


def _pairs(site: AttentionSite, valid: Tensor, keys: Tensor) -> Tensor:
    """bool [B, 1, T, S] of the site's mask in each row, counted from its first token."""
    starts = keys.int().argmax(1).tolist()
    pairs = [expected(site.mask, valid.shape[1], start, keys=keys.shape[1]) for start in starts]
    return torch.stack(pairs)[:, None].to(valid.device)


def _table(value: Tensor, rope: Rope, positions: Tensor) -> str | None:
    """ "cos" or "sin" when the value is that table of the site's own frequencies, laid out as the style says."""
    if value.dim() < 2 or value.shape[-1] != 2 * len(rope.inv_freq) or value.shape[-2] != positions.shape[1]:
        return None
    freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * freq
    angles = torch.cat((angles, angles), -1) if rope.style == "half" else angles.repeat_interleave(2, -1)
    tolerance = 1e-4 + 1e-6 * positions.shape[1] if value.dtype in (torch.float32, torch.float64) else 2e-2
    try:
        value = value.float().to(positions.device).expand(angles.shape)
    except RuntimeError:
        return None
    for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
        if float((value - table * rope.attention_scaling).abs().max()) < tolerance * rope.attention_scaling:
            return name
    return None
