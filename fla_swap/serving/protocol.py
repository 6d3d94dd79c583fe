"""The part of OpenAI's HTTP protocol that is served: requests, answers, errors."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Sampling(BaseModel):
    """What both routes take. A parameter that would change the answer and is not served is an error, never ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(Sampling):
    prompt: str | list[int]


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: str
    content: str


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


def error(message: str, *, kind: str = "invalid_request_error", parameter: str | None = None) -> dict[str, Any]:
    """An error body as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": None}}


class Answer:
    """Builds the bodies of one answer, whole or in pieces."""

    def __init__(self, model: str, *, chat: bool):
        self.chat, self.model = chat, model
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def whole(self, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._body(kind, [choice]), "usage": usage}

    def piece(self, text: str, reason: str | None, *, first: bool = False) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self.chat:
            choice["delta"] = {**({"role": "assistant"} if first else {}), **({"content": text} if text else {})}
        else:
            choice["text"] = text
        return self._body("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def usage_piece(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._body("chat.completion.chunk" if self.chat else "text_completion", []), "usage": usage}


def usage(prompt: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
