"""Many requests of random lengths and options in one session; `request_checks` checks the answers.

`benchmarks/generation/many_requests.py` runs ten thousand of them, tests run some dozens. Prompts
share beginnings, requests arrive in bursts while others run, one in six is aborted at a random
moment, and there are so few pages that sequences are often recomputed.
"""

import ctypes
import gc
import pickle
import random
import resource
import tempfile
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from small_models import far_from_flat

from llama2rt.generate import Engine, SamplingOptions, Update
from llama2rt.generate.budget import Budget
from llama2rt.generate.session import Session
from llama2rt.model.llama import Llama
from llama2rt.text.tokenizer import Tokenizer


@dataclass
class Asked:
    """One request, what became of it, and when it is to be aborted (-1: never): so many steps after
    it came, which is while it waits more often than not, or when it has so many tokens."""

    prompt: list[int]
    options: SamplingOptions
    sample: int
    abort_after: int
    abort_at: int
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

    def aborted_now(self, age: int) -> bool:
        """Whether it is to be, so many steps after it came."""
        return age == self.abort_after or 0 <= self.abort_at <= len(self.tokens)

    def put_away(self, file: IO[bytes]) -> None:
        """Keeps the answer in a file alone."""
        pickle.dump((self.tokens, self.logprobs, self.text), file)
        self.tokens, self.logprobs, self.text = array("q"), array("d"), ""

    def take_back(self, file: IO[bytes]) -> None:
        self.tokens, self.logprobs, self.text = pickle.load(file)


def draw(count: int, vocab_size: int, seed: int) -> list[Asked]:
    """Random requests for a model of a context of 96."""
    rng = random.Random(seed)
    openings = [[rng.randrange(3, vocab_size) for _ in range(70)] for _ in range(6)]
    asked: list[Asked] = []
    for _ in range(count):
        if asked and rng.random() < 0.2:  # another sample of the last prompt
            asked.append(replace(fresh(asked[-1]), sample=asked[-1].sample + 1))
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
            max_tokens=rng.choice([1, 8, 25, 60, 80]),
            seed=rng.randrange(2**40),
            logprobs=rng.choice([0, 0, 0, 3]),
        )
        abort = rng.random()
        abort_after = rng.randint(0, 100) if abort < 0.08 else -1
        abort_at = rng.randint(1, 15) if abort > 0.84 else -1
        asked.append(Asked(prompt, options, 0, abort_after, abort_at))
    return asked


def fresh(asked: Asked) -> Asked:
    """The same request, not answered."""
    return Asked(asked.prompt, asked.options, asked.sample, asked.abort_after, asked.abort_at)


def resident_bytes() -> int:
    """Of this process, without what is free and waits for its next use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def run(
    engine: Engine, asked: list[Asked], most_waiting: int, measure_at: Iterable[int] = ()
) -> dict:
    """Answers all in one session: its counters, the pages that it did not give back, and the
    process's resident bytes when so many requests had ended. Until all have, answers are in a file:
    what grows is not what this function keeps."""
    by_id: dict[int, Asked] = {}
    ages: dict[int, int] = {}
    todo, ended, steps, in_order = iter(asked), 0, 0, list(asked)
    resident = dict.fromkeys(measure_at, 0)
    bursts = random.Random(len(asked))
    with engine.session() as session, tempfile.TemporaryFile() as answers:
        while True:
            arriving = bursts.choice([0, 0, 0, 1, 1, 2, 8])
            while arriving and session.statistics.waiting < most_waiting:
                if (new := next(todo, None)) is None:
                    break
                identifier = session.add(new.prompt, new.options, sample=new.sample)
                by_id[identifier], ages[identifier] = new, 0
                arriving -= 1
            if not session.unfinished:
                if arriving:
                    break
                continue
            steps += 1
            for update in session.step():
                by_id[update.id].take(update)
                if update.finish_reason is None:
                    continue
                in_order[ended] = by_id.pop(update.id)
                in_order[ended].put_away(answers)
                del ages[update.id]
                ended += 1
                if ended in resident:
                    resident[ended] = resident_bytes()
            for identifier, age in list(ages.items()):
                ages[identifier] += 1
                if by_id[identifier].aborted_now(age):
                    assert session.abort(identifier)
                    assert not session.abort(identifier), "aborted twice"
        last = session.statistics
        assert last.running == last.waiting == 0, f"unfinished: {last}"
        leaked = _leaked(session)
        answers.seek(0)
        for one in in_order:
            one.take_back(answers)
    return {
        "steps": steps,
        "preemptions": last.preemptions,
        "prefix_hits": last.prefix_hits,
        "prompt_tokens": last.prompt_tokens,
        "tokens": last.tokens,
        "guesses": last.guesses,
        "accepted": last.accepted,
        "pages_leaked": leaked,
        "resident": resident,
    }


def _leaked(session: Session) -> int:
    """How many pages a session in which nothing runs cannot give out again. AssertionError where it
    gives one out twice."""
    used = session.statistics.pages_used
    session.reset()  # what is kept for later prompts counts as free: here it must become so
    pool = session._scheduler.pool
    assert pool.cached == 0 and pool.pages - pool.free == used
    taken = pool.take(pool.free)
    assert len(np.unique(taken)) == len(taken), "a page was freed twice"
    pool.release(taken)
    return used


class FewPages(Engine):
    """Sixteen sequences begin and cannot all end; long prompts come in chunks. By `cache_bytes` the
    logits of so small a model would take more than its pages."""

    budget = Budget(pages=64, prefill_tokens=64, sequences=16)

    def _within(self, plan: object, restricted: bool) -> Budget:
        self.runner.refresh()
        return self.budget


def model_and_tokenizer(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[Llama, Tokenizer]:
    """Tiny ones."""
    words = ["a", "small", "assistant", "answers", "questions", "about", "dates", "and", "units"]
    texts = [f"{a} {b} {i * 37 % 101}" for i, a in enumerate(words * 12) for b in words]
    tokenizer = Tokenizer.train(texts, 330, folder)
    return far_from_flat(kv_heads=2, vocab_size=tokenizer.vocab_size, dtype=dtype), tokenizer
