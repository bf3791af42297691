"""Many requests of random lengths and options in one session, against each one alone.

    python tests/helpers/many_requests.py 10000

Prompts share beginnings, requests arrive while others run, every tenth is aborted somewhere, and
there are so few pages that sequences are recomputed. Printed every thousand: the process's resident
memory and the session's counters. Then every token of every answer is checked against a forward
pass of its own, and every answer is compared with what the request gets alone. A token may differ
only at a tie: two tokens have logits within 1e-4, or the uniform number is within 1e-4 of the
border between them, or what top-p or min-p keeps is decided by so little.

Found on 2026-11-30, of 129,135 tokens: 9020 answers equal, 980 aborted ones equal as far as they
go, 3 tokens at a tie with the forward pass; 128 preemptions, 54,584 prompt tokens found in pages;
0.4 kB of memory a request, which is its answer. With three guesses (a second argument) the same,
and 3203 of 10,937 guesses accepted.
"""

import itertools
import json
import random
import sys
import tempfile
import time
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from small_models import far_from_flat, packed

from llama2rt.generate import Engine, SamplingOptions, Update
from llama2rt.generate.budget import Budget
from llama2rt.generate.sampling import RowOptions, choose, stream_keys, uniforms
from llama2rt.model.llama import Llama
from llama2rt.text.tokenizer import Tokenizer

TIE = 1e-4


@dataclass
class Asked:
    """One request, what became of it, and when it is to be aborted (-1: never)."""

    prompt: list[int]
    options: SamplingOptions
    sample: int
    abort_after: int
    tokens: array = field(default_factory=lambda: array("q"))
    logprobs: array = field(default_factory=lambda: array("d"))
    text: str = ""
    finish_reason: str | None = None

    def take(self, update: Update) -> None:
        self.tokens.extend(update.tokens)
        self.logprobs.extend(update.logprobs)
        each = [len(top) for top in update.top]
        assert each == [self.options.logprobs] * len(each)
        assert len(each) == len(update.tokens) * (self.options.logprobs > 0)
        self.text += update.text
        self.finish_reason = update.finish_reason


def draw(count: int, vocab_size: int, seed: int) -> list[Asked]:
    """Random requests for a model of a context of 96."""
    rng = random.Random(seed)
    openings = [[rng.randrange(3, vocab_size) for _ in range(70)] for _ in range(6)]
    asked: list[Asked] = []
    for _ in range(count):
        if asked and rng.random() < 0.2:  # another sample of the last prompt
            asked.append(replace(_fresh(asked[-1]), sample=asked[-1].sample + 1))
            continue
        opening = rng.choice(openings)[: rng.choice([0, 0, 0, 8, 33, 65, 70])]
        prompt = opening + [rng.randrange(3, vocab_size) for _ in range(rng.randint(1, 20))]
        options = SamplingOptions(
            temperature=rng.choice([0.0, 0.0, 0.7, 1.0, 1.3]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.5]),
            top_k=rng.choice([0, 0, 0, 5, 40]),
            min_p=rng.choice([0.0, 0.0, 0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.2]),
            stop=rng.choice([(), (), (), ("e",), ("an", "7 ")]),
            stop_ids=rng.choice([(), (), (7, 300)]),
            max_tokens=rng.choice([1, 4, 10, 25, 60]),
            seed=rng.randrange(2**40),
            logprobs=rng.choice([0, 0, 0, 3]),
        )
        abort_after = rng.randint(0, 12) if rng.random() < 0.1 else -1
        asked.append(Asked(prompt, options, 0, abort_after))
    return asked


