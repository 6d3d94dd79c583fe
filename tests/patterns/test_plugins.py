"""Recognisers of users: `patterns=`, entry points of installed packages, and what is said when one is broken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from models import tiny

from fla_swap.errors import RecogniserError
from fla_swap.inspection import inspect
from fla_swap.patterns.base import ABSENT, Found
from fla_swap.patterns.catalogue import catalogue
from fla_swap.patterns.core import FusedCore
from fla_swap.patterns.graph import CapturedGraph
from fla_swap.patterns.plugins import Checked, installed_recognisers


@dataclass(frozen=True)
class Silent:
    """Finds nothing."""

    name: str = "silent"
    slot: str = "path"

    def match(self, node: Any, graph: CapturedGraph) -> Any:
        return ABSENT


@dataclass(frozen=True)
class Answers(Silent):
    """Answers the same at every node."""

    answer: Any = None

    def match(self, node: Any, graph: CapturedGraph) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


PLUGIN = """
from dataclasses import dataclass
from fla_swap.patterns.base import ABSENT

@dataclass
class Nothing:
    name: str
    slot: str = "path"

    def match(self, node, graph):
        return ABSENT

ONE, SEVERAL, NONE = Nothing("one"), (Nothing("two"), Nothing("three", "scores")), Nothing
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Installs `their_package` with these entry points, as pip would leave it."""

    def install(**entries: str) -> None:
        (tmp_path / "their_module.py").write_text(PLUGIN, encoding="utf-8")
        info = tmp_path / "their_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n", encoding="utf-8")
        lines = [f"{name} = {value}\n" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("[fla_swap.recognisers]\n" + "".join(lines), encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    sys.modules.pop("their_module", None)


def names(recognisers: Any) -> list[str]:
    return [r.name for r in recognisers]


def test_ones_own_come_first_in_their_slot() -> None:
    found = catalogue([Silent("mine")])
    assert names(found.path)[0] == "mine" and "mine" not in names((*found.cores, *found.scores))
    assert names(catalogue([FusedCore(name="a"), FusedCore(name="b")]).cores)[:2] == ["a", "b"]


def test_installed_packages_are_asked_unless_patterns_are_given(package: Any) -> None:
    package(first="their_module:ONE", second="their_module:SEVERAL")
    assert names(installed_recognisers()) == ["one", "two", "three"]
    assert names(catalogue().path)[:2] == ["one", "two"] and names(catalogue().scores)[0] == "three"
    assert "one" not in names(catalogue(()).path)
    assert names(catalogue((Silent("mine"), *installed_recognisers())).path)[:3] == ["mine", "one", "two"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:ONE", "could not be loaded: ModuleNotFoundError.*patterns=\\(\\)"),
        ("their_module:MISSING", "could not be loaded: AttributeError.*uninstall"),
        ("their_module:NONE", "is no recogniser: an instance"),
    ],
)
def test_a_broken_package_is_named(package: Any, value: str, message: str) -> None:
    package(broken=value)
    with pytest.raises(RecogniserError, match=f"package 'their-package', entry point broken = '{value}': .*{message}"):
        inspect(tiny("llama"))
    assert len(inspect(tiny("llama"), patterns=()).sites) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Silent, "an instance with `name`"),
        ("silent", "is no recogniser"),
        (Silent(slot="nowhere"), "'silent' has slot 'nowhere'; the slots are"),
    ],
)
def test_what_is_no_recogniser(given: Any, message: str) -> None:
    with pytest.raises(RecogniserError, match=message):
        catalogue([given])


def test_names_are_unique_in_a_slot() -> None:
    with pytest.raises(RecogniserError, match="same name"):
        catalogue([Silent(), Silent()])
    with pytest.raises(RecogniserError, match="same name"):
        catalogue([Silent("rope")])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "answered None, expected Found, Absent or Refused"),
        (
            Found(facts={"sclae": 2.0}),
            "states \\['sclae'\\], of which the grammar knows nothing; the facts of",
        ),
        (KeyError("val"), "raised KeyError: 'val'"),
    ],
)
def test_a_recogniser_that_fails_says_where(answer: Any, message: str) -> None:
    with pytest.raises(RecogniserError, match=f"'silent' \\(patterns=\\) at .*modeling_llama.py:\\d+.*{message}"):
        inspect(tiny("llama"), patterns=[Answers(answer=answer)])


@pytest.mark.parametrize(
    ("family", "implementation"), [("gemma2", "eager"), ("qwen3", "sdpa"), ("olmo", "eager"), ("bloom", "eager")]
)
def test_the_built_in_recognisers_keep_to_the_same_rules(
    family: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fla_swap.patterns import catalogue as module

    for slot in ("SCORES", "PATH"):
        wrapped = tuple(Checked(inner=r, origin="built in") for r in getattr(module, slot))
        monkeypatch.setattr(module, slot, wrapped)
    assert len(inspect(tiny(family, implementation)).sites) == 2
