"""What the evaluating recognisers read off numbers: rotations, masks, ALiBi, head tables. Each with its near misses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fla_swap.patterns.heads import HeadsRefused, group
from fla_swap.patterns.mask import MaskTable, alibi_slopes, classify
from fla_swap.patterns.mask_kinds import MaskRefused, expected
from fla_swap.patterns.projection import Stored
from fla_swap.patterns.rope import NotRotation, read_rotation
from fla_swap.types import Mask, WeightRef

FREQ = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)


def rotated(x: Tensor, style: str, scaling: float = 1.0, freq: Tensor = FREQ) -> Tensor:
    """x [N, T, D] with its first 2·len(freq) channels turned, written as the textbook does."""
    turned = x.clone()
    for i, f in enumerate(freq.tolist()):
        a, b = (i, i + len(freq)) if style == "half" else (2 * i, 2 * i + 1)
        for t in range(x.shape[1]):
            c, s = scaling * math.cos(t * f), scaling * math.sin(t * f)
            turned[:, t, a] = x[:, t, a] * c - x[:, t, b] * s
            turned[:, t, b] = x[:, t, b] * c + x[:, t, a] * s
    return turned


@pytest.fixture
def sample() -> Tensor:
    return torch.randn(3, 13, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("scaling", [1.0, 1.25])
@pytest.mark.parametrize("width", [6, 10])
def test_a_rotation_is_read_back(sample: Tensor, style: str, scaling: float, width: int) -> None:
    x = sample[..., :width]
    rope = read_rotation(x, rotated(x, style, scaling), [])
    assert rope.style == style and rope.attention_scaling == pytest.approx(scaling)
    assert rope.inv_freq == pytest.approx(FREQ.tolist())


def test_stored_frequencies_are_taken_exactly(sample: Tensor) -> None:
    stored = (FREQ.float() * (1 + 1e-6)).double()
    assert read_rotation(sample, rotated(sample, "half"), [stored]).inv_freq == tuple(stored.tolist())


def test_what_is_no_rotation_is_refused(sample: Tensor) -> None:
    steps = torch.arange(13).double()[:, None]
    with pytest.raises(NotRotation, match="changes nothing"):
        read_rotation(sample, sample.clone(), [])
    with pytest.raises(NotRotation, match="scaled by an amount"):
        read_rotation(sample, sample * (1 + steps), [])
    with pytest.raises(NotRotation, match="no fixed pairs"):
        read_rotation(sample, sample.cumsum(1), [])
    with pytest.raises(NotRotation, match="not start at 0"):
        read_rotation(sample[:, 3:], rotated(sample, "half")[:, 3:], [])
    quadratic = torch.stack([rotated(sample, "half", freq=FREQ * t)[:, t] for t in range(13)], 1)
    with pytest.raises(NotRotation, match="not position × frequency"):
        read_rotation(sample, quadratic, [])


@pytest.mark.parametrize(
    "mask",
    [
        Mask(kind="causal"),
        Mask(kind="bidirectional"),
        Mask(kind="window", window=1),
        Mask(kind="window", window=7),
        Mask(kind="chunked", window=5),
        Mask(kind="local", window=4),
    ],
)
def test_a_mask_is_classified_from_two_lengths(mask: Mask) -> None:
    tables = [MaskTable(seen=expected(mask, n), bias=None) for n in (13, 29)]
    assert classify(tables) == mask


def test_a_window_counts_the_token_itself() -> None:
    assert expected(Mask(kind="window", window=2), 4).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


def test_other_masks_are_refused() -> None:
    causal = expected(Mask(kind="causal"), 13)
    hole = causal.clone()
    hole[7, 3] = False
    for seen in (hole, causal & (torch.arange(13)[None] != 0), causal.t()):
        with pytest.raises(MaskRefused, match="neither causal"):
            classify([MaskTable(seen=seen, bias=None)])
    grows = [MaskTable(seen=expected(Mask(kind="window", window=n // 2), n), bias=None) for n in (12, 30)]
    with pytest.raises(MaskRefused, match="at lengths 12, 30"):
        classify(grows)


def test_alibi_slopes_are_read_back_and_other_biases_refused() -> None:
    seen = expected(Mask(kind="causal"), 13)
    slopes = torch.tensor([0.5, 0.25])
    steps = torch.arange(13.0)
    by_distance = slopes[:, None, None] * (steps[None, :] - steps[:, None])
    by_key = (slopes[:, None, None] * steps).expand(2, 13, 13)
    for bias in (by_distance, by_key):
        table = MaskTable(seen=seen, bias=bias.masked_fill(~seen, 0.0))
        assert alibi_slopes([table], 2) == pytest.approx((0.5, 0.25))
    assert alibi_slopes([MaskTable(seen=seen, bias=None)], 2) is None
    with pytest.raises(MaskRefused, match="not ALiBi"):
        alibi_slopes([MaskTable(seen=seen, bias=(by_distance**2).masked_fill(~seen, 0.0))], 2)


def test_key_value_heads_are_grouped() -> None:
    rows = torch.arange(8).reshape(2, 4)
    repeated = rows.repeat_interleave(3, 0)
    unique, repeats = group(repeated, 6)
    assert torch.equal(unique, rows) and repeats == 3
    assert torch.equal(group(rows, 6)[0], rows)
    with pytest.raises(HeadsRefused, match="do not stand together"):
        group(rows.repeat(3, 1), 6)
    with pytest.raises(HeadsRefused, match="unevenly"):
        group(rows[[0, 0, 1, 1, 1]], 5)


def test_rows_become_ranges_of_the_parameter() -> None:
    stored = Stored(name="qkv", rows=torch.arange(12), whole=12)
    assert stored.ref(torch.arange(12)) == WeightRef(name="qkv")
    assert stored.ref(torch.tensor([0, 1, 6, 7])) == WeightRef(name="qkv", rows=((0, 2), (6, 8)))
    assert stored.ref(torch.tensor([3, 2])) == WeightRef(name="qkv", rows=((3, 4), (2, 3)))
