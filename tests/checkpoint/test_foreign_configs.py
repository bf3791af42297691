"""Keys and files of other people's folders that change what a model computes."""

import json

import pytest
import torch
from model_folders import TOKENS, assert_refused, logits, make, rewrite
from safetensors.torch import load_file

import llama2rt
from llama2rt.checkpoint import convert, files, hf, meta

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "default", "rope_theta": 900.0}},
        {"rope_scaling": {"type": "default", "rope_theta": 900.0}, "rope_theta": 300.0},
        {
            "rope_scaling": {"rope_type": "default", "rope_theta": 900.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        },
        {"rope_theta": 300.0, "rope_parameters": {"rope_theta": 900.0}},
        {"rope_theta": 900.0, "rope_scaling": None},
    ],
)
def test_rotary_frequencies_are_those_of_transformers(tmp_path, rope):
    folder = tmp_path / "m"
    hf.save(make(), None, folder)
    absent = {key: None for key in ("rope_theta", "rope_parameters") if key not in rope}
    rewrite(folder / "config.json", **{**absent, **{k: v for k, v in rope.items() if v}})
    if rope.get("rope_scaling", 1) is None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    ours, _ = llama2rt.load(folder)
    assert ours.config.rope_theta == 900.0
    if transformers.__version__.startswith("4.") and rope.get("rope_theta") != 900.0:
        pytest.skip("transformers 4 reads rope_theta at the top of config.json alone")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    assert (logits(ours) - expected).abs().max() < 1e-4


def test_a_llama_made_an_encoder_is_refused(tmp_path):
    hf.save(make(), None, tmp_path / "m")
    rewrite(tmp_path / "m" / "config.json", is_causal=False)
    assert_refused(tmp_path / "m", r"config\.json: is_causal: only True is supported, got False")


def test_a_folder_without_a_tokenizer_claims_no_ids(tmp_path, caplog):
    """Left out, transformers' config would say EOS 2, whatever the model's is."""
    hf.save(make(), None, tmp_path / "m")
    rewrite(tmp_path / "m" / "config.json", eos_token_id=300)
    convert(tmp_path / "m", tmp_path / "out", "hf")
    assert "no tokenizer, with which the ids of BOS, EOS and padding" in caplog.text
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.eos_token_id is None and config.bos_token_id is None


def test_pickles_and_adapters_are_named(tmp_path, caplog):
    folder = tmp_path / "m"
    model = make()
    hf.save(model, None, folder)
    (folder / "adapter_config.json").write_text("{}")
    llama2rt.load(folder)
    assert not caplog.records  # without weights there is no adapter
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "adapter_model.bin").write_bytes(b"")
    assert (logits(llama2rt.load(folder)[0]) == logits(model)).all()
    assert "adapter_config.json: the model beside it is read, without this adapter" in caplog.text
    (folder / files.SINGLE).rename(tmp_path / "weights")
    assert_refused(folder, r"adapter_config\.json: adapters are not read; merge it into its model")
    (tmp_path / "weights").rename(folder / files.SINGLE)
    (folder / "adapter_config.json").unlink()
    torch.save(load_file(folder / files.SINGLE), folder / "pytorch_model.bin")
    (folder / files.SINGLE).unlink()
    assert_refused(folder, r"pytorch_model\.bin is a pickle, which can run code: save it again")


def altered(folder, change):
    path = folder / "consolidated.00.pth"
    shard = torch.load(path)
    torch.save(change(shard), path)


def test_meta_files_of_other_shapes_are_named(tmp_path):
    folder = tmp_path / "m"
    meta.save(make(context=4096), None, folder)
    rope = {"rope.freqs": torch.zeros(4)}
    rope |= {f"layers.{i}.attention.inner_attention.rope.freqs": torch.zeros(4) for i in (0, 1)}
    altered(folder, lambda shard: {**shard, **rope})
    llama2rt.load(folder)  # LLaMA 1's carry them
    rewrite(folder / "params.json", vocab_size="400")
    assert_refused(folder, r"params\.json: vocab_size: expected a positive integer, got '400'")
    rewrite(folder / "params.json", vocab_size=400)
    altered(folder, lambda shard: {**shard, "norm.weight": 3})
    assert_refused(folder, r"00\.pth: norm\.weight: expected a tensor, got int")
    altered(folder, lambda shard: [1])
    assert_refused(folder, r"00\.pth: expected tensors by name, got list")


def test_a_context_that_metas_format_loses_is_named(tmp_path, caplog):
    hf.save(make(context=64), None, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "meta", "meta")
    assert "params.json holds no context: it will be read as 4096, not this model's 64" in (
        caplog.text
    )
    assert llama2rt.load(tmp_path / "meta")[0].config.context == 4096
    caplog.clear()
    meta.save(make(context=4096), None, tmp_path / "same")
    assert "context" not in caplog.text
