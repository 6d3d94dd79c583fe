"""Text to blocks of tokens: what alignment, distillation, evaluation and the example teacher read.

A source is one string:

- ``"stdlib"`` is the running interpreter's standard library, ``"stdlib:DIR"`` a copy of one elsewhere. Whole packages
  (`HELD_OUT`) are kept for evaluation, and their tests are in neither part.
- a ``.txt``, ``.md``, ``.rst``, ``.py`` or ``.jsonl`` file (field ``text``), or a folder of such files;
- anything else is a dataset id of the Hugging Face hub, ``"name"``, ``"name:config"`` or ``"name:config:field"``
  (streamed).

Files, and hub datasets with no validation or test split, hold out `HELD_OUT_FRACTION` of their documents, chosen by a
hash of the document: the choice depends on nothing else, and no document is ever in both parts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import Dataset

from fla_swap.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "eval"]
Progress = Callable[[int, int], None]
"""Called with (documents read, tokens read) after every batch of documents."""

HELD_OUT = (
    "argparse",
    "asyncio",
    "email",
    "heapq",
    "http",
    "json",
    "sqlite3",
    "statistics",
    "textwrap",
)
"""Top-level modules and packages of the standard library that no model of ours is trained on."""

HELD_OUT_FRACTION = 0.05
SUFFIXES = (".jsonl", ".md", ".py", ".rst", ".txt")

_NOT_LIBRARY = ("site-packages", "dist-packages", "lib-dynload", "__pycache__")
_GENERATED = ("encodings",)  # character tables: a tenth of the library's bytes, and no prose or code to learn from
_PIECE = 4096  # characters after which a single long text file is cut, at the next blank line
_BATCH = 64  # documents tokenised at once


def load_texts(source: str, *, split: Split, tests: bool = True) -> Iterator[str]:
    """The documents of one part of a source, in a fixed order.

    Args:
        source: see the module's docstring.
        split: "train" or "eval".
        tests: whether the standard library's ``test`` package belongs to "train".

    Raises:
        DataError: the path or dataset does not exist, a file is not UTF-8, a record has no text, or nothing is left.
    """
    if split not in ("train", "eval"):
        raise DataError(f"split is {split!r}; it must be 'train' or 'eval'")
    kind, _, rest = source.partition(":")
    if kind == "stdlib":
        texts = _stdlib_texts(Path(rest or sysconfig.get_path("stdlib")), split, tests)
    elif (path := Path(source).expanduser()).exists():
        texts = _local_texts(path, split)
    elif _looks_like_a_path(source):
        raise DataError(f"{source}: no such file or folder")
    else:
        texts = _hub_texts(source, split)
    texts = (text for text in texts if not text.isspace() and text)
    first = next(texts, None)
    if first is None:
        raise DataError(f"{source}: no text for split {split!r}")
    return itertools.chain((first,), texts)


def token_stream(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit_tokens: int | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """All documents as one row of token ids [tokens], int64, each document followed by the end-of-text token.

    No other special token is added. Reading stops as soon as `limit_tokens` are there.

    Raises:
        DataError: the tokenizer has no end-of-text token, or there is no text.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError(f"{type(tokenizer).__name__} has no eos_token: set one, it separates the documents")
    parts: list[torch.Tensor] = []
    documents = tokens = 0
    remaining = iter(texts)
    while (limit_tokens is None or tokens < limit_tokens) and (batch := list(itertools.islice(remaining, _BATCH))):
        rows: Any = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        part = torch.tensor([token for row in rows for token in (*row, eos)], dtype=torch.int64)
        parts.append(part)
        documents += len(batch)
        tokens += part.numel()
        if progress is not None:
            progress(documents, tokens)
    if documents == 0:
        raise DataError("no text to tokenise")
    return torch.cat(parts)[:limit_tokens]


def token_blocks(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    limit_tokens: int | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Documents packed into full blocks [blocks, block_size], int64.

    Documents cross blocks; the last partial block is dropped.

    Raises:
        DataError: there are fewer tokens than one block.
    """
    if block_size < 2:
        raise DataError(f"block_size is {block_size}; predicting a next token takes at least 2")
    stream = token_stream(texts, tokenizer, limit_tokens=limit_tokens, progress=progress)
    blocks = stream.numel() // block_size
    if blocks == 0:
        raise DataError(
            f"found {stream.numel()} tokens, fewer than one block of {block_size}: "
            "give more text or a smaller block_size"
        )
    return stream[: blocks * block_size].view(blocks, block_size)


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of tokens as transformers' `Trainer` reads them: item i is ``{"input_ids": [block_size] int64}``."""

    def __init__(self, blocks: torch.Tensor):
        if blocks.ndim != 2 or blocks.dtype != torch.int64:
            raise DataError(f"blocks must be [blocks, block_size] int64, got {tuple(blocks.shape)} {blocks.dtype}")
        self.blocks = blocks

    def __len__(self) -> int:
        return self.blocks.shape[0]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index]}


