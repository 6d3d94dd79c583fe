"""What a report looks like: the table, the page (parsed, not looked at), and the explanation of one module."""

from __future__ import annotations

import dataclasses
import io
import json
import xml.etree.ElementTree as ElementTree
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from models import tiny
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import fla_swap as fs
from fla_swap.reporting.drawing import KINDS
from fla_swap.reporting.facts import facts_of
from fla_swap.reporting.page import in_model_order
from fla_swap.reporting.source import source_lines
from fla_swap.types import (
    ArgPath,
    AttentionReport,
    AttentionSite,
    CallContract,
    Gate,
    LayerPlan,
    LowRank,
    Mask,
    NearMiss,
    Norm,
    Projection,
    Rope,
    SwapPlan,
    Temperature,
    WeightRef,
)


class Attention(nn.Module):
    """Two heads of 8; `twist` makes it one that is not understood."""

    def __init__(self, twist: str):
        super().__init__()
        self.twist = twist
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.twist == "sorted <q>":
            q = q.sort(-1).values  # the line that the report must show
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.o(y).softmax(-1) if self.twist == "gated" else self.o(y)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        twists = ("", "sorted <q>", "")
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": Attention(t)}) for t in twists)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["attn"](x).softmax(-1)
        return x


@cache
def mixed() -> AttentionReport:
    """Two sites, one near miss between them, and three softmaxes that are no attention."""
    return fs.inspect(Model(), torch.randn(1, 7, 16))


@cache
def gemma() -> AttentionReport:
    return fs.inspect(tiny("gemma2", "sdpa"))


def everything() -> AttentionSite:
    """A site with all that a site can have."""
    own = Projection(
        weight=WeightRef(name="m.q.weight", rows=((0, 8), (24, 32))),
        bias=WeightRef(name="m.q.bias"),
        adapters=(LowRank(down=WeightRef(name="m.a"), up=WeightRef(name="m.b"), scale=0.5),),
    )
    norm = Norm(kind="rms", eps=1e-6, weight=WeightRef(name="m.n"), offset=1.0)
    return AttentionSite(
        fqn="m",
        layer=3,
        q=own,
        k=Projection(weight=WeightRef(name="m.kv", rows=((0, 16),), transposed=True)),
        v=Projection(weight=WeightRef(name="m.kv", rows=((16, 48),), transposed=True)),
        o=None,
        hidden_size=48,
        heads=4,
        kv_heads=2,
        head_dim=8,
        v_head_dim=16,
        scale=0.5,
        mask=Mask(kind="chunked", window=32),
        call=CallContract(
            hidden=ArgPath(position=0),
            memory=ArgPath(keyword="states", item=1),
            residual=ArgPath(keyword="r"),
            outputs=2,
            cache_index=3,
        ),
        rope=Rope(inv_freq=(1.0, 0.1), style="interleaved", attention_scaling=1.25, limit=64),
        q_norm=norm,
        k_norm=dataclasses.replace(norm, across_heads=True),
        norm_after_rope=True,
        softcap=30.0,
        sinks=WeightRef(name="m.sinks"),
        alibi=(0.5, 0.25),
        dropout=0.1,
        kind="cross",
        place="graph",
        anchor="softmax_7",
        memory_size=24,
        clip=8.0,
        temperature=Temperature(scale=0.1, length=8192, offset=1),
        v_norm=norm,
        o_norm=norm,
        gate=Gate(projection=own, per_head=True),
        source="nowhere.py:1",
    )


# The table


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_print_shows_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    print(mixed())
    text = capsys.readouterr().out
    rows = {line.split("│")[2].strip(): line for line in text.splitlines() if line.count("│") > 3}
    assert "layers.0.attn" in rows and "bias qkvo" in rows["layers.2.attn"] and "self │ module" in rows["layers.2.attn"]
    assert "Model: 2 attention sites" in text and "1 attention core that is not understood" in text
    assert "layers.1.attn │ q          │ sort.default between the projection and the core" in text
    assert text.count("belongs to no site: layers") == 0 and text.count("belongs to no site: ") == 3


def test_rich_prints_the_same_table() -> None:
    console = Console(file=io.StringIO(), width=160)
    rich_text, plain = io.StringIO(), str(gemma())
    rich.print(gemma(), file=rich_text)
    console.print(fs.report_table(gemma()))
    assert isinstance(console.file, io.StringIO)
    for text in (rich_text.getvalue(), console.file.getvalue(), plain):
        assert "Gemma2ForCausalLM: 2 attention sites" in text and "eager is the meaning" in text
    assert "window 8" in console.file.getvalue() and "softcap" not in plain


