"""Our folders and transformers': round trips, what transformers makes of ours, damage by name."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from model_folders import BATCH, TOKENS, assert_refused, logits, make, rewrite, same_weights
from processes import run_python

import llama2rt
from llama2rt import Tokenizer
from llama2rt.checkpoint import convert, files, hf, native
from llama2rt.errors import InputError
from llama2rt.model import ScalarModel
from llama2rt.model.heads import Normalization


@pytest.mark.parametrize("tied", [False, True])
def test_native_round_trip(tmp_path, small_tokenizer, tied):
    model = make(tied=tied)
    native.save(model, small_tokenizer, tmp_path / "m")
    loaded, tokenizer = llama2rt.load(tmp_path / "m")
    assert loaded.config == model.config and same_weights(loaded, model)
    assert tokenizer.digest == small_tokenizer.digest
    assert (loaded.output.weight is loaded.transformer.embedding.weight) == tied
    assert all(p.requires_grad for p in loaded.parameters())
    half, _ = llama2rt.load(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    native.save(half, None, tmp_path / "half")
    again, tokenizer = llama2rt.load(tmp_path / "half")
    assert tokenizer is None and {p.dtype for p in again.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("writer", [native, hf])
def test_scalar_model_round_trip(tmp_path, small_tokenizer, writer):
    model = ScalarModel.from_llama(make(), seed=2)
    writer.save(model, small_tokenizer, tmp_path / "m")
    loaded, _ = llama2rt.load(tmp_path / "m")
    assert isinstance(loaded, ScalarModel) and same_weights(loaded, model)
    assert torch.equal(loaded(*BATCH), model(*BATCH))


@pytest.mark.parametrize("writer, key", [(native, "normalization"), (hf, "score_normalization")])
def test_a_normalization_travels_with_its_model(tmp_path, small_tokenizer, writer, key):
    model = ScalarModel.from_llama(make(), seed=2)
    writer.save(model, None, tmp_path / "raw")
    assert key not in json.loads((tmp_path / "raw" / "config.json").read_text())
    model.normalization = Normalization(mean=-1.5, std=0.25)
    writer.save(model, small_tokenizer, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "other", "hf" if writer is native else "native")
    convert(tmp_path / "other", tmp_path / "half", "hf", dtype="bf16")
    for name in ("m", "other", "half"):
        assert llama2rt.load(tmp_path / name)[0].normalization == model.normalization
    loaded, _ = llama2rt.load(tmp_path / "other")
    assert torch.equal(loaded(*BATCH), model(*BATCH))  # scores stay as they are
    kept = transformers.AutoConfig.from_pretrained(tmp_path / "half").score_normalization
    assert kept == {"mean": -1.5, "std": 0.25}
    for wrong in ({"mean": 0.0, "std": 0.0}, {"scale": 2.0}, [1.0]):
        rewrite(tmp_path / "m" / "config.json", **{key: wrong})
        assert_refused(tmp_path / "m", f"config.json: {key}: ")


def test_saving_replaces_a_model_but_nothing_else(tmp_path, small_tokenizer):
    folder = tmp_path / "m"
    native.save(make(), small_tokenizer, folder)
    other = make(layers=1)
    native.save(other, None, folder)
    loaded, tokenizer = llama2rt.load(folder)
    assert loaded.config.layers == 1 and tokenizer is None
    assert [p.name for p in tmp_path.iterdir()] == ["m"]  # no temporary folder left behind
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    with pytest.raises(InputError, match="thesis: exists and is not a model folder"):
        native.save(other, None, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    native.save(make(), None, folder)

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_safetensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        native.save(make(layers=1), None, folder)
    loaded, _ = llama2rt.load(folder)
    assert loaded.config.layers == 2
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_is_an_os_error_that_names_the_folder(tmp_path):
    """Both safetensors and torch.save report it as something else."""
    script = """
import resource, signal, sys
import llama2rt
from llama2rt.checkpoint import native, hf, meta
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = llama2rt.LlamaConfig(dim=64, layers=1, heads=2, kv_heads=2, ffn_hidden=64, vocab_size=300)
model = llama2rt.Llama(config).initialize()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
for writer in (native, hf, meta):
    try:
        writer.save(model, None, sys.argv[1])
    except OSError as error:
        print(error)
