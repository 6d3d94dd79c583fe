"""From token ids to text as it grows: no broken characters, no half of a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"


class GrowingText:
    """Decodes tokens one by one. `push` returns the text that is certain by now; `ended` says that a stop was met.

    Args:
        tokenizer: a transformers tokenizer.
        stops: sequences that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, tuple(s for s in stops if s)
        self.ids: list[int] = []
        self.start = self.read = 0
        self.held = ""
        self.ended = False

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        self.ids.append(token)
        before = self._decode(self.start, self.read)
        text = self._decode(self.start, len(self.ids))
        if text.endswith(UNFINISHED) or len(text) <= len(before):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return self._take(text[len(before) :])

    def finish(self) -> str:
        """What was held back."""
        if self.ended:
            return ""
        rest = self._decode(self.start, len(self.ids))[len(self._decode(self.start, self.read)) :]
        text, self.held = self.held + rest, ""
        cut = self._first_stop(text)
        self.ended = cut is not None
        return text if cut is None else text[:cut]

    def _decode(self, start: int, stop: int) -> str:
        return self.tokenizer.decode(self.ids[start:stop], skip_special_tokens=True)

    def _first_stop(self, text: str) -> int | None:
        found = [place for place in (text.find(s) for s in self.stops) if place >= 0]
        return min(found) if found else None

    def _take(self, new: str) -> str:
        """Add to what is held, and let go of what cannot belong to a stop any more."""
        text = self.held + new
        cut = self._first_stop(text)
        if cut is not None:
            self.ended, self.held = True, ""
            return text[:cut]
        longest = max((len(s) for s in self.stops), default=0)
        keep = next(
            (n for n in range(min(longest - 1, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)),
            0,
        )
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
