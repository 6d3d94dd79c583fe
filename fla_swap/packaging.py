"""A model as a folder of compiled libraries: prefill and decode by AOTInductor, run without transformers.

    fs.package(model, "served", context=2048)           # here: model, transformers, a C++ compiler
    fs.load_package("served").generate(ids)             # there: torch, safetensors and fla_swap

The folder holds `prefill.pt2` and `decode.pt2` (code alone), `model.safetensors` (the weights, once) and
`package.json`. Both libraries take the model's states, keys and values as arguments and change them in place.

Legend for shapes: B rows, T tokens of one call, V vocabulary.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fla_swap.errors import CheckpointError, ConfigError, SwapError
from fla_swap.folders import WEIGHTS, check_safetensors, read_json, written_beside

FORMAT = "fla_swap package 1"
FACTS, TENSORS = "package.json", "model.safetensors"
PARTS = {"prefill": "prefill.pt2", "decode": "decode.pt2"}
TRACED = 13
"""Tokens of the prefill that is traced; its length is dynamic."""
SHORTEST = 8
"""Fewer tokens are read one by one: tracing takes sizes such as T − 1 for others than 0 and 1."""
Place = tuple[dict[str, Any], str]


def _places(cache: Any) -> list[Place]:
    """Where a static cache keeps its tensors: (dictionary, key), always in the same order."""
    found: list[Place] = []
    for layer in cache.layers:
        for own in (getattr(layer, "state", {}), vars(layer)):
            found += [(own, name) for name, value in own.items() if isinstance(value, Tensor)]
    return found


class _Step(nn.Module):
    """A model as a function of ids [B, T], their positions, and all that its cache holds: logits [B, V] of the last."""

    def __init__(self, model: nn.Module, cache: Any):
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, ids: Tensor, positions: Tensor, states: list[Tensor]) -> Tensor:
        places = _places(self.cache)
        kept = [own[name] for own, name in places]
        try:
            for (own, name), tensor in zip(places, states, strict=True):
                own[name] = tensor
            out = self.model(ids, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].float()
        finally:
            for (own, name), tensor in zip(places, kept, strict=True):
                own[name] = tensor


@torch.no_grad()
def package(
    model: nn.Module, folder: str | Path, *, rows: int = 1, context: int = 2048, inductor: dict[str, Any] | None = None
) -> Path:
    """Compile `model`, a causal language model on the device that it will run on, into `folder`; returns it.

    Args:
        rows: prompts that are generated at the same time, B.
        context: tokens of prompt and answer together that there is room for.
        inductor: options of Inductor, such as {"max_autotune": True}.
    Raises:
        ConfigError: rows or context make no sense.
        SwapError: the model is compiled by `fs.compile`, or keeps something on the host between steps.
        CheckpointError: the folder cannot be written.
    """
    from transformers import StaticCache

    from fla_swap.decoding import allocate, on_device

    if rows < 1 or context <= TRACED:
        raise ConfigError(f"rows={rows}, context={context}: at least one row, and more than {TRACED} tokens")
    if "forward" in vars(model):
        raise SwapError("this model is compiled (`fs.compile`): `fs.uncompile` it first, a package compiles by itself")
    whole: Any = model
    cache = StaticCache(config=whole.config.get_text_config(decoder=True), max_cache_len=context)
    allocate(model, cache, rows)
    if not on_device(cache):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise SwapError(f"a package needs caches that live on the device alone; this model's are {', '.join(kinds)}")
    step, device = _Step(model.eval(), cache), next(model.parameters()).device
    states = [own[name] for own, name in _places(cache)]
    with written_beside(Path(folder), (*WEIGHTS, FACTS, *PARTS.values())) as fresh:
        weights: dict[str, Tensor] = {}
        names = {}
        for part, file in PARTS.items():
            program = _exported(step, states, rows, TRACED if part == "prefill" else 1, context)
            path = str(fresh / file)
            options = {**(inductor or {}), "aot_inductor.package_constants_in_so": False}
            torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
            have = {**program.state_dict, **program.constants}
            used = torch._inductor.aoti_load_package(path).get_constant_fqns()
            names[part] = _shared(weights, {name: have[name] for name in used}, part)
        facts = {
            "format": FORMAT,
            "torch": torch.__version__.split("+")[0],
            "machine": platform.machine(),
            "device": device.type,
            "rows": rows,
            "context": context,
            "vocabulary": whole.config.get_text_config(decoder=True).vocab_size,
            "ends": _ends(whole),
            "states": [{"shape": list(s.shape), "dtype": str(s.dtype).removeprefix("torch.")} for s in states],
            "constants": names,
        }
        save_file({n: t.detach().cpu().contiguous() for n, t in weights.items()}, fresh / TENSORS)
        (fresh / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def _exported(step: _Step, states: list[Tensor], rows: int, tokens: int, context: int) -> torch.export.ExportedProgram:
    device = states[0].device
    ids = torch.ones(rows, tokens, dtype=torch.long, device=device)
    positions = torch.arange(tokens, device=device).expand(rows, -1).contiguous()
    dynamic = {1: torch.export.Dim("tokens", min=SHORTEST, max=context)} if tokens > 1 else {}
    shapes = (dynamic, dynamic, [{} for _ in states])
    arguments = (ids, positions, [s.clone() for s in states])
    return torch.export.export(step, arguments, dynamic_shapes=shapes, strict=False)


def _shared(weights: dict[str, Tensor], own: dict[str, Tensor], part: str) -> dict[str, str]:
    """Add a library's constants to the weights; returns its name for each → the name in the file. Equal ones once."""
    names = {}
    for name, tensor in own.items():
        tied = next((n for n, t in weights.items() if t is tensor or _same_memory(t, tensor)), None)
        known = tied or (name if name not in weights else f"{part}.{name}")
        names[name] = known
        weights.setdefault(known, tensor)
    return names


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _ends(model: Any) -> list[int]:
    config = getattr(model, "generation_config", None) or model.config
    ends = config.eos_token_id
    return [] if ends is None else [int(e) for e in ends] if isinstance(ends, (list, tuple)) else [int(ends)]


