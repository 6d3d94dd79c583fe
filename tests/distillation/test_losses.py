"""Losses from hidden states equal the textbook losses from whole logits; output heads are proved, not guessed."""

from __future__ import annotations

import pytest
import torch
from small_models import llama, text
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from fla_swap.distillation.evaluation import held_out_loss
from fla_swap.distillation.losses import CausalModel, Head, cross_entropy, kl_divergence
from fla_swap.errors import DataError, TrainingError

SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def random_head(generator: torch.Generator, **kwargs) -> Head:
    weight = torch.randn(50, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    return Head(weight=weight, **kwargs)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 3.0)])
@pytest.mark.parametrize("biased", [False, True])
def test_kl_from_hidden_states_equals_kl_of_whole_logits(scale, softcap, biased):
    generator = torch.Generator().manual_seed(0)
    hidden, reference = (torch.randn(2, 7, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    hidden.requires_grad_(True)
    bias = torch.randn(50, generator=generator, dtype=torch.float64) if biased else None
    head, other = (random_head(generator, scale=scale, softcap=softcap, bias=bias) for _ in range(2))

    def capped(x: torch.Tensor, head: Head) -> torch.Tensor:
        logits = scale * F.linear(x, head.weight, bias)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    p, q = capped(reference, other).softmax(-1), capped(hidden, head).softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    wanted = torch.autograd.grad(expected, (hidden, head.weight))
    found = kl_divergence(hidden, head, reference, other, chunk=5)
    got = torch.autograd.grad(found, (hidden, head.weight))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_kl_gives_the_teacher_no_gradient():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    head, other = random_head(generator), random_head(generator)
    kl_divergence(hidden, head, hidden, other).backward()
    assert other.weight.grad is None


def test_kl_refuses_heads_with_different_caps():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    with pytest.raises(TrainingError, match=r"caps its logits at 5\.0, the teacher at None"):
        kl_divergence(hidden, random_head(generator, softcap=5.0), hidden, random_head(generator))


def test_cross_entropy_predicts_the_next_token_of_each_row():
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 9, 12, generator=generator, dtype=torch.float64), random_head(generator)
    labels = torch.randint(0, 50, (2, 9), generator=generator)
    logits = hidden[:, :-1] @ head.weight.t()
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(cross_entropy(hidden, head, labels, chunk=4), expected)


def families():
    yield "tied", llama()
    yield "softcap", Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0))
    yield "multiplied", CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625))
    yield "divided", GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))
    yield "gpt2", GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=64))


@pytest.mark.parametrize(("name", "model"), families(), ids=lambda value: value if isinstance(value, str) else "")
def test_hidden_states_and_head_give_the_models_own_logits(name, model):
    model.eval()
    ids = torch.arange(20).view(2, 10)
    cut = CausalModel(model)
    with torch.no_grad():
        torch.testing.assert_close(cut.head.logits(cut.hidden(ids)), model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cut.hidden(ids), cut._stopped(ids))
    expected = {"softcap": (1.0, 2.0), "multiplied": (0.0625, None), "divided": (0.125, None)}
    assert (cut.scale, cut.softcap) == expected.get(name, (1.0, None))


def test_a_model_without_an_output_head_is_refused_by_name():
    with pytest.raises(TrainingError, match="LlamaModel has no output head"):
        CausalModel(llama().model)


def test_a_head_that_is_not_linear_is_refused():
    model = llama()
    model.lm_head.register_forward_hook(lambda module, args, output: output.square())
    with pytest.raises(TrainingError, match="not a linear map of the last hidden states"):
        CausalModel(model)


def test_held_out_loss_is_transformers_loss_and_leaves_the_model_in_its_mode():
    model, blocks = llama().train(), text(rows=10)
    found = held_out_loss(model, blocks, batch_size=4)
    assert model.training
    with torch.no_grad():
        expected = model.eval()(input_ids=blocks, labels=blocks).loss
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_held_out_loss_says_what_it_was_given():
    with pytest.raises(DataError, match=r"got \(3,\) torch.float32"):
        held_out_loss(llama(), torch.zeros(3))
