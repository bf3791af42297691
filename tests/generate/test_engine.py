"""The engine against transformers, against the training path and against itself."""

import copy

import numpy as np
import pytest
import torch

from llama2rt.errors import InputError
from llama2rt.generate import Engine


def _prompts(count, longest, vocab_size=400, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest + 1, count)
    return [rng.integers(3, vocab_size, size).tolist() for size in sizes]


def _top_two_gap(model, tokens):
    """Gap between the two largest logits after each token."""
    n = len(tokens)
    logits = model.logits(
        torch.tensor(tokens), torch.arange(n), torch.tensor([0, n], dtype=torch.int32)
    )
    values = logits.float().topk(2).values
    return values[:, 0] - values[:, 1]


@torch.no_grad()
def _assert_same_or_tie(model, prompt, ours, theirs, gap=1e-4):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            at = _top_two_gap(model, prompt + ours[:i])[-1]
            assert at < gap, f"token {i}: {a} and {b}, although the gap is {at:.2e}"
            return
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_greedy_equals_transformers(models, kv_heads):
    model = models.build(kv_heads)
    theirs = models.build_transformers(model)
    prompts = _prompts(12, 40)
    ours = Engine(model, models.Ids(), page_size=8, max_sequences=5).generate(
        prompts, temperature=0, max_tokens=30
    )
    same = 0
    for prompt, completion in zip(prompts, ours, strict=True):
        reference = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        _assert_same_or_tie(model, prompt, completion.tokens, reference)
        same += completion.tokens == reference
        ended = reference[-1] == 2
        assert completion.finish_reason == ("stop" if ended else "length")
    assert same >= 11