def _fresh(asked: Asked) -> Asked:
    return Asked(asked.prompt, asked.options, asked.sample, asked.abort_after)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def run(engine: Engine, asked: list[Asked], most_waiting: int, report_every: int = 0) -> dict:
    """Answers all in one session; returns its counters and resident bytes as they went."""
    by_id: dict[int, Asked] = {}
    ages: dict[int, int] = {}
    todo, resident, ended = iter(asked), [], 0
    with engine.session() as session:
        while True:
            while session.statistics.waiting < most_waiting and (new := next(todo, None)):
                identifier = session.add(new.prompt, new.options, sample=new.sample)
                by_id[identifier], ages[identifier] = new, 0
            if not session.unfinished:
                break
            for update in session.step():
                by_id[update.id].take(update)
                if update.finish_reason is None:
                    continue
                del ages[update.id], by_id[update.id]
                ended += 1
                if report_every and ended % report_every == 0:
                    resident.append(resident_bytes())
                    print(
                        f"{ended}: {resident[-1] / 2**20:.1f} MiB, {session.statistics}", flush=True
                    )
            for identifier in list(ages):
                ages[identifier] += 1
                if by_id[identifier].abort_after == ages[identifier] - 1:
                    assert session.abort(identifier)
                    assert not session.abort(identifier), "aborted twice"
                    ages[identifier] = 10**9
        last = session.statistics
        assert last.pages_used == last.running == last.waiting == 0, f"leaked: {last}"
    return {
        "preemptions": last.preemptions,
        "prefix_hits": last.prefix_hits,
        "prompt_tokens": last.prompt_tokens,
        "tokens": last.tokens,
        "guesses": last.guesses,
        "accepted": last.accepted,
        "resident": resident,
    }


def compare(engine: Engine, asked: list[Asked]) -> dict:
    """Each request alone, without any cached prefix; how many were equal, tied, aborted."""
    found = {"equal": 0, "tied": 0, "aborted": 0}
    with engine.session() as session:
        for one in asked:
            alone = _fresh(one)
            session.reset()
            session.add(alone.prompt, alone.options, sample=alone.sample)
            while session.unfinished:
                for update in session.step():
                    alone.take(update)
            found[_verdict(engine, one, alone)] += 1
    return found


