"""The sampler against the distribution it claims, and its random streams."""

import numpy as np
import pytest
import torch
from scipy import stats

from llama2rt.generate.request import SamplingOptions
from llama2rt.generate.sampling import (
    _INCREMENT,
    RowOptions,
    _mix,
    choose,
    stream_keys,
    uniforms,
)

DRAWS = 40_000


def _uniform(draws=DRAWS, seed=0):
    indices = np.arange(draws)
    keys = stream_keys(seed, indices // 8, indices % 8)
    return torch.from_numpy(uniforms(keys, np.zeros(draws, np.int32)))


def _rows(*options):
    """Rows of logits with these options each."""
    rows = RowOptions.empty(len(options))
    for i, each in enumerate(options):
        rows.put(i, SamplingOptions(**each))
    return rows


def _choose(logits, uniform, **options):
    """Tokens and logprobs of rows with the same options."""
    rows = _rows(options).take(np.zeros(len(logits), np.int64))
    choice = choose(logits, uniform, rows)
    return torch.from_numpy(choice.tokens), torch.from_numpy(choice.logprobs)


def _counts(logits, **options):
    tokens, logprobs = _choose(logits.repeat(DRAWS, 1), _uniform(), **options)
    return torch.bincount(tokens, minlength=len(logits)), tokens, logprobs


def _assert_follows(counts, expected):
    """Chi-square of observed counts against probabilities; impossible tokens never drawn."""
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    test = stats.chisquare(counts[possible].numpy(), (expected[possible] * DRAWS).numpy())
    assert test.pvalue > 1e-3


@pytest.fixture
def logits():
    return torch.randn(40, generator=torch.Generator().manual_seed(3)) * 1.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_softmax(logits, temperature):
    counts, tokens, logprobs = _counts(logits, temperature=temperature)
    expected = (logits.double() / temperature).softmax(0)
    _assert_follows(counts, expected)
    torch.testing.assert_close(logprobs, expected.log()[tokens].float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95])
def test_top_p_keeps_the_crossing_token(logits, top_p):
    counts, _, logprobs = _counts(logits, top_p=top_p)
    p = logits.double().softmax(0)
    ordered, order = p.sort(descending=True)
    kept = order[ordered.cumsum(0) - ordered <= top_p]
    assert p[kept].sum() >= top_p > p[kept[:-1]].sum()
    expected = torch.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()
    _assert_follows(counts, expected)
    assert logprobs.max() == pytest.approx(float(p.max().log()), abs=1e-5)  # of the whole softmax


def test_top_k_then_top_p(logits):
    counts, _, _ = _counts(logits, top_k=7)
    p = logits.double().softmax(0)
    values, order = p.topk(7)
    expected = torch.zeros_like(p)
    expected[order] = values / values.sum()
    _assert_follows(counts, expected)
    counts, _, _ = _counts(logits, top_k=7, top_p=0.6)
    renormalised = values / values.sum()
    kept = order[renormalised.cumsum(0) - renormalised <= 0.6]
    assert 1 < len(kept) < 7
    expected = torch.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()
    _assert_follows(counts, expected)


def test_nucleus_wider_than_the_partial_sort():
    # A flat row needs a full sort, a peaked one does not; both in one batch.
    generator = torch.Generator().manual_seed(0)
    flat, peaked = torch.randn(2, 1000, generator=generator) * torch.tensor([[0.1], [6.0]])
    uniform = _uniform(512)
    options = {"temperature": 1.0, "top_p": 0.9, "top_k": 0}
    both, _ = _choose(torch.stack([flat, peaked]).repeat(256, 1), uniform, **options)
    for row, logits in enumerate((flat, peaked)):
        alone, _ = _choose(logits.repeat(256, 1), uniform[row::2], **options)
        assert torch.equal(both[row::2], alone)
        ordered, order = logits.softmax(0).sort(descending=True)
        kept = order[ordered.cumsum(0) - ordered <= 0.9]
        assert (len(kept) > 128) == (row == 0)
        assert torch.isin(alone, kept).all()
        expected = kept[
            torch.searchsorted(
                logits.double().softmax(0)[kept].cumsum(0),
                uniform[row::2] * logits.double().softmax(0)[kept].sum(),
                right=True,
            )
        ]
        assert (alone == expected).float().mean() > 0.99  # a last bit may move a boundary


