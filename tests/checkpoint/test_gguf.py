"""GGUF files: the weights and tokenizer that they were made of, and every damage by name."""

import copy
import json

import numpy as np
import pytest
import torch
from model_folders import TOKENS, logits, make, same_weights

import llama2rt
from llama2rt.checkpoint import convert, gguf_file
from llama2rt.checkpoint.commands import convert as convert_command
from llama2rt.checkpoint.load import read
from llama2rt.errors import InputError
from llama2rt.generate.commands import _hash
from llama2rt.run.manifest import hash_path
from llama2rt.text.chat import encode_prompt

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

import gguf_files  # noqa: E402 - needs it

KINDS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "Q8_0": torch.float32,
}


def as_dtype(model, dtype):
    return copy.deepcopy(model).to(dtype)


@pytest.fixture(scope="module")
def model():
    """One whose vectors every 16-bit type holds, as those of a model trained in bf16 are."""
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(parameter.bfloat16().clamp(0.25))
    return model


@pytest.fixture(scope="module")
def settings(model, small_tokenizer):
    template = "{% for m in messages %}{{ '[INST]' + m['content'] }}{% endfor %}"
    tokens = gguf_files.sentencepiece_settings(small_tokenizer)
    return gguf_files.settings_of(model) | tokens | {"tokenizer.chat_template": template}


@pytest.fixture(scope="module", params=list(KINDS))
def file(request, model, settings, tmp_path_factory):
    """(path, its type of matrices, a model of the weights in it)."""
    kind = request.param
    path = tmp_path_factory.mktemp(kind) / "model.gguf"
    gguf_files.write(path, gguf_files.tensors_of(model), settings, kind)
    return path, kind, gguf_files.rounded(model, kind)


def test_weights_shape_and_tokenizer_are_those_it_was_made_of(file, small_tokenizer, caplog):
    path, kind, expected = file
    loaded, tokenizer = llama2rt.load(path)
    assert loaded.config == expected.config
    assert {p.dtype for p in loaded.parameters()} == {KINDS[kind]}
    assert same_weights(loaded, as_dtype(expected, KINDS[kind]))
    assert tokenizer.agrees_with(small_tokenizer) and small_tokenizer.agrees_with(tokenizer)
    assert ("Q8_0 is read as fp32" in caplog.text) == (kind == "Q8_0" and caplog.records != [])
    halved, _ = llama2rt.load(path, dtype=torch.bfloat16)
    assert same_weights(halved, as_dtype(expected, torch.bfloat16))


@pytest.mark.parametrize("file", ["BF16", "Q8_0"], indirect=True)
def test_transformers_gives_equal_logits_on_the_export_and_on_the_file_itself(file, tmp_path):
    transformers = pytest.importorskip("transformers")
    path, _, expected = file
    convert(path, tmp_path / "hf", "hf", dtype="fp32")
    ours = logits(expected)
    load = transformers.AutoModelForCausalLM.from_pretrained
    exported = load(tmp_path / "hf")
    itself = load(path.parent, gguf_file=path.name, dtype=torch.float32)
    for theirs in (exported, itself):
        with torch.no_grad():
            found = theirs(TOKENS[None]).logits[0]
        torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
    # Without the permutation undone, or with another one, they are far from it.
    wrong = expected.transformer.blocks[0].query.weight
    with torch.no_grad():
        before = wrong.clone()
        wrong.copy_(torch.from_numpy(gguf_files.permuted(before.numpy(), 8).copy()))
        assert (logits(expected) - ours).abs().max() > 0.01
        wrong.copy_(before)


@pytest.mark.parametrize("file", ["BF16"], indirect=True)
def test_converted_through_every_format(file, model, tmp_path):
    path, kind, expected = file
    for to in ("native", "hf", "meta"):
        convert_command(path, tmp_path / to, to=to)
        again, tokenizer = llama2rt.load(tmp_path / to)
        if to == "meta":  # whose params.json has no context
            assert vars(again.config) == {**vars(model.config), "context": again.config.context}
        else:
            assert again.config == model.config
        assert same_weights(again, as_dtype(expected, KINDS[kind]))
        messages = [{"role": "user", "content": "the fox counts sheep"}]
        assert encode_prompt(tokenizer, messages) == encode_prompt(
            llama2rt.load(path, "meta")[1], messages
        )
    folder = tmp_path / "hf"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "[INST]" in config["chat_template"] and config["add_bos_token"] is True


