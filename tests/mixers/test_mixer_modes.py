"""Every way of running a mixer gives the same numbers: whole, in chunks, token by token, packed, padded, compiled."""

from __future__ import annotations

import itertools

import torch

TOLERANCE = {"rtol": 1e-8, "atol": 1e-9}


def same(a, b, **options):
    torch.testing.assert_close(a, b, **(TOLERANCE | options))


def same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        same(a[name], b[name])


def addresses(state):
    return {name: tensor.data_ptr() for name, tensor in state.items()}


def test_without_a_state_none_is_returned(mixer, hidden):
    y, state = mixer(hidden)
    assert state is None
    same(y, mixer.o_proj(mixer.head_outputs(hidden).flatten(2)))


@torch.no_grad()
def test_chunks_and_single_tokens_equal_one_call_and_keep_the_state_in_place(mixer, hidden):
    whole, last = mixer(hidden, output_state=True)
    for sizes in ((6, 7), (1, 2, 10), (9, 1, 1, 1, 1), (1,) * 13):
        state = mixer.init_state(2, device=hidden.device, dtype=hidden.dtype)
        where, pieces = addresses(state), []
        for piece in hidden.split(sizes, 1):
            y, state = mixer(piece, state=state)
            pieces.append(y)
        same(torch.cat(pieces, 1), whole)
        same_state(state, last)
        assert addresses(state) == where


@torch.no_grad()
def test_the_state_does_not_grow(mixer, hidden):
    _, short = mixer(hidden[:, :3], output_state=True)
    _, long = mixer(hidden.repeat(1, 4, 1), output_state=True)
    assert {n: t.shape for n, t in short.items()} == {n: t.shape for n, t in long.items()}


@torch.no_grad()
def test_packed_documents_equal_separate_ones_and_go_on_from_their_states(mixer, hidden):
    first, second = hidden[:1, :4], hidden[1:, :7]
    nothing = (hidden[:1, :0], mixer.init_state(1, device=hidden.device, dtype=hidden.dtype))
    separate = [mixer(first, output_state=True), nothing, mixer(second, output_state=True)]
    line = torch.cat((first, second, hidden[:1, 11:]), 1)  # two rows of padding at the end, an empty document inside
    y, state = mixer(line, output_state=True, cu_seqlens=torch.tensor([0, 4, 4, 11]))
    same(y[:, :11], torch.cat([part for part, _ in separate], 1))
    same_state(state, {name: torch.cat([s[name] for _, s in separate]) for name in state})

    more = [hidden[:1, 5:6], hidden[:1, 6:9], hidden[1:, 8:13]]
    expected = [mixer(x, state=s) for x, (_, s) in zip(more, separate, strict=True)]
    y, state = mixer(torch.cat(more, 1), state=state, cu_seqlens=torch.tensor([0, 1, 4, 9], dtype=torch.int32))
    same(y, torch.cat([part for part, _ in expected], 1))
    same_state(state, {name: torch.cat([s[name] for _, s in expected]) for name in state})


@torch.no_grad()
def test_start_marks_separate_documents_in_every_row(mixer, hidden):
    starts = torch.zeros(2, 13, dtype=torch.bool)
    starts[0, [0, 6]] = True
    starts[1, [3, 4, 11]] = True
    borders = ((0, 6, 13), (0, 3, 4, 11, 13))
    y, state = mixer(hidden, starts=starts, output_state=True)
    for row, bounds in enumerate(borders):
        for a, b in itertools.pairwise(bounds):
            alone, last = mixer(hidden[row : row + 1, a:b], output_state=True)
            same(y[row : row + 1, a:b], alone)
        mine = {name: tensor[row : row + 1].clone() for name, tensor in state.items()}
        token = hidden[row : row + 1, :1]
        same(mixer(token, state=mine)[0], mixer(token, state=last)[0])  # the state is that of the last document


@torch.no_grad()
def test_start_marks_after_a_state(mixer, hidden):
    """A second chunk in which one row goes on and then starts anew; the other row only goes on."""
    starts = torch.zeros(2, 8, dtype=torch.bool)
    starts[0, 2] = True
    _, state = mixer(hidden[:, :5], output_state=True)
    y, state = mixer(hidden[:, 5:], state=state, starts=starts)
    whole, _ = mixer(hidden)
    same(y[0, :2], whole[0, 5:7])
    same(y[1], whole[1, 5:])
    alone, last = mixer(hidden[:1, 7:], output_state=True)
    same(y[:1, 2:], alone)
    same(mixer(hidden[:, :1], state=state)[0][:1], mixer(hidden[:1, :1], state=last)[0])


@torch.no_grad()
def test_left_padding_changes_nothing(mixer, hidden):
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[0, :5] = False
    garbage = torch.where(valid[..., None], hidden, 100 * torch.randn_like(hidden))
    y, state = mixer(garbage, valid=valid, output_state=True)
    alone, last = mixer(hidden[:1, 5:], output_state=True)
    whole, _ = mixer(hidden[1:], output_state=True)
    same(y[:1, 5:], alone)
    same(y[1:], whole)
    for token in hidden[:, :3].split(1, 1):  # decode goes on alike
        y, state = mixer(token, state=state)
        alone, last = mixer(token[:1], state=last)
        same(y[:1], alone)


@torch.no_grad()
def test_padding_in_decode_leaves_the_memory_untouched(mixer, hidden):
    _, state = mixer(hidden[:, :9], output_state=True)
    before = {name: tensor.clone() for name, tensor in state.items()}
    mixer(hidden[:, 9:10] * 100, state=state, valid=torch.tensor([[False], [True]]))
    if "valid" not in state:  # a window's distances count padding too, so there only the keys must not be seen
        same_state({n: t[:1] for n, t in state.items()}, {n: t[:1] for n, t in before.items()})
    else:
        slot = int(state["count"][0] - 1) % mixer.config.window
        assert not state["valid"][0, slot] and state["valid"][1].all()


@torch.no_grad()
def test_right_padding_leaves_the_memory_untouched(mixer, hidden):
    if "valid" in mixer.init_state(1, device=hidden.device, dtype=hidden.dtype):
        return
    valid = torch.arange(13)[None] < torch.tensor([[1], [9]])
    _, state = mixer(hidden, valid=valid, output_state=True)
    for row, length in enumerate((1, 9)):
        _, alone = mixer(hidden[row : row + 1, :length], output_state=True)
        same_state({n: t[row : row + 1] for n, t in state.items()}, alone)


@torch.no_grad()
def test_given_positions_and_tables_are_used(mixer, hidden):
    if mixer.rope is None:
        return
    from fla_swap.mixers.base import positions_like, rope_tables

    y, _ = mixer(hidden)
    same(mixer(hidden, positions=positions_like(hidden))[0], y)
    same(mixer(hidden, cos_sin=rope_tables(mixer.rope, positions_like(hidden), torch.float64))[0], y)
    stretched, _ = mixer(hidden, positions=3 * positions_like(hidden))
    assert (stretched - y).abs().max() > 1e-3
