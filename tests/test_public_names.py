"""`import fla_swap`: every public name is there, from where type checkers think it is, and imported when it is used."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fla_swap


def imports_for_type_checkers() -> dict[str, str]:
    """Name → module, from the `if TYPE_CHECKING:` block."""
    tree = ast.parse(Path(fla_swap.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {a.name: str(n.module) for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}


def test_both_lists_of_names_agree():
    sources = {name: f"fla_swap.{module}" for name, module in fla_swap._SOURCE_OF.items()}
    assert {**sources, "mixers": "fla_swap", "ops": "fla_swap"} == imports_for_type_checkers()
    assert sorted(fla_swap.__all__) == sorted(imports_for_type_checkers()) and set(fla_swap.__all__) <= set(
        dir(fla_swap)
    )


@pytest.mark.parametrize("name", fla_swap.__all__)
def test_a_public_name_is_what_its_module_defines(name):
    value = getattr(fla_swap, name)
    if name not in ("mixers", "ops"):
        assert value.__name__ == name and value.__module__.startswith("fla_swap")


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="module 'fla_swap' has no attribute 'swapp'"):
        fla_swap.swapp  # noqa: B018


def test_the_registered_model_type_is_the_one_that_is_written():
    from fla_swap import hybrid, registration

    assert registration.FlaSwapConfig.model_type == hybrid.MODEL_TYPE
