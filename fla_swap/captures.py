"""One model, or part of it, captured at two lengths and matched: which lengths, and where its tokens stand.

The far capture is longer than every number at which the code may change, and than a thousand tokens: a fact that holds
for a few tokens only is none. Proofs run at a length of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from torch import nn

from fla_swap.capture import capture
from fla_swap.errors import CaptureError, FlaSwapError
from fla_swap.exporting import quiet
from fla_swap.lengths import far_lengths, free_length, rope_limit
from fla_swap.matching import MatchResult, match
from fla_swap.model_inputs import Example, Inputs, default_inputs, inputs_of_length, resizable, sizes_of
from fla_swap.parts import call_of_part
from fla_swap.patterns.base import Recogniser
from fla_swap.patterns.catalogue import catalogue
from fla_swap.patterns.cores import mask_lengths, table_lengths
from fla_swap.patterns.graph import CapturedGraph
from fla_swap.patterns.hints import repeats
from fla_swap.patterns.parts import unread
from fla_swap.types import AttentionSite
from fla_swap.verification import weights_of
from fla_swap.wrappers import config_of

SHORT = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
LONGEST = 8192
LONGEST_TABLE = 4096
FAR = 1024
LARGEST_GRAPH = 8000
BEYOND_A_TABLE = (IndexError, RuntimeError)
"""What a graph raises whose positions go beyond the end of a stored table."""


class TwoCaptures:
    """`part` of `model` ("": all of it), captured twice. `match` sets what else is known.

    `longest`: the length that sites are proved at, beyond the windows; `checked`: that of the far capture, up to which
    masks, positions and scales are compared; `first`, `second`: the short and the far capture; `rope_limit`: the
    longest input for which the rotary frequencies hold; `notes`: what a user should know about it.
    """

    def __init__(
        self, model: nn.Module, example: Example | None, patterns: Iterable[Recogniser] | None, part: str = ""
    ):
        self.model, self.example, self.part = model, example, part
        self.catalogue = catalogue(patterns)
        self.longest = 0
        self.checked: int | None = None
        self.first: CapturedGraph | None = None
        self.second: CapturedGraph | None = None
        self.resize: list[int] | None = None
        self.time_first = False
        self.notes: list[str] = []
        self.rope_limit: int | None = None

    def choose_length(self, site: AttentionSite) -> None:
        """The length that a site is proved at when nothing was captured: longer than its window."""
        longest = free_length(max(2 * SHORT[0], site.mask.window or 0) + 3, self._limit(), self._sizes())
        self.longest = min(longest, LONGEST)
        if self.example is not None:
            self.resize = resizable(self.model, self.example, self.longest)

    def match(self) -> MatchResult:
        """The sites, not yet proved. Raises CaptureError for a model that cannot be captured, or read as a whole."""
        try:
            return self._either_way()
        except FlaSwapError:
            raise
        except Exception as error:  # whatever a graph that nobody has seen does to the matcher
            raise CaptureError(f"{type(self.model).__name__}: {unread(error)}") from error

    def _either_way(self) -> MatchResult:
        known = list(self.notes)
        matched = self._match()
        if self.example is None or (matched.varied and matched.sites):
            return matched
        # Nothing depends on the second dimension, or it explains nothing: the tokens may stand in the first.
        before = dict(vars(self))
        self.time_first, self.notes = True, known
        if resizable(self.model, self.example, SHORT[0], time_first=True):
            with contextlib.suppress(CaptureError):
                other = self._match()
                if other.varied and (len(other.sites) > len(matched.sites) or not matched.varied):
                    return other
        vars(self).update(before)
        return matched

    def _match(self) -> MatchResult:
        taken = self._sizes()
        short = next(n for n in SHORT if n not in taken)
        limit = self._limit()
        if self.example is not None:
            self.resize = resizable(self.model, self.example, short, time_first=self.time_first)
        first = self.capture(short, limit)
        if first.branched:
            self._read_rope_limit(short)
        self._note_opaque(first.opaque)
        masks = {h for h in mask_lengths(first, self.catalogue) if h < min(limit, LONGEST)}
        near = free_length(max((*masks, 2 * short)) + 3, limit, taken)
        self.longest, self.first = min(near, limit), first
        if sizes_of(self.inputs(self.longest)) == sizes_of(self.inputs(short)):
            self.notes.append("the model was captured at one size only: its inputs have no other, or it takes no other")
            self.checked = short
            return match((first,), self.catalogue, rope_limit=self.rope_limit)
        tables = {h for h in table_lengths(first, self.catalogue) if h < LONGEST_TABLE}
        far = free_length(max((*masks, *tables, FAR)) + 3, limit, taken)
        matched = self._at_far(first, far, limit, {*taken, *tables})
        if matched.fixed:
            self.notes.append(f"{len(matched.fixed)} layers have one token count only ({matched.fixed[0]} …)")
        return matched

    def _at_far(self, first: CapturedGraph, far: int, limit: int, taken: set[int]) -> MatchResult:
        """`first` matched with a capture at `far`, or at the longest of the model's sizes that it takes."""
        near = self.longest
        shortest = free_length(2 * first.length + 3, limit, taken)
        if near < far and repeats(first):
            far = max(near, self._affordable(first, shortest, far, limit))
        lengths = list(far_lengths(far, near, taken)) if near < far else [far]
        if shortest < lengths[-1]:  # a number behind the mask may be more than the model takes
            lengths += far_lengths(lengths[-1], shortest, taken)[1:]
        for number, length in enumerate(lengths[:-1]):
            if number and not self._takes(length + 2):  # something longer failed: this is the longest, or one less
                limit = min(limit, length + 1)
                length += self._takes(length + 1)
            try:
                with quiet():
                    second = self.capture(length, limit)
            except Exception:  # whatever the model does with a length that it does not take
                limit = length
                continue
            try:
                matched = match((first, second), self.catalogue, rope_limit=self.rope_limit, passing=BEYOND_A_TABLE)
            except BEYOND_A_TABLE:
                limit = length
                continue
            self.checked, self.longest, self.second = length, min(near, length), second
            return matched
        self.checked = self.longest = lengths[-1]
        self.second = second = self.capture(lengths[-1], limit)
        return match((first, second), self.catalogue, rope_limit=self.rope_limit)

    def _takes(self, length: int) -> bool:
        try:
            with quiet():
                self.capture(length)
        except Exception:
            return False
        return True

    def _affordable(self, first: CapturedGraph, near: int, far: int, limit: int) -> int:
        """Where code that loops over the tokens is unrolled: the length at which the graph stays small enough."""
        grown = self.capture(near, limit)
        slope = (len(grown.nodes) - len(first.nodes)) / (near - first.length)
        most = first.length + (LARGEST_GRAPH - len(first.nodes)) / slope if slope > 0.5 else far
        if most >= far:
            return far
        length = max(near, int(most))
        self.notes.append(f"the model's code loops over its tokens: it was looked at up to {length} of them")
        return length

    def _read_rope_limit(self, short: int) -> None:
        """The model's code decides by the length: up to where do the rotary frequencies hold?"""
        self.rope_limit = rope_limit(self.model, self.inputs(short), short)
        if self.rope_limit is not None:
            self.notes.append(
                f"the rotary frequencies hold up to {self.rope_limit} tokens: the model takes others for longer "
                "inputs, a mixer that makes its own tables goes on with these"
            )

    def _note_opaque(self, opaque: Sequence[str]) -> None:
        if opaque:
            more = f" and {len(opaque) - 1} more" if len(opaque) > 1 else ""
            self.notes.append(f"not looked into, torch.export cannot follow it: {opaque[0]}{more}")

    def capture(self, length: int, limit: int = 2**31) -> CapturedGraph:
        """The model, or its part, at one length; `limit`: the longest input that it takes."""
        inputs = self.inputs(length)
        if not self.part:
            return capture(self.model, inputs, length=length, limit=limit)
        given, closed = call_of_part(self.model, self.part, inputs)
        module = self.model.get_submodule(self.part)
        return capture(module, given, length=length, limit=limit, name=self.part, closed=closed)

    def inputs(self, length: int, padded: int = 0) -> Inputs:
        """One call's arguments at this length, the second row padded."""
        if self.example is not None:
            return inputs_of_length(self.example, length, padded=padded, resize=self.resize, time_first=self.time_first)
        return default_inputs(self.model, length, padded=padded)

    def _limit(self) -> int:
        """The longest input that the model takes."""
        stated = getattr(config_of(self.model), "max_position_embeddings", None)
        return stated if isinstance(stated, int) and stated > SHORT[0] else 2**31

    def _sizes(self) -> set[int]:
        """Every size in the model: a captured length must not be one of them."""
        sizes = {d for tensor in weights_of(self.model).values() for d in tensor.shape}
        config = config_of(self.model)
        if config is not None:
            sizes |= {v for v in vars(config).values() if isinstance(v, int)}
        return sizes