def test_a_table_has_every_extra_of_a_site() -> None:
    text = str(AttentionReport(model="M", sites=(everything(),)))
    words = (
        *("cross", "graph", "4/2", "8/16", "chunked 32", "interleaved 4/8 ×1.25", "bias q", "adapters q", "clip 8"),
        *("q/k rms norm", "v rms norm", "temperature", "softcap 30", "alibi", "sinks", "dropout 0.1"),
        *("output rms norm", "sigmoid gate", "no output projection", "scale 0.5", "not proved"),
    )
    flat = " ".join(
        " ".join(line.split("│")[n].strip() for line in text.splitlines() if "│" in line) for n in range(1, 11)
    )
    assert not [w for w in words if w not in flat]


# The facts in words


def test_every_field_of_a_site_is_told() -> None:
    facts = {f.name: f for f in facts_of(everything())}
    assert facts["q"].text == "m.q.weight rows 0–7, 24–31, bias m.q.bias, plus 0.5 × m.b @ m.a"
    assert facts["v"].text == "m.kv rows 16–47 (stored [in, out]), no bias"
    assert facts["k norm"].text == "rms norm over all heads at once, eps 1e-06, weight m.n + 1"
    assert facts["temperature"].text == "queries times 1 + 0.1 · log(1 + ⌊(position + 1) / 8192⌋)"
    assert facts["scale"].text == "0.5 (the usual is 0.353553)"
    assert facts["mask"].text == "chunked: a token sees what is before it in its chunk of 32"
    assert facts["call"].text == "hidden argument 0, memory states[1], residual r; returns item 0 of 2; cache layer 3"
    assert facts["rope"].text.endswith(
        "frequencies 1 … 0.1, tables times 1.25, before the norm, for inputs of up to 64 tokens"
    )
    assert all(f.text and f.origin for f in facts.values())


def leaves(value: Any) -> list[tuple[str, Any]]:
    """(path, copy with the leaf at that path changed) for every leaf of a site."""
    found: list[tuple[str, Any]] = []
    for item in dataclasses.fields(value):
        old = getattr(value, item.name)
        if dataclasses.is_dataclass(old):
            changes = [(f".{path}", new) for path, new in leaves(old)]
        elif isinstance(old, tuple) and old and dataclasses.is_dataclass(old[0]):
            changes = [(f".0.{path}", (new, *old[1:])) for path, new in leaves(old[0])]
        elif isinstance(old, tuple) and old:
            changes = [("", old[1:])]
        elif isinstance(old, bool):
            changes = [("", not old)]
        elif isinstance(old, int | float | str):
            changes = [("", old + "x" if isinstance(old, str) else old + 1)]
        else:
            changes = []
        found += [(item.name + path, dataclasses.replace(value, **{item.name: new})) for path, new in changes]
    return found


def test_no_fact_is_left_untold() -> None:
    """Whatever is changed in a site, its explanation changes."""
    told = AttentionReport(model="M", sites=(everything(),)).explain("")
    untold = [p for p, site in leaves(everything()) if AttentionReport(model="M", sites=(site,)).explain("") == told]
    assert untold == []


def test_the_explanation_of_a_layer() -> None:
    text = gemma().explain("model.layers.0")
    assert "model.layers.0.self_attn: attention layer 0, proved" in text and "layers.1" not in text
    assert "window: a token sees itself and the 7 tokens before it  [the mask was evaluated at two lengths]" in text
    assert "4 query heads on 2 key/value heads, 16 channels each, hidden size 64" in text
    assert "0.0625 (the usual is 0.25)" in text and "modeling_gemma2.py:" in text
    assert "note: model.layers.0.self_attn: the model runs 'sdpa', whose output differs from its eager code" in text
    assert gemma().explain("model.layers.0.self_attn.q_proj") == text


def test_the_explanation_of_a_near_miss() -> None:
    text = mixed().explain("layers.1")
    assert "held     core\n" in text and "failed   q: sort.default between the projection and the core" in text
    assert "q = q.sort(-1).values  # the line that the report must show" in text
    assert "write a recogniser for slot 'path'" in text and "layers.0" not in text
    everything_told = mixed().explain("")
    assert everything_told.count("attention layer") == 2 and everything_told.count("no attention") == 3


@pytest.mark.parametrize(
    ("name", "near"), [("layers.11", "'layers.1'"), ("layer.0.attn", "'layers.0.attn'"), ("x", "'layers.0.attn'")]
)
def test_an_unknown_name(name: str, near: str) -> None:
    with pytest.raises(KeyError, match="the report on Model has no attention in") as caught:
        mixed().explain(name)
    assert f"{name!r}; names near it: [" in caught.value.args[0] and near in caught.value.args[0]


