"""Public scans over channels: `hgrn` and `selective_scan`, with their steps for decoding."""

from __future__ import annotations

from fla_swap.kernels.scan.hgrn import hgrn, hgrn_step
from fla_swap.kernels.scan.selective import selective_scan, selective_scan_step

__all__ = ["hgrn", "hgrn_step", "selective_scan", "selective_scan_step"]
