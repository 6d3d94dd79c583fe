"""Which layers a plan swaps, what it refuses, and that it survives a file."""

from __future__ import annotations

import dataclasses
import json

import pytest
from rich.console import Console
from sites import ToyConfig, report_of, tiny, toy_registered

from fla_swap.errors import MixerError, PlanError
from fla_swap.mixers import SoftmaxConfig, WindowConfig
from fla_swap.planning import (
    Rule,
    load_plan,
    plan,
    plan_from_json,
    plan_table,
    plan_to_json,
    save_plan,
    uniform_layers,
)
from fla_swap.types import Mask


@pytest.fixture(scope="module", autouse=True)
def toy():
    with toy_registered():
        yield


@pytest.fixture(scope="module")
def report():
    return report_of(tiny("llama", layers=8))


@pytest.fixture(scope="module")
def local_report(report):
    """As in Gemma: every other layer sees a window only."""
    window = Mask(kind="window", window=4)
    sites = tuple(dataclasses.replace(s, mask=window) if s.layer % 2 == 0 else s for s in report.sites)
    return dataclasses.replace(report, sites=sites)


def swapped(result) -> list[int]:
    return [layer.site.layer for layer in result.layers]


def test_uniform_layers_are_evenly_spaced_and_keep_both_ends():
    assert uniform_layers(8, 2) == (0, 7)
    assert uniform_layers(12, 3) == (0, 6, 11)
    assert uniform_layers(24, 6) == (0, 5, 9, 14, 18, 23)
    assert uniform_layers(5, 1) == (2,)
    assert uniform_layers(3, 0) == ()
    assert uniform_layers(4, 4) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("keep", "layers"),
    [
        ("1/4", [1, 2, 3, 4, 5, 6]),
        (0.25, [1, 2, 3, 4, 5, 6]),
        ("25%", [1, 2, 3, 4, 5, 6]),
        (0, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("0", [0, 1, 2, 3, 4, 5, 6, 7]),
        ([3, 5], [0, 1, 2, 4, 6, 7]),
        ("3, 5", [0, 1, 2, 4, 6, 7]),
        ("1/100", [0, 1, 2, 3, 5, 6, 7]),
        (0.99, [3]),
    ],
)
def test_keep_decides_which_layers_stay(report, keep, layers):
    result = plan(report, mixer="toy", keep=keep)
    assert swapped(result) == layers
    assert result.kept == tuple(s.fqn for s in report.sites if s.layer not in layers)


def test_windowed_layers_stay_and_the_fraction_does_not_count_them(local_report):
    assert swapped(plan(local_report, mixer="toy", keep="1/2")) == [3, 5]
    assert swapped(plan(local_report, mixer="toy", keep=0)) == [1, 3, 5, 7]
    assert swapped(plan(local_report, mixer="toy", keep=0, local=True)) == list(range(8))


def test_a_report_of_windowed_layers_only_says_how_to_swap_them():
    with pytest.raises(PlanError, match="local=True"):
        plan(report_of(tiny("mistral")), mixer="toy", keep=0)


def test_rules_name_exceptions_and_the_first_one_wins(report):
    rules = [Rule("model.layers.3.*", "softmax"), Rule("model.layers.[0-3].*", ToyConfig(decay=0.5))]
    result = plan(report, rules=rules)
    assert [(layer.site.layer, layer.mixer) for layer in result.layers] == [
        (0, "toy"),
        (1, "toy"),
        (2, "toy"),
        (3, "softmax"),
    ]
    assert result.layers[0].options["decay"] == 0.5
    both = plan(report, mixer="toy", keep="1/2", rules=[Rule("model.layers.0.*", "softmax")])
    assert both.layers[0].mixer == "softmax"
    assert len(both.kept) == 4


