"""Capture: what is open and closed, regions put back, models left alone, failures explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from torch import Tensor, nn

from fla_swap.capture import capture
from fla_swap.errors import CaptureError
from fla_swap.model_inputs import default_inputs, inputs_of_length


def test_regions_without_gradients_are_part_of_the_graph() -> None:
    model: Any = tiny("llama")
    graph = capture(model, default_inputs(model, 13), length=13)
    assert not [n for n in graph.nodes if "wrap_with" in str(n.target)]
    cosine = next(n for n in graph.nodes if str(n.target) == "aten.cos.default")
    angles = torch.arange(13)[:, None] * model.model.rotary_emb.inv_freq
    assert not graph.is_open(cosine)
    assert torch.allclose(graph.evaluate(cosine)[0], torch.cat((angles, angles), -1).cos(), atol=1e-6)


def test_placeholders_map_to_parameters_and_values() -> None:
    model: Any = tiny("llama")
    graph = capture(model, default_inputs(model, 13), length=13)
    assert set(graph.weights.values()) >= {n for n, _ in model.named_parameters()}
    assert graph.data == {"input_ids"} and graph.values["attention_mask"].shape == (2, 13)
    name = next(p for p, n in graph.weights.items() if n == "model.norm.weight")
    assert torch.equal(graph.values[name], model.model.norm.weight)


def test_in_place_writes_are_seen_by_later_readers() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.zeros(x.shape[1])
            table[2:] = 7.0
            return x * table

    graph = capture(InPlace(), ((torch.randn(2, 5),), {}), length=5)
    product: Any = next(n for n in graph.nodes if "mul" in str(n.target))
    assert graph.evaluate(product.args[1]).tolist() == [0, 0, 7, 7, 7]


def test_half_precision_tables_are_evaluated_in_fp32() -> None:
    model = tiny("llama").to(torch.bfloat16)
    graph = capture(model, default_inputs(model, 13), length=13)
    cosine = next(n for n in graph.nodes if str(n.target) == "aten.cos.default")
    assert graph.evaluate(cosine).dtype == torch.float32


def test_the_join_is_the_last_tensor_that_all_data_passes() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sin()
            a, b = y.chunk(2, -1)
            return torch.cat((-b, a), -1)

    graph = capture(Halves(), ((torch.randn(2, 5, 4),), {}), length=5)
    joined = next(n for n in graph.nodes if "cat" in str(n.target))
    node, between = graph.join(joined)
    assert node is not None and "sin" in str(node.target) and len(between) == 4


def test_train_flags_come_back_even_when_export_fails() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = Branches().train()
    with pytest.raises(CaptureError, match=r"could not follow Branches.*test_capture.py:\d+.*within="):
        capture(model, ((torch.randn(2, 5),), {}), length=5)
    assert model.training


class Router(nn.Module):
    """Moves its own weights while it runs, which torch.export cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.classifier = self.classifier.to(torch.float32)
        return self.classifier(x).softmax(-1)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.router = nn.Linear(4, 4), Router()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.router(x)[..., :1]


def test_the_module_whose_forward_fails_is_not_looked_into_and_no_other() -> None:
    graph = capture(Routed(), ((torch.randn(2, 5, 4),), {}), length=5)
    assert graph.opaque == ("router",)
    assert [n for n in graph.nodes if "linear" in str(n.target)]


def test_kernels_of_a_package_without_a_gpu_are_named() -> None:
    class Kernels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("0 active drivers ([]). There should only be one.")

    with pytest.raises(CaptureError, match=r"own forward calls Triton kernels of an installed.*no GPU"):
        capture(Kernels(), ((torch.randn(2, 5, 4),), {}), length=5)


def test_default_inputs_are_padded_on_the_left() -> None:
    _, kwargs = default_inputs(tiny("llama"), 7, padded=3)
    assert kwargs["attention_mask"].tolist() == [[1] * 7, [0, 0, 0, 1, 1, 1, 1]]
    assert kwargs["position_ids"][1].tolist() == [0, 0, 0, 0, 1, 2, 3]
    assert kwargs["use_cache"] is False and int(kwargs["input_ids"].max()) < 128


def test_example_inputs_are_repeated_or_cut() -> None:
    example = torch.arange(6.0).reshape(1, 3, 2)
    (longer,), _ = inputs_of_length(example, 5)
    assert (
        longer.shape == (2, 5, 2) and torch.equal(longer[0, 3:], example[0, :2]) and torch.equal(longer[0], longer[1])
    )
    _, named = inputs_of_length({"x": example, "flag": True}, 2)
    assert torch.equal(named["x"][1], example[0, :2]) and named["flag"] is True
    with pytest.raises(CaptureError, match="holds no tensor"):
        inputs_of_length({"flag": True}, 2)