# The page


class Page(HTMLParser):
    """Parses strictly: every tag is closed, in order; nothing is fetched from anywhere."""

    VOID = ("meta", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.text, self.marked, self.ids, self.links = [], [], [], []
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert not {"src", "srcset", "data", "action", "onclick"} & set(given) and tag not in ("script", "link", "img")
        if "href" in given:
            self.links.append(given["href"])
        if "id" in given:
            self.ids.append(given["id"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] == "mark":
            self.marked.append(data)
        if self.open[-2:] == ["rect", "title"]:
            self.titles.append(data)


def drawing(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = fs.report_html(mixed())
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert len(set(page.ids)) == len(page.ids) == 3
    assert [link.removeprefix("#") for link in page.links] == [page.ids[1], page.ids[0], page.ids[2]]
    shown = " ".join(page.text)
    assert "2 attention sites, 2 proved, 1 not understood" in shown and "Softmaxes that belong to no attention" in shown


def test_the_page_draws_the_layers_in_model_order() -> None:
    text = fs.report_html(mixed())
    colours = [rect.get("fill") for rect in drawing(text).iter("{http://www.w3.org/2000/svg}rect")]
    assert colours == [KINDS["causal"], KINDS["not understood"], KINDS["causal"]]
    first, second, _ = Page(text).titles
    assert first.startswith("layers.0.attn: 2 heads, causal, rope –, bias qkvo; proof ")
    assert second.startswith("layers.1.attn: not understood, stopped at q: sort.default between")
    windows = drawing(fs.report_html(gemma())).iter("{http://www.w3.org/2000/svg}rect")
    assert [r.get("fill") for r in windows] == [KINDS["window"], KINDS["causal"]]


def test_the_page_shows_facts_near_misses_and_code() -> None:
    page = Page(fs.report_html(mixed()))
    shown = " ".join(page.text)
    assert "core ✓" in shown and "q ✗" in shown and "write a recogniser for slot 'path'" in shown
    (line, *_), code = page.marked, shown
    assert "q = q.sort(-1).values  # the line that the report must show" in line
    assert 'if self.twist == "sorted <q>":' in code and "layers.0.attn.q.weight, bias layers.0.attn.q.bias" in shown


def test_the_page_of_a_site_with_everything_and_of_nothing() -> None:
    site = dataclasses.replace(everything(), fqn="m<1>")
    shown = " ".join(Page(fs.report_html(AttentionReport(model="A & B", sites=(site,), notes=("n < 1",)))).text)
    assert "A & B" in shown and "m<1>" in shown and "n < 1" in shown and "nowhere.py:1" in shown
    assert [f.text for f in facts_of(site) if f.text not in shown] == []
    assert "No attention was found." in " ".join(Page(fs.report_html(AttentionReport(model="M", sites=()))).text)


def test_a_plan_is_drawn_too() -> None:
    first, second = gemma().sites
    plan = SwapPlan(layers=(LayerPlan(site=second, mixer="gla"),), kept=(first.fqn,))
    titles = Page(fs.report_html(gemma(), plan)).titles
    assert titles[0].endswith("; kept as it is") and titles[1].endswith("; swapped for gla")


def test_near_misses_stand_where_their_names_would() -> None:
    sites = tuple(dataclasses.replace(everything(), fqn=f"layers.{n}.attn", layer=n) for n in (1, 2, 10))
    misses = tuple(NearMiss(fqn=n, slot="q", reason="") for n in ("layers.9.attn", "head", "layers.0.attn", "tail"))
    order = [i.fqn for i in in_model_order(AttentionReport(model="M", sites=sites, near_misses=misses))]
    names = ["head", "layers.0.attn", "layers.1.attn", "layers.2.attn", "layers.9.attn", "layers.10.attn", "tail"]
    assert order == names


def test_code_around_a_line(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("one\ntwo\nthree\nfour\n", encoding="utf-8")
    code = source_lines(f"{file}:2", around=1)
    assert code is not None and code.lines == ((1, "one", False), (2, "two", True), (3, "three", False))
    assert [source_lines(s) for s in (f"{file}:9", "nowhere.py:3", "", f"{file}")] == [None] * 4


def test_json_has_the_new_fields() -> None:
    (miss,) = json.loads(json.dumps(mixed().to_dict()))["near_misses"]
    assert miss["passed"] == ["core"] and miss["anchor"].startswith("scaled_dot_product_attention")
