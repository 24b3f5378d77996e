"""What a MODEL computes once opened: the same as transformers opens, whatever form its checkpoint has."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import make_config, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model

from compressor.errors import UserError
from compressor.models import open_model, parse_device, parse_dtype, probe, save

IDS = torch.arange(40).view(2, 20) * 7 % 320


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def saved(tmp_path, tiny_tokenizer):
    """A function that saves a model and its tokenizer and gives the folder."""

    def saved(model, **options):
        model.save_pretrained(tmp_path / "model", **options)
        tiny_tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return saved


def test_a_folder_opens_as_transformers_opens_it(tiny_folder, tiny_model):
    opened = open_model(str(tiny_folder), device="cpu")
    assert torch.equal(logits(opened.model), logits(tiny_model)) and opened.plain and not opened.model.training
    assert opened.stored_dtype == opened.model.dtype == torch.float32
    assert opened.folder == tiny_folder and opened.name == str(tiny_folder) and len(opened.hash) == 64
    assert opened.tokenizer.decode(opened.tokenizer.encode("The film, 3 times.")) == "The film, 3 times."


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_dtypes_are_computed_in_float32_and_saved_as_they_were(saved, tiny_model, tmp_path, dtype):
    folder = saved(tiny_model.to(dtype))
    opened = open_model(str(folder), device="cpu")
    assert opened.model.dtype == torch.float32 and opened.stored_dtype == dtype
    assert torch.equal(logits(opened.model), logits(tiny_model.float()))
    save(opened.model, tmp_path / "again", opened.tokenizer, opened.stored_dtype)
    one, other = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert other[name].dtype == dtype and torch.equal(other[name], tensor)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_another_dtype_to_compute_in(tiny_folder):
    assert open_model(str(tiny_folder), dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="unknown dtype 'float8'; allowed: float32"):
        open_model(str(tiny_folder), dtype="float8")
    assert parse_dtype(None) == torch.float32


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x", ""])
def test_devices_that_are_none(device):
    with pytest.raises(UserError) as error:
        parse_device(device)
    assert f"device {device!r} cannot be used here" in str(error.value) and "\n" not in str(error.value)


def test_an_untied_head_is_kept(saved):
    model = make_model(make_config(tie_word_embeddings=False))
    opened = open_model(str(saved(model)), device="cpu")
    assert torch.equal(logits(opened.model), logits(model))
    assert not torch.equal(opened.model.lm_head.weight, opened.model.transformer.wte.weight)


def test_a_head_of_its_own_in_a_tied_config_is_refused(saved):
    """transformers warns and leaves it untied; a later tie_weights() would then change the model."""
    model = make_model(make_config(tie_word_embeddings=False))
    folder = saved(model)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "tie_word_embeddings": True}))
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        open_model(str(folder))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()  # stored twice, but the same
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_model(str(folder)).model.config.tie_word_embeddings


@pytest.mark.parametrize("changes", [{"n_inner": 48}, {"activation_function": "relu"}, {"n_head": 2, "n_layer": 1}])
def test_other_shapes(saved, changes):
    model = make_model(make_config(**changes))
    assert torch.equal(logits(open_model(str(saved(model)), device="cpu").model), logits(model))


def test_a_base_models_checkpoint(saved, tiny_model):
    folder = saved(tiny_model.transformer)
    assert "wte.weight" in load_file(folder / "model.safetensors") and isinstance(tiny_model.transformer, GPT2Model)
    assert torch.equal(logits(open_model(str(folder), device="cpu").model), logits(tiny_model))


def test_the_trunk_of_a_classifier(saved, tiny_model):
    classifier = GPT2ForSequenceClassification(make_config(num_labels=3))
    classifier.transformer.load_state_dict(tiny_model.transformer.state_dict())
    folder = saved(classifier)
    assert "score.weight" in load_file(folder / "model.safetensors")
    assert torch.equal(logits(open_model(str(folder), device="cpu").model), logits(tiny_model))


def test_masks_of_old_versions_are_skipped(saved, tiny_model):
    folder = saved(tiny_model)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"transformer.h.{i}.attn.bias": torch.zeros(1, 1, 64, 64) for i in range(6)}
    tensors |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(float("-inf")) for i in range(6)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(open_model(str(folder), device="cpu").model), logits(tiny_model))


def test_shards(saved, tiny_model):
    folder = saved(tiny_model, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    one = open_model(str(folder), device="cpu")
    assert torch.equal(logits(one.model), logits(tiny_model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["h.3.mlp.c_proj.bias", "wpe.weight"])
def test_weights_that_are_no_numbers(saved, tiny_model, name, value):
    tiny_model.transformer.get_parameter(name).data.flatten()[5] = value
    with pytest.raises(UserError, match=f"{name} holds NaN or infinite numbers"):
        open_model(str(saved(tiny_model)))


def test_the_hash_is_of_the_weights(tiny_folder, tmp_path):
    one = open_model(str(tiny_folder)).hash
    folder = shutil.copytree(tiny_folder, tmp_path / "moved")
    assert open_model(str(folder)).hash == one
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert open_model(str(folder)).hash != one


# ---------------------------------------------------------------- save


def test_a_saved_folder_is_what_users_expect(tiny_folder, tiny_model, tmp_path):
    opened = open_model(str(tiny_folder), device="cpu")
    save(opened.model, tmp_path / "out", opened.tokenizer, torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is GPT2LMHeadModel and torch.equal(logits(again), logits(tiny_model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 64 and tokenizer.encode("a film") == opened.tokenizer.encode("a film")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"} | {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_numbers_that_the_files_dtype_does_not_hold_are_not_saved(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.transformer.h[2].mlp.c_fc.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match=r"transformer.h.2.mlp.c_fc.weight came out with NaN or infinite .* float16"):
        save(tiny_model, tmp_path / "out", tiny_tokenizer, torch.float16)
    assert not (tmp_path / "out").exists()


def test_the_probe_tells_models_apart(tiny_model):
    one, again = probe(tiny_model), probe(tiny_model)
    assert one == again and len(one["ids"]) == len(one["logsumexp"]) == 24 and len(one["logits"]) == 16
    expected = tiny_model(torch.tensor([one["ids"]])).logits[0]
    assert one["logsumexp"] == pytest.approx(expected.logsumexp(-1).tolist(), rel=1e-6)
    assert one["logits"] == pytest.approx(expected[-1, one["tokens"]].tolist(), rel=1e-5)
    tiny_model.transformer.h[5].mlp.c_proj.bias.data[0] += 0.01
    assert probe(tiny_model)["logsumexp"] != one["logsumexp"]


# ---------------------------------------------------------------- the package teaches transformers its model type


@pytest.mark.parametrize(
    "order",
    [
        "import compressor; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import compressor",
        "import compressor.modeling; from transformers import AutoModelForCausalLM",
    ],
)
def test_importing_the_package_is_enough_to_open_a_compressed_folder(order, tmp_path, tiny_model, tiny_tokenizer):
    """In a fresh process, without trust_remote_code, in either order of the imports (isort puts ours first)."""
    from compressor.modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel

    fields = {**tiny_model.config.to_dict(), "model_type": "gpt2_compressed"}
    groups = [{"layers": [1, 2], "start": 1, "rank": 2, "bias": "per_layer"}]
    model = GPT2CompressedLMHeadModel(GPT2CompressedConfig(**fields, ffn_groups=groups))
    save(model, tmp_path / "compressed", tiny_tokenizer, torch.float32)
    script = f"""
import sys
{order.split("; ")[0]}
{"assert 'torch' not in sys.modules, 'the import is not cheap'" if order.startswith("import compressor;") else ""}
{order.split("; ")[1]}
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "compressed")!r})
print(type(model).__module__, compressor.GPT2CompressedLMHeadModel is type(model), "apply" in dir(compressor))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout.split() == ["compressor.modeling.modeling_gpt2_compressed", "True", "True"], ran.stderr
