"""Folders that other people wrote: what of theirs counts, survives, or is refused by name."""

import json
import pickle

import pytest
import torch
from model_folders import BATCH, TOKENS, assert_refused, logits, make, rewrite
from safetensors.torch import load_file, save_file, save_model

import llama2rt
from llama2rt import LlamaConfig, Tokenizer
from llama2rt.checkpoint import convert, files, hf, native
from llama2rt.generate import Engine
from llama2rt.model import Llama
from llama2rt.text import chat

transformers = pytest.importorskip("transformers")

MARK = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read(path):
    return json.loads(path.read_text())


def round_trip(folder, tmp_path):
    """The folder through every format, back to Hugging Face's."""
    convert(folder, tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "native2", "native")
    convert(tmp_path / "native2", tmp_path / "out", "hf")
    return tmp_path / "out"


# --- tokens that a folder adds ------------------------------------------------------------------


@pytest.fixture
def extended(tmp_path, small_tokenizer):
    """A folder to which transformers added two tokens, a template and another EOS: tokenizer.model
    stayed as it was."""
    folder = tmp_path / "m"
    hf.save(make(vocab_size=402, context=4096), small_tokenizer, folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": MARK})
    theirs.eos_token = "<|im_end|>"
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(folder)
    return folder


def test_added_tokens_eos_and_template_count_and_survive(extended, tmp_path, caplog):
    theirs = transformers.AutoTokenizer.from_pretrained(extended)
    assert (len(theirs), theirs.eos_token_id) == (402, 401)
    _, ours = llama2rt.load(extended)
    assert "402 pieces instead of 400; EOS 401 instead of 2" in caplog.text
    assert (ours.vocab_size, ours.eos) == (402, 401) and ours.stop_ids[0] == 401
    out = round_trip(extended, tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(out)
    assert (len(again), again.eos_token_id) == (402, 401)
    assert read(out / "config.json")["eos_token_id"] == 401
    assert 401 in transformers.GenerationConfig.from_pretrained(out).eos_token_id
    assert again.encode("<|im_end|>") == theirs.encode("<|im_end|>") == [1, 401]
    assert again.chat_template == TEMPLATE
    assert not (out / "tokenizer.model").exists()  # it would contradict the others
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fox"}]
    tokens, _ = chat.encode_dialogue(llama2rt.load(out)[1], messages)
    assert tokens == theirs.apply_chat_template(messages, return_dict=False)
    assert pickle.loads(pickle.dumps(ours)).stop_ids == ours.stop_ids


def only_model(folder, tokenizer, **companions):
    hf.save(make(vocab_size=402), tokenizer, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    for name, content in companions.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "companions",
    [
        {
            "added_tokens": {MARK[0]: 400, MARK[1]: 401},
            "special_tokens_map": {"eos_token": MARK[1], "additional_special_tokens": MARK},
            "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"},
        },
        {
            "tokenizer_config": {
                "eos_token": MARK[1],
                "added_tokens_decoder": {
                    str(400 + i): {"content": text, "special": True, "normalized": False}
                    for i, text in enumerate(MARK)
                },
            },
            "special_tokens_map": {"eos_token": "</s>"},
        },
    ],
    ids=["added_tokens.json", "added_tokens_decoder"],
)
def test_files_beside_a_lone_tokenizer_model_count(tmp_path, small_tokenizer, companions, caplog):
    only_model(tmp_path / "m", small_tokenizer, **companions)
    _, ours = llama2rt.load(tmp_path / "m")
    assert (ours.vocab_size, ours.eos) == (402, 401)
    assert "eos_token is" in caplog.text and "holds" in caplog.text  # the two name another EOS
    assert "2 added tokens" in caplog.text
    text = "the quick  brown <|im_end|> fox"
    assert ours.encode(text) == small_tokenizer.encode(text)  # text stays text
    convert(tmp_path / "m", tmp_path / "out", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(theirs), theirs.eos_token_id) == (402, 401)
    assert theirs.encode("<|im_end|>") == [1, 401]
    plain = "the quick  brown fox"
    assert theirs.encode(plain) == small_tokenizer.encode(plain, bos=True)


def test_ids_that_contradict_each_other_are_named(tmp_path, small_tokenizer):
    only_model(tmp_path / "m", small_tokenizer, added_tokens={MARK[0]: 405})
    assert_refused(tmp_path / "m", r"added token '<\|im_start\|>': expected id 400, .* got 405")
    hf.save(make(), small_tokenizer, tmp_path / "n")
    (tmp_path / "n" / "added_tokens.json").write_text(json.dumps({"</s>": 7}))
    assert_refused(tmp_path / "n", r"tokenizer\.json: '</s>' has id 2 here and 7 in the files")
    (tmp_path / "n" / "added_tokens.json").write_text("{\n1}")
    assert_refused(tmp_path / "n", r"added_tokens\.json:2: not JSON")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "expected an object, got "),
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": "x"}}, "400: expected an obj"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "id of an"),
        ("tokenizer_config.json", {"chat_template": ["x"]}, "chat_template: expected text, or a"),
        ("added_tokens.json", {"a": "x"}, "added_tokens.json: expected the id of an added token"),
        ("added_tokens.json", {"a": True}, "added_tokens.json: expected the id of an added token"),
    ],
)
def test_values_of_another_shape_are_named(tmp_path, small_tokenizer, file, content, reason):
    hf.save(make(vocab_size=400), small_tokenizer, tmp_path / "m")
    (tmp_path / "m" / file).write_text(json.dumps(content))
    assert_refused(tmp_path / "m", reason)


