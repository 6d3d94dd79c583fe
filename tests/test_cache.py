"""The state layer by itself: what transformers asks of a cache layer, and that nothing grows."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import pytest
import torch
from sites import Toy, ToyConfig, prompts, report_of, tiny, toy_registered
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from fla_swap.cache import StateLayer, install_layer, state_bytes
from fla_swap.errors import SwapError
from fla_swap.planning import plan
from fla_swap.swapping import restore_, swap_

MIXER = Toy(ToyConfig(hidden_size=4, num_heads=1, head_dim=2))


@pytest.fixture(scope="module", autouse=True)
def toy():
    with toy_registered():
        yield


@pytest.fixture
def hybrid():
    """A Llama whose middle one of three layers is still softmax attention."""
    model = tiny("llama", layers=3)
    return swap_(model, plan(report_of(model), mixer="toy", keep=[1]))


def filled(stock=None, batch: int = 2) -> StateLayer:
    layer = StateLayer(stock or DynamicLayer())
    layer.prepare(MIXER, batch, torch.device("cpu"), torch.float32)
    layer.state["s"].copy_(torch.arange(batch * 4.0).view(batch, 1, 2, 2))
    return layer


def fill(stock, tokens: int):
    stock.update(torch.zeros(1, 1, tokens, 2), torch.zeros(1, 1, tokens, 2))
    return stock


STOCKS = {
    "dynamic": DynamicLayer,
    "dynamic window": lambda: DynamicSlidingWindowLayer(sliding_window=6),
    "static": lambda: StaticLayer(max_cache_len=20),
    "static window": lambda: StaticSlidingWindowLayer(max_cache_len=20, sliding_window=6),
}


@pytest.mark.parametrize("kind", STOCKS)
def test_it_reports_the_sizes_of_the_layer_that_it_replaces(kind):
    """So masks and positions come out as if keys and values still stood there, at any number of tokens."""
    layer, stock = StateLayer(STOCKS[kind]()), STOCKS[kind]()
    assert layer.get_seq_length() == 0
    layer.prepare(MIXER, 1, torch.device("cpu"), torch.float32)
    for tokens in (4, 1, 3, 1, 2):
        fill(stock, tokens)
        layer.advance(tokens)
        assert int(layer.get_seq_length()) == int(stock.get_seq_length())
        assert isinstance(layer.get_seq_length(), type(stock.get_seq_length()))
        for query in (1, 3):
            assert layer.get_mask_sizes(query) == stock.get_mask_sizes(query)
    assert layer.get_max_length() == stock.get_max_length()
    assert (layer.is_sliding, layer.is_compileable) == (stock.is_sliding, stock.is_compileable)


def test_it_is_a_linear_layer_and_a_layer_with_a_length():
    layer = filled()
    assert isinstance(layer, LinearAttentionLayer)
    cache = DynamicCache()
    cache.layers.append(layer)
    layer.advance(3)
    assert cache.get_seq_length() == 3 and cache.batch_size == 2


def test_beams_and_batches_move_rows():
    layer = filled()
    first, second = layer.state["s"].clone()
    address = layer.state["s"].data_ptr()
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.state["s"], torch.stack((second, first)))
    assert layer.state["s"].data_ptr() == address
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.state["s"], torch.stack((second, second, first, first)))
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(layer.state["s"], torch.stack((first, second)))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reset_zeroes_in_place(kind):
    layer = filled(STOCKS[kind]())
    address = layer.state["s"].data_ptr()
    layer.advance(5)
    layer.reset()
    assert layer.state["s"].abs().sum() == 0 and layer.state["s"].data_ptr() == address
    assert int(layer.get_seq_length()) == 0


def test_offload_and_prefetch_keep_the_state():
    layer = filled()
    before = layer.state["s"].clone()
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.state["s"], before)


def test_state_bytes_do_not_depend_on_the_length(hybrid):
    sizes = set()
    for length in (1, 7, 60):
        cache = DynamicCache(config=hybrid.config)
        with torch.no_grad():
            hybrid(torch.ones(2, length, dtype=torch.long), past_key_values=cache)
        sizes.add(state_bytes(cache))
    assert sizes == {2 * 2 * 4 * 8 * 8 * 4}  # layers, rows, heads, key and value width, bytes of fp32


@pytest.mark.parametrize("static", [False, True])
def test_states_stay_at_their_addresses(hybrid, static):
    cache = StaticCache(hybrid.config, max_cache_len=16) if static else DynamicCache(config=hybrid.config)
    ids, _ = prompts()
    addresses = []
    with torch.no_grad():
        for piece in (ids[:, :6], ids[:, 6:7], ids[:, 7:11]):
            hybrid(piece, past_key_values=cache)
            addresses.append([cache.layers[i].state["s"].data_ptr() for i in (0, 2)])
    assert addresses[0] == addresses[1] == addresses[2]
    assert isinstance(cache.layers[1], StaticLayer if static else DynamicLayer)


@pytest.mark.parametrize("remove", [1, 2, 3, 7])
def test_crop_undoes_recorded_tokens(hybrid, remove):
    """As in assisted decoding: guess some tokens, take back what was wrong, go on. Crops may follow each other."""
    ids, _ = prompts(length=20)
    cache, clean = DynamicCache(config=hybrid.config), DynamicCache(config=hybrid.config)
    with torch.no_grad():
        hybrid(ids[:, :8], past_key_values=cache)
        cache.activate_past_recording()
        for piece in (ids[:, 8:12], ids[:, 12:13], ids[:, 13:15]):
            hybrid(piece, past_key_values=cache)
        cache.crop(-remove)
        hybrid(ids[:, : 15 - remove], past_key_values=clean)
        assert cache.get_seq_length() == 15 - remove
        for i in (0, 2):
            torch.testing.assert_close(cache.layers[i].state["s"], clean.layers[i].state["s"], atol=1e-5, rtol=1e-5)
        if remove < 7:
            cache.crop(-1)
            cache.crop(0)
            clean.layers[1].crop(-1)
            again = DynamicCache(config=hybrid.config)
            hybrid(ids[:, : 14 - remove], past_key_values=again)
            torch.testing.assert_close(cache.layers[0].state["s"], again.layers[0].state["s"], atol=1e-5, rtol=1e-5)


def test_tokens_that_were_not_recorded_cannot_be_cropped(hybrid):
    cache = DynamicCache(config=hybrid.config)
    with torch.no_grad():
        hybrid(prompts()[0], past_key_values=cache)
    cache.layers[0].crop(0)
    with pytest.raises(SwapError, match=r"crop\(-1\).*recorded"):
        cache.layers[0].crop(-1)


def test_caches_of_another_structure_are_refused(hybrid):
    ids, _ = prompts()
    used = DynamicCache(config=hybrid.config)
    with torch.no_grad():
        hybrid(ids, past_key_values=used)
        restore_(hybrid)
        with pytest.raises(SwapError, match="filled by a swapped model"):
            hybrid(ids, past_key_values=used)
        full = DynamicCache(config=hybrid.config)
        hybrid(ids, past_key_values=full)
        swap_(hybrid, plan(report_of(hybrid), mixer="toy", keep=0))
        with pytest.raises(SwapError, match="before the swap"):
            hybrid(ids, past_key_values=full)
    linear = DynamicCache()
    linear.layers.append(LinearAttentionLayer())
    linear.update_conv_state(torch.zeros(1, 4, 3), 0)
    with pytest.raises(SwapError, match="already holds a state of the model before the swap"):
        install_layer(linear, 0)
    with pytest.raises(SwapError, match="got tuple"):
        install_layer((), 0)
