"""Which checkpoints are GPT-2s, and that everything else is refused in one line before a weight is read."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
from conftest import make_config, make_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from compressor.checkpoint import build, find, locate, open_tokenizer, read_config, structure_hash
from compressor.errors import UserError
from compressor.metrics.size import parameters
from compressor.modeling import GPT2CompressedConfig


@pytest.fixture
def folder(tmp_path, tiny_folder):
    """A copy of the tiny checkpoint, to be spoilt."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def configure(folder, drop=(), **changes):
    """Change config.json."""
    record = json.loads((folder / "config.json").read_text())
    record = {key: value for key, value in {**record, **changes}.items() if key not in drop}
    (folder / "config.json").write_text(json.dumps(record))


def reweigh(folder, change):
    """Change the dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        open_tokenizer(str(folder), folder, find(str(folder)).config)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value).replace(str(folder), "MODEL")


def test_the_figures_of_a_checkpoint(tiny_folder, tiny_model):
    found = find(str(tiny_folder))
    assert found.folder == tiny_folder and found.files == (tiny_folder / "model.safetensors",)
    assert found.bytes == (tiny_folder / "model.safetensors").stat().st_size
    assert found.dtype == torch.float32 and found.foreign_bytes == 0
    assert parameters(build(found.config)) == sum(tensor.numel() for tensor in tiny_model.parameters())
    assert all(parameter.is_meta for parameter in build(found.config).parameters())


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "llama"},
            "MODEL is not a GPT-2: its model_type is 'llama'; allowed: 'gpt2', 'gpt2_compressed'",
        ),
        ({"model_type": None}, "is not a GPT-2: its model_type is None"),
        ({"n_layer": 7}, "the weight files lack transformer.h.6."),
        ({"n_layer": 5}, "the weight files hold transformer.h.5."),
        ({"n_layer": 0}, "n_layer 0; allowed: 1 to 1000"),
        ({"n_layer": 1 << 40}, "allowed: 1 to 1000"),
        ({"n_embd": 1 << 40}, "n_embd 1099511627776; allowed: 1 to"),
        ({"dtype": []}, "not a valid GPT-2 configuration"),
        ({"n_layer": "six"}, "not a valid GPT-2 configuration"),
        ({"n_layer": None}, "not a valid GPT-2 configuration"),
        ({"n_embd": 64}, "has shape [320, 32], its config asks for [320, 64]"),
        ({"n_positions": 32}, "transformer.wpe.weight has shape [64, 32], its config asks for [32, 32]"),
        ({"vocab_size": 321}, "transformer.wte.weight has shape [320, 32]"),
        ({"n_inner": 100}, "its config asks for"),
        ({"n_head": 5}, "n_embd 32, which n_head 5 does not divide"),
        ({"n_head": -4}, "n_head -4"),
        ({"activation_function": "gleu"}, "the unknown activation_function 'gleu'"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised"),
        ({"per_layer_config": {"1": {"n_inner": 24}}}, "per_layer_config"),
        ({"tie_word_embeddings": False}, "the weight files lack lm_head.weight"),
        ({"attn_pdrop": -1.0}, "attn_pdrop -1.0; allowed: 0 to 1"),
        ({"dtype": "float99"}, "not a valid GPT-2 configuration"),
        ({"compression": [{"rewrite": []}]}, "allowed: a list of rewrites"),
        ({"compression": "soft_shared"}, "has compression 'soft_shared'; allowed: a list of rewrites"),
        ({"model_type": "gpt2_compressed", "ffn_groups": [{"layers": [1, 2]}]}, "as entry 0 of ffn_groups"),
        (
            {"model_type": "gpt2_compressed", "ffn_groups": [{"layers": [9], "start": 0, "rank": 0, "bias": "shared"}]},
            "layers within 0 to 5",
        ),
        (
            {
                "model_type": "gpt2_compressed",
                "ffn_groups": [{"layers": [1], "start": 1, "rank": 0, "bias": "shared"}] * 2,
            },
            "a layer twice in ffn_groups",
        ),
    ],
)
def test_configs_that_do_not_fit(folder, changes, said):
    configure(folder, **changes)
    assert said in refusal(folder)


def test_a_misspelt_key_is_not_skipped_silently(folder):
    configure(folder, drop=("n_embd",), n_embed=32)
    assert "config.json has 'n_embed', which GPT-2 does not know (did you mean 'n_embd'?)" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"gpt2"', "\xff"])
def test_a_config_that_is_no_config(folder, content):
    (folder / "config.json").write_bytes(content.encode("latin1"))
    assert any(said in refusal(folder) for said in ("cannot be read", "not a GPT-2"))


def test_keys_of_old_versions_are_accepted(folder):
    """As in the config.json of `gpt2` and of what old versions of transformers wrote."""
    configure(
        folder,
        n_ctx=64,
        torch_dtype="float32",
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        summary_type="cls_index",
        gradient_checkpointing=False,
        output_past=True,
        finetuning_task=None,
        num_labels=1,
        use_bfloat16=False,
        sep_token_id=None,
        decoder_start_token_id=None,
        bad_words_ids=None,
        _num_labels=2,
        transformers_version="4.1.0",
    )
    assert find(str(folder)).config.n_layer == 6


def test_names_of_the_attribute_map_are_accepted(folder):
    configure(folder, drop=("n_layer",), num_hidden_layers=6)
    assert find(str(folder)).config.n_layer == 6


def test_code_of_a_checkpoint_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('run')")
    configure(folder, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.T", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = find(str(folder))
    assert type(found.config).__name__ == "GPT2Config" and len(open_tokenizer("m", folder, found.config)) == 320


# ---------------------------------------------------------------- weights


def without(*names):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key not in names}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("transformer.h.3.mlp.c_fc.bias"), "the weight files lack transformer.h.3.mlp.c_fc.bias"),
        (
            lambda t: {**t, "transformer.h.3.mlp.adapter.weight": torch.ones(2)},
            "hold transformer.h.3.mlp.adapter.weight",
        ),
        (lambda t: {**t, "transformer.h.0.mlp.c_fc.bias": torch.ones(32)}, "has shape [32], its config asks for [128]"),
        (
            lambda t: {**t, "transformer.h.0.mlp.c_fc.weight": torch.ones(32, 128, dtype=torch.int8)},
            "is stored as I8; allowed: F32, F16, BF16, F64",
        ),
        (lambda t: {"x": torch.ones(1)}, "the weight files lack transformer."),
    ],
)
def test_weights_that_do_not_fit(folder, change, said):
    reweigh(folder, change)
    assert said in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -40_000])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors is damaged or truncated" in refusal(folder)


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(folder)
    torch.save({}, folder / "pytorch_model.bin")
    assert "pickle" in refusal(folder)


def test_shards(folder, tiny_model, tmp_path):
    tiny_model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    found = find(str(folder))
    assert len(shards) > 2 and list(found.files) == shards
    assert found.bytes == sum(shard.stat().st_size for shard in shards)
    index = folder / "model.safetensors.index.json"
    broken = ["{", "[]", "{}", '{"weight_map": {"a": 1}}']
    for content, said in [*((content, "cannot be read") for content in broken), ('{"weight_map": {}}', "missing")]:
        kept = index.read_text()
        index.write_text(content)
        assert said in refusal(folder)
        index.write_text(kept)
    shards[1].unlink()
    assert f"the weight file {shards[1].name} named by model.safetensors.index.json is missing" in refusal(folder)


def test_what_a_checkpoint_may_hold_besides(folder):
    """Masks that old versions stored, a classifier's head; neither counts as the language model's bytes."""
    extra = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for i in range(6)}
    extra |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(6)}
    extra |= {"score.weight": torch.ones(2, 32)}
    reweigh(folder, lambda tensors: {**tensors, **extra})
    assert find(str(folder)).foreign_bytes == 6 * 64 * 64 + 6 * 4 + 2 * 32 * 4


def test_a_base_models_file_without_the_trunks_prefix(folder):
    reweigh(folder, lambda tensors: {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()})
    assert find(str(folder)).foreign_bytes == 0
    reweigh(folder, without("h.2.ln_1.bias"))
    assert "lack transformer.h.2.ln_1.bias" in refusal(folder)


# ---------------------------------------------------------------- tokenizer


def test_a_missing_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()
    assert "has no tokenizer" in refusal(folder)
    (folder / "vocab.json").write_text("{}")
    assert "has no tokenizer" in refusal(folder)  # merges.txt is missing


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}}'),
        ("tokenizer_config.json", "{"),
    ],
)
def test_a_damaged_tokenizer(folder, file, content):
    (folder / file).write_text(content)
    assert "tokenizer cannot be read" in refusal(folder) or "the tokenizer has 1 tokens" in refusal(folder)


@pytest.mark.parametrize(("vocab", "merges"), [("{", "a b"), ('{"a": 0, "b": 1}', "a"), ("[]", "a b")])
def test_a_damaged_vocabulary(folder, vocab, merges):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(vocab)
    (folder / "merges.txt").write_text(merges)
    assert "tokenizer cannot be read" in refusal(folder)


def test_vocab_and_merges_will_do(folder, tiny_tokenizer):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "tokenizer.json").unlink()
    opened = open_tokenizer("m", folder, find(str(folder)).config)
    assert opened.encode("The film was long.") == tiny_tokenizer.encode("The film was long.")


@pytest.mark.parametrize(("vocabulary", "fits"), [(320, True), (384, True), (319, False)])
def test_a_vocabulary_may_be_padded_beyond_the_tokenizer_not_cut(tmp_path, tiny_tokenizer, vocabulary, fits):
    folder = tmp_path / "model"
    make_model(make_config(n_layer=1, vocab_size=vocabulary)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    if fits:
        assert len(open_tokenizer(str(folder), folder, find(str(folder)).config)) == 320
    else:
        assert "the tokenizer has 320 tokens, the model 319; they do not belong together" in refusal(folder)


# ---------------------------------------------------------------- where


def test_places(tmp_path, tiny_folder, monkeypatch):
    run = tmp_path / "run"
    for step in ("rewritten", "recovered"):
        shutil.copytree(tiny_folder, run / step)
        assert locate(str(run)) == run / step  # the latest step that is there
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("run/rewritten").samefile(locate("~/run/rewritten"))
    assert locate("demo").name == "checkpoint"


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (lambda at: None, "./none", "./none does not exist; allowed: a save_pretrained folder"),
        (lambda at: None, "a/b/c", "a/b/c does not exist"),
        (lambda at: None, "", "'' does not exist"),
        (lambda at: None, "two words", "two words does not exist"),
        (lambda at: (at / "file").write_text("x"), "file", "file is a file"),
        (lambda at: (at / "empty").mkdir(), "empty", "empty is a folder without config.json"),
    ],
)
def test_places_that_are_none(tmp_path, monkeypatch, make, name, said):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    with pytest.raises(UserError) as error:
        locate(name)
    assert said in str(error.value) and "demo" in str(error.value)


def test_a_run_without_a_model_names_the_command_that_makes_one(tmp_path):
    (tmp_path / "alignment.json").write_text("{}")
    with pytest.raises(UserError, match="gpt2-compress rewrite"):
        locate(str(tmp_path))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The cache of a machine without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_name_on_the_hub_is_found_in_its_cache(hub_cache, tiny_folder):
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = hub_cache / "models--someone--tiny"
    shutil.copytree(tiny_folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    found = find("someone/tiny")
    assert found.folder == place / "snapshots" / commit and found.config.n_layer == 6


@pytest.mark.parametrize("name", ["someone/other", "gpt2"])
def test_a_name_that_is_not_there_and_no_network(hub_cache, name):
    with pytest.raises(UserError) as error:
        find(name)
    message = str(error.value)
    assert f"{name} is no local folder" in message and "HF_HUB_OFFLINE" in message and "\n" not in message


@pytest.mark.parametrize("name", ["-dash", "dot..dot", "a--b"])
def test_a_name_that_the_hub_does_not_allow(hub_cache, name):
    with pytest.raises(UserError, match="is no local folder and could not be had from the hub"):
        find(name)


# ---------------------------------------------------------------- structure


def test_structures_are_the_same_when_the_tensors_are(tiny_config):
    assert structure_hash(tiny_config) == structure_hash(make_config(resid_pdrop=0.5, compression=[{"rewrite": "x"}]))
    assert structure_hash(tiny_config) != structure_hash(make_config(n_layer=5))
    groups = [[[0, 1], [2, 3, 4]], [[0, 1, 2], [3, 4]]]  # the same tensors, shared by other layers
    one, other = (
        GPT2CompressedConfig(
            **{**tiny_config.to_dict(), "model_type": "gpt2_compressed"},
            ffn_groups=[{"layers": layers, "start": layers[0], "rank": 2, "bias": "per_layer"} for layers in entry],
        )
        for entry in groups
    )
    assert len({structure_hash(one), structure_hash(other), structure_hash(tiny_config)}) == 3


def test_a_config_is_read_without_its_weights(folder):
    (folder / "model.safetensors").unlink()
    assert read_config("m", folder).n_layer == 6
    assert isinstance(build(read_config("m", folder)), GPT2LMHeadModel)
