"""The HTTP side: OpenAI's completion routes, health and metrics, over an `Engine`."""

from __future__ import annotations

import asyncio
import json
import queue
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fla_swap.errors import FlaSwapError
from fla_swap.serving.engine import Engine, Full, Request
from fla_swap.serving.protocol import Answer, ChatRequest, CompletionRequest, Sampling, error, usage
from fla_swap.serving.text import GrowingText

DEFAULT_NEW_TOKENS = 256
MAX_BODY_BYTES = 4 << 20
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class TooLarge(Exception):
    """The body is larger than the limit."""


class BodyLimit:
    """Refuses request bodies over a size, also when their length is not announced."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.limit:
            return await self._refuse(scope, receive, send)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise TooLarge
            return message

        try:
            await self.app(scope, counted, send)
        except TooLarge:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = error(f"the request body is larger than {self.limit} bytes")
        await JSONResponse(body, status_code=413, headers={"connection": "close"})(scope, receive, send)


class Metrics:
    """Prometheus metrics: the engine's counts as they stand, and two histograms."""

    def __init__(self, engine: Engine):
        self.engine, self.registry = engine, CollectorRegistry()
        self.registry.register(self)  # type: ignore[arg-type]
        name = "fla_swap_time_to_first_token_seconds"
        self.first = Histogram(name, "From arrival to the first token", buckets=SECONDS, registry=self.registry)
        name = "fla_swap_request_seconds"
        self.whole = Histogram(name, "From arrival to the last token", buckets=SECONDS, registry=self.registry)

    def collect(self) -> Any:
        counts = self.engine.counts
        for name, text in (
            ("requests", "Requests accepted"),
            ("finished", "Requests answered to the end"),
            ("cancelled", "Requests given up by their clients"),
            ("failed", "Requests that failed"),
            ("prompt_tokens", "Tokens of prompts"),
            ("new_tokens", "Tokens generated"),
            ("steps", "Decode steps"),
            ("busy_rows", "Rows in use, summed over the steps"),
        ):
            yield CounterMetricFamily(f"fla_swap_{name}", text, value=getattr(counts, name))
        yield GaugeMetricFamily("fla_swap_running", "Requests in a slot", value=self.engine.running)
        yield GaugeMetricFamily("fla_swap_waiting", "Requests waiting for a slot", value=len(self.engine.waiting))
        yield GaugeMetricFamily("fla_swap_slots", "Slots", value=len(self.engine.rows))

    def done(self, request: Request) -> None:
        if request.first_token is not None:
            self.first.observe(request.first_token - request.arrived)
        self.whole.observe(time.monotonic() - request.arrived)