def test_agreeing_files_keep_the_original(tmp_path, small_tokenizer, caplog):
    hf.save(make(), small_tokenizer, tmp_path / "m")
    (tmp_path / "m" / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    _, tokenizer = llama2rt.load(tmp_path / "m")
    assert tokenizer.digest == small_tokenizer.digest and not caplog.text


def test_a_template_of_a_json_only_folder_survives(tmp_path, small_tokenizer):
    hf.save(make(context=4096), small_tokenizer, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.model").unlink()
    rewrite(tmp_path / "m" / "tokenizer_config.json", chat_template=TEMPLATE.replace("im_", "x_"))
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    (tmp_path / "m" / "additional_chat_templates" / "rag.jinja").write_text("{{ 1 }}")
    out = round_trip(tmp_path / "m", tmp_path)
    assert read(out / "tokenizer_config.json")["chat_template"] == TEMPLATE.replace("im_", "x_")
    assert (out / "additional_chat_templates" / "rag.jinja").read_text() == "{{ 1 }}"


def test_a_json_only_model_without_a_template_gets_the_one_it_is_trained_with(
    tmp_path, small_tokenizer
):
    (tmp_path / "tokenizer.json").write_bytes(small_tokenizer.as_json())
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    hf.save(make(), tokenizer, tmp_path / "m")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fox"}]
    expected, _ = chat.encode_dialogue(tokenizer, messages)
    assert theirs.apply_chat_template(messages, return_dict=False) == expected


# --- what ends a sequence -----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_generation_ends_at_any_of_several_eos_ids(tmp_path, small_tokenizer, where):
    folder = tmp_path / "m"
    model = make(context=4096)
    hf.save(model, small_tokenizer, folder)
    defaults = {"temperature": 0.6, "top_p": 0.9, "do_sample": True}
    rewrite(folder / "generation_config.json", **defaults)
    rewrite(folder / where, eos_token_id=[2, 300])
    for path in (folder, round_trip(folder, tmp_path)):
        loaded, tokenizer = llama2rt.load(path)
        assert tokenizer.stop_ids == (2, 300)
        prompt = [1, 5, 6, 7]
        with torch.no_grad():  # a model that says token 300 and means "end"
            batch = (torch.tensor(prompt), torch.arange(4), torch.tensor([0, 4], dtype=torch.int32))
            said = loaded.hidden(*batch)[-1]
            loaded.output.weight.zero_()
            loaded.output.weight[300] = said
        sample = Engine(loaded, tokenizer).generate([prompt], temperature=0, max_tokens=6)[0]
        assert sample.tokens == [300] and sample.finish_reason == "stop" and not sample.text
        config = transformers.GenerationConfig.from_pretrained(path)
        assert (config.temperature, config.top_p) == (0.6, 0.9)
    out = tmp_path / "out"
    assert read(out / "generation_config.json")["eos_token_id"] == [2, 300]
    assert read(out / "config.json")["eos_token_id"] == [2, 300]


@pytest.mark.parametrize("value", ["</s>", [2, "x"], True, -1, [[2]]])
def test_eos_ids_that_are_none_are_named(tmp_path, small_tokenizer, value):
    hf.save(make(), small_tokenizer, tmp_path / "m")
    rewrite(tmp_path / "m" / "generation_config.json", eos_token_id=value)
    assert_refused(tmp_path / "m", r"generation_config\.json: eos_token_id: expected an id or a")


def test_a_tokenizer_given_apart_keeps_what_ends_the_models_sequences(tmp_path, small_tokenizer):
    from llama2rt.stages.loading import load_llama

    hf.save(make(), small_tokenizer, tmp_path / "m")
    rewrite(tmp_path / "m" / "generation_config.json", eos_token_id=[2, 300])
    path = small_tokenizer.save(tmp_path / "apart")
    assert load_llama(tmp_path / "m", path)[1].stop_ids == (2, 300)


# --- weights ------------------------------------------------------------------------------------


def altered(folder, change):
    path = folder / files.SINGLE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_tied_folder_whose_head_differs_keeps_it(tmp_path, caplog):
    model = make(tied=True)
    hf.save(model, None, tmp_path / "m")
    head = torch.randn(model.output.weight.shape)
    altered(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": head}))
    loaded, _ = llama2rt.load(tmp_path / "m")
    assert not loaded.config.tied and torch.equal(loaded.output.weight, head)
    assert torch.equal(loaded.transformer.embedding.weight, model.transformer.embedding.weight)
    assert "lm_head.weight differs" in caplog.text and "both are kept" in caplog.text
    if int(transformers.__version__.split(".")[0]) >= 5:  # 4 ties them whatever they hold
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        with torch.no_grad():
            expected = theirs(TOKENS[None]).logits[0]
        assert (logits(loaded) - expected).abs().max() < 1e-4
    native.save(loaded, None, tmp_path / "n")
    again, _ = llama2rt.load(tmp_path / "n")
    assert torch.equal(logits(again), logits(loaded)) and not again.config.tied


def test_a_tied_folder_that_repeats_its_embedding_stays_tied(tmp_path, caplog):
    model = make(tied=True)
    hf.save(model, None, tmp_path / "m")
    copy = model.transformer.embedding.weight.detach().clone()
    altered(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": copy}))
    loaded, _ = llama2rt.load(tmp_path / "m")
    assert (
        loaded.config.tied
        and loaded.output.weight is loaded.transformer.embedding.weight
        and not caplog.text
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_folder_with_both_can_be_outlined(tmp_path, differs, dtype):
    """On the meta device, where no parameter has values: so stages check models beforehand."""
    model = make(tied=True)
    hf.save(model, None, tmp_path / "m")
    head = model.transformer.embedding.weight.detach().to(dtype) + differs
    altered(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": head}))
    for device in ("meta", "cpu"):
        loaded, _ = llama2rt.load(tmp_path / "m", device, torch.bfloat16)
        assert loaded.config.tied != differs and loaded.output.weight.device.type == device


def test_a_tied_folder_with_its_head_alone(tmp_path):
    """What safetensors' save_model writes of a tied transformers model."""
    model = make(tied=True)
    hf.save(model, None, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / files.SINGLE).unlink()
    save_model(theirs, str(tmp_path / "m" / files.SINGLE), metadata={"format": "pt"})
    names = load_file(tmp_path / "m" / files.SINGLE).keys()
    assert "lm_head.weight" in names and "model.embed_tokens.weight" not in names
    loaded, _ = llama2rt.load(tmp_path / "m")
    assert loaded.config.tied and torch.equal(logits(loaded), logits(model))


def test_mixed_dtypes_lose_nothing(tmp_path, caplog):
    model = make()
    hf.save(model, None, tmp_path / "m")

    def mix(tensors):
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].bfloat16()

    altered(tmp_path / "m", mix)
    loaded, _ = llama2rt.load(tmp_path / "m")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.transformer.norm.weight, model.transformer.norm.weight)
    assert torch.equal(loaded.output.weight, model.output.weight.bfloat16().float())
    assert "torch.bfloat16" in caplog.text and "all become torch.float32" in caplog.text
    with torch.no_grad():
        loaded.logits(*BATCH)
    half, _ = llama2rt.load(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_weights_that_are_no_floating_point_are_named(tmp_path):
    hf.save(make(), None, tmp_path / "m")
    altered(
        tmp_path / "m",
        lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.int8)}),
    )
    assert_refused(tmp_path / "m", r"model\.norm\.weight: expected one of float32, .*, got int8")


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/model", "a/b", "..", 3])
def test_an_index_that_points_elsewhere_is_refused(tmp_path, file):
    hf.save(make(), None, tmp_path / "other")
    hf.save(make(), None, tmp_path / "m", shard_bytes=30_000)
    index = tmp_path / "m" / files.INDEX
    rewrite(index, weight_map={**read(index)["weight_map"], "model.norm.weight": file})
    assert_refused(
        tmp_path / "m",
        r"index\.json: weight_map: model\.norm\.weight: expected the name of a file in this folder",
    )


def test_a_tokenizer_larger_than_the_model_is_named(tmp_path, small_tokenizer, caplog):
    hf.save(make(vocab_size=390), small_tokenizer, tmp_path / "m")
    llama2rt.load(tmp_path / "m")
    assert "the tokenizer has 400 ids, the model only 390 embeddings" in caplog.text


# --- what others do with our exports ------------------------------------------------------------


def test_the_usual_snippet_runs_on_an_export(tmp_path, small_tokenizer):
    hf.save(make(), small_tokenizer, tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for text in ("hello there", ["hello there", "a"]):
        batch = tokenizer(text, return_tensors="pt", padding=True)
        assert set(batch) == {"input_ids", "attention_mask"}
        model.generate(**batch, max_new_tokens=3)


def test_a_padded_vocabulary_keeps_working(tmp_path, small_tokenizer):
    model = Llama(LlamaConfig(64, 1, 4, 4, 64, vocab_size=448, context=64)).initialize(0)
    hf.save(model, small_tokenizer, tmp_path / "m")
    loaded, tokenizer = llama2rt.load(tmp_path / "m")
    assert (loaded.config.vocab_size, tokenizer.vocab_size) == (448, 400)
    assert Engine(loaded, tokenizer).generate([[1, 5]], max_tokens=4)[0].tokens
