"""Scores are read at the last token, in the order asked, whatever shares the batch."""

import numpy as np
import pytest
import torch
from small_models import packed

from llama2rt.errors import InputError
from llama2rt.model.config import LlamaConfig
from llama2rt.model.heads import ScalarModel
from llama2rt.rollout.scoring import score, score_tokens
from llama2rt.text import chat


@pytest.fixture(scope="module")
def model() -> ScalarModel:
    config = LlamaConfig(
        dim=32, layers=2, heads=4, kv_heads=2, ffn_hidden=64, vocab_size=97, context=64
    )
    return ScalarModel(config).initialize(seed=3)


def _sequences(count: int = 23) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, int(rng.integers(1, 40))).tolist() for _ in range(count)]


def _alone(model: ScalarModel, tokens: list[int]) -> float:
    with torch.no_grad():
        return float(model(*packed(tokens))[-1])


@pytest.mark.parametrize("micro_tokens", [1, 50, 16384])
def test_packed_scores_equal_one_by_one(model, micro_tokens):
    sequences = _sequences()
    expected = [_alone(model, tokens) for tokens in sequences]
    got = score_tokens(model, sequences, micro_tokens=micro_tokens)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_scores_in_eval_mode_without_gradients_and_gives_the_mode_back(model):
    modes = []
    hook = model.register_forward_hook(
        lambda module, _, out: modes.append((module.training, out.requires_grad))
    )
    for training in (True, False):
        model.train(training)
        score_tokens(model, _sequences(3))
        assert model.training is training
    hook.remove()
    assert modes == [(False, False)] * 2


def test_mode_is_given_back_when_scoring_fails(model):
    model.train(True)
    with pytest.raises(Exception, match=r".+"):
        score_tokens(model, [[10_000]])  # outside the vocabulary
    assert model.training
    model.eval()


def test_bad_sequences_are_named(model):
    with pytest.raises(ValueError, match=r"sequences\[1\] is empty"):
        score_tokens(model, [[1], []])
    with pytest.raises(InputError, match=r"sequences\[0\] has 65 tokens.*context is 64"):
        score_tokens(model, [[1] * 65])
    assert score_tokens(model, []).shape == (0,)


def test_scores_that_are_not_finite_rank_nothing(model):
    broken = ScalarModel(model.config).initialize(seed=3)
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="scores are not finite"):
        score_tokens(broken, _sequences(3))


class _Words:
    """A tokenizer of known pieces: one id a word, so that the expected tokens can be counted."""

    bos, eos, template = 1, 2, None

    def encode(self, text, bos=False, eos=False):
        ids = [3 + sum(map(ord, word)) % 90 for word in text.split()]
        return [self.bos] * bos + ids + [self.eos] * eos

    def encode_with_offsets(self, text):
        begins, at = [], 0
        for word in text.split():
            begins.append(at := text.index(word, at))
            at += len(word)
        return self.encode(text), begins


def test_text_is_scored_as_a_finished_dialogue(model):
    messages = [{"role": "user", "content": "how many days has a week"}]
    tokenizer = _Words()
    got = score(model, tokenizer, [(messages, "seven"), (messages, "")])
    tokens, _ = chat.encode_response(tokenizer, messages, "seven")
    assert tokens[-1] == tokenizer.eos
    assert got[0] == pytest.approx(_alone(model, tokens), rel=1e-4, abs=1e-5)
    assert np.isfinite(got).all()
    assert got[0] != got[1]


def test_sampled_tokens_get_no_eos(model):
    open_ended, closed = [1, 5, 9], [1, 5, 9, 2]
    got = score_tokens(model, [open_ended, closed])
    assert got[0] == pytest.approx(_alone(model, open_ended), rel=1e-4, abs=1e-5)
    assert abs(got[0] - got[1]) > 1e-4


def test_a_long_sequence_passes_alone_and_leaves_the_others_their_size(model, monkeypatch):
    sizes = []
    forward = ScalarModel.forward

    def spy(self, tokens, positions, cu_seqlens, keys, **more):
        sizes.append(len(tokens))
        return forward(self, tokens, positions, cu_seqlens, keys, **more)

    monkeypatch.setattr(ScalarModel, "forward", spy)
    sequences = [[1, 2, 3], [4, 5, 6], [7, 8, 9], list(range(1, 13))]
    score_tokens(model, sequences, micro_tokens=6)
    assert sizes == [6, 3, 12]


@pytest.mark.parametrize("micro_tokens", [1, 90, 16384])
def test_responses_to_one_prompt_score_as_they_do_alone(model, monkeypatch, micro_tokens):
    rng = np.random.default_rng(1)
    sequences = []
    for _ in range(10):
        prompt = rng.integers(0, 97, int(rng.integers(1, 30))).tolist()
        for _ in range(int(rng.integers(1, 6))):
            # Few tokens, so that some responses are equal, and some are none.
            sequences.append(prompt + rng.integers(0, 3, int(rng.integers(0, 8))).tolist())
    expected = [_alone(model, tokens) for tokens in sequences]
    sizes = []
    forward = model.transformer.forward
    monkeypatch.setattr(
        model.transformer,
        "forward",
        lambda tokens, *rest: (sizes.append(len(tokens)), forward(tokens, *rest))[1],
    )
    got = score_tokens(model, sequences, micro_tokens=micro_tokens)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    if micro_tokens == 16384:
        assert sum(sizes) < 0.6 * sum(map(len, sequences))
