"""Continuous batching: new requests join between two steps, finished ones leave, and every step is one graph.

The engine's thread owns the model. `submit` and `cancel` may be called from any thread; a request's tokens come out of
its own queue.

Legend for shapes: S slots, V vocabulary.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from fla_swap.compilation import whole_graph
from fla_swap.decoding import allocate
from fla_swap.errors import FlaSwapError
from fla_swap.serving.slots import SlotCache

WARM_STEPS = 2
IDLE_SECONDS = 0.2


class Full(FlaSwapError):
    """The waiting line is full."""


@dataclass(eq=False, kw_only=True)
class Request:
    """One prompt on its way. `tokens` receives token ids and at last a reason: "stop", "length", "cancelled", "error".

    temperature 0 is greedy; `top_p` keeps the most likely tokens whose probabilities reach it; `stop` ends on any of
    these token ids, which are not passed on.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: frozenset[int] = frozenset()
    tokens: queue.SimpleQueue[int | str] = field(default_factory=queue.SimpleQueue)
    on_token: Callable[[], object] | None = None
    cancelled: bool = False
    made: int = 0
    arrived: float = field(default_factory=time.monotonic)
    first_token: float | None = None

    def give(self, item: int | str) -> None:
        self.tokens.put(item)
        if self.on_token is not None:
            self.on_token()


@dataclass(kw_only=True)
class Counts:
    """What the metrics route shows; totals since the start."""

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    busy_rows: int = 0