class Conversation:
    """One request between the HTTP side and the engine."""

    def __init__(self, engine: Engine, metrics: Metrics, request: Request, text: GrowingText):
        self.engine, self.metrics, self.request, self.text = engine, metrics, request, text
        self.reason = "stop"
        loop, self.news = asyncio.get_running_loop(), asyncio.Event()
        request.on_token = lambda: loop.call_soon_threadsafe(self.news.set)
        engine.submit(request)

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it becomes certain; whoever stops listening gives the request up."""
        over = False
        try:
            while not over:
                await self.news.wait()
                self.news.clear()
                over, text = self._take()
                if text:
                    yield text
        finally:
            if not over:
                self.engine.cancel(self.request)
            self.metrics.done(self.request)

    def _take(self) -> tuple[bool, str]:
        parts: list[str] = []
        while True:
            try:
                item = self.request.tokens.get_nowait()
            except queue.Empty:
                return False, "".join(parts)
            if isinstance(item, str):
                self.reason = item
                return True, "".join(parts) + self.text.finish()
            parts.append(self.text.push(item))
            if self.text.ended:
                self.engine.cancel(self.request)
                self.reason = "stop"
                return True, "".join(parts)

    def usage(self) -> dict[str, int]:
        return usage(len(self.request.prompt), len(self.text.ids))


class Service:
    """Turns bodies into engine requests and tokens into bodies."""

    def __init__(self, engine: Engine, tokenizer: Any, name: str):
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        self.metrics = Metrics(engine)
        config: Any = getattr(engine.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        ends = ends if ends is not None else tokenizer.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])

    def prompt_of(self, body: CompletionRequest | ChatRequest) -> list[int]:
        if isinstance(body, CompletionRequest):
            ids = body.prompt if isinstance(body.prompt, list) else self.tokenizer(body.prompt)["input_ids"]
            size = self.engine.model.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr]
            if any(not 0 <= i < size for i in ids):
                raise FlaSwapError(f"a token id in the prompt is outside of the vocabulary of {size}")
            return list(ids)
        if not getattr(self.tokenizer, "chat_template", None):
            raise FlaSwapError("this model's tokenizer has no chat template; use /v1/completions")
        messages = [m.model_dump() for m in body.messages]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def open(self, body: CompletionRequest | ChatRequest) -> Conversation:
        prompt = self.prompt_of(body)
        asked = body.max_tokens
        if isinstance(body, ChatRequest):
            asked = body.max_completion_tokens or asked
        room = self.engine.tokens - len(prompt)
        request = Request(
            prompt=prompt,
            max_tokens=asked if asked is not None else max(min(DEFAULT_NEW_TOKENS, room), 1),
            temperature=body.temperature,
            top_p=body.top_p,
            stop=self.ends,
        )
        return Conversation(self.engine, self.metrics, request, GrowingText(self.tokenizer, body.stops()))

    async def answer(self, body: CompletionRequest | ChatRequest, http: HttpRequest) -> Response:
        conversation = self.open(body)
        answer = Answer(self.name, chat=isinstance(body, ChatRequest))
        if body.stream:
            return StreamingResponse(self._events(conversation, answer, body), media_type="text/event-stream")
        gone = asyncio.create_task(_disconnected(http))
        whole = asyncio.create_task(_joined(conversation))
        try:
            await asyncio.wait({gone, whole}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                self.engine.cancel(conversation.request)
            text = await whole
        finally:
            gone.cancel()
        if conversation.reason == "error":
            return JSONResponse(error("the model failed on this request", kind="server_error"), status_code=500)
        return JSONResponse(answer.whole(text, conversation.reason, conversation.usage()))

    async def _events(self, conversation: Conversation, answer: Answer, body: Sampling) -> AsyncIterator[str]:
        first = True
        async for text in conversation.pieces():
            yield _event(answer.piece(text, None, first=first))
            first = False
        if conversation.reason == "error":
            yield _event(error("the model failed on this request", kind="server_error"))
            return
        yield _event(answer.piece("", conversation.reason, first=first))
        if body.stream_options is not None and body.stream_options.include_usage:
            yield _event(answer.usage_piece(conversation.usage()))
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _joined(conversation: Conversation) -> str:
    return "".join([text async for text in conversation.pieces()])


async def _disconnected(http: HttpRequest) -> None:
    while not await http.is_disconnected():
        await asyncio.sleep(0.2)


def make_app(engine: Engine, tokenizer: Any, name: str, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The ASGI application; the engine runs from its startup to its shutdown.

    Routes: POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /health (503 once the engine has
    failed), GET /metrics (Prometheus).
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="fla_swap", lifespan=lifespan)
    app.add_middleware(BodyLimit, limit=max_body_bytes)
    service = Service(engine, tokenizer, name)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HttpRequest, problem: RequestValidationError) -> JSONResponse:
        first = problem.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(error(f"{place or 'body'}: {first['msg']}", parameter=place or None), status_code=400)

    @app.exception_handler(FlaSwapError)
    async def refused(http: HttpRequest, problem: FlaSwapError) -> JSONResponse:
        if isinstance(problem, Full):
            body = error(str(problem), kind="rate_limit_error")
            return JSONResponse(body, status_code=429, headers={"retry-after": "1"})
        return JSONResponse(error(str(problem)), status_code=400)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        return await service.answer(body, http)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        return await service.answer(body, http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "fla_swap"}]}

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = engine.thread.is_alive() and engine.failure is None
        state = {"status": "ok" if alive else "failed", "running": engine.running, "waiting": len(engine.waiting)}
        return JSONResponse(state, status_code=200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

    return app
