"""The engine against transformers, against the training path and against itself."""

import copy

import numpy as np
import pytest
import torch
from small_models import Ids, far_from_flat, packed, transformers_twin

from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.generate.budget import forward_bytes
from llama2rt.generate.generation import Generation
from llama2rt.generate.kv_cache import page_bytes


def _prompts(count, longest, vocab_size=400, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest + 1, count)
    return [rng.integers(3, vocab_size, size).tolist() for size in sizes]


def _top_two_gap(model, tokens):
    """Gap between the two largest logits after each token."""
    values = model.logits(*packed(tokens)).float().topk(2).values
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
def test_greedy_equals_transformers(kv_heads):
    model = far_from_flat(kv_heads)
    theirs = transformers_twin(model)
    prompts = _prompts(12, 40)
    ours = Engine(model, Ids(), page_size=8, max_sequences=5).generate(
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
        logprob = model(*packed(tokens), targets, temperature=temperature)
    return logprob[prompt - 1 : n - 1]


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_rollout_logprobs_equal_the_training_path(temperature, kv_heads):
    model = far_from_flat(kv_heads)
    completions = Engine(model, Ids(), max_sequences=6).generate(
        _prompts(6, 30), n=3, temperature=temperature, top_p=0.9, max_tokens=25
    )
    for completion in completions:
        expected = _recompute(model, completion, temperature)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-5
        )
    greedy = Engine(model, Ids()).generate(_prompts(2, 30), temperature=0, max_tokens=9)
    for completion in greedy:
        expected = _recompute(model, completion, 1.0)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_rollout_logprobs_in_bf16(temperature):
    # Decoding and training round to bf16 at different places (2^-9 relative per operation): the
    # two may differ by no more than bf16 differs from fp32 on the same path.
    model = far_from_flat(dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    completions = Engine(model, Ids()).generate(
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


def test_samples_do_not_depend_on_the_batch():
    model = far_from_flat()
    prompts = _prompts(7, 30)
    options = {"n": 3, "temperature": 0.9, "top_p": 0.95, "max_tokens": 20, "seed": 5}
    ended = []
    expected = Engine(model, Ids()).generate(prompts, **options, on_finish=ended.append)
    assert sorted(map(id, ended)) == sorted(map(id, expected))
    assert [c.prompt_index for c in expected] == [i for i in range(7) for _ in range(3)]
    assert [c.prompt_tokens for c in expected] == [p for p in prompts for _ in range(3)]
    assert len({tuple(c.tokens) for c in expected}) > 15
    longest = max(len(p) for p in prompts) + 20
    least = page_bytes(model, 8) * -(-longest // 8) + forward_bytes(
        model.config, model.output.weight.dtype, longest, 1, True
    )
    for engine in (
        Engine(model, Ids(), max_sequences=1),
        Engine(model, Ids(), max_sequences=4, page_size=3),
        Engine(model, Ids(), page_size=8, cache_bytes=least),
        Engine(model, Ids(), page_size=8, cache_bytes=3 * least),
    ):
        again = engine.generate(prompts, **options)
        assert _samples(again) == _samples(expected)
        np.testing.assert_allclose(
            np.concatenate([c.logprobs for c in again]),
            np.concatenate([c.logprobs for c in expected]),
            atol=1e-4,
        )
    fewer = Engine(model, Ids()).generate(prompts[:2], **options)
    assert _samples(fewer) == _samples(expected[:6])
    some = Engine(model, Ids()).generate([prompts[5], prompts[2]], **options, indices=[5, 2])
    assert _samples(some) == _samples(expected[15:18] + expected[6:9])
    assert [c.prompt_index for c in some] == [5, 5, 5, 2, 2, 2]
    with pytest.raises(InputError, match="indices: expected 2, got 1"):
        Engine(model, Ids()).generate(prompts[:2], indices=[5])
    assert _samples(expected) == _samples(Engine(model, Ids()).generate(prompts, **options))


def test_seeds_and_indices_give_different_samples():
    engine = Engine(far_from_flat(), Ids())
    same_prompt = [[5, 6, 7]] * 4
    outputs = [c.tokens for seed in (0, 1) for c in engine.generate(same_prompt, n=4, seed=seed)]
    assert len({tuple(tokens) for tokens in outputs}) == len(outputs)


def test_first_tokens_follow_the_model():
    """End to end: the drawn tokens' distribution is the model's softmax, shared prompt and all."""
    from scipy import stats

    model = far_from_flat(vocab_size=30)
    prompt = [4, 9, 17, 3, 8]
    n = 8000
    engine = Engine(model, Ids(-1), max_sequences=500)
    first = [c.tokens[0] for c in engine.generate([prompt], n=n, temperature=4.0, max_tokens=1)]
    with torch.no_grad():
        logits = model.logits(*packed(prompt))[-1]
    expected = (logits.double() / 4.0).softmax(0).numpy() * n
    counts = np.bincount(first, minlength=30)
    assert expected.min() > 5
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_stop_and_length():
    model = far_from_flat()
    prompt = [5, 6, 7]
    free = Engine(model, Ids(-1)).generate([prompt], temperature=0, max_tokens=12)[0]
    assert free.finish_reason == "length" and len(free.tokens) == len(free.logprobs) == 12
    third = free.tokens[3]
    cut = free.tokens.index(third) + 1
    stopped = Engine(model, Ids(third)).generate([prompt], temperature=0, max_tokens=12)[0]
    assert stopped.tokens == free.tokens[:cut] and stopped.finish_reason == "stop"
    assert stopped.text.split() == [str(token) for token in free.tokens[: cut - 1]]
    # The limit reached exactly with EOS is a stop; one token earlier it is a length without EOS.
    exact = Engine(model, Ids(third)).generate([prompt], temperature=0, max_tokens=cut)[0]
    assert exact.finish_reason == "stop"
    if cut > 1:
        short = Engine(model, Ids(third)).generate([prompt], temperature=0, max_tokens=cut - 1)[0]
        assert short.finish_reason == "length" and third not in short.tokens


def test_eos_at_once_is_an_empty_response():
    model = far_from_flat()
    first = Engine(model, Ids(-1)).generate([[5, 6]], temperature=0, max_tokens=1)[0].tokens
    empty = Engine(model, Ids(first[0])).generate([[5, 6]], temperature=0)[0]
    assert (empty.tokens, empty.text, empty.finish_reason) == (first, "", "stop")


def test_context_ends_a_sequence():
    model = far_from_flat()
    full = [[3] * 95, [4] * 90, [5]]
    completions = Engine(model, Ids(-1)).generate(full, max_tokens=200)
    assert [len(c.tokens) for c in completions] == [1, 6, 95]
    assert {c.finish_reason for c in completions} == {"length"}


def test_bad_input():
    engine = Engine(far_from_flat(), Ids())
    for prompts, message in (
        ([[3], []], "prompt 1: empty"),
        ([[3] * 96], "prompt 0: 96 tokens leave no room in the context of 96"),
        ([[3, 400]], r"prompt 0: token id outside 0\.\.399"),
        ([[-1]], r"prompt 0: token id outside"),
        ([[3, 3_000_000_000]], r"prompt 0: token id outside"),
        ([[3], [2**70]], r"prompt 1: token id outside"),
        ([[3], [{"role": "user", "content": " "}]], "prompt 1: message 1: user content is blank"),
    ):
        with pytest.raises(InputError, match=message):
            engine.generate(prompts)
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    "option",
    [
        *({"n": value} for value in (0, -1, 2**31, 1.0, True)),
        *({"top_k": value} for value in (-1, 3_000_000_000, 2.5)),
        *({"max_tokens": value} for value in (0, 3_000_000_000, None)),
        *({"seed": value} for value in (-1, 2**63, 0.5)),
        *({"temperature": value} for value in (-0.1, float("nan"), float("inf"))),
        *({"top_p": value} for value in (0.0, 1.5, float("nan"))),
    ],
    ids=str,
)
def test_an_option_outside_its_range_is_bad_input(option):
    (name,) = option
    with pytest.raises(InputError, match=f"^{name}: expected"):
        Engine(far_from_flat(), Ids()).generate([[3]], **option)


@pytest.mark.parametrize(
    "option",
    [{name: v} for name in ("page_size", "max_sequences", "cache_bytes") for v in (0, -1, 1.5)],
    ids=str,
)
def test_an_engine_that_cannot_be_is_bad_input(option):
    (name,) = option
    with pytest.raises(InputError, match=f"^{name}: expected an integer in 1"):
        Engine(far_from_flat(), Ids(), **option)


def test_the_largest_options_are_taken():
    engine = Engine(far_from_flat(), Ids(-1), max_sequences=2**31 - 1)
    (completion,) = engine.generate(
        [[3] * 90], max_tokens=2**31 - 1, top_k=2**31 - 1, seed=2**63 - 1
    )
    assert len(completion.tokens) == 6
    with pytest.raises(InputError, match="n: expected at most 2147483647 samples in all"):
        engine.generate([[3]] * 2, n=2**31 - 1)


@pytest.fixture
def forwards(monkeypatch):
    """(cache, batch) of all forward passes."""
    found = []
    forward = Generation._forward
    monkeypatch.setattr(
        Generation,
        "_forward",
        lambda self, batch: found.append((self.cache, batch)) or forward(self, batch),
    )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}])
