"""`fla-swap serve DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fla_swap.consoles import err
from fla_swap.errors import FlaSwapError
from fla_swap.options import Device, Dtype, Model


def serve_command(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    slots: Annotated[int, typer.Option(help="Requests that are generated at the same time.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Longest prompt and answer together, in tokens.", min=2)] = 4096,
    waiting: Annotated[int, typer.Option(help="Requests that may wait for a slot; more get status 429.", min=1)] = 256,
    max_body: Annotated[int, typer.Option(help="Largest request body in bytes.", min=1)] = 4 << 20,
    grace: Annotated[int, typer.Option(help="Seconds that running answers get on shutdown.", min=0)] = 30,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile prefill and step.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a model over HTTP, as OpenAI's clients expect it; requests join and leave between steps."""
    try:
        import uvicorn

        from fla_swap.serving.engine import Engine
        from fla_swap.serving.server import make_app
    except ImportError as error:
        raise FlaSwapError(f"`fla-swap serve` needs {error.name}: pip install 'fla-swap[serve]'") from error
    from fla_swap.checkpoint import load
    from fla_swap.conversion import find_device, load_tokenizer, pick_dtype

    where = find_device(device)
    loaded: Any = load(model, dtype=pick_dtype(dtype, where), device=where)
    engine = Engine(loaded, slots=slots, tokens=tokens, waiting=waiting, compiled=compiled)
    app = make_app(engine, load_tokenizer(model), Path(model).name or str(model), max_body_bytes=max_body)
    err.print(
        f"{slots} slots of {tokens} tokens on {where}, {engine.cache.bytes_per_slot() / 2**20:.1f} MiB each; "
        f"http://{host}:{port}/v1 (also /health, /metrics)"
    )
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=grace, log_level="info")
