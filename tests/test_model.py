"""Models from scratch: which layers a config makes, and that they run as transformers' own models do."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import fla_swap as fs
from fla_swap.errors import ConfigError, MixerError
from fla_swap.feed_forward import ChannelMixing
from fla_swap.model import HybridModel

VOCAB = 61
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2}
SMALL |= {"initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
MIXED = SMALL | {
    "mixer": "rwkv6",
    "mixer_options": {"decay_rank": 4, "mix_rank": 4},
    "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2},
    "layers": {2: {"mixer": "mamba2", "head_dim": 8, "feed_forward": "swiglu"}},
}


def build(**options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(fs.HybridConfig(**{**SMALL, **options})).eval()


@pytest.fixture(scope="module")
def mixed():
    """RWKV6 with channel mixing, softmax, and Mamba2 with SwiGLU."""
    return build(**MIXED)


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


def same(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_mixer_and_a_feed_forward_for_each_layer(mixed):
    assert [block.mixer.name for block in mixed.model.layers] == ["rwkv6", "softmax", "mamba2"]
    assert [type(block.mlp).__name__ for block in mixed.model.layers] == ["ChannelMixing", "SwiGLU", "SwiGLU"]
    first, softmax, last = (block.mixer for block in mixed.model.layers)
    assert (softmax.heads, softmax.kv_heads, len(softmax.rope.inv_freq)) == (4, 2, 4)
    assert (first.config.layer, first.config.num_layers, first.mix_down.out_features) == (0, 3, 20)
    assert last.head_dim == 8 and last.q_heads == 1 and last.config.output_gate == "swish"


def test_attention_layers_with_a_window():
    model = build(mixer="mamba2", attn={"layers": [0, 2], "num_heads": 4, "num_kv_heads": 1, "window_size": 5})
    window, mamba, _ = (block.mixer for block in model.model.layers)
    assert window.name == "window" and window.config.window == 5 and window.kv_heads == 1
    assert mamba.name == "mamba2" and mamba.heads == 2
    assert [block.mlp is None for block in model.model.layers] == [False, True, False]


def test_the_config_survives_json_and_says_what_is_wrong():
    config = fs.HybridConfig(**MIXED)
    again = fs.HybridConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict() and again.layers[2]["mixer"] == "mamba2"
    for words, options in {
        "no option 'mixer_option'; did you mean 'mixer_options'": {"mixer_option": {}},
        "num_attention_heads follows from the layers and is 2 here, not 4; the option is num_heads": {
            "num_attention_heads": 4
        },
        r"no layer \[3\]": {"layers": {3: {}}},
        r"no layer \[-1\]": {"attn": {"layers": [-1]}},
        r"layers \[1\] stand both": {"attn": {"layers": [1]}, "layers": {1: {}}},
        "attn needs": {"attn": {"num_heads": 3}},
        "feed_forward must be one of": {"feed_forward": "moe"},
    }.items():
        with pytest.raises(ConfigError, match=words):
            fs.HybridConfig(**SMALL, **options)
    with pytest.raises(MixerError, match=r"layer 0: no mixer is called 'glah'"):
        build(mixer="glah")
    with pytest.raises(MixerError, match=r"layer 1: GLAConfig has no option \['windw'\]"):
        build(layers={1: {"windw": 3}})
    with pytest.raises(ConfigError, match="layer 0: channel mixing keeps a state, which 'softmax' layers do not"):
        build(mixer="softmax", feed_forward="channel_mixing")


def test_saved_and_loaded_through_the_auto_classes(mixed, ids, tmp_path):
    mixed.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is fs.HybridForCausalLM and AutoConfig.from_pretrained(tmp_path).model_type == "fla_swap_hybrid"
    assert torch.equal(again(ids).logits, mixed(ids).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is HybridModel
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half(ids).logits.isfinite().all()
    fs.save(mixed, tmp_path / "checked")
    assert torch.equal(fs.load(tmp_path / "checked")(ids).logits, mixed(ids).logits)


def test_tied_embeddings(ids, tmp_path):
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_weights_start_normal_and_gates_where_their_mixer_put_them():
    model = build(mixer="gla", hidden_size=128, initializer_range=0.02)
    mixer = model.model.layers[0].mixer
    for linear in (
        mixer.q_proj,
        mixer.o_proj,
        mixer.gk_up,
        mixer.gate.up,
        model.lm_head,
        model.model.layers[1].mlp.up_proj,
    ):
        assert 0.017 < linear.weight.std() < 0.023
    fresh = type(mixer)(mixer.config)
    assert torch.equal(mixer.gk_up.bias, fresh.gk_up.bias) and torch.equal(mixer.gate.up.bias, fresh.gate.up.bias)


@torch.no_grad()
def test_loss_logits_and_hidden_states(mixed, ids):
    out = mixed(ids, labels=ids, output_hidden_states=True)
    logits = out.logits[:, :-1].flatten(0, 1)
    same(out.loss, torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))
    assert len(out.hidden_states) == 4
    same(mixed.lm_head(out.hidden_states[-1]), out.logits)
    same(mixed(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    same(mixed(inputs_embeds=mixed.model.embed_tokens(ids)).logits, out.logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        mixed()


@torch.no_grad()
def test_packed_documents_equal_separate_ones(mixed, ids):
    whole = torch.cat((ids[:1, :5], ids[1:, :7]), 1)
    separate = torch.cat((mixed(ids[:1, :5]).logits, mixed(ids[1:, :7]).logits), 1)
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    places = torch.cat((torch.arange(5), torch.arange(7)))[None]
    same(mixed(whole, cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=7, use_cache=False).logits, separate)
    same(mixed(whole, position_ids=places, use_cache=False).logits, separate)
    same(mixed(whole, position_ids=places, cu_seq_lens_q=borders).logits, separate)


@torch.no_grad()
def test_padding_left_and_right(mixed, ids):
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 9:] = 0, 0
    padded = mixed(ids, attention_mask=mask).logits
    same(padded[:1, 4:], mixed(ids[:1, 4:]).logits)
    same(padded[1:, :9], mixed(ids[1:, :9]).logits)


def test_gradient_checkpointing_changes_no_gradient(mixed, ids):
    model = build(**MIXED).train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    for options in ({"use_reentrant": False}, {"use_reentrant": True}):
        model.zero_grad()
        model.gradient_checkpointing_enable(options)
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter.grad, plain[name], rtol=1e-4, atol=1e-6), name
    assert all(gradient.abs().max() > 0 for gradient in plain.values())


def test_training_with_a_cache_gives_the_same_gradients(ids):
    """The default in training is `use_cache=True`: the states are filled, the gradients do not notice."""
    model = build(**MIXED).train()
    gradients = []
    for use_cache in (True, False):
        model.zero_grad()
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        same(a, b, 1e-5)


@torch.no_grad()
def test_every_way_of_generating_agrees_with_none_cached(mixed, ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    plain = {"max_new_tokens": 9, "do_sample": False, "attention_mask": mask}
    expected = mixed.generate(ids, **plain, use_cache=False)
    assert expected[:, 12:].unique().numel() > 6
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(mixed.generate(ids, **plain, **options), expected), options
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    assert torch.equal(mixed.generate(ids[1:], **plain | {"attention_mask": None}, **lookup), expected[1:])
    beams = {**plain, "num_beams": 3}
    assert torch.equal(mixed.generate(ids, **beams), mixed.generate(ids, **beams, use_cache=False))


@torch.no_grad()
def test_chunked_prefill_and_single_tokens(mixed, ids):
    whole, cache, pieces = mixed(ids).logits, None, []
    for piece in ids.split((5, 1, 1, 5), 1):
        out = mixed(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    same(torch.cat(pieces, 1), whole)


@torch.no_grad()
def test_the_state_does_not_grow(ids):
    from fla_swap.cache import state_bytes

    model = build(mixer="mamba2", mixer_options={"head_dim": 8})
    sizes = [state_bytes(model(ids.repeat(1, n), use_cache=True).past_key_values) for n in (1, 20)]
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_as_whole_graphs(ids, backend):
    torch._dynamo.reset()
    model = build(**MIXED)
    with torch.no_grad():
        expected, tokens = model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)
        fs.compile(model, backend=backend)
        same(model(ids).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)
    fs.uncompile(model)


def test_channel_mixing_reads_the_token_before():
    torch.manual_seed(0)
    mixing = ChannelMixing(8, None, 0, 2).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    from fla_swap.mixers.parts import Tokens

    k, r = (x + (before - x) * mix for mix in (mixing.mix_k, mixing.mix_r))
    expected = mixing.receptance(r).sigmoid() * mixing.value(mixing.key(k).relu() ** 2)
    same(mixing(x, Tokens(), None), expected, 1e-9)
    assert mixing.key.out_features == 32


def padded_prompt(ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return mask


@torch.no_grad()
def test_samba(ids, tmp_path):
    """Two layers, Mamba and a window, each with its SwiGLU (2406.07522)."""
    attn = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 5}
    model = build(num_hidden_layers=2, mixer="mamba", feed_forward="swiglu", attn=attn)
    assert [block.mixer.name for block in model.model.layers] == ["mamba", "window"]
    assert all(block.mlp is not None for block in model.model.layers)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": padded_prompt(ids)}
    tokens = model.generate(ids, **options)
    assert torch.equal(tokens, model.generate(ids, **options, use_cache=False))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(ids, **options), tokens)


@torch.no_grad()
def test_softmax_layers_can_be_found_proved_and_swapped(ids, tmp_path):
    """A teacher from scratch: its attention is as visible as that of any other model, and so is its conversion."""
    model = build(attn={"layers": [1, 2], "num_heads": 4, "num_kv_heads": 2}, mixer="gla")
    before = model(ids).logits
    report = fs.inspect(model)
    assert [site.fqn for site in report.sites] == ["model.layers.1.mixer", "model.layers.2.mixer"]
    fs.swap_(model, fs.plan(report, mixer="softmax", keep=0))
    same(model(ids).logits, before, 1e-5)
    fs.restore_(model)
    fs.swap_(model, fs.plan(report, mixer="gated_deltanet", keep=[1]))
    assert model.model.layers[1].mixer.mixer.name == "gated_deltanet" and model.model.layers[2].mixer.name == "softmax"
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": padded_prompt(ids)}
    tokens = model.generate(ids, **options)
    assert torch.equal(tokens, model.generate(ids, **options, use_cache=False))
    assert torch.equal(tokens, model.generate(ids, **options, cache_implementation="static"))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.swap_plan() == model.config.swap_plan()
    assert torch.equal(again.generate(ids, **options), tokens)
    fs.restore_(model)
    assert torch.equal(model(ids).logits, before) and type(model) is fs.HybridForCausalLM


def test_a_saved_conversion_loads_in_a_fresh_process(ids, tmp_path):
    import subprocess
    import sys

    model = build(mixer="softmax", num_hidden_layers=1)
    fs.swap_(model, fs.plan(fs.inspect(model, {"input_ids": ids}), mixer="gla", keep=0))
    model.save_pretrained(tmp_path)
    code = (
        "import sys, fla_swap, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model).__name__, model(torch.arange(1, 9)[None]).logits.double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    name, value = done.stdout.split()
    assert name == "FlaSwapHybridForCausalLM"
    assert abs(float(value) - model(torch.arange(1, 9)[None]).logits.double().sum().item()) < 1e-4


def test_trained_by_transformers_trainer(ids, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = build(**{**MIXED, "initializer_range": 0.02})
    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=5e-3, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert 3.5 < losses[0] < 4.8 and losses[-1] < losses[0] - 1