def test_argmax_and_its_logprob(logits):
    tokens, logprobs = _choose(
        logits.clone()[None], torch.tensor([0.5]).double(), temperature=0.0, top_p=0.5, top_k=3
    )
    assert tokens.item() == logits.argmax()
    assert logprobs.item() == pytest.approx(float(logits.log_softmax(0).max()), abs=1e-6)


def test_extreme_uniforms_never_choose_impossible_tokens():
    logits = torch.tensor([[-torch.inf, 2.0, 1.0, -torch.inf], [-torch.inf, 2.0, 1.0, -torch.inf]])
    uniform = torch.tensor([2.0**-49, 1 - 2.0**-49], dtype=torch.float64)
    tokens, _ = _choose(logits, uniform, temperature=1.0, top_p=1.0, top_k=0)
    assert tokens.tolist() == [1, 2]


def test_splitmix64_known_values():
    # First outputs of SplitMix64 seeded with 1234567 (its authors' reference code).
    states = np.full(3, 1234567, np.uint64) + np.arange(1, 4, dtype=np.uint64) * _INCREMENT
    assert _mix(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_streams_are_uniform_and_unrelated():
    prompts, samples = np.divmod(np.arange(2000), 10)
    keys = np.concatenate([stream_keys(seed, prompts, samples) for seed in (0, 1, -1)])
    assert len(np.unique(keys)) == len(keys)
    draws = np.stack([uniforms(keys, np.full(len(keys), step)) for step in range(20)])
    assert draws.min() > 0 and draws.max() < 1
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3
    for a, b in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):  # steps, neighbours
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_min_p_keeps_the_tokens_near_the_likeliest(logits):
    counts, _, _ = _counts(logits, min_p=0.2, temperature=0.8)
    p = (logits.double() / 0.8).softmax(0)
    expected = torch.where(p >= 0.2 * p.max(), p, 0)
    assert 1 < (expected > 0).sum() < len(p)
    _assert_follows(counts, expected / expected.sum())


def test_repetition_penalty_draws_otherwise_and_reports_the_models_logprobs(logits):
    seen = torch.tensor([logits.argmax(), logits.argmin(), 5, 5])
    rows = _rows({"repetition_penalty": 1.7}).take(np.zeros(DRAWS, np.int64))
    repeated = seen.repeat(DRAWS, 1).numpy()
    choice = choose(logits.repeat(DRAWS, 1), _uniform(), rows, repeated)
    changed = logits.double().clone()
    changed[seen] = torch.where(changed[seen] > 0, changed[seen] / 1.7, changed[seen] * 1.7)
    tokens = torch.from_numpy(choice.tokens)
    _assert_follows(torch.bincount(tokens, minlength=len(logits)), changed.softmax(0))
    expected = logits.log_softmax(0)[tokens].numpy()
    np.testing.assert_allclose(choice.logprobs, expected, atol=2e-6)


def test_rows_are_drawn_as_if_alone(logits):
    """Of one batch, each by its own options; torch's softmax rounds by the number of rows."""
    options = [
        *(
            {},
            {"temperature": 0},
            {"temperature": 0.3},
            {"top_p": 0.7},
            {"top_k": 3},
            {"min_p": 0.3},
        ),
        *({"top_k": 9, "top_p": 0.5}, {"repetition_penalty": 1.5}, {"logprobs": 2}, {"top_p": 0.7}),
    ]
    batch = logits.repeat(len(options), 1) * torch.linspace(0.5, 2, len(options))[:, None]
    uniform = _uniform(len(options))
    held = np.arange(3)[None]
    together = choose(batch.clone(), uniform, _rows(*options), held)
    for i, each in enumerate(options):
        one = slice(i, i + 1)
        seen = held if "repetition_penalty" in each else None
        alone = choose(batch[one].clone(), uniform[one], _rows(each), seen)
        assert alone.tokens == together.tokens[one]
        assert alone.logprobs == pytest.approx(together.logprobs[one], abs=1e-6)
        assert [t for t, _ in (alone.top or [[]])[0]] == [t for t, _ in together.top[i]]
    assert [len(each) for each in together.top] == [0] * 8 + [2, 0]
