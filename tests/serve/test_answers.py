"""Answers by OpenAI's own client are the engine's: tokens, text, log-probabilities, whole or
streamed, alone or beside others."""

import concurrent.futures

import pytest
from served import NAME

MESSAGES = [{"role": "user", "content": "what is a fox?"}]
PROMPT = "the quick brown"
DRAWN = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "max_tokens": 24}


@pytest.fixture(scope="module")
def expected(server):
    """What the engine itself answers: by messages, by text."""
    engine = server.engine
    ids = engine.tokenizer.encode(PROMPT, bos=True)
    return engine.generate([MESSAGES], n=2, **DRAWN), engine.generate([ids], n=2, **DRAWN)


def ids_of(choice) -> list[int]:
    return choice.model_extra["token_ids"]


def test_a_chat_is_the_engines(client, expected) -> None:
    reply = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        n=2,
        logprobs=True,
        top_logprobs=3,
        extra_body={"return_token_ids": True},
        **DRAWN,
    )
    engine = expected[0]
    assert [c.message.content for c in reply.choices] == [c.text for c in engine]
    assert [ids_of(c) for c in reply.choices] == [c.tokens for c in engine]
    assert [c.finish_reason for c in reply.choices] == [c.finish_reason for c in engine]
    for choice, completion in zip(reply.choices, engine, strict=True):
        said = choice.logprobs.content
        assert [entry.logprob for entry in said] == pytest.approx(completion.logprobs, abs=1e-5)
        for entry in said:
            tops = [top.logprob for top in entry.top_logprobs]
            assert len(tops) == 3 and tops == sorted(tops, reverse=True)
    asked = len(engine[0].prompt_tokens)
    given = sum(len(c.tokens) for c in engine)
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (asked, given)
    assert usage.total_tokens == asked + given


def test_a_streamed_chat_is_the_whole_one(client, expected) -> None:
    stream = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
        **DRAWN,
    )
    texts, tokens, reasons = ["", ""], [[], []], [None, None]
    roles, counted = [0, 0], None
    for chunk in stream:
        counted = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += ids_of(choice)
            roles[choice.index] += choice.delta.role == "assistant"
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    engine = expected[0]
    assert texts == [c.text for c in engine] and tokens == [c.tokens for c in engine]
    assert reasons == [c.finish_reason for c in engine] and roles == [1, 1]
    assert counted.completion_tokens == sum(map(len, tokens))


def test_a_completion_of_text_or_ids(client, server, expected) -> None:
    engine = expected[1]
    ids = engine[0].prompt_tokens
    asked = {"model": NAME, "n": 2, "logprobs": 2, "extra_body": {"return_token_ids": True}}
    for prompt in (PROMPT, ids, [PROMPT], [ids]):
        reply = client.completions.create(prompt=prompt, **asked, **DRAWN)
        assert [ids_of(c) for c in reply.choices] == [c.tokens for c in engine]
        assert [c.text for c in reply.choices] == [c.text for c in engine]
        assert reply.choices[0].model_extra["prompt_token_ids"] == ids
    said = reply.choices[0].logprobs
    assert said.token_logprobs == pytest.approx(engine[0].logprobs, abs=1e-5)
    assert len(said.tokens) == len(said.text_offset) == len(said.top_logprobs)
    # Tokens in a row are the text, but for the EOS that it does not hold.
    assert "".join(said.tokens).startswith(engine[0].text)
    two = client.completions.create(prompt=[PROMPT, ids[:2]], **asked, **DRAWN)
    assert [c.index for c in two.choices] == [0, 1, 2, 3]
    assert [ids_of(c) for c in two.choices[:2]] == [c.tokens for c in engine]


def test_a_streamed_completion(client, expected) -> None:
    stream = client.completions.create(model=NAME, prompt=PROMPT, stream=True, **DRAWN)
    pieces = [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == expected[1][0].text and len(pieces) > 3


def test_stop_texts_and_defaults(client, expected) -> None:
    text = expected[1][0].text
    stop = text[4:7]
    reply = client.completions.create(model=NAME, prompt=PROMPT, stop=[stop, "@@"], **DRAWN)
    choice = reply.choices[0]
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"
    default = client.completions.create(model=NAME, prompt=PROMPT, temperature=0)
    assert default.usage.completion_tokens == 16  # OpenAI's own
    chat = client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=0)
    assert chat.usage.total_tokens <= 96  # the context


def test_seeds_are_kept_and_drawn(client) -> None:
    def texts(**options):
        reply = client.completions.create(model=NAME, prompt=PROMPT, n=2, max_tokens=12, **options)
        return [choice.text for choice in reply.choices]

    assert texts(seed=3) == texts(seed=3) != texts(seed=4)
    assert texts() != texts() and len(set(texts(seed=3))) == 2
    greedy = {"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert texts(extra_body=greedy) == texts(temperature=0)
    assert texts(temperature=0, extra_body={"repetition_penalty": 5.0}) != texts(temperature=0)


def test_clients_share_the_engine(client, server) -> None:
    prompts = [f"fox {i} jumps over {i * i}" for i in range(12)]
    tokenizer = server.engine.tokenizer
    alone = [
        server.engine.generate([tokenizer.encode(p, bos=True)], seed=i, max_tokens=20)[0].text
        for i, p in enumerate(prompts)
    ]

    def ask(i: int) -> str:
        reply = client.completions.create(model=NAME, prompt=prompts[i], seed=i, max_tokens=20)
        return reply.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone
    server.wait(lambda: server.pages_used() == 0)