def _verdict(engine: Engine, one: Asked, alone: Asked) -> str:
    pairs = zip(one.tokens, alone.tokens, strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if common is not None:  # `verify` has shown that both are drawn
        return "aborted" if one.finish_reason == "abort" else "tied"
    common = min(len(one.tokens), len(alone.tokens))
    np.testing.assert_allclose(one.logprobs[:common], alone.logprobs[:common], atol=1e-4)
    aborted = one.finish_reason == "abort"
    if aborted:
        assert alone.text.startswith(one.text), f"{one} is not the beginning of {alone}"
        return "aborted"
    assert (one.tokens, one.text) == (alone.tokens, alone.text), f"{one} is not {alone}"
    assert one.finish_reason == alone.finish_reason, f"{one} is not {alone}"
    return "equal"


@torch.no_grad()
def verify(engine: Engine, asked: list[Asked]) -> dict:
    """Each answer token by token: that it is what the request draws from the logits of one forward
    pass over prompt and answer, as training computes them, and that it ends where it must. By
    induction it is then the answer that the request gets alone."""
    found = {"drawn": 0, "ties": 0}
    for one in asked:
        ties = _drawn(engine.model, one)
        found["drawn"] += len(one.tokens) - ties
        found["ties"] += ties
        _require_end(engine, one)
    return found


def _drawn(model: Llama, one: Asked) -> int:
    """How many tokens are chosen by less than TIE; AssertionError where one is not chosen."""
    n, prompt = len(one.tokens), len(one.prompt)
    if not n:
        return 0
    context = one.prompt + one.tokens.tolist()
    logits = model.logits(*packed(context))[prompt - 1 : -1].float()
    options = RowOptions.empty(1)
    options.put(0, one.options)
    key = stream_keys(one.options.seed, np.zeros(1, np.int64), np.array([one.sample]))
    uniform = torch.from_numpy(uniforms(key.repeat(n), np.arange(n)))
    seen = None
    if one.options.repetition_penalty != 1:
        seen = np.array([(context[: prompt + i] + context[:1] * n)[: prompt + n] for i in range(n)])
    answer = np.array(one.tokens)
    np.testing.assert_allclose(one.logprobs, _logprobs(logits, one), atol=1e-4)

    def drawn(uniform_by: float = 0, top_p_by: float = 0, min_p_by: float = 0) -> np.ndarray:
        rows = options.take(np.zeros(n, np.int64))
        rows.top_p[rows.top_p < 1] += top_p_by
        rows.min_p[:] *= 1 + min_p_by
        near = (uniform + uniform_by).clamp(0, 1)
        return choose(logits.clone(), near, rows, seen).tokens

    expected = drawn()
    right = expected == answer
    if right.all():
        return 0
    near = itertools.product((-TIE, 0, TIE), repeat=3)
    others = [drawn(*each) for each in near]
    for i in np.flatnonzero(~right).tolist():
        row, held = logits[i].clone(), context[: prompt + i]
        penalty = one.options.repetition_penalty
        row[held] = torch.where(row[held] > 0, row[held] / penalty, row[held] * penalty)
        # Two tokens as likely as each other: argmax, and the order of those to draw from.
        gap = abs(float(row[expected[i]] - row[answer[i]]))
        # Between two borders that near there may be tokens of which neither draw knows.
        limited = bool((options.top_k > 0) | (options.top_p < 1) | (options.min_p > 0))
        order = row.argsort(descending=True).argsort() if limited else torch.arange(len(row))
        places = [int(order[tokens[i]]) for tokens in others]
        between = min(places) <= int(order[answer[i]]) <= max(places)
        assert between or gap < TIE, f"{one}: {expected[i]} at {i}, by {gap}"
    return int((~right).sum())


def _logprobs(logits: torch.Tensor, one: Asked) -> np.ndarray:
    scaled = logits / (one.options.temperature or 1)
    return scaled.log_softmax(-1)[range(len(one.tokens)), one.tokens.tolist()].numpy()


def _require_end(engine: Engine, one: Asked) -> None:
    decode, stop_ids = engine.tokenizer.decode, engine.tokenizer.stop_ids + one.options.stop_ids
    limit = min(one.options.max_tokens, engine.model.config.context - len(one.prompt))
    assert not set(one.tokens[:-1]) & set(stop_ids), f"{one}: goes on after a stop token"
    by_id = bool(one.tokens) and one.tokens[-1] in stop_ids
    before = decode(one.prompt)
    whole = decode(one.prompt + one.tokens[: len(one.tokens) - by_id].tolist())
    if not whole.startswith(before):
        return  # the prompt ends within a character
    whole = whole[len(before) :]
    found = [whole.index(stop) for stop in one.options.stop if stop in whole]
    if found and one.finish_reason != "abort":
        assert (one.finish_reason, one.text) == ("stop", whole[: min(found)]), f"{one}: {whole}"
    elif one.finish_reason == "abort":
        assert whole.startswith(one.text), f"{one}: {whole}"
    else:
        reason = "stop" if by_id else "length"
        assert by_id or len(one.tokens) == limit, f"{one}: ended early"
        assert (one.finish_reason, one.text) == (reason, whole), f"{one}: {whole}"


class FewPages(Engine):
    """Sixteen sequences begin and cannot all end; long prompts come in chunks. By `cache_bytes` the
    logits of so small a model would take more than its pages."""

    def _within(self, plan: object, restricted: bool) -> Budget:
        self.runner.refresh()
        return Budget(pages=48, prefill_tokens=64, sequences=16)


def engine(cls: type[Engine], folder: Path, **options) -> Engine:
    """Of a tiny model and tokenizer."""
    words = ["a", "small", "assistant", "answers", "questions", "about", "dates", "and", "units"]
    texts = [f"{a} {b} {i * 37 % 101}" for i, a in enumerate(words * 12) for b in words]
    tokenizer = Tokenizer.train(texts, 330, folder)
    model = far_from_flat(kv_heads=2, vocab_size=tokenizer.vocab_size)
    return cls(model, tokenizer, page_size=8, **options)


def main(count: int, speculate: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tight = engine(FewPages, Path(folder), speculate=speculate)
        asked = draw(count, tight.model.config.vocab_size, seed=count)
        begun = time.perf_counter()
        result = run(tight, asked, most_waiting=64, report_every=max(1, count // 10))
        result |= {"seconds": time.perf_counter() - begun, "forward": tight.runner.path}
        print(json.dumps(result), flush=True)
        print(json.dumps(verify(tight, asked)), flush=True)
        print(json.dumps(compare(engine(Engine, Path(folder)), asked)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0]))
