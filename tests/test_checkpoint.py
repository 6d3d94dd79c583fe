"""Saved and loaded again: the same logits bit for bit, and no folder is ever left half written or overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from sites import prompts, report_of, tiny, toy_registered
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fla_swap import hybrid
from fla_swap.checkpoint import load, save
from fla_swap.errors import CheckpointError
from fla_swap.planning import plan
from fla_swap.swapping import drop_originals, restore_, swap_, swapped_layers


@pytest.fixture(scope="module", autouse=True)
def toy():
    with toy_registered():
        yield


def swapped(family="llama", mixer="toy", keep=0, **arguments):
    model = tiny(family, **arguments)
    return swap_(model, plan(report_of(model), mixer=mixer, keep=keep, local=True))


@torch.no_grad()
def logits(model):
    return model(prompts()[0]).logits


CASES = [("llama", "toy", [1]), ("qwen3", "softmax", 0), ("phi3", "gla", 0), ("gpt2", "gated_deltanet", 0)]
CASES += [("mistral", "window", [0])]


@pytest.mark.parametrize(("family", "mixer", "keep"), CASES)
def test_reload_is_bitwise_equal(family, mixer, keep, tmp_path):
    model = swapped(family, mixer, keep)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert type(again) is type(model) and not again.is_custom_code()
    assert again.config.model_type == family and again.config.swap_plan() == model.config.swap_plan()
    assert list(again.state_dict()) == list(model.state_dict())
    assert again.generation_config.max_new_tokens == 7
    ids, mask = prompts()
    text = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=4)
    assert torch.equal(again.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=4), text)


def test_bfloat16_in_several_files_with_tied_embeddings(tmp_path):
    tiny("llama", tied=True).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    swap_(model, plan(report_of(model), mixer="gla", keep=[0]))
    model.save_pretrained(tmp_path / "out", max_shard_size="20kB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = load(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))
    assert load(tmp_path / "out", dtype=torch.float32).dtype == torch.float32


def test_on_disk_the_model_is_ours_and_in_memory_its_base(tmp_path):
    model = swapped(keep=[1])
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "fla_swap"
    assert written["fla_swap"]["base_model_type"] == "llama"
    assert written["fla_swap"]["base_architecture"] == "LlamaForCausalLM"
    assert [layer["site"]["layer"] for layer in written["fla_swap"]["plan"]["layers"]] == [0]
    assert model.config.to_dict()["model_type"] == "llama"
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"
    again = load(tmp_path)
    again.save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text()) == written


def test_a_restored_model_saves_as_a_plain_one(tmp_path):
    model = swapped()
    model.save_pretrained(tmp_path / "hybrid")
    restore_(model).save_pretrained(tmp_path / "plain")
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "fla_swap" not in written and "auto_map" not in written
    assert torch.equal(logits(load(tmp_path / "plain")), logits(model))


def test_trust_remote_code_is_enough_in_a_fresh_process(tmp_path):
    """Neither the script nor its imports mention fla_swap; the folder's shim does. Without trust: an error."""
    model = swapped(mixer="gla")
    save(model, tmp_path / "out")
    torch.save(logits(model), tmp_path / "logits.pt")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"folder, ids = {str(tmp_path / 'out')!r}, torch.tensor({prompts()[0].tolist()})\n"
        "try:\n    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)\n"
        "except ValueError as error:\n    print('refused')\n"
        "assert 'fla_swap' not in sys.modules\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        f"print(torch.equal(model(ids).logits, torch.load({str(tmp_path / 'logits.pt')!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["refused", "True"], done.stderr


def test_a_tokenizer_is_saved_along(tmp_path):
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", chat_template="{{ messages }}")
    save(swapped(), tmp_path / "out", tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == "{{ messages }}"


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("how", ["save_pretrained", "save"])
def test_a_folder_with_another_model_is_not_touched(how, tmp_path):
    model = swapped(keep=[1])

    def write(folder):
        return model.save_pretrained(folder) if how == "save_pretrained" else save(model, folder)

    for name, other in (("plain", tiny("llama")), ("plan", swapped(keep=[0])), ("base", swapped("qwen3", keep=[1]))):
        other.save_pretrained(tmp_path / name)
        before = snapshot(tmp_path / name)
        with pytest.raises(CheckpointError, match="holds another model"):
            write(tmp_path / name)
        assert snapshot(tmp_path / name) == before
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=r"without a config\.json"):
        write(tmp_path / "bare")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        write(tmp_path / "broken")
    write(tmp_path / "own")
    write(tmp_path / "own")  # the same model again, after more training


def test_a_plain_model_does_not_replace_another_unless_told(tmp_path):
    save(tiny("llama"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save(tiny("llama", seed=1), tmp_path / "out")
    save(tiny("llama", seed=1), tmp_path / "out", overwrite=True)
    assert torch.equal(logits(load(tmp_path / "out")), logits(tiny("llama", seed=1)))


def test_overwriting_replaces_the_model_and_keeps_other_files(tmp_path):
    out = tmp_path / "out"
    swapped(layers=3).save_pretrained(out, max_shard_size="20kB")
    (out / "report.json").write_text("{}")
    model = swapped(keep=[1])
    save(model, out, overwrite=True)
    assert sorted(p.name for p in out.glob("*.safetensors*")) == ["model.safetensors"]
    assert (out / "report.json").read_text() == "{}"
    assert torch.equal(logits(load(out)), logits(model))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_side_files_go_with_the_model_that_another_one_replaces(tmp_path):
    out, model = tmp_path / "out", swapped(keep=[1])
    save(model, out)
    belongs = ("tokenizer.json", "chat_template.jinja", "adapter_config.json", "vocab.txt", "modeling_own.py")
    for name in (*belongs, "report.png", "training-plan.json"):
        (out / name).write_text(name)
    save(model, out, overwrite=True)  # the same model: they are its own
    assert all((out / name).exists() for name in belongs)
    save(swapped(keep=[0]), out, overwrite=True)
    assert not any((out / name).exists() for name in belongs)
    assert (out / "report.png").read_text() == "report.png" and (out / "training-plan.json").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_full_disk_or_interrupt_leaves_the_old_folder(error, moment, tmp_path, monkeypatch):
    out = tmp_path / "out"
    model = swapped()
    save(model, out)
    before = snapshot(out)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    renames, replace = [], os.replace

    def fail(*args, **kwargs):
        raise error

    def rename(source, target):  # the second rename, when the old folder has already made room
        renames.append(target)
        return fail() if len(renames) == 2 else replace(source, target)

    if moment == "writing":
        monkeypatch.setattr(hybrid.PreTrainedModel, "save_pretrained", fail)
    else:
        monkeypatch.setattr("os.replace", rename)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        save(model, out)
    monkeypatch.undo()
    assert snapshot(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def damage(folder, what):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    if what == "cut":
        weights.write_bytes(data[: len(data) // 2])
    elif what == "header":
        weights.write_bytes(data[:5])
    elif what == "noise":
        weights.write_bytes(b"\xff" * 400)
    elif what == "gone":
        weights.unlink()
    elif what == "config":
        (folder / "config.json").write_text('{"model_type": ')
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "no plan":
        del config["fla_swap"]["plan"]
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "mixer":
        config["fla_swap"]["plan"]["layers"][0]["mixer"] = "mamba9"
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "base":
        config["fla_swap"]["base_model_type"] = "llama9"
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "layers":
        config["num_hidden_layers"] = 3
        (folder / "config.json").write_text(json.dumps(config))


DAMAGE = {
    "cut": r"model\.safetensors is damaged or cut short: \d+ bytes",
    "header": r"model\.safetensors is no readable safetensors file",
    "noise": r"model\.safetensors is no readable safetensors file",
    "gone": "no weights",
    "config": r"config\.json is damaged",
    "no config": r"no config\.json",
    "no plan": "missing parts",
    "mixer": "no mixer is called 'mamba9'",
    "base": "swapped from a 'llama9'",
    "layers": r"no weights for \['model\.layers\.2\.",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_one_error_that_says_what(what, tmp_path):
    save(swapped(), tmp_path / "out")
    damage(tmp_path / "out", what)
    with pytest.raises(CheckpointError, match=DAMAGE[what]):
        load(tmp_path / "out")


def test_a_missing_shard_and_a_missing_folder_are_named(tmp_path):
    swapped().save_pretrained(tmp_path / "out", max_shard_size="20kB")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load(tmp_path / "out")
    with pytest.raises(CheckpointError, match="no folder"):
        load(tmp_path / "absent")


def test_a_loaded_model_has_no_originals_and_can_be_saved_after_dropping_them(tmp_path):
    model = swapped()
    drop_originals(model)
    save(model, tmp_path / "out")
    assert [layer.original for _, layer in swapped_layers(load(tmp_path / "out"))] == [None, None]