def test_part_of_a_weight_is_that_part_of_the_whole(file, model):
    path, kind, expected = file
    _, _, weights = read(path)
    for name, parameter in as_dtype(expected, KINDS[kind]).named_parameters():
        assert torch.equal(weights[name].read(), parameter), name
        rows = parameter.shape[0]
        rest = [slice(0, n) for n in parameter.shape[1:]]
        areas = [(slice(3, rows - 5), *rest), (slice(rows // 2, rows // 2 + 1), *rest)]
        if rest:
            areas.append((slice(1, rows), slice(7, parameter.shape[1] - 3)))
        for area in areas:
            assert torch.equal(weights[name].read(area), parameter[area]), (name, area)


def test_each_tensor_is_read_once_and_none_with_another(file, tmp_path, monkeypatch):
    path, *_ = file
    reads = []
    fromfile = np.fromfile

    def counted(file, dtype, count, offset):
        reads.append((offset, count))
        return fromfile(file, dtype, count, offset=offset)

    stored = gguf_file.read(path).tensors.values()
    read(path)  # reads no matrix
    monkeypatch.setattr(gguf_file.np, "fromfile", counted)
    convert(path, tmp_path / "out", "native")
    matrices = {(t.begin, t.nbytes) for t in stored if len(t.shape) > 1}
    assert set(reads) == {(t.begin, t.nbytes) for t in stored}
    assert sorted(r for r in reads if r in matrices) == sorted(matrices)


def test_vectors_that_the_matrices_dtype_does_not_hold_keep_theirs(tmp_path, settings, caplog):
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.tensors_of(make()), settings, "BF16")
    loaded, _ = llama2rt.load(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert "is torch.bfloat16" in caplog.text and "all become torch.float32" in caplog.text


def test_settings_that_a_file_may_leave_out(tmp_path, small_tokenizer):
    model = make(tied=True, kv_heads=8, rope_theta=10000.0)
    leave = ("attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "vocab_size")
    settings = gguf_files.settings_of(model) | dict.fromkeys(f"llama.{key}" for key in leave)
    settings |= {"llama.rope.scaling.type": "none", "llama.attention.head_count_kv": [8, 8]}
    tensors = gguf_files.tensors_of(model) | {"rope_freqs.weight": np.ones(4, np.float32)}
    tensors.pop("output.weight", None)
    path = gguf_files.write(tmp_path / "m.gguf", tensors, settings)
    loaded, tokenizer = llama2rt.load(path)
    assert loaded.config == model.config and tokenizer is None
    assert same_weights(loaded, model)


def write_changed(path, model, settings, changes, tensors=None, kind="F32", **options):
    values = gguf_files.tensors_of(model)
    for name, tensor in (tensors or {}).items():
        values[name] = tensor
        if tensor is None:
            del values[name]
    return gguf_files.write(path, values, settings | changes, kind, **options)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type: only 'none'"),
        ({"llama.rope.scaling.factor": 8.0}, "llama.rope.scaling.factor: only 1"),
        ({"llama.expert_count": 8}, "llama.expert_count: only 0 is supported, got 8"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale"),
        ({"llama.attention.key_length": 16}, "attention.key_length: expected .* = 8, got 16"),
        ({"llama.attention.sliding_window": 32}, "llama.attention.sliding_window"),
        ({"llama.attention.head_count_kv": [4, 8]}, "head_count_kv: only one for all layers"),
        ({"llama.context_length": None}, "llama.context_length: missing"),
        ({"llama.block_count": 3}, "blk.2.attn_k.weight: missing"),
        ({"llama.attention.head_count": 7}, "heads: expected a divisor of dim 64, got 7"),
        ({"llama.embedding_length": "wide"}, "llama.embedding_length: expected a number"),
        ({"general.type": "adapter"}, "general.type: only 'model' is supported, got 'adapter'"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model: expected 'llama' .* got 't5'"),
        ({"tokenizer.ggml.bos_token_id": 4000}, "tokenizer.ggml.bos_token_id: expected 0 to 399"),
        ({"general.alignment": 24}, "general.alignment: expected a power of two"),
    ],
)
def test_settings_that_are_refused_by_name(tmp_path, model, settings, changes, pattern):
    path = write_changed(tmp_path / "m.gguf", model, settings, changes)
    with pytest.raises(InputError, match=rf"m\.gguf: .*{pattern}"):
        read(path)


def test_tensors_that_are_refused_by_name_and_type(tmp_path, model, settings):
    with pytest.raises(InputError, match=r"general\.architecture: only 'llama' .* got 'qwen2'"):
        read(write_changed(tmp_path / "a.gguf", model, settings, {}, architecture="qwen2"))
    named = {"blk.1.ffn_up.weight": "Q4_0"}
    gguf_files.KINDS["Q4_0"] = gguf.GGMLQuantizationType.Q4_0
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight: stored as Q4_0; only F32, F16"):
        read(write_changed(tmp_path / "b.gguf", model, settings, {}, kinds=named))
    scaled = {"rope_freqs.weight": np.linspace(1, 8, 4, dtype=np.float32)}
    with pytest.raises(InputError, match=r"rope_freqs\.weight: only unscaled rope"):
        read(write_changed(tmp_path / "c.gguf", model, settings, {}, scaled))
    bias = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.bias: not part of a model"):
        read(write_changed(tmp_path / "d.gguf", model, settings, {}, bias))
    short = {"blk.0.attn_k.weight": np.zeros((16, 64), np.float32)}
    with pytest.raises(InputError, match=r"attn_k\.weight: expected shape \[32, 64\], got \[16,"):
        read(write_changed(tmp_path / "e.gguf", model, settings, {}, short))


def test_unknown_settings_are_named_in_a_warning(tmp_path, model, settings, caplog):
    read(write_changed(tmp_path / "m.gguf", model, settings, {"llama.brand_new": 3}))
    assert "m.gguf: not read: llama.brand_new" in caplog.text


# --- several files ----------------------------------------------------------------------------


def test_several_files_are_one_model(tmp_path, model, settings):
    first = write_changed(tmp_path / "m.gguf", model, settings, {}, tensors_per_file=6)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 4 and first == parts[0]
    for part in (parts[0], parts[2]):
        loaded, tokenizer = llama2rt.load(part)
        assert same_weights(loaded, model) and tokenizer is not None
    # One model too for `generate --resume`, until one of its files is another.
    assert _hash(parts[0]) == _hash(parts[2]) != hash_path(parts[0])
    whole, before = parts[1].read_bytes(), _hash(parts[0])
    parts[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert _hash(parts[0]) != before
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(InputError, match=r"m-00002-of-00004\.gguf: split\.no: expected 1 of 4"):
        read(first)
    parts[1].unlink()
    with pytest.raises(InputError, match=r"m-00002-of-00004\.gguf: missing, one of the 4 files"):
        read(first)
    parts[1].write_bytes(whole)
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match=r"renamed\.gguf: split\.count: this is one of 4 files"):
        read(renamed)


# --- damage -----------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_is_named_with_key_or_tensor(tmp_path, model, settings):
    path = write_changed(tmp_path / "m.gguf", model, settings, {}, kind="Q8_0")
    whole = path.read_bytes()
    stored = sorted(gguf_file.read(path).tensors.values(), key=lambda tensor: tensor.begin)
    for cut in [0, 3, 4, 8, 20, 24, 31, *range(40, stored[0].begin, 1709)]:
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"m\.gguf: (not a GGUF|neither|damaged or cut off)"):
            read(path)
    path.write_bytes(whole[: stored[0].begin - 40])
    with pytest.raises(InputError, match=r"ends at byte \d+, within the description after \w"):
        read(path)
    for tensor in (stored[0], stored[7], stored[-1]):
        path.write_bytes(whole[: tensor.begin + tensor.nbytes - 1])
        with pytest.raises(InputError, match=rf"m\.gguf: {tensor.name}: damaged or cut off: ends"):
            read(path)
    path.write_bytes(whole)
    _, _, weights = read(path)
    path.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=rf"{stored[-1].name}: damaged or cut off$"):
        for weight in weights.values():
            weight.read()


def test_damaged_bytes_are_an_input_error_or_are_other_values(tmp_path, settings, model, seed):
    """Never another exception, nor memory for a length that no file has."""
    path = write_changed(tmp_path / "m.gguf", model, settings, {})
    whole = bytearray(path.read_bytes())
    header = min(tensor.begin for tensor in gguf_file.read(path).tensors.values())
    random = np.random.default_rng(seed)
    refused = 0
    for at in [*range(4, 24), *random.integers(24, header, 60), *range(header - 90, header)]:
        kept, whole[at] = whole[at], whole[at] ^ 0xFF
        path.write_bytes(whole)
        try:
            gguf_file.read(path)
        except InputError as error:
            refused += 1
            assert "m.gguf" in str(error)
        whole[at] = kept
    assert refused > 40


def test_other_versions_and_files(tmp_path, model, settings):
    path = write_changed(tmp_path / "m.gguf", model, settings, {})
    whole = path.read_bytes()
    for version, pattern in ((1, "GGUF version 1"), (3 << 24, "a big-endian file")):
        path.write_bytes(whole[:4] + version.to_bytes(4, "little") + whole[8:])
        with pytest.raises(InputError, match=pattern):
            read(path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="neither a model folder nor a GGUF file"):
        read(tmp_path / "notes.txt")
    with pytest.raises(InputError, match=r"no such model folder"):
        read(tmp_path / "nothing.gguf")
    with pytest.raises(InputError, match=r"name the GGUF file itself, such as .*m\.gguf"):
        read(tmp_path)


def test_gguf_s_own_reader_finds_the_same(tmp_path, model, settings):
    path = write_changed(tmp_path / "m.gguf", model, settings, {}, kind="Q8_0")
    ours, theirs = gguf_file.read(path), gguf.GGUFReader(path)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.metadata) == keys
    for key in keys:
        assert ours.metadata[key] == theirs.fields[key].contents(), key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.begin, found.nbytes) == (tensor.data_offset, tensor.n_bytes)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        area = tuple(slice(0, n) for n in found.shape)
        assert torch.equal(found.read(area).float(), torch.from_numpy(values.copy()))
