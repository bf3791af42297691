"""Reward models in Hugging Face folders: where transformers reads their scores, and where we do."""

import json

import numpy as np
import pytest
import torch
from model_folders import assert_refused, make, rewrite

import llama2rt
from llama2rt.checkpoint import convert, hf
from llama2rt.model import ScalarModel
from llama2rt.rollout.scoring import score_tokens

transformers = pytest.importorskip("transformers")

TEXTS = ["the fox </s>", "a quick brown fox jumps over lazy dogs </s>", "what </s>", "a fox"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad", [None, "</s>"])
def test_exported_reward_models_score_batches(tmp_path, small_tokenizer, side, pad):
    model = ScalarModel.from_llama(make(), seed=4)
    hf.save(model, small_tokenizer, tmp_path / "m")
    if pad is not None:  # a folder that pads with EOS: its scores would be read a token early
        rewrite(tmp_path / "m" / "tokenizer_config.json", pad_token=pad)
        convert(tmp_path / "m", tmp_path / "again", "hf")
    folder = tmp_path / ("m" if pad is None else "again")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    assert theirs.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = ["the fox </s>", "a quick brown fox jumps over lazy dogs </s>", "what </s>"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        together = theirs(**batch).logits[:, 0]
        for i, text in enumerate(texts):
            ids = tokenizer(text, return_tensors="pt")
            assert ids["input_ids"][0, -1] == small_tokenizer.eos
            alone = theirs(**ids).logits[0, 0]
            n = ids["input_ids"].shape[1]
            cu_seqlens = torch.tensor([0, n], dtype=torch.int32)
            ours = model(ids["input_ids"][0], torch.arange(n), cu_seqlens)[-1]
            torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(alone, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_folder_that_pads_with_eos_is_read_in_front_of_it(
    tmp_path, small_tokenizer, caplog, side
):
    """As trainers leave it that give a tokenizer without a pad token its EOS to pad with: the model
    has never been read at an EOS."""
    hf.save(ScalarModel.from_llama(make(), seed=4), small_tokenizer, tmp_path / "m")
    as_foreign(tmp_path / "m", pad_token_id=small_tokenizer.eos)
    rewrite(tmp_path / "m" / "tokenizer_config.json", pad_token="</s>")
    caplog.set_level("INFO")
    convert(tmp_path / "m", tmp_path / "native", "native")
    assert "pad_token_id 2 also ends answers: scores are read at the token before" in caplog.text
    convert(tmp_path / "native", tmp_path / "again", "hf")
    for name in ("m", "again"):
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name, padding_side=side)
        assert theirs.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id == 2
        with torch.no_grad():
            batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
            expected = theirs(**batch).logits[:, 0]
        ids = [tokenizer(text)["input_ids"] for text in TEXTS]
        assert [i[-1] == 2 for i in ids] == [True, True, True, False]
        for folder in (name, "native"):
            model, _ = llama2rt.load(tmp_path / folder)
            found = score_tokens(model, ids)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
            alone = score_tokens(model, [i[:-1] if i[-1] == 2 else i for i in ids])
            np.testing.assert_array_equal(found, alone)
            assert np.isfinite(score_tokens(model, [[2], [2, 2]])).all()


@pytest.mark.parametrize("pad", [400, "</s>", 1.0, True])
def test_a_pad_token_that_is_no_id_is_refused(tmp_path, small_tokenizer, pad):
    hf.save(ScalarModel.from_llama(make(), seed=4), small_tokenizer, tmp_path / "m")
    as_foreign(tmp_path / "m", pad_token_id=pad)
    assert_refused(tmp_path / "m", r"config\.json: pad_token_id: expected an id below 400, got ")


def as_foreign(folder, **changes):
    """The folder without the key that our own exports have."""
    config = json.loads((folder / "config.json").read_text())
    del config["score_unread"]
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_an_export_with_nothing_but_eos_to_pad_with_keeps_its_scores(
    tmp_path, small_tokenizer, caplog, monkeypatch
):
    """As of tokenizers whose BOS is their EOS."""
    monkeypatch.setattr(type(small_tokenizer), "pad_candidate", lambda self: self.eos)
    model = ScalarModel.from_llama(make(), seed=4)
    hf.save(model, small_tokenizer, tmp_path / "m")
    assert caplog.text.count("pad_token_id becomes 2, which also ends answers") == 1
    again, _ = llama2rt.load(tmp_path / "m")
    text = [[1, 250, 13, 2]]
    assert again.unread is None
    np.testing.assert_array_equal(score_tokens(again, text), score_tokens(model, text))


def test_a_folder_without_a_tokenizer_keeps_its_pad_token(tmp_path):
    hf.save(ScalarModel.from_llama(make(), seed=4), None, tmp_path / "m")
    as_foreign(tmp_path / "m", pad_token_id=77)
    convert(tmp_path / "m", tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "again", "hf")
    for name in ("m", "native", "again"):
        assert llama2rt.load(tmp_path / name)[0].unread == 77
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert theirs.config.pad_token_id == 77


@pytest.mark.parametrize("behind", ["", "\n"])
def test_what_a_template_writes_behind_eos_is_what_transformers_reads(
    tmp_path, small_tokenizer, behind
):
    hf.save(ScalarModel.from_llama(make(), seed=4), small_tokenizer, tmp_path / "m")
    as_foreign(tmp_path / "m", pad_token_id=2)
    end = json.dumps("</s>" + behind)
    template = "{% for m in messages %}{{ m.content + END }}{% endfor %}".replace("END", end)
    rewrite(tmp_path / "m" / "tokenizer_config.json", pad_token="</s>", chat_template=template)
    model, _ = llama2rt.load(tmp_path / "m")
    assert model.unread == (None if behind else 2)


@pytest.mark.parametrize("pad", [None, -1, 0])
def test_a_pad_token_that_ends_no_text_changes_nothing(tmp_path, small_tokenizer, pad):
    hf.save(ScalarModel.from_llama(make(), seed=4), small_tokenizer, tmp_path / "m")
    as_foreign(tmp_path / "m", pad_token_id=pad)
    model, _ = llama2rt.load(tmp_path / "m")
    assert model.unread is None
    convert(tmp_path / "m", tmp_path / "native", "native")
    assert "unread" not in json.loads((tmp_path / "native" / "config.json").read_text())