def load_blocks(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    split: Split,
    limit_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenBlocks:
    """`load_texts` and `token_blocks` in one call; errors name the source."""
    texts = load_texts(source, split=split)
    try:
        blocks = token_blocks(texts, tokenizer, block_size, limit_tokens=limit_tokens, progress=progress)
    except DataError as error:
        raise DataError(f"{source} ({split}): {error}") from error
    return TokenBlocks(blocks)


# ---- the standard library


def _stdlib_texts(root: Path, split: Split, tests: bool) -> Iterator[str]:
    if not (root / "abc.py").is_file():
        raise DataError(f"{root}: no standard library here (abc.py is missing)")
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _stdlib_part(parts, tests) == split:
            # A few test files are undecodable on purpose; they are no text and no error.
            try:
                yield _read_python(path)
            except (SyntaxError, UnicodeDecodeError):
                continue


def _stdlib_part(parts: tuple[str, ...], tests: bool) -> Split | None:
    """Which part a module belongs to, by its dotted path in the library."""
    top = parts[0]
    if top in _GENERATED or any(part in _NOT_LIBRARY for part in parts):
        return None
    if top == "test":
        held = tuple(f"test_{name}" for name in HELD_OUT)
        return "train" if tests and not any(part.startswith(held) for part in parts[1:]) else None
    return "eval" if top in HELD_OUT else "train"


def _read_python(path: Path) -> str:
    with tokenize.open(path) as file:  # honours the encoding declaration (PEP 263)
        return file.read()


# ---- files and folders


def _looks_like_a_path(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or source.endswith((*SUFFIXES, "/")) or source.count("/") > 1


def _local_texts(path: Path, split: Split) -> Iterator[str]:
    threshold = _held_out_threshold(path)
    for text in _documents(path):
        if (_digest(text) <= threshold) == (split == "eval"):
            yield text


def _held_out_threshold(path: Path) -> int:
    """The largest digest that is held out: `HELD_OUT_FRACTION` of the distinct documents, and at least one."""
    digests = sorted({_digest(text) for text in _documents(path)})
    if not digests:
        raise DataError(f"{path}: no text")
    if len(digests) < 2:
        raise DataError(
            f"{path}: one document only, nothing to hold out; documents are the files of a folder, the records of a "
            f".jsonl file, or pieces of about {_PIECE} characters, cut at blank lines, of any other file"
        )
    return digests[max(1, round(HELD_OUT_FRACTION * len(digests))) - 1]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _documents(path: Path) -> Iterator[str]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"{path}: cannot read {path.suffix or 'a file without suffix'}; known: {', '.join(SUFFIXES)}"
            )
        documents = _records(path) if path.suffix == ".jsonl" else _pieces(_read(path))
    else:
        files = [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES and file.is_file()]
        if not files:
            raise DataError(f"{path}: no file with one of the suffixes {', '.join(SUFFIXES)}")
        documents = itertools.chain.from_iterable(
            _records(file) if file.suffix == ".jsonl" else (_read(file),) for file in files
        )
    return (text for text in documents if text and not text.isspace())


def _read(path: Path) -> str:
    try:
        return _read_python(path) if path.suffix == ".py" else path.read_text(encoding="utf-8")
    except (SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be decoded as text ({error})") from error


def _pieces(text: str) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _PIECE and line.isspace():
            yield "".join(piece)
            piece, size = [], 0
    yield "".join(piece)


def _records(path: Path, field: str = "text") -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                found = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise DataError(f"{path}, line {number}: no string {field!r} in the record, found {found}")
            yield record[field]


# ---- the hub


def _hub_texts(source: str, split: Split) -> Iterator[str]:
    """Rows of a hub dataset, streamed: its own validation (or test) split is "eval" when it has one."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source}: no such file, and a hub dataset needs the `datasets` package: pip install datasets"
        ) from error
    name, config, field = _parse_hub_source(source)
    try:
        names = datasets.get_dataset_split_names(name, config)
        held = next((known for known in ("validation", "test") if known in names), None)
        rows = datasets.load_dataset(
            name, config, split="train" if split == "train" or not held else held, streaming=True
        )
    except Exception as error:  # the hub client raises a different class for each kind of failure
        raise DataError(f"{source}: no such file, and no hub dataset could be opened ({error})") from error
    for row in rows:
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise DataError(
                f"{source}: no string field {field!r} in the rows, found {sorted(row)}; say name:config:field"
            )
        if held or (_digest(text) < HELD_OUT_FRACTION * 2**64) == (split == "eval"):
            yield text


def _parse_hub_source(source: str) -> tuple[str, str | None, str]:
    parts = source.split(":")
    if len(parts) > 3 or not parts[0]:
        raise DataError(f"{source}: a hub dataset is written name, name:config or name:config:field")
    name, config, field = (*parts, "", "")[:3]
    return name, config or None, field or "text"
