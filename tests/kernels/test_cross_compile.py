"""Shipped Triton kernels compile for chips that are not here, within each chip's shared memory.

Every `kernels/<name>/triton_impl.py` offers `configurations()`. The compiler runs in a process of its own: this one has
Triton in interpreter mode. By default every kernel is compiled in its most demanding bf16 configuration for every
chip; `-m slow` compiles every configuration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDERS = sorted(path.parent.name for path in (Path(__file__).parents[2] / "kernels").glob("*/triton_impl.py"))

# Bytes a thread may spill on sm_90, by folder and whether the inputs are narrow (bf16). Most kernels spill nothing in
# bf16. The most: 592 for window's query gradients at width 256 (tiles that spill less were slower), 560 for the delta
# rule's state walk at that width. fp32 products without tensor cores cost the decay kernels up to 304, window 1,880,
# the delta rule's state walks 9,040.
STACK_LIMITS = {
    ("decay", True): 32,
    ("decay", False): 320,
    ("delta", True): 600,
    ("delta", False): 9040,
    ("feature", True): 400,
    ("feature", False): 2500,
