"""FlexAttention: its mask_mod and score_mod are evaluated; what they mean is stated and proved, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fla_swap as fs
from fla_swap.errors import VerificationError
from fla_swap.inspection import prove
from fla_swap.patterns.flex import FlexRefused, read_function
from fla_swap.types import ArgPath, AttentionReport, CallContract, Mask

pytestmark = pytest.mark.filterwarnings("ignore")
D, H, K = 32, 4, 8
SLOPES = (0.5, 0.25, 0.125, 0.0625)


class Flex(nn.Module):
    """`options(self, x)` gives the keywords of the call, but for the block mask: `mask` is its mask_mod."""

    def __init__(self, options: Callable[[Any, Tensor], dict] | None = None, mask: Any = None, kv: int = H):
        super().__init__()
        self.options, self.mask, self.kv = options, mask, kv
        self.q, self.k, self.v, self.o = (
            nn.Linear(D, H * K),
            nn.Linear(D, kv * K),
            nn.Linear(D, kv * K),
            nn.Linear(D, D),
        )
        self.register_buffer("slopes", torch.tensor(SLOPES))
        self.learned = nn.Parameter(torch.tensor(SLOPES))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, K)).transpose(1, 2) for p in (self.q, self.k, self.v))
        more = {} if self.options is None else self.options(self, x)
        if self.mask is not None:
            more["block_mask"] = create_block_mask(self.mask, None, None, x.shape[1], x.shape[1], device="cpu")
        return self.o(flex_attention(q, k, v, **more).transpose(1, 2).flatten(2))


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j


def window(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i >= j) & (i - j < 40)


def alibi(m: Any, x: Tensor) -> dict:
    return {"score_mod": lambda score, b, h, i, j: score + m.slopes[h] * (j - i)}


def softcap(m: Any, x: Tensor) -> dict:
    return {"score_mod": lambda score, b, h, i, j: 1.5 * torch.tanh(score / 1.5)}


def hides(m: Any, x: Tensor) -> dict:
    return {"score_mod": lambda score, b, h, i, j: torch.where(i >= j, score, -float("inf"))}


def capped_alibi(m: Any, x: Tensor) -> dict:
    return {"score_mod": lambda s, b, h, i, j: 2.0 * torch.tanh(0.5 * s) + m.slopes[h] * (j - i)}


def report_of(module: nn.Module) -> AttentionReport:
    torch.manual_seed(0)
    return fs.inspect(module, torch.randn(2, 7, D), strict=False)


CAUSAL = Mask(kind="causal")
POSITIVES: dict[str, tuple[Flex, dict[str, Any]]] = {
    "bidirectional": (Flex(), {"mask": Mask(kind="bidirectional")}),
    "causal": (Flex(mask=causal), {}),
    "window": (Flex(mask=window), {"mask": Mask(kind="window", window=40)}),
    "ALiBi": (Flex(alibi, causal), {"alibi": pytest.approx(SLOPES)}),
    "softcap": (Flex(softcap, causal), {"softcap": 1.5}),
    "a mask in score_mod": (Flex(hides), {}),
    "softcap and ALiBi": (Flex(capped_alibi, causal), {"softcap": 2.0, "alibi": pytest.approx(SLOPES)}),
    "factor": (Flex(lambda m, x: {"score_mod": lambda s, b, h, i, j: s * 3.0, "scale": 0.1}, causal), {"scale": 0.3}),
    "grouped": (Flex(lambda m, x: {"enable_gqa": True}, causal, kv=2), {"kv_heads": 2}),
}
POSITIVES["softcap and ALiBi"][1]["scale"] = K**-0.5


@pytest.mark.parametrize("name", POSITIVES)
def test_what_the_functions_mean_is_stated_and_proved(name: str) -> None:
    module, facts = POSITIVES[name]
    report = report_of(nn.Sequential(nn.LayerNorm(D), module))
    assert not report.near_misses, report.near_misses[0].reason
    (site,) = report.sites
    wanted = {"mask": CAUSAL, "kv_heads": H, "heads": H, "scale": K**-0.5, "alibi": None, "softcap": None, **facts}
    for fact, value in wanted.items():
        own = getattr(site, fact)
        assert own == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), fact
    assert site.proved and site.max_error is not None and site.max_error < 1e-5
    assert site.fqn == "1" and "test_flex.py:" in site.source
    assert all(p.requires_grad for p in module.parameters())


def test_the_proof_tells_facts_that_are_off_and_a_swap_changes_nothing() -> None:
    model = nn.Sequential(nn.LayerNorm(D), Flex(capped_alibi, causal)).eval()
    report, x = report_of(model), torch.randn(2, 33, D)
    (site,) = report.sites
    assert site.alibi is not None
    for wrong in ({"softcap": 2.01}, {"alibi": (0.51, *site.alibi[1:])}, {"mask": Mask(kind="window", window=5)}):
        with pytest.raises(VerificationError, match="computes something that the site does not say"):
            prove(model, dataclasses.replace(site, **wrong, call=CallContract(hidden=ArgPath(position=0))), x)
    with torch.no_grad():
        before = model(x)
        program = torch.export.export(model, (x,), strict=False)
        assert not fs.rewrite(program).records
        fs.swap_(model, fs.plan(report, mixer="softmax", keep=0))
        assert float((model(x) - before).abs().max()) < 1e-5


def per_batch(m: Any, x: Tensor) -> dict:
    return {"score_mod": lambda score, b, h, i, j: score + b * (j - i)}


NEAR_MISSES: dict[str, tuple[Flex, str]] = {
    "square": (Flex(lambda m, x: {"score_mod": lambda s, b, h, i, j: s * s}, causal), "neither a bias, a constant"),
    "factor by head": (
        Flex(lambda m, x: {"score_mod": lambda s, b, h, i, j: s * m.slopes[h]}, causal),
        "neither a bias, a constant",
    ),
    "bias made of data": (
        Flex(lambda m, x: {"score_mod": lambda s, b, h, i, j, g=None: s + x.mean((1, 2))[b]}, causal),
        "score_mod reads values that depend on what the model reads",
    ),
    "learned bias": (
        Flex(lambda m, x: {"score_mod": lambda s, b, h, i, j: s + m.learned[h] * (j - i)}, causal),
        "score_mod reads the parameter 'learned': a learned bias",
    ),
    "bias by batch row": (Flex(per_batch, causal), "differs between rows of the batch"),
    "mask by head": (Flex(mask=lambda b, h, i, j: (i >= j) & (i - j < 3 + h)), "the mask"),
    "bias that is no line": (
        Flex(lambda m, x: {"score_mod": lambda s, b, h, i, j: s - (i - j) * (i - j) * 1e-4}, causal),
        "that is not ALiBi",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_a_site_cannot_state_is_refused_with_its_reason(name: str) -> None:
    module, reason = NEAR_MISSES[name]
    report = report_of(module)
    assert not report.sites and not report.unclaimed
    (miss,) = report.near_misses
    assert reason in miss.reason and "test_flex.py:" in miss.source


def test_functions_of_a_score_are_told_by_their_values() -> None:
    zero = torch.zeros(1, 2, 3, 3)
    assert read_function(lambda s: zero + s).factor == 1.0
    assert read_function(lambda s: zero + 0.25 * s).factor == 0.25
    capped = read_function(lambda s: 20 * torch.tanh((zero + s) / 20))
    assert capped.softcap == 20.0 and capped.factor == pytest.approx(1.0, rel=1e-5)
    for f in (lambda s: zero, lambda s: (zero + s).abs(), lambda s: (zero + s).clamp(-9, 9), lambda s: zero - s):
        with pytest.raises(FlexRefused, match="score_mod"):
            read_function(f)
