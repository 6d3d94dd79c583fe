"""The endpoint gives what `generate` gives, to the official client, however requests come and go."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
import uvicorn
from sites import report_of, tiny
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fla_swap as fs
from fla_swap.errors import FlaSwapError
from fla_swap.serving.engine import Engine, Full, Request, choose
from fla_swap.serving.server import make_app
from fla_swap.serving.text import GrowingText

TEACHER = Path(__file__).resolve().parents[2] / "examples" / "teacher"


def hybrid(vocab: int | None = None):
    """A random hybrid: one linear layer, one that kept its attention."""
    if vocab is None:
        model = tiny("llama")
    else:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes, num_key_value_heads=2, eos_token_id=None))
    return fs.swap_(model.eval(), fs.plan(report_of(model), mixer="gla", keep=(1,)))


def drain(request: Request) -> tuple[list[int], str]:
    tokens: list[int] = []
    while True:
        item = request.tokens.get(timeout=60)
        if isinstance(item, str):
            return tokens, item
        tokens.append(item)


def test_requests_that_come_and_go_get_the_tokens_of_generate():
    model = hybrid()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 60, (n,), generator=generator).tolist() for n in (3, 9, 1, 14, 6)]
    counts = [7, 3, 12, 5, 9]
    expected = [
        model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=n)[0, len(p) :].tolist()
        for p, n in zip(prompts, counts, strict=True)
    ]
    engine = Engine(model, slots=2, tokens=32, compiled=False)
    engine.start()
    try:
        requests = [
            engine.submit(Request(prompt=p, max_tokens=n, temperature=0)) for p, n in zip(prompts, counts, strict=True)
        ]
        assert [drain(r) for r in requests] == [(tokens, "length") for tokens in expected]
        assert engine.counts.finished == 5 and engine.running == 0
        assert engine.counts.busy_rows > engine.counts.steps  # several at once
    finally:
        engine.stop()


def test_a_model_from_scratch_is_served_the_same_way():
    torch.manual_seed(0)
    config = fs.HybridConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, intermediate_size=48, mixer="gla")
    config.eos_token_id = None
    model = fs.HybridForCausalLM(config).eval()
    prompts = [[3, 5, 7, 9], [11, 2]]
    expected = [
        model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=6)[0, len(p) :].tolist() for p in prompts
    ]
    engine = Engine(model, slots=2, tokens=32, compiled=False)
    engine.start()
    try:
        requests = [engine.submit(Request(prompt=p, max_tokens=6, temperature=0)) for p in prompts]
        assert [drain(r)[0] for r in requests] == expected
    finally:
        engine.stop()


def test_a_stop_token_ends_a_row_and_a_cancelled_request_frees_its_slot():
    model = hybrid()
    prompt = [5, 9, 2]
    tokens = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0, 3:].tolist()
    engine = Engine(model, slots=1, tokens=4096, compiled=False)
    engine.start()
    try:
        stopped = engine.submit(Request(prompt=prompt, max_tokens=6, temperature=0, stop=frozenset([tokens[2]])))
        assert drain(stopped) == (tokens[: tokens.index(tokens[2])], "stop")
        long = engine.submit(Request(prompt=prompt, max_tokens=4000, temperature=0))
        long.tokens.get(timeout=60)
        engine.cancel(long)
        assert drain(long)[1] == "cancelled"
        assert drain(engine.submit(Request(prompt=prompt, max_tokens=2, temperature=0))) == (tokens[:2], "length")
    finally:
        engine.stop()


def test_what_cannot_fit_is_refused_with_the_numbers():
    engine = Engine(hybrid(), slots=1, tokens=16, waiting=1, compiled=False)
    with pytest.raises(FlaSwapError, match="10 tokens and 7 may follow; a slot holds 16"):
        engine.submit(Request(prompt=[1] * 10, max_tokens=7))
    engine.submit(Request(prompt=[1], max_tokens=1))
    with pytest.raises(Full, match="1 requests are waiting"):
        engine.submit(Request(prompt=[1], max_tokens=1))
    engine.start()
    engine.stop()
    with pytest.raises(FlaSwapError, match="stopped"):
        engine.submit(Request(prompt=[1], max_tokens=1))


def test_each_row_has_its_own_temperature_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(4000, -1)
    torch.manual_seed(0)
    drawn = choose(logits, torch.ones(4000, 1), torch.full((4000, 1), 0.7))
    kept = logits[0].softmax(-1)[:2]  # .64 and .24: together they pass .7
    shares = torch.stack([(drawn == i).double().mean() for i in range(4)])
    assert torch.allclose(shares, torch.cat((kept / kept.sum(), torch.zeros(2))).double(), atol=0.03)
    assert (choose(logits, torch.zeros(4000, 1), torch.ones(4000, 1)) == 0).all()


def test_text_grows_without_broken_characters_and_ends_before_a_stop():
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    for text in ("def f(x):\n    return 'größer → 値'\n", "plain"):
        growing = GrowingText(tokenizer)
        parts = [growing.push(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) + growing.finish() == text
    growing = GrowingText(tokenizer, stops=["return x"])
    shown = ""
    for token in tokenizer("a = 1\nreturn x + 1", add_special_tokens=False)["input_ids"]:
        shown += growing.push(token)
        assert not shown.endswith("ret")
        if growing.ended:
            break
    assert growing.ended and shown == "a = 1\n"


@pytest.fixture(scope="module")
def server():
    """A real server on a free port: (base address, engine, the model, the tokenizer)."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    model = hybrid(len(tokenizer))
    engine = Engine(model, slots=3, tokens=256, waiting=64, compiled=False)
    app = make_app(engine, tokenizer, "tiny", max_body_bytes=20_000)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}", engine, model, tokenizer
    running.should_exit = True
    thread.join(30)
    assert not thread.is_alive() and not engine.thread.is_alive()