"""
    said = run_python("-c", script, tmp_path / "model").stdout.splitlines()
    assert len(said) == 3
    for line in said:
        assert line.startswith(f"{tmp_path}/model: this model could not be written (")
    assert not list(tmp_path.iterdir())


def test_a_replacement_that_fails_puts_the_old_model_back(tmp_path, monkeypatch):
    model = make()
    native.save(model, None, tmp_path / "m")
    rename = Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        native.save(make(), None, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    loaded, _ = llama2rt.load(tmp_path / "m")
    assert torch.equal(loaded.output.weight, model.output.weight)


def test_damage_is_named(tmp_path, small_tokenizer):
    folder = tmp_path / "m"
    native.save(make(), small_tokenizer, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, description = weights.read_bytes(), config.read_text()

    for cut in (0, 4, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        assert_refused(folder, r"model\.safetensors: damaged or not safetensors")
    os.remove(weights)
    assert_refused(folder, r"m: no model\.safetensors")
    weights.write_bytes(whole)
    config.write_text(description[:-30])
    assert_refused(folder, r"config\.json:\d+: not JSON")
    config.write_text("[1]")
    assert_refused(folder, r"config\.json: expected a JSON object, got list")
    config.write_text(description)
    rewrite(config, kind="tree")
    assert_refused(folder, r"config\.json: kind: expected one of llama, scalar, got 'tree'")
    config.write_text(description)
    shape = json.loads(description)["config"]
    rewrite(config, config=shape | {"heads": 7})
    assert_refused(folder, r"config\.json: heads: expected a divisor of dim 64, got 7")
    rewrite(config, config=shape | {"depth": 7})
    assert_refused(folder, r"config\.json: .*depth")
    rewrite(config, config=shape | {"layers": 3})
    assert_refused(folder, r"model\.safetensors: blocks\.2\.\S+: missing \(9 tensors in all\)")
    rewrite(config, config=shape | {"layers": 1})
    assert_refused(
        folder, r"model\.safetensors: blocks\.1\.\S+: not part of a model of this configuration"
    )
    rewrite(config, config=shape | {"ffn_hidden": 100})
    assert_refused(folder, r"model\.safetensors: blocks\.\S+: expected shape \[.*\], got \[.*\]")
    with pytest.raises(InputError, match="nowhere: no such model folder"):
        llama2rt.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no config\.json and no params\.json"):
        llama2rt.load(tmp_path / "empty")


# --- Hugging Face -----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [files.SHARD_BYTES, 30_000])
def test_transformers_loads_our_export_and_we_load_theirs(
    tmp_path, small_tokenizer, tied, shard_bytes
):
    model = make(tied=tied)
    hf.save(model, small_tokenizer, tmp_path / "ours", shard_bytes=shard_bytes)
    assert (tmp_path / "ours" / files.INDEX).exists() == (shard_bytes == 30_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.dtype == torch.float32 and theirs.config.rope_parameters["rope_theta"] == 700.0
    assert theirs.generation_config.eos_token_id == small_tokenizer.eos
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    assert 0.3 < expected.std() < 5
    assert (logits(model) - expected).abs().max() < 1e-4

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    for folder in ("ours", "theirs"):
        loaded, _ = llama2rt.load(tmp_path / folder)
        assert loaded.config == model.config and same_weights(loaded, model)


def test_transformers_loads_our_reward_model(tmp_path, small_tokenizer):
    model = ScalarModel.from_llama(make(), seed=4)
    hf.save(model, small_tokenizer, tmp_path / "m")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert theirs.num_labels == 1
    with torch.no_grad():
        score = theirs(TOKENS[None]).logits[0, 0]
    torch.testing.assert_close(score, model(*BATCH)[-1].detach(), rtol=1e-4, atol=1e-5)


TEXTS = [
    "Hello world",
    "  two spaces\n\nnew line 123",
    " leading",
    "",
    "\u65e5\u672c\u8a9e \U0001f642 \u00e9 \u0416",
    "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST]",
    "def f(x):\n    return x\t\t1.5e-3",
    "the quick brown foxes jumped over twelve zeros, sheepdogs counted",
    "sheepfoxfromjumpsovercountsthelazy quickly dogsdogsfoxes whatwhat isis",
]


def check_auto_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    os.remove(folder / "tokenizer.model")  # tokenizer.json must be enough
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos, tokenizer.eos)
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=True)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids), text


def test_auto_tokenizer_equals_ours(tmp_path, small_tokenizer):
    hf.save(make(), small_tokenizer, tmp_path / "m")
    _, tokenizer = llama2rt.load(tmp_path / "m")
    assert tokenizer.digest == small_tokenizer.digest
    check_auto_tokenizer(tmp_path / "m", small_tokenizer)
    # A folder with tokenizer.json alone goes through us unchanged.
    model, from_json = llama2rt.load(tmp_path / "m")
    assert all(from_json.encode(text) == small_tokenizer.encode(text) for text in TEXTS)
    hf.save(model, from_json, tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(TEXTS[0])["input_ids"] == small_tokenizer.encode(TEXTS[0], bos=True)


def test_auto_tokenizer_equals_llamas_own(tmp_path, shared_data):
    tokenizer = Tokenizer.load(shared_data("llama_tokenizer.model"))
    hf.save(make(dim=16, heads=2, kv_heads=1, vocab_size=32000), tokenizer, tmp_path / "m")
    check_auto_tokenizer(tmp_path / "m", tokenizer)


def test_both_spellings_of_rope_theta_and_dtype(tmp_path, small_tokenizer):
    model = make()
    hf.save(model, small_tokenizer, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    old = {"rope_parameters": None, "dtype": None, "head_dim": None, "mlp_bias": None}
    rewrite(path, **old)  # as transformers 4 writes it
    assert llama2rt.load(tmp_path / "m")[0].config == model.config
    rewrite(path, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 700.0})
    assert llama2rt.load(tmp_path / "m")[0].config == model.config
    rewrite(path, num_key_value_heads=None)  # LLaMA 1: no such key
    with pytest.raises(InputError, match=r"k_proj|key"):
        llama2rt.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: expected 'llama', got 'gpt2'"),
        ({"attention_bias": True}, "attention_bias: only False is supported, got True"),
        ({"hidden_act": "gelu"}, "hidden_act: only 'silu' is supported, got 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: only unscaled rope"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters: only unscaled rope"),
        ({"head_dim": 32}, "head_dim: expected .* = 8, got 32"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"num_attention_heads": 7}, "heads: expected a divisor of dim 64, got 7"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures: expected"),
        ({"rope_scaling": "llama3"}, "rope_scaling: expected an object or null, got 'llama3'"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta: expected a positive number"),
        ({"rms_norm_eps": "1e-5"}, "norm_eps: expected a positive number, got '1e-5'"),
        ({"tie_word_embeddings": "false"}, "tied: expected true or false, got 'false'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0 is supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: only None"),
    ],
)
def test_what_the_model_cannot_express_is_refused(tmp_path, changes, message):
    hf.save(make(), None, tmp_path / "m")
    rewrite(tmp_path / "m" / "config.json", **changes)
    with pytest.raises(InputError, match=r"config\.json: " + message):
        llama2rt.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.\w+\.weight: missing \(9 tensors in all\)"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\w+\.weight: not part of a model"),
        ({"vocab_size": 401}, r"lm_head\.weight: expected shape \[401, 64\], got \[400, 64\]"),
    ],
)
def test_tensors_are_named_as_in_the_file(tmp_path, changes, message):
    hf.save(make(), None, tmp_path / "m")
    rewrite(tmp_path / "m" / "config.json", **changes)
    with pytest.raises(InputError, match=rf"model\.safetensors: {message}"):
        llama2rt.load(tmp_path / "m")


def test_a_run_directory_is_not_its_model(tmp_path):
    native.save(make(), None, tmp_path / "run" / "model")
    with pytest.raises(InputError, match=f"its model is in {tmp_path}/run/model"):
        llama2rt.load(tmp_path / "run")


def test_damaged_shards_are_named(tmp_path):
    folder = tmp_path / "m"
    hf.save(make(), None, folder, shard_bytes=30_000)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(InputError, match=f"{shard.name}: damaged"):
        llama2rt.load(folder)
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}: listed in .*index.json but missing"):
        llama2rt.load(folder)
    shard.write_bytes(whole)
    rewrite(folder / files.INDEX, weight_map={"model.norm.weight": shard.name})
    with pytest.raises(InputError, match=f"{shard.name}: model.norm.weight: listed"):
        llama2rt.load(folder)


# --- Meta -------------------------------------------------------------------------------------


def test_convert_between_all_formats(tmp_path, small_tokenizer):
    model = make(context=4096)  # what a Meta folder, which stores no context, is read with
    native.save(model, small_tokenizer, tmp_path / "native0")
    previous = "native0"
    for number, to in enumerate(("hf", "meta", "native", "meta", "hf", "native"), 1):
        name = f"{to}{number}"
        convert(tmp_path / previous, tmp_path / name, to, shards=2 if to == "meta" else 1)
        loaded, tokenizer = llama2rt.load(tmp_path / name)
        assert loaded.config == model.config and same_weights(loaded, model), name
        assert tokenizer.digest == small_tokenizer.digest
        previous = name
    convert(tmp_path / "hf1", tmp_path / "bf16", "native", dtype="bf16")
    assert llama2rt.load(tmp_path / "bf16")[0].output.weight.dtype == torch.bfloat16


def test_convert_refuses(tmp_path):
    native.save(make(), None, tmp_path / "m")
    native.save(ScalarModel.from_llama(make()), None, tmp_path / "reward")
    with pytest.raises(InputError, match="m: already exists and is not empty"):
        convert(tmp_path / "m", tmp_path / "m", "hf")
    with pytest.raises(InputError, match="reward: a model with a scalar head has no Meta format"):
        convert(tmp_path / "reward", tmp_path / "x", "meta")
    with pytest.raises(InputError, match="shards: expected a divisor of dim 64, got 3"):
        convert(tmp_path / "m", tmp_path / "x", "meta", shards=3)
    with pytest.raises(InputError, match="shards: only a Meta folder"):
        convert(tmp_path / "m", tmp_path / "x", "hf", shards=2)
    assert not (tmp_path / "x").exists()
