"""The families table: what a run has found is on disk at once, and a run that was interrupted goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fla_swap.bench.families import Result, Table, main
from fla_swap.errors import ConfigError

WANTED = [("llama", "decoder", "sdpa"), ("llama", "decoder", "eager"), ("t5", "decoder", "sdpa")]


def result(number: int, **own: Any) -> Result:
    family, group, implementation = WANTED[number]
    common: dict[str, Any] = {"family": family, "group": group, "implementation": implementation, "stage": "inspected"}
    return Result(**{**common, **own})


def start(folder: Path, resume: bool = False) -> Table:
    return Table.start(folder / "families.md", WANTED, "the command", resume=resume)


def test_every_result_is_in_the_table_at_once(tmp_path: Path) -> None:
    table = start(tmp_path)
    table.add(result(1, facts=("4 × causal",), proved=4))
    text = table.path.read_text()
    assert "- command: `the command`" in text and "CPU cores" in text and ", transformers 5." in text
    assert "not finished: 2 of 3 runs are missing" in text and "| llama | eager: 4 proved (4 × causal) |" in text
    table.add(result(0, facts=("4 × causal",), proved=4))
    table.add(result(2, refusals=("4 at mask: a learned bias",)))
    text = table.path.read_text()
    assert "not finished" not in text and "| llama | 4 proved (4 × causal) |" in text
    assert "2 types: 1 every attention proved, 1 refused with a reason" in text


def test_a_run_goes_on_from_its_raw_results(tmp_path: Path) -> None:
    first = start(tmp_path)
    first.add(result(1, facts=("4 × causal",), proved=4, notes=("a note",)))
    with first.raw.open("a") as file:
        file.write('{"family": "t5", "gro')  # cut in the middle of a line
    second = start(tmp_path, resume=True)
    assert second.left == [WANTED[0], WANTED[2]] and second.results == first.results
    second.add(result(0))
    assert start(tmp_path, resume=True).left == [WANTED[2]]


def test_results_are_neither_overwritten_nor_mixed_with_those_of_other_versions(tmp_path: Path) -> None:
    table = start(tmp_path)
    table.add(result(0))
    with pytest.raises(ConfigError, match=r"holds 1 results: go on with --resume"):
        start(tmp_path)
    with pytest.raises(SystemExit):
        main(["--only", "llama", "--out", str(table.path)])
    header, *rows = table.raw.read_text().splitlines()
    other = {**json.loads(header), "versions": "python 3.9, torch 1.0"}
    table.raw.write_text("\n".join([json.dumps(other), *rows]) + "\n")
    with pytest.raises(ConfigError, match="remove it to start anew"):
        start(tmp_path, resume=True)


def test_a_type_counts_by_the_worse_of_its_implementations(tmp_path: Path) -> None:
    table = start(tmp_path)
    table.add(result(0, facts=("4 × causal",), proved=4))
    table.add(result(1, facts=("3 × causal",), proved=3, refusals=("1 at q: why",)))
    assert "1 types: 1 proved in part" in table.path.read_text()
