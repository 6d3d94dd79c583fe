"""Sources of text, what each part holds, and how documents become blocks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fla_swap.distillation.data import (
    HELD_OUT,
    TokenBlocks,
    load_blocks,
    load_texts,
    token_blocks,
    token_stream,
)
from fla_swap.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


class Letters:
    """One token a letter: a is 1, b is 2, …; 0 ends a document."""

    eos_token_id: int | None = 0

    def __call__(self, texts, *, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) - ord("a") + 1 for letter in text] for text in texts]}


class TestPacking:
    def test_documents_are_joined_by_the_end_of_text_token_and_cut_into_blocks(self):
        blocks = token_blocks(["abc", "d", "ef"], Letters(), 4)
        assert blocks.dtype == torch.int64
        assert blocks.tolist() == [[1, 2, 3, 0], [4, 0, 5, 6]]  # the last 0 fills no block

    def test_reading_stops_at_the_token_limit(self):
        def endless():
            while True:
                yield "abc"

        assert token_stream(endless(), Letters(), limit_tokens=6).tolist() == [1, 2, 3, 0, 1, 2]

    def test_progress_counts_documents_and_tokens(self):
        seen = []
        token_stream(["abc"] * 70, Letters(), progress=lambda documents, tokens: seen.append((documents, tokens)))
        assert seen == [(64, 256), (70, 280)]

    def test_too_little_text_says_how_much_there_was(self):
        with pytest.raises(DataError, match="found 7 tokens, fewer than one block of 8"):
            token_blocks(["abc", "de"], Letters(), 8)

    def test_no_text_and_no_end_of_text_token_are_errors(self):
        with pytest.raises(DataError, match="no text"):
            token_stream([], Letters())
        without = Letters()
        without.eos_token_id = None
        with pytest.raises(DataError, match="eos_token"):
            token_stream(["abc"], without)

    def test_the_dataset_gives_the_trainer_its_rows(self):
        rows = TokenBlocks(torch.arange(6).view(2, 3))
        assert len(rows) == 2
        assert {key: value.tolist() for key, value in rows[1].items()} == {"input_ids": [3, 4, 5]}
        with pytest.raises(DataError, match="int64"):
            TokenBlocks(torch.zeros(2, 3))


class TestStandardLibrary:
    @pytest.fixture
    def library(self, tmp_path):
        files = (
            "abc.py", "json/decoder.py", "statistics.py", "ast.py", "test/test_json/test_dump.py",
            "test/test_ast.py", "test/test_httplib.py", "encodings/cp437.py", "site-packages/numpy/core.py",
        )  # fmt: skip
        for name in files:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"# {name}\n")
        (tmp_path / "test" / "bad_coding.py").write_bytes(b"# coding: latin-uhh\n\xff")
        return f"stdlib:{tmp_path}"

    def test_whole_packages_are_held_out_and_their_tests_belong_to_neither_part(self, library):
        assert list(load_texts(library, split="eval")) == ["# json/decoder.py\n", "# statistics.py\n"]
        assert list(load_texts(library, split="train")) == ["# abc.py\n", "# ast.py\n", "# test/test_ast.py\n"]
        assert list(load_texts(library, split="train", tests=False)) == ["# abc.py\n", "# ast.py\n"]

    def test_the_running_interpreter_has_about_a_megabyte_to_evaluate_on(self):
        held = list(load_texts("stdlib", split="eval"))
        assert 0.8e6 < sum(map(len, held)) < 2e6
        train = set(load_texts("stdlib", split="train", tests=False))
        assert not train & {text for text in held if len(text) > 100}
        assert {"json", "asyncio", "argparse"} < set(HELD_OUT)

    def test_a_folder_that_is_no_library(self, tmp_path):
        with pytest.raises(DataError, match=r"abc\.py is missing"):
            load_texts(f"stdlib:{tmp_path}", split="train")


class TestFiles:
    def test_a_folder_is_split_by_file_and_nothing_is_lost(self, tmp_path):
        for i in range(40):
            (tmp_path / f"{i:02}.txt").write_text(f"document {i}")
        (tmp_path / "notes.bin").write_bytes(b"\xff")
        train, held = (list(load_texts(str(tmp_path), split=split)) for split in ("train", "eval"))
        assert len(held) == 2 and len(train) == 38
        assert sorted(train + held) == sorted(f"document {i}" for i in range(40))
        assert held == list(load_texts(str(tmp_path), split="eval"))

    def test_equal_documents_are_on_the_same_side(self, tmp_path):
        for i in range(40):
            (tmp_path / f"{i:02}.txt").write_text(f"document {i % 4}")
        train, held = (set(load_texts(str(tmp_path), split=split)) for split in ("train", "eval"))
        assert len(held) == 1 and len(train) == 3 and not train & held

    def test_one_long_file_is_cut_at_blank_lines(self, tmp_path):
        path = tmp_path / "book.md"
        text = "".join(f"{'x' * 900} {i}\n\n" for i in range(100))
        path.write_text(text)
        train, held = (list(load_texts(str(path), split=split)) for split in ("train", "eval"))
        assert len(held) == 1 and all(piece.endswith("\n\n") for piece in train + held)
        assert sum(map(len, train + held)) == len(text)

    def test_records_of_a_jsonl_file(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"row {i}", "id": i}) for i in range(20)))
        train, held = (list(load_texts(str(path), split=split)) for split in ("train", "eval"))
        assert sorted(train + held) == sorted(f"row {i}" for i in range(20)) and len(held) == 1

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', r"line 2: no string 'text' in the record, found \['body'\]"),
            ("a.jsonl", b"{", "line 1: not JSON"),
            ("a.txt", b"", "no text"),
            ("a.txt", b" \n\n", "no text"),
            ("a.txt", b"one line", "one document only"),
            ("a.txt", b"\xff\xfe\x00", "cannot be decoded"),
            ("a.exe", b"x", "cannot read .exe"),
        ],
    )
    def test_bad_files(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_texts(str(tmp_path / name), split="train")

    def test_missing_and_empty_places(self, tmp_path):
        with pytest.raises(DataError, match="no such file or folder"):
            load_texts("./missing/data.txt", split="train")
        with pytest.raises(DataError, match="no file with one of the suffixes"):
            load_texts(str(tmp_path), split="train")
        with pytest.raises(DataError, match="split is 'valid'"):
            load_texts("stdlib", split="valid")  # type: ignore[arg-type]

    def test_load_blocks_names_the_source_in_its_errors(self, tmp_path):
        for name in "abc":
            (tmp_path / f"{name}.txt").write_text(name)
        rows = load_blocks(str(tmp_path), Letters(), 2, split="train")
        assert len(rows) == 2 and rows[0]["input_ids"][1] == 0
        with pytest.raises(DataError, match=r"train\): found 4 tokens"):
            load_blocks(str(tmp_path), Letters(), 8, split="train")


class TestHub:
    def test_the_config_and_field_follow_the_name(self, monkeypatch):
        calls = []
        fake = type(sys)("datasets")
        fake.get_dataset_split_names = lambda name, config: ["train", "validation"]
        rows = {"train": [{"body": "t"}], "validation": [{"body": "v"}]}

        def load_dataset(name, config, *, split, streaming):
            calls.append((name, config, split, streaming))
            return rows[split]

        fake.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", fake)
        assert list(load_texts("owner/set:small:body", split="eval")) == ["v"]
        assert list(load_texts("owner/set::body", split="train")) == ["t"]
        assert calls == [("owner/set", "small", "validation", True), ("owner/set", None, "train", True)]
        with pytest.raises(DataError, match=r"no string field 'text' in the rows, found \['body'\]"):
            load_texts("owner/set", split="train")


def test_the_teacher_script_trains_saves_and_reloads(tmp_path):
    spec = importlib.util.spec_from_file_location("train_teacher", ROOT / "examples" / "train_teacher.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["train_teacher"] = script
    spec.loader.exec_module(script)
    out = tmp_path / "teacher"
    arguments = ["--preset", "tiny", "--device", "cpu", "--steps", "40", "--limit-bytes", "60000", "--out", str(out)]
    facts = script.main(arguments)
    losses = [row["held_out"] for row in facts["history"]]
    assert len(losses) == 2 and losses[1] < losses[0] < 5.95  # ln 384 = 5.95 is knowing nothing
    assert facts["loss"] == pytest.approx(losses[1], abs=2e-3)  # the saved bf16 weights lose next to nothing

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and type(model).__name__ == "LlamaForCausalLM"
    text = "def f(x):\n    é = '日本'  \t\n\n        return x\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 1
    assert f"{facts['loss']:.4f} nats" in (out / "README.md").read_text()
    with pytest.raises(SystemExit):  # a folder with a model in it is not written over
        script.main(arguments)
