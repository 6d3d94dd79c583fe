"""Attention as people write it by hand: one class a style, each `x [B, T, 32] → [B, T, 32]`, four heads of eight.

`plain(style)` puts two of them into a decoder (embedding → blocks → head) that takes `input_ids`; `whole(name)` is a
model whose attention has no module of its own. The styles are in the files that are imported here.
"""

from __future__ import annotations

import plain_layouts as plain_layouts
import plain_near_misses as plain_near_misses
import plain_scores as plain_scores
from plain_base import NEAR_MISSES as NEAR_MISSES
from plain_base import STYLES as STYLES
from plain_base import plain as plain
from plain_whole import whole as whole