def test_a_mixer_is_a_name_with_options_or_its_config(report):
    named = plan(report, mixer="toy", options={"decay": 0.5}, keep=0)
    assert named == plan(report, mixer=ToyConfig(decay=0.5), keep=0)
    assert named.layers[0].options["hidden_size"] == 32
    assert named.layers[0].options["num_kv_heads"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs `mixer` or `rules`"),
        ({"mixer": "tox"}, "no mixer is called 'tox'"),
        ({"mixer": "toy", "options": {"deacy": 0.5}}, "no option \\['deacy'\\].*'decay'"),
        ({"mixer": ToyConfig(), "options": {"decay": 0.5}}, "inside ToyConfig"),
        ({"mixer": "toy", "keep": [2, 11]}, "layers \\[11\\], which do not exist.*\\[0, 1, 2, 3, 4, 5, 6, 7\\]"),
        ({"mixer": "toy", "keep": list(range(8))}, "swaps no layer"),
        ({"mixer": "toy", "keep": 1}, "less than 1"),
        ({"mixer": "toy", "keep": "most"}, "neither a fraction"),
        ({"mixer": "toy", "keep": "1,x"}, "'x' is no layer number"),
        ({"rules": [Rule("transformer.h.*", "toy")]}, "'transformer.h.\\*' matches no attention site.*model.layers.0"),
        ({"mixer": "window", "options": {"window": -4}}, r"layers\.\d\.self_attn cannot .* at least 1, got -4"),
        ({"rules": [Rule("*", SoftmaxConfig())], "options": {"decay": 1}}, "options"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(report, arguments, message):
    with pytest.raises(PlanError, match=message):
        plan(report, **arguments)


def test_a_window_without_a_token_is_refused_where_it_is_written():
    with pytest.raises(MixerError, match="at least 1, got 0"):
        WindowConfig(window=0)


def test_a_mask_that_softmax_would_treat_as_causal_is_refused(report):
    odd = dataclasses.replace(report, sites=(dataclasses.replace(report.sites[0], mask=Mask(kind="prefix")),))
    with pytest.raises(PlanError, match=r"self_attn cannot be swapped for 'softmax'.*'prefix'"):
        plan(odd, mixer="softmax", keep=0)


def test_a_mixer_that_cannot_take_a_site_fails_at_plan_time_and_names_it(report):
    odd = dataclasses.replace(report, sites=(dataclasses.replace(report.sites[0], mask=Mask(kind="bidirectional")),))
    with pytest.raises(PlanError, match=r"model\.layers\.0\.self_attn cannot be swapped for 'toy'.*bidirectional"):
        plan(odd, mixer="toy", keep=0)


def test_cross_attention_stays_and_is_refused_by_name(report):
    crossing = dataclasses.replace(report.sites[3], kind="cross", mask=Mask(kind="bidirectional"), memory_size=32)
    mixed = dataclasses.replace(report, sites=(*report.sites[:3], crossing, *report.sites[4:]))
    result = plan(mixed, mixer="toy", keep=0)
    assert swapped(result) == [0, 1, 2, 4, 5, 6, 7] and result.kept == (crossing.fqn,)
    assert swapped(plan(mixed, rules=[Rule("model.layers.[23].*", "toy")])) == [2]
    with pytest.raises(PlanError, match=r"'model.layers.3.*' matches only cross-attention .* another sequence"):
        plan(mixed, rules=[Rule("model.layers.3.*", "toy")])
    with pytest.raises(PlanError, match="all 1 attention layers are cross-attention"):
        plan(dataclasses.replace(report, sites=(crossing,)), mixer="toy", keep=0)


def test_a_report_without_sites_cannot_be_planned(report):
    with pytest.raises(PlanError, match="no attention site"):
        plan(dataclasses.replace(report, sites=()), mixer="toy")


def test_a_plan_survives_json_and_a_file(report, tmp_path):
    result = plan(report, mixer="softmax", keep="1/4")
    assert plan_from_json(plan_to_json(result)) == result
    save_plan(result, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == result


def test_wrong_plan_files_are_named_with_what_is_wrong(report, tmp_path):
    good = json.loads(plan_to_json(plan(report, mixer="toy")))
    wrong = {
        "text.json": ("not json", "not JSON"),
        "other.json": (json.dumps({"layers": []}), "no fla_swap plan"),
        "new.json": (json.dumps({**good, "version": 2}), "version 2"),
        "extra.json": (json.dumps({**good, "colour": 1}), "damaged.*colour"),
        "mixer.json": (json.dumps({**good, "layers": [{**good["layers"][0], "mixer": "x"}]}), "no mixer is called 'x'"),
    }
    for name, (text, message) in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(PlanError, match=f"(?s){name}.*{message}"):
            load_plan(tmp_path / name)
    with pytest.raises(PlanError, match="cannot read"):
        load_plan(tmp_path / "absent.json")


def test_the_table_shows_every_layer(report):
    console = Console(width=120, record=True)
    console.print(plan_table(plan(report, mixer="toy", keep=[2])))
    text = console.export_text()
    assert "7 layers swapped, 1 kept" in text
    assert "model.layers.2.self_attn" in text and "toy" in text and "4/2 × 8" in text