class Engine:
    """Runs requests on a model, `slots` at a time, each at most `tokens` tokens long (prompt and answer).

    Args:
        compiled: the step and the prefill through `torch.compile`, the step as a CUDA graph on a GPU.
        waiting: requests that may wait for a slot; `Full` beyond.
    """

    def __init__(
        self, model: nn.Module, *, slots: int = 8, tokens: int = 4096, waiting: int = 256, compiled: bool = True
    ):
        self.model, self.tokens, self.waiting_limit = model.eval(), tokens, waiting
        self.device = next(model.parameters()).device
        self.cache = SlotCache(model, slots, tokens)
        config: Any = model.config
        self.alone = StaticCache(config=config.get_text_config(decoder=True), max_cache_len=tokens)
        allocate(model, self.alone, 1)
        forward: Callable[..., Any] = model.forward
        self.prefill_forward = whole_graph(forward, dynamic=True) if compiled else forward
        self.step_forward = whole_graph(forward, dynamic=False) if compiled else forward
        self.use_graph = compiled and self.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.token = torch.zeros(slots, 1, dtype=torch.long, device=self.device)
        self.temperature = torch.ones(slots, 1, device=self.device)
        self.top_p = torch.ones(slots, 1, device=self.device)
        self.active = torch.zeros(slots, dtype=torch.bool, device=self.device)
        self.rows: list[Request | None] = [None] * slots
        self.waiting: deque[Request] = deque()
        self.counts = Counts()
        self.lock, self.work = threading.Lock(), threading.Event()
        self.stopping = threading.Event()
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self, timeout: float | None = 30.0) -> None:
        """End: running requests get "cancelled"."""
        self.stopping.set()
        self.work.set()
        if self.thread.is_alive():
            self.thread.join(timeout)

    def submit(self, request: Request) -> Request:
        """Queue a request. Raises `Full`, and FlaSwapError for one that cannot fit into a slot."""
        if not request.prompt:
            raise FlaSwapError("the prompt has no tokens")
        if len(request.prompt) + request.max_tokens > self.tokens:
            raise FlaSwapError(
                f"the prompt has {len(request.prompt)} tokens and {request.max_tokens} may follow; a slot holds "
                f"{self.tokens} in all"
            )
        with self.lock:
            if self.failure is not None or self.stopping.is_set():
                raise FlaSwapError(f"the engine has stopped ({self.failure or 'shutting down'})")
            if len(self.waiting) >= self.waiting_limit:
                raise Full(f"{self.waiting_limit} requests are waiting already; try again later")
            self.waiting.append(request)
            self.counts.requests += 1
        self.work.set()
        return request

    def cancel(self, request: Request) -> None:
        """Give up a request; its slot is free after the running step."""
        request.cancelled = True
        self.work.set()

    @property
    def running(self) -> int:
        return sum(row is not None for row in self.rows)

    # The engine's own thread.

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while not self.stopping.is_set():
                self._drop_cancelled()
                self._admit()
                if self.running:
                    self._step()
                else:
                    self.work.wait(IDLE_SECONDS)
                    self.work.clear()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self.failure = error
            raise
        finally:
            self._end_all("error" if self.failure is not None else "cancelled")

    def _end_all(self, reason: str) -> None:
        with self.lock:
            left = [*self.waiting, *(row for row in self.rows if row is not None)]
            self.waiting.clear()
        self.rows = [None] * len(self.rows)
        for request in left:
            request.give(reason)

    def _drop_cancelled(self) -> None:
        for slot, request in enumerate(self.rows):
            if request is not None and request.cancelled:
                self._free(slot, "cancelled")
        with self.lock:
            gone = [r for r in self.waiting if r.cancelled]
            self.waiting = deque(r for r in self.waiting if not r.cancelled)
        for request in gone:
            self.counts.cancelled += 1
            request.give("cancelled")

    def _admit(self) -> None:
        """Prefill waiting requests into the free slots: one at a time, so that the running ones wait for one prompt."""
        for slot, row in enumerate(self.rows):
            if row is not None:
                continue
            with self.lock:
                request = self.waiting.popleft() if self.waiting else None
            if request is None:
                return
            try:
                first = self._prefill(slot, request)
            except torch.OutOfMemoryError:
                self.counts.failed += 1
                request.give("error")
                continue
            self.rows[slot] = request
            self.active[slot] = True
            self._deliver(slot, request, first)
            if self.running > 1:
                return

    def _prefill(self, slot: int, request: Request) -> int:
        """Run a prompt alone, put its state into the slot, and choose its first token."""
        self.alone.reset()
        ids = torch.tensor([request.prompt], device=self.device)
        length = ids.shape[1]
        logits = self.prefill_forward(
            input_ids=ids,
            position_ids=torch.arange(length, device=self.device)[None],
            past_key_values=self.alone,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        ).logits[:, -1]
        self.cache.fill(slot, self.alone, length)
        self.temperature[slot], self.top_p[slot] = request.temperature, request.top_p
        self.counts.prompt_tokens += length
        token = choose(logits, self.temperature[slot : slot + 1], self.top_p[slot : slot + 1])
        self.token[slot] = token
        return int(token)

    def _forward(self) -> None:
        """One step of every row, in place."""
        output = self.step_forward(
            input_ids=self.token,
            attention_mask=self.cache.mask(),
            position_ids=self.cache.lengths[:, None].clone(),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        self.token.copy_(choose(output.logits[:, -1], self.temperature, self.top_p)[:, None])
        self.cache.lengths.add_(self.active)

    def _step(self) -> None:
        if self.use_graph and self.graph is None and self.counts.steps >= WARM_STEPS:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._forward()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._forward()
        self.counts.steps += 1
        tokens = self.token[:, 0].tolist()
        for slot, request in enumerate(self.rows):
            if request is not None:
                self.counts.busy_rows += 1
                self._deliver(slot, request, tokens[slot])

    def _deliver(self, slot: int, request: Request, token: int) -> None:
        if request.first_token is None:
            request.first_token = time.monotonic()
        if token in request.stop:
            self._free(slot, "stop")
            return
        request.made += 1
        self.counts.new_tokens += 1
        request.give(token)
        if request.made >= request.max_tokens:
            self._free(slot, "length")

    def _free(self, slot: int, reason: str) -> None:
        request, self.rows[slot] = self.rows[slot], None
        self.active[slot] = False
        self.cache.lengths[slot] = 0
        assert request is not None
        if reason == "cancelled":
            self.counts.cancelled += 1
        else:
            self.counts.finished += 1
        request.give(reason)


def choose(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """Token ids [S] from logits [S, V]; temperature and top_p [S, 1], per row. Temperature 0: the most likely token."""
    logits = logits.float()
    chances = (logits / temperature.clamp(min=1e-4)).softmax(-1)
    ordered, order = chances.sort(-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p
    chances = torch.zeros_like(chances).scatter(-1, order, ordered * kept)
    drawn = (chances / torch.empty_like(chances).exponential_(1)).argmax(-1)
    return torch.where(temperature[:, 0] == 0, logits.argmax(-1), drawn)