def test_cache_and_forward_pass_hold_no_more_than_cache_bytes(forwards, dtype, options):
    model = far_from_flat(kv_heads=2, dtype=dtype)
    prompts = [[5] * 60 for _ in range(40)]
    page, restricted = page_bytes(model, 16), bool(options)
    least = 5 * page + forward_bytes(model.config, model.output.weight.dtype, 69, 1, restricted)
    for allowed in (least, 3 * least, 8 * least):
        Engine(model, Ids(-1), cache_bytes=allowed).generate(prompts, max_tokens=9, **options)
        cache, steps = forwards[-1][0], [step for _, step in forwards]
        assert cache.keys.nbytes + cache.values.nbytes == cache.pages * page
        prefilled = max(int(step.cu_seqlens[-1]) for step in steps)
        decoded = max(len(step.lengths) for step in steps)
        widest = forward_bytes(
            model.config, model.output.weight.dtype, prefilled, decoded, restricted
        )
        assert cache.pages * page + widest <= allowed
        forwards.clear()
    assert decoded > 1


def test_a_step_prefills_no_more_than_its_share(forwards):
    """A long prompt passes alone; short ones together, up to a quarter of the bytes."""
    model = far_from_flat()
    share = forward_bytes(model.config, model.output.weight.dtype, 50, 8, False)
    prompts = [[5] * n for n in (20, 20, 20, 80, 3, 4)]
    Engine(model, Ids(-1), cache_bytes=4 * share, max_sequences=8).generate(prompts, max_tokens=2)
    sizes = [np.diff(step.cu_seqlens).tolist() for _, step in forwards]
    assert sorted(n for step in sizes for n in step) == [2, 3, 19, 19, 19, 79]
    assert all(sum(step) <= 82 for step in sizes) and max(map(len, sizes)) > 1


