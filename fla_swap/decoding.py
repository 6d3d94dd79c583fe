"""The decode loop of a compiled model: one step is one graph, on the device from the token to the next token.

transformers' `generate` prepares everything as always (masks, cache, logits processors, stopping criteria) and calls
`_sample`; a compiled model's `_sample` is `decode` here. It keeps its buffers and caches from one call to the next, so
that a second call with the same number of rows captures and compiles nothing.

Legend for shapes: B rows (padded to a bucket), T prompt tokens, L slots of the static cache, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.generation import logits_process, stopping_criteria

from fla_swap.cache import StateLayer
from fla_swap.stateful import prepare_cache
from fla_swap.whole_prompts import whole_prompt

# Rows are padded to one of these, so that a batch of 3 uses the graph of 4. Larger ones: the next multiple of the last.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# Caches and their graphs that are kept for the next call.
KEPT_SESSIONS = 2
# Steps between two looks at whether every row has ended; the device runs ahead of the host by at most twice as many.
CHECK_EVERY = 16
WARM_STEPS = 2

# What changes scores on the device alone and does not count tokens: safe inside a graph.
ON_DEVICE = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.SuppressTokensLogitsProcessor,
)
# What a step's graph depends on besides its inputs.
STOPS = (stopping_criteria.MaxLengthCriteria, stopping_criteria.EosTokenCriteria)


def bucket(rows: int) -> int:
    """The number of rows that a step is run with."""
    return next((size for size in BUCKETS if rows <= size), -(-rows // BUCKETS[-1]) * BUCKETS[-1])


def slots(cache: StaticCache) -> int:
    """Tokens that a static cache has room for."""
    return max(layer.get_max_length() for layer in cache.layers)


def allocate(model: nn.Module, cache: StaticCache, batch_size: int) -> None:
    """Allocate everything in a static cache now, so that no compiled graph has to: states, then keys and values."""
    prepare_cache(model, cache, batch_size)
    target: Any = model
    shape = target._get_static_cache_init_shape()
    if shape is not None:
        heads, head_dim = shape
        cache.early_initialization(batch_size, heads, head_dim, target.dtype, target.device)


class Session:
    """One static cache, the buffers of a step at fixed addresses, and the step's graph once it is captured."""

    def __init__(self, cache: StaticCache, rows: int, device: torch.device):
        self.cache, self.rows = cache, rows
        length = slots(cache)
        self.ids = torch.zeros(rows, length + 1, dtype=torch.long, device=device)
        self.mask = torch.ones(rows, length, dtype=torch.long, device=device)
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.cursor = torch.zeros(1, dtype=torch.long, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.alive = torch.zeros(1, dtype=torch.long, device=device)
        self.counts = [layer.count for layer in cache.layers if isinstance(layer, StateLayer)]
        self.graphs: dict[Any, torch.cuda.CUDAGraph] = {}

    def start(self, ids: Tensor, mask: Tensor, real_rows: int) -> None:
        """Take a prompt ids [B, T] and its mask [B, T], of whose rows the first `real_rows` are asked for."""
        time = ids.shape[1]
        self.ids.copy_(ids[:, :1].expand_as(self.ids))  # a penalty on repetition sees only tokens that are there
        self.ids[:, :time] = ids
        self.mask.fill_(1)
        self.mask[:, :time] = mask
        self.position.copy_(mask.sum(1, keepdim=True) - 1)
        self.cursor.fill_(time)
        self.alive.zero_()
        self.finished.copy_(torch.arange(self.rows, device=ids.device) >= real_rows)


class Choice:
    """How the next token follows from the logits: processors, greedy or sampled, ends and padding."""

    def __init__(self, processors: Any, config: Any, criteria: Any):
        self.processors, self.sample = processors, bool(config.do_sample)
        ends = [c.eos_token_id for c in criteria if isinstance(c, stopping_criteria.EosTokenCriteria)]
        self.ends: Tensor | None = ends[0] if ends else None
        self.pad: Tensor | None = config._pad_token_tensor

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for choices that make the same graph."""
        parts = [(type(p), *sorted((n, str(v)) for n, v in vars(p).items())) for p in self.processors]
        ends = None if self.ends is None else tuple(self.ends.tolist())
        pad = None if self.pad is None else int(self.pad)
        return (*parts, self.sample, ends, pad)

    def __call__(self, session: Session, logits: Tensor) -> None:
        """Write the token that follows logits [B, V] into the session; rows that have ended get padding."""
        scores = self.processors(session.ids, logits.float())
        if self.sample:
            chances = scores.softmax(-1)
            token = (chances / torch.empty_like(chances).exponential_(1)).argmax(-1)
        else:
            token = scores.argmax(-1)
        if self.ends is not None:
            assert self.pad is not None
            token = torch.where(session.finished, self.pad.to(token.device), token)
        session.alive.add_((~session.finished).any())
        if self.ends is not None:
            session.finished.logical_or_(torch.isin(token, self.ends.to(token.device)))
        session.ids.index_copy_(1, session.cursor, token[:, None])
        session.token.copy_(token[:, None])
        session.cursor.add_(1)
        session.position.add_(1)


class Decoder:
    """What a compiled model keeps between calls of `generate`: its step and its sessions."""

    def __init__(self, step: Callable[..., Any], *, cuda_graphs: bool):
        self.step, self.cuda_graphs = step, cuda_graphs
        self.sessions: OrderedDict[tuple[int, int], Session] = OrderedDict()
        self.newest: StaticCache | None = None

    def cache(self, model: Any, rows: int, length: int) -> StaticCache:
        """An empty cache for a padded batch: that of an earlier call of this size, or a new one."""
        session = self.sessions.get((rows, length))
        if session is not None:
            session.cache.reset()
            self.newest = session.cache
        else:
            self.newest = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
            allocate(model, self.newest, rows)
        return self.newest

    def owns(self, cache: Any) -> bool:
        return cache is not None and cache is self.newest

    def session(self, cache: StaticCache, rows: int, device: torch.device) -> Session:
        """The session that owns `cache`, made the first time; the oldest ones make room."""
        key = (rows, slots(cache))
        known = self.sessions.get(key)
        if known is None or known.cache is not cache:
            self.sessions[key] = known = Session(cache, rows, device)
        self.sessions.move_to_end(key)
        while len(self.sessions) > KEPT_SESSIONS:
            self.sessions.popitem(last=False)
        return known

    def run(self, session: Session, choice: Choice, padded: bool) -> None:
        """One step in place, inside `stepping`: forward of the last token, choice of the next."""
        output = self.step(
            input_ids=session.token,
            attention_mask=session.mask if padded else None,
            position_ids=session.position,
            past_key_values=session.cache,
            use_cache=True,
            return_dict=True,
        )
        if session.counts:
            torch._foreach_add_(session.counts, 1)  # pyright: ignore[reportPrivateImportUsage]
        choice(session, output.logits[:, -1])

    def capture(self, session: Session, choice: Choice, padded: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(session, choice, padded)
        return graph

    def steps(self, session: Session, choice: Choice, count: int, padded: bool, streamer: Any, rows: int) -> None:
        """Up to `count` steps; stops some steps after every row has ended."""
        key = (*choice.key, padded)
        flag = Flag(session.finished) if choice.ends is not None else None
        for index in range(count):
            if self.cuda_graphs and index >= WARM_STEPS and key not in session.graphs:
                session.graphs[key] = self.capture(session, choice, padded)
            if key in session.graphs:
                session.graphs[key].replay()
            else:
                self.run(session, choice, padded)
            if streamer is not None:
                streamer.put(session.token[:rows, 0].to("cpu", copy=True))
            every = 1 if streamer is not None or not self.cuda_graphs else CHECK_EVERY
            if flag is not None and (index + 1) % every == 0 and flag.up(wait=every == 1):
                return


@contextmanager
def stepping(cache: StaticCache) -> Iterator[None]:
    """While this is open, every call brings one token a row, which counts: no layer looks for padding, none counts."""
    layers = [layer for layer in cache.layers if isinstance(layer, StateLayer)]
    for layer in layers:
        layer.by_row, layer.counting = True, False
    try:
        yield
    finally:
        for layer in layers:
            layer.by_row, layer.counting = False, True


class Flag:
    """Whether every row has ended, read one look late so that the device does not wait for the host."""

    def __init__(self, finished: Tensor):
        self.finished = finished
        pinned = finished.device.type == "cuda"
        self.host = torch.zeros((), dtype=torch.bool, pin_memory=pinned)
        self.event: torch.cuda.Event | None = None

    def up(self, *, wait: bool) -> bool:
        """Take the answer of the last look (this one's when `wait`) and look again."""
        if wait or self.finished.device.type != "cuda":
            return bool(self.finished.all())
        if self.event is not None:
            self.event.synchronize()
        answer = bool(self.host) if self.event is not None else False
        self.host.copy_(self.finished.all(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.event = event
        return answer


def on_device(cache: Any) -> bool:
    """Whether all that a decode step does with this cache happens on the device at fixed addresses."""
    if type(cache) is not StaticCache or getattr(cache, "offloading", False):
        return False
    return all(
        (isinstance(layer, StateLayer) and layer.counts_on_device and not layer.shared)
        or (isinstance(layer, StaticLayer) and not isinstance(layer, StaticSlidingWindowLayer))
        for layer in cache.layers
    )


def applies(model: Any, processors: Any, criteria: Any, config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `decode` can run this call; otherwise transformers' own loop does, around the compiled forward."""
    return (
        not config.return_dict_in_generate
        and config.use_cache
        and not model.config.is_encoder_decoder
        and set(kwargs) <= {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
        and kwargs.get("position_ids") is not None
        and on_device(kwargs.get("past_key_values"))
        and all(type(p) in ON_DEVICE for p in processors)
        and all(type(c) in STOPS for c in criteria)
        and criteria.max_length is not None
    )


def decode(
    model: Any,
    decoder: Decoder,
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    streamer: Any,
    kwargs: dict[str, Any],
) -> Tensor:
    """As transformers' `_sample`: the prompt [B, T] and what follows, [B, T + new]."""
    asked = input_ids.shape[0]
    cache = kwargs["past_key_values"]
    rows = bucket(asked)
    if rows > asked:
        fill = torch.arange(rows, device=input_ids.device).clamp(max=asked - 1)
        input_ids = input_ids[fill]
        kwargs = {n: v[fill] if isinstance(v, Tensor) and v.shape[:1] == (asked,) else v for n, v in kwargs.items()}
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    padded = not bool(mask.all())
    outputs = _prefill(model, input_ids, config, kwargs, padded)
    session = decoder.session(cache, rows, input_ids.device)
    session.start(input_ids, mask, asked)
    choice = Choice(processors, config, criteria)
    choice(session, outputs.logits[:, -1])
    if streamer is not None:
        streamer.put(session.token[:asked, 0].to("cpu", copy=True))
    time = input_ids.shape[1]
    with stepping(cache):
        decoder.steps(session, choice, criteria.max_length - time - 1, padded, streamer, asked)
    if streamer is not None:
        streamer.end()
    return session.ids[:asked, : time + int(session.alive)].clone()


def _prefill(model: Any, input_ids: Tensor, config: Any, kwargs: dict[str, Any], padded: bool) -> Any:
    if padded or input_ids.shape[1] == 1 or int(kwargs["past_key_values"].get_seq_length()):
        return model._prefill(input_ids, config, kwargs)
    with whole_prompt(model) as able:
        return model._prefill(input_ids, config, {**kwargs, "attention_mask": None} if able else kwargs)


def with_decode(kind: type[nn.Module], decoder: Decoder) -> type[nn.Module]:
    """A subclass of a model's class, of the same name, whose `_sample` is `decode` where that applies."""

    def _sample(
        self: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if not synced_gpus and applies(self, logits_processor, stopping_criteria, generation_config, model_kwargs):
            return decode(
                self, decoder, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
            )
        cache: Any = model_kwargs.get("past_key_values")
        if decoder.owns(cache):  # made for a padded batch that is not coming
            model_kwargs["past_key_values"] = fresh = StaticCache(config=self.config, max_cache_len=slots(cache))
            allocate(self, fresh, input_ids.shape[0])
        return kind._sample(  # type: ignore[attr-defined]
            self,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    content = {"_sample": _sample, "is_compiled_for_decoding": True}
    return type(kind.__name__, (kind,), {**content, "__module__": kind.__module__, "__doc__": kind.__doc__})
