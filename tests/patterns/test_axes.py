"""How a mask lies against scores: what does not fit is refused, never reshaped into something that does."""

from __future__ import annotations

import pytest
import torch

from fla_swap.patterns.axes import AxesRefused, arrange

PLAIN = ((("b", 0),), (("h", 0),), (("t", 0),), (("s", 0),))


def test_a_mask_of_pairs_stands_against_queries_and_keys():
    mask = torch.arange(6).reshape(2, 3)
    assert torch.equal(arrange(mask, PLAIN), mask[None, None])


def test_a_mask_with_more_dimensions_than_the_scores_is_refused():
    with pytest.raises(AxesRefused, match=r"\(1, 1, 2, 2, 3\) on scores of 4 dimensions"):
        arrange(torch.ones(1, 1, 2, 2, 3), PLAIN)