class Package:
    """A loaded package: reads and writes tokens on states of its own.

    facts: what package.json holds (rows, context, ends, torch, …). device: where it runs.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], libraries: dict[str, Any], device: torch.device):
        self.folder, self.facts, self.device = folder, facts, device
        self._libraries = libraries
        self._states = [
            torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]), device=device)
            for entry in facts["states"]
        ]
        self.tokens = 0

    def reset(self) -> None:
        """Forget everything that was read."""
        for state in self._states:
            state.zero_()
        self.tokens = 0

    def read(self, ids: Tensor) -> Tensor:
        """Read ids int64 [B, T] after what was read before; the logits fp32 [B, V] that follow.

        Raises ConfigError: another number of rows than the package has, or no room left.
        """
        rows, tokens = ids.shape
        if rows != self.facts["rows"]:
            raise ConfigError(f"{rows} rows; this package was made for rows={self.facts['rows']}")
        if tokens == 0 or self.tokens + tokens > self.facts["context"]:
            raise ConfigError(
                f"{tokens} tokens after {self.tokens}: this package has room for context={self.facts['context']}"
            )
        positions = torch.arange(self.tokens, self.tokens + tokens, device=self.device).expand(rows, -1)
        part, length = ("prefill", tokens) if tokens >= SHORTEST else ("decode", 1)
        for piece, places in zip(ids.to(self.device).split(length, 1), positions.split(length, 1), strict=True):
            # Libraries read memory by the strides of the traced arguments, whatever those of the given ones are.
            logits = self._libraries[part](piece.contiguous(), places.contiguous(), self._states)
        self.tokens += tokens
        return logits

    def stream(
        self, ids: Tensor, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[Tensor]:
        """The tokens int64 [B, 1] that follow the prompts ids [B, T], one after another, until every row has ended.

        temperature: 0 takes the likeliest; above, tokens are drawn from softmax(logits / temperature).
        """
        self.reset()
        ends = torch.tensor(self.facts["ends"], dtype=torch.long, device=self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        done = torch.zeros(ids.shape[0], dtype=torch.bool, device=self.device)
        logits = self.read(ids)
        for index in range(max_new_tokens):
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                token = logits.argmax(-1, keepdim=True)
            if len(ends):
                token = torch.where(done[:, None], ends[:1], token)
                done |= torch.isin(token[:, 0], ends)
            yield token
            if index + 1 == max_new_tokens or bool(done.all()):
                return
            logits = self.read(token)

    def generate(self, ids: Tensor, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> Tensor:
        """Prompts ids int64 [B, T], all of one length, and what follows them: [B, T + new]; see `stream`."""
        new = list(self.stream(ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))
        return torch.cat([ids.to(self.device), *new], 1)


def load_package(folder: str | Path) -> Package:
    """Load what `package` wrote. Needs neither transformers nor the model's code.

    Raises CheckpointError: no package there, a damaged file, another version of torch or another kind of machine.
    """
    import fla_swap.ops  # noqa: F401 - registers the operators that the libraries call

    folder = Path(folder)
    if not (folder / FACTS).exists():
        raise CheckpointError(f"{folder} holds no package that fs.package wrote: there is no {FACTS}")
    facts = read_json(folder / FACTS)
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{folder / FACTS} is no {FORMAT!r}: {facts.get('format')!r}")
    here = {"torch": torch.__version__.split("+")[0], "machine": platform.machine()}
    for name, value in here.items():
        if facts[name] != value:
            raise CheckpointError(f"{folder} was made for {name} {facts[name]}, this is {value}: package it again here")
    if facts["device"] == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"{folder} was made for CUDA, and there is no CUDA device here")
    check_safetensors(folder / TENSORS)
    device = torch.device(facts["device"])
    weights = load_file(folder / TENSORS, device=str(device))
    libraries = {}
    for part, file in PARTS.items():
        if not (folder / file).exists():
            raise CheckpointError(f"{folder / file} is missing")
        library = torch._inductor.aoti_load_package(str(folder / file))
        constants = {name: weights[known] for name, known in facts["constants"][part].items()}
        library.load_constants(constants, check_full_update=True, user_managed=True)
        libraries[part] = library
    return Package(folder, facts, libraries, device)