def test_the_official_client_gets_whole_and_streamed_answers(server):
    address, _, model, tokenizer = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    assert [m.id for m in client.models.list()] == ["tiny"]
    ids = tokenizer("def main():", return_tensors="pt")["input_ids"]
    new = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    whole = client.completions.create(model="tiny", prompt="def main():", max_tokens=12, temperature=0)
    assert whole.choices[0].text == expected and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    stream = client.completions.create(model="tiny", prompt="def main():", max_tokens=12, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in stream) == expected
    both = client.completions.create(model="tiny", prompt=ids[0].tolist(), max_tokens=12, temperature=0)
    assert both.choices[0].text == expected


def test_many_clients_at_once_get_their_own_answers(server):
    address, engine, _, _ = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")

    def ask(text: str) -> str:
        return client.completions.create(model="tiny", prompt=text, max_tokens=8, temperature=0).choices[0].text

    prompts = [f"value_{i} = " for i in range(12)]
    alone = [ask(p) for p in prompts]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, prompts)) == alone
    assert engine.running == 0 and not engine.waiting


def test_a_client_that_goes_away_frees_its_slot(server):
    address, engine, _, _ = server
    before = engine.counts.cancelled

    async def leave():
        async with httpx.AsyncClient() as client:
            body = {"prompt": "x", "max_tokens": 200, "stream": True}
            async with client.stream("POST", f"{address}/v1/completions", json=body) as answer:
                async for _ in answer.aiter_lines():
                    return

    asyncio.run(leave())
    deadline = time.monotonic() + 20
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.running == 0 and engine.counts.cancelled == before + 1


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "x", "max_tokens": 9999}, 400, "a slot holds 256"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "x", "n": 2}, 400, "n:"),
        ({"prompt": "x", "logprobs": 5}, 400, "logprobs"),
        ({"prompt": [10**9]}, 400, "vocabulary"),
        ({"prompt": ""}, 400, "no tokens"),
        ({"prompt": "x" * 30_000}, 413, "larger than 20000 bytes"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(server, body, status, message):
    answer = httpx.post(f"{server[0]}/v1/completions", json=body, timeout=30)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_malformed_json_chat_without_template_health_and_metrics(server):
    address = server[0]
    headers = {"content-type": "application/json"}
    assert httpx.post(f"{address}/v1/completions", content=b"{", headers=headers).status_code == 400
    chat = httpx.post(f"{address}/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert chat.status_code in (200, 400)
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    text = httpx.get(f"{address}/metrics").text
    assert "fla_swap_slots 3.0" in text and "fla_swap_request_seconds_count" in text