def _recompute(model, completion, temperature):
    tokens = completion.prompt_tokens + completion.tokens
    n, prompt = len(tokens), len(completion.prompt_tokens)
    targets = torch.full((n,), -1)
    targets[prompt - 1 : n - 1] = torch.tensor(completion.tokens)
    with torch.no_grad():
        logprob = model(
            torch.tensor(tokens),
            torch.arange(n),
            torch.tensor([0, n], dtype=torch.int32),
            targets,
            temperature=temperature,
        )
    return logprob[prompt - 1 : n - 1]


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_rollout_logprobs_equal_the_training_path(models, temperature, kv_heads):
    model = models.build(kv_heads)
    completions = Engine(model, models.Ids(), max_sequences=6).generate(
        _prompts(6, 30), n=3, temperature=temperature, top_p=0.9, max_tokens=25
    )
    for completion in completions:
        expected = _recompute(model, completion, temperature)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-5
        )
    greedy = Engine(model, models.Ids()).generate(_prompts(2, 30), temperature=0, max_tokens=9)
    for completion in greedy:
        expected = _recompute(model, completion, 1.0)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_rollout_logprobs_in_bf16(models, temperature):
    # Decoding and training round to bf16 at different places (2^-9 relative per operation): the
    # two may differ by no more than bf16 differs from fp32 on the same path.
    model = models.build(dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    completions = Engine(model, models.Ids()).generate(
        _prompts(8, 30), n=2, temperature=temperature, max_tokens=25
    )
    ours, training, truth = (
        torch.cat(parts)
        for parts in zip(
            *(
                (
                    torch.tensor(c.logprobs),
                    _recompute(model, c, temperature),
                    _recompute(exact, c, temperature),
                )
                for c in completions
            ),
            strict=True,
        )
    )
    rounding = (training - truth).square().mean().sqrt()
    assert (ours - training).square().mean().sqrt() < 1.5 * rounding
    assert (ours - truth).square().mean().sqrt() < 1.2 * rounding
    assert abs((ours - training).mean()) < 0.2 * rounding  # a bias would be a KL that is not there


def _samples(completions):
    return [(c.tokens, c.text, c.finish_reason) for c in completions]


def test_samples_do_not_depend_on_the_batch(models):
    model = models.build()
    prompts = _prompts(7, 30)
    options = {"n": 3, "temperature": 0.9, "top_p": 0.95, "max_tokens": 20, "seed": 5}
    ended = []
    expected = Engine(model, models.Ids()).generate(prompts, **options, on_finish=ended.append)
    assert sorted(map(id, ended)) == sorted(map(id, expected))
    assert [c.prompt_index for c in expected] == [i for i in range(7) for _ in range(3)]
    assert [c.prompt_tokens for c in expected] == [p for p in prompts for _ in range(3)]
    assert len({tuple(c.tokens) for c in expected}) > 15
    longest = 8 * -(-max(len(p) + 20 for p in prompts) // 8)
    for engine in (
        Engine(model, models.Ids(), max_sequences=1),
        Engine(model, models.Ids(), max_sequences=4, page_size=3),
        Engine(model, models.Ids(), page_size=8, max_cached_tokens=longest),  # preempts
        Engine(model, models.Ids(), page_size=8, max_cached_tokens=3 * longest),
    ):
        again = engine.generate(prompts, **options)
        assert _samples(again) == _samples(expected)
        np.testing.assert_allclose(
            np.concatenate([c.logprobs for c in again]),
            np.concatenate([c.logprobs for c in expected]),
            atol=1e-4,
        )
    fewer = Engine(model, models.Ids()).generate(prompts[:2], **options)
    assert _samples(fewer) == _samples(expected[:6])
    assert _samples(expected) == _samples(Engine(model, models.Ids()).generate(prompts, **options))


def test_seeds_and_indices_give_different_samples(models):
    engine = Engine(models.build(), models.Ids())
    same_prompt = [[5, 6, 7]] * 4
    outputs = [c.tokens for seed in (0, 1) for c in engine.generate(same_prompt, n=4, seed=seed)]
    assert len({tuple(tokens) for tokens in outputs}) == len(outputs)


def test_first_tokens_follow_the_model(models):
    """End to end: the drawn tokens' distribution is the model's softmax, shared prompt and all."""
    from scipy import stats

    model = models.build(vocab_size=30)
    prompt = [4, 9, 17, 3, 8]
    n = 8000
    engine = Engine(model, models.Ids(-1), max_sequences=500)
    first = [c.tokens[0] for c in engine.generate([prompt], n=n, temperature=4.0, max_tokens=1)]
    with torch.no_grad():
        logits = model.logits(
            torch.tensor(prompt), torch.arange(5), torch.tensor([0, 5], dtype=torch.int32)
        )[-1]
    expected = (logits.double() / 4.0).softmax(0).numpy() * n
    counts = np.bincount(first, minlength=30)
    assert expected.min() > 5
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_stop_and_length(models):
    model = models.build()
    prompt = [5, 6, 7]
    free = Engine(model, models.Ids(-1)).generate([prompt], temperature=0, max_tokens=12)[0]
    assert free.finish_reason == "length" and len(free.tokens) == len(free.logprobs) == 12
    third = free.tokens[3]
    cut = free.tokens.index(third) + 1
    stopped = Engine(model, models.Ids(third)).generate([prompt], temperature=0, max_tokens=12)[0]
    assert stopped.tokens == free.tokens[:cut] and stopped.finish_reason == "stop"
    assert stopped.text.split() == [str(token) for token in free.tokens[: cut - 1]]
    # The limit reached exactly with EOS is a stop; one token earlier it is a length without EOS.
    exact = Engine(model, models.Ids(third)).generate([prompt], temperature=0, max_tokens=cut)[0]
    assert exact.finish_reason == "stop"
    if cut > 1:
        short = Engine(model, models.Ids(third)).generate(
            [prompt], temperature=0, max_tokens=cut - 1
        )[0]
        assert short.finish_reason == "length" and third not in short.tokens


def test_eos_at_once_is_an_empty_response(models):
    model = models.build()
    first = Engine(model, models.Ids(-1)).generate([[5, 6]], temperature=0, max_tokens=1)[0].tokens
    empty = Engine(model, models.Ids(first[0])).generate([[5, 6]], temperature=0)[0]
    assert (empty.tokens, empty.text, empty.finish_reason) == (first, "", "stop")


def test_context_ends_a_sequence(models):
    model = models.build()
    full = [[3] * 95, [4] * 90, [5]]
    completions = Engine(model, models.Ids(-1)).generate(full, max_tokens=200)
    assert [len(c.tokens) for c in completions] == [1, 6, 95]
    assert {c.finish_reason for c in completions} == {"length"}


def test_bad_input(models):
    engine = Engine(models.build(), models.Ids(), max_cached_tokens=64)
    for prompts, message in (
        ([[3], []], "prompt 1: empty"),
        ([[3] * 96], "prompt 0: 96 tokens leave no room in the context of 96"),
        ([[3, 400]], r"prompt 0: token id outside 0\.\.399"),
        ([[-1]], r"prompt 0: token id outside"),
        ([[3], [{"role": "user", "content": " "}]], "prompt 1: message 1: user content is blank"),
    ):
        with pytest.raises(InputError, match=message):
            engine.generate(prompts)
    for option in (
        {"n": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_k": -1},
        {"max_tokens": 0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: expected"):
            engine.generate([[3]], **option)
    with pytest.raises(ValueError, match="max_cached_tokens: expected at least 96"):
        engine.generate([[3] * 10], max_tokens=80)
    assert engine.generate([]) == []


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0.9}, {"top_k": 5}, {}])
def test_a_model_that_is_not_finite_is_said_so(models, options):
    model = copy.deepcopy(models.build())
    with torch.no_grad():
        model.output[7, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        Engine(model, models.Ids()).generate([[3, 4, 5]], **options)


def test_messages_and_text(models, tokenizer):
    model = models.build(vocab_size=tokenizer.vocab_size)
    messages = [{"role": "user", "content": "questions about dates"}]
    engine = Engine(model, tokenizer)
    (completion,) = engine.generate([messages], max_tokens=30, seed=3)
    assert completion.prompt_tokens[0] == tokenizer.bos
    assert (
        tokenizer.decode(completion.prompt_tokens).strip() == "[INST] questions about dates [/INST]"
    )
    assert completion.text == tokenizer.decode(completion.tokens).strip()
    many = engine.generate([messages], n=60, max_tokens=3, temperature=2.0)
    assert all(c.text == tokenizer.decode(c.tokens).strip() for c in many)
    assert any(c.text != tokenizer.decode(c.tokens) for c in many)
    (raw,) = engine.generate([completion.prompt_tokens], max_tokens=30, seed=3)
    assert raw.tokens == completion.tokens
    continued = engine.generate([raw.prompt_tokens], n=60, max_tokens=3, temperature=2.0)
    for c in continued:
        whole = tokenizer.decode(c.prompt_tokens + c.tokens)
        assert whole == "[INST] questions about dates [/INST]" + c.text
    assert any(c.text.startswith(" ") for c in continued)
    for prompt, text in ((messages, completion.text), (raw.prompt_tokens, raw.text)):
        assert "".join(engine.stream(prompt, max_tokens=30, seed=3)) == text


def test_a_padded_vocabulary_has_no_text(models, tokenizer):
    model = models.build(vocab_size=4 * tokenizer.vocab_size)
    completions = Engine(model, tokenizer).generate([[5, 6]], n=20, temperature=2.0, max_tokens=9)
    assert any(max(c.tokens) >= tokenizer.vocab_size for c in completions)


def test_model_state_is_left_alone(models):
    model = models.build()
    engine = Engine(model, models.Ids())
    model.train()
    modes = []
    hook = model.blocks[0].register_forward_hook(lambda block, *_: modes.append(block.training))
    before = engine.generate([[5, 6, 7]], temperature=0, max_tokens=5)
    hook.remove()
    assert model.training and not any(modes) and modes
    # Rotary tables or anything else made while sampling must serve training afterwards.
    loss = -model(
        torch.tensor([5, 6, 7]),
        torch.arange(3),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([6, 7, -1]),
    ).sum()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * parameter.grad.sign()
    after = engine.generate([[5, 6, 7]], temperature=0, max_tokens=5)
    assert after[0].logprobs != before[0].logprobs, "weights are read live"
    model.eval()
    engine.generate([[5, 6, 7]], max_tokens=2)
    assert not model.training
    model.train()
    stream = engine.stream([5, 6, 7], max_tokens=20)
    next(stream)
    stream.close()
    assert model.training, "also when a stream is dropped half way"
