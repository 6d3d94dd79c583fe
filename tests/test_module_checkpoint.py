"""Saving and loading modules that are no transformers models: bitwise, tied weights, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.checkpoint import load, save
from fla_swap.errors import CheckpointError
from fla_swap.inspection import inspect
from fla_swap.planning import plan
from fla_swap.swapping import restore_, swap_, swapped_layers

IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """A language model that nobody registered anywhere: tied embeddings, a saved buffer and one that is not."""

    def __init__(self, *, width: int = 16, layers: int = 2, tied: bool = True):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, width), nn.Linear(width, 40, bias=False)
        self.layers = nn.ModuleList(Attention(width) for _ in range(layers))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("shift", torch.zeros(1), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) * self.scale + self.shift
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def swapped(mixer: str = "gated_deltanet", *, dtype: torch.dtype = torch.float32, tied: bool = True) -> Model:
    torch.manual_seed(0)
    model = Model(tied=tied)
    with torch.no_grad():
        model.scale.fill_(1.5)
    report = inspect(model)
    assert len(report.sites) == 2
    swap_(model, plan(report, mixer=mixer, keep=[1]))
    return model.to(dtype)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS)


@pytest.mark.parametrize("mixer", ["gated_deltanet", "window", "softmax"])
def test_a_swapped_module_comes_back_bitwise(mixer, tmp_path):
    model = swapped(mixer)
    assert save(model, tmp_path / "out") == tmp_path / "out"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"plan.json", "model.safetensors"}
    loaded = load(tmp_path / "out", Model())
    assert [(fqn, layer.mixer.name, layer.original) for fqn, layer in swapped_layers(loaded)] == [
        ("layers.0", mixer, None)
    ]
    assert swapped_layers(loaded)[0][1].mixer.config == swapped_layers(model)[0][1].mixer.config
    wanted, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.head.weight is loaded.embed.weight


def test_the_dtype_on_disk_is_kept_or_changed(tmp_path):
    model = swapped(dtype=torch.bfloat16)
    save(model, tmp_path / "out")
    fresh = Model().to(torch.bfloat16)  # what is not saved (`shift`) has the dtype that it is built with
    assert torch.equal(logits(load(tmp_path / "out", fresh)), logits(model))
    assert load(tmp_path / "out", Model(), dtype=torch.float64).head.weight.dtype == torch.float64


def test_a_module_built_without_weights_is_filled(tmp_path):
    model = swapped()
    save(model, tmp_path / "out")
    with init_empty_weights():
        empty = Model()
    loaded = load(tmp_path / "out", empty)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(logits(loaded), logits(model)) and loaded.head.weight is loaded.embed.weight
    with torch.device("meta"):
        empty = Model()
    with pytest.raises(CheckpointError, match=r"buffer 'shift' is not saved.*init_empty_weights"):
        load(tmp_path / "out", empty)


def test_modules_are_saved_without_a_swap_too(tmp_path):
    torch.manual_seed(3)
    model = Model(tied=False)
    save(model, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out", Model(tied=False))), logits(model))


def test_restoring_brings_the_very_module_back():
    torch.manual_seed(0)
    model = Model()
    original, before = model.layers[0], logits(model)
    swap_(model, plan(inspect(model), mixer="gla", keep=[1]))
    assert not torch.equal(logits(model), before)
    restore_(model)
    assert model.layers[0] is original and torch.equal(logits(model), before)


def test_weights_that_were_trained_apart_do_not_fill_a_tied_module(tmp_path):
    model = swapped(tied=False)
    save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"embed\.weight and head\.weight differ there, and are one tensor"):
        load(tmp_path / "out", Model())
    tied = swapped()
    save(tied, tmp_path / "tied")
    assert torch.equal(logits(load(tmp_path / "tied", Model(tied=False))), logits(tied))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(3, 3), "saved from another module: this Linear has no attention there"),
        (lambda: Model(width=32), r"is \[.*\] there and \[.*\] in this Model"),
        (lambda: Model(layers=3), r"has no weights for \['layers\.2\.out\.bias'"),
        (lambda: Model(layers=1), r"has weights that this module lacks, \['layers\.1\."),
        (swapped, r"swapped already \(layers\.0\)"),
    ],
)
def test_another_module_is_refused_and_left_alone(model, message, tmp_path):
    save(swapped(), tmp_path / "out")
    fresh = model()
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "out", fresh)
    after = fresh.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


def test_damaged_folders_are_named(tmp_path):
    out = save(swapped(), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no module that fs.save wrote: there is no plan.json"):
        load(tmp_path, Model())
    with pytest.raises(CheckpointError, match=r"a module of your own: build it"):
        load(out)
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load(out, Model())
    data = json.loads((out / "plan.json").read_text())
    data["layers"][0]["mixer"] = "mamba9"
    (out / "plan.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="no mixer is called 'mamba9'"):
        load(out, Model())


def test_another_model_is_not_overwritten(tmp_path):
    out = save(swapped("window"), tmp_path / "out")
    model = swapped("gla")
    with pytest.raises(CheckpointError, match="holds another model"):
        save(model, out)
    save(model, out, overwrite=True)
    save(model, out)
    assert torch.equal(logits(load(out, Model())), logits(model))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