def test_no_more_pages_than_can_be_needed(forwards):
    """Whatever memory is free: one long prompt does not make all as long."""
    prompts = [[5] * 80, *([6] for _ in range(30))]
    Engine(far_from_flat(), Ids(-1), max_sequences=8).generate(prompts, max_tokens=4)
    assert forwards[-1][0].pages == 6 + 7 + 6  # the longest, seven of a page, and one shared prompt


def test_a_sequence_that_cannot_fit_is_said_before_sampling(forwards, monkeypatch):
    model = far_from_flat()
    page = page_bytes(model, 16)
    least = 6 * page + forward_bytes(model.config, model.output.weight.dtype, 90, 1, False)
    engine = Engine(model, Ids(), cache_bytes=least - 1)
    message = (
        rf"^cache_bytes: expected at least {least} for prompt 1 "
        rf"\(10 tokens and up to 80 more\), got {least - 1}$"
    )
    with pytest.raises(InputError, match=message):
        engine.generate([[3], [3] * 10, [4] * 10], max_tokens=80)
    engine.generate([[3] * 10], max_tokens=70)
    done = len(forwards)
    least = page + forward_bytes(model.config, model.output.weight.dtype, 16, 1, False)
    monkeypatch.setattr("llama2rt.generate.engine.free_bytes", lambda device: 2 * least)
    with pytest.raises(InputError, match=rf"got {least} \(half of the free memory\)"):
        Engine(model, Ids()).generate([[3] * 10], max_tokens=7)
    assert len(forwards) == done
    assert Engine(model, Ids()).generate([[3] * 10], max_tokens=6)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0.9}, {"top_k": 5}, {}])
def test_a_model_that_is_not_finite_is_said_so(options):
    model = copy.deepcopy(far_from_flat())
    with torch.no_grad():
        model.output.weight[7, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        Engine(model, Ids()).generate([[3, 4, 5]], **options)


def test_messages_and_text(tokenizer):
    model = far_from_flat(vocab_size=tokenizer.vocab_size)
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


def test_a_padded_vocabulary_has_no_text(tokenizer):
    model = far_from_flat(vocab_size=4 * tokenizer.vocab_size)
    completions = Engine(model, tokenizer).generate([[5, 6]], n=20, temperature=2.0, max_tokens=9)
    assert any(max(c.tokens) >= tokenizer.vocab_size for c in completions)


def test_model_state_is_left_alone():
    model = far_from_flat()
    engine = Engine(model, Ids())
    model.train()
    modes = []
    hook = model.transformer.blocks[0].register_forward_hook(
        lambda block, *_: modes.append(block.training)
    )
    before = engine.generate([[5, 6, 7]], temperature=0, max_tokens=5)
    hook.remove()
    assert model.training and not any(modes) and modes
    # Rotary tables or anything else made while sampling must serve training afterwards.
    loss = -model(*packed([5, 6, 7]), torch.tensor([6, 7, -1])).sum()
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
