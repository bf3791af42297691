"""Many requests of random lengths and options in one session, against each one alone.

    python tests/helpers/many_requests.py 10000

Prompts share beginnings, requests arrive while others run, every tenth is aborted somewhere, and
there are so few pages that sequences are recomputed. Printed every thousand: the process's resident
memory and the session's counters. It fails where an answer is not the one that the request gets
alone, but for ties: where the two first differ, argmax must have the two largest logits within
1e-4, a draw must have its uniform number within 1e-4 of the border between the two tokens.
"""

import json
import random
import sys
import tempfile
import time
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
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def take(self, update: Update) -> None:
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.top += update.top
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
                    print(f"{ended}: {resident[-1] / 2**20:.1f} MiB, {session.statistics}")
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
    common = min(len(one.tokens), len(alone.tokens))
    for i in range(common):
        if one.tokens[i] != alone.tokens[i]:
            _require_tie(engine.model, one, alone, i)
            common = i
            break
    np.testing.assert_allclose(one.logprobs[:common], alone.logprobs[:common], atol=1e-4)
    if one.options.logprobs:
        assert [len(each) for each in one.top] == [one.options.logprobs] * len(one.tokens)
    aborted = one.finish_reason == "abort"
    if common < min(len(one.tokens), len(alone.tokens)):
        return "aborted" if aborted else "tied"
    if aborted:
        assert alone.text.startswith(one.text), f"{one} is not the beginning of {alone}"
        return "aborted"
    assert (one.tokens, one.text) == (alone.tokens, alone.text), f"{one} is not {alone}"
    assert one.finish_reason == alone.finish_reason, f"{one} is not {alone}"
    return "equal"


@torch.no_grad()
def _require_tie(model: Llama, one: Asked, alone: Asked, i: int) -> None:
    context = one.prompt + one.tokens[:i]
    logits = model.logits(*packed(context))[-1:].float()
    options = RowOptions.empty(3)
    for row in range(3):
        options.put(row, one.options)
    key = stream_keys(one.options.seed, np.zeros(1, np.int64), np.array([one.sample]))
    (uniform,) = uniforms(key, np.array([i]))
    near = torch.tensor([uniform - TIE, uniform, uniform + TIE], dtype=torch.float64).clamp(0, 1)
    seen = np.array([context] * 3) if one.options.repetition_penalty != 1 else None
    if one.options.temperature == 0:
        if seen is not None:
            return  # the gap is that of penalised logits
        a, b = logits[0, one.tokens[i]], logits[0, alone.tokens[i]]
        assert abs(a - b) < TIE, f"{one} and {alone} at {i}: logits {a} and {b}"
    else:
        tokens = choose(logits.repeat(3, 1), near, options, seen).tokens.tolist()
        both = {one.tokens[i], alone.tokens[i]}
        assert both <= set(tokens), f"{one} and {alone} at {i}: near {tokens}"


class FewPages(Engine):
    """Sixteen sequences begin and cannot all end; long prompts come in chunks. By `cache_bytes` the
    logits of so small a model would take more than its pages."""

    def _within(self, plan: object, restricted: bool) -> Budget:
        return Budget(pages=30, prefill_tokens=32, sequences=16)


def engine(cls: type[Engine], folder: Path, **options) -> Engine:
    """Of a tiny model and tokenizer."""
    words = ["a", "small", "assistant", "answers", "questions", "about", "dates", "and", "units"]
    texts = [f"{a} {b} {i * 37 % 101}" for i, a in enumerate(words * 12) for b in words]
    tokenizer = Tokenizer.train(texts, 330, folder)
    model = far_from_flat(kv_heads=2, vocab_size=tokenizer.vocab_size)
    return cls(model, tokenizer, page_size=8, **options)


def main(count: int) -> None:
    torch.set_num_threads(1)
    for speculate in (0, 3):
        with tempfile.TemporaryDirectory() as folder:
            tight = engine(FewPages, Path(folder), speculate=speculate)
            asked = draw(count, tight.model.config.vocab_size, seed=count)
            begun = time.perf_counter()
            result = run(tight, asked, most_waiting=64, report_every=max(1, count // 10))
            result["seconds"] = time.perf_counter() - begun
            print(json.dumps(result), flush=True)
            print(json.dumps(compare(engine(Engine, Path(folder)), asked)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
