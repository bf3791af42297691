"""Answers of a policy, each with its reward: drawn, scored, and kept in files as they are done."""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama2rt.data.records import Prompt
from llama2rt.errors import InputError
from llama2rt.generate import Completion, Engine
from llama2rt.generate.remote import Handover, Remote, RemoteOptions
from llama2rt.model import Llama
from llama2rt.parallel import on_main, tensor_group, world
from llama2rt.rollout import balance
from llama2rt.rollout.responses import Response, read_responses, write_responses
from llama2rt.rollout.reward import RewardModels
from llama2rt.run import check_integers
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

PROMPTS_PER_FILE = 512


class SamplingOptions(BaseModel):
    """How long answers may be, and what sampling them may take."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_tokens: int = Field(default=256, gt=0)
    """response length; a longer response is cut there and is scored as it stands, without an EOS"""
    max_sequences: int = Field(default=256, gt=0)
    """sampled at once"""
    cache_bytes: int | None = Field(default=None, gt=0)
    """most memory that sampling takes beside the model; None for half of what is free"""
    server: str | None = None
    """URL of a server of OpenAI's API that samples instead of this process, its key in
    LLAMA2RT_API_KEY; None for none"""
    server_model: str | None = None
    """the model's name at the server; None for the only one that it lists"""
    server_kind: str = "auto"
    """auto, llama2rt, vllm, sglang, llamacpp, transformers or openai"""
    weights: str | None = None
    """folder that the server reads weights from, which are written there when they have changed"""
    reload: str | None = None
    """how the server is told: a URL, or a command, which has the folder in LLAMA2RT_WEIGHTS"""
    tolerance: float = Field(default=0.25, gt=0)
    """how far a token's log-probability at the server may be from the model's here, in nats"""

    @model_validator(mode="after")
    def _consistent(self) -> "SamplingOptions":
        check_integers(self)
        if (self.weights is None) != (self.reload is None):
            raise ValueError("weights and reload: one says where, the other how; give both")
        for name in ("server_model", "weights"):
            if self.server is None and getattr(self, name) is not None:
                raise ValueError(f"{name}: only with server")
        return self

    def engine(self, model: Llama, tokenizer: Tokenizer) -> Engine | Remote:
        """What samples from `model` within these bounds. InputError where a server is named and
        none of its kind answers."""
        if self.server is None:
            return Engine(
                model,
                tokenizer,
                max_sequences=self.max_sequences,
                cache_bytes=self.cache_bytes,
                as_trained=True,
            )
        handover = None
        if self.weights is not None and self.reload is not None:
            handover = Handover(Path(self.weights), self.reload)
        return Remote(
            self.server,
            model,
            tokenizer,
            api_key=os.environ.get("LLAMA2RT_API_KEY"),
            options=RemoteOptions(
                name=self.server_model,
                kind=self.server_kind,
                tolerance=self.tolerance,
                concurrency=self.max_sequences,
            ),
            handover=handover,
        )

    def check_server(self, changes: str | None, *, adapter: bool = False) -> None:
        """InputError where a server is named and cannot do what a stage needs. `changes`: why the
        stage samples from other weights than the server began with, or None where it does not."""
        if self.server is None:
            return
        if world().size > 1:
            raise InputError(
                f"sampling.server: {world().size} processes would each hand their weights over; "
                "start one"
            )
        if changes is not None and self.weights is None:
            raise InputError(
                f"sampling.server: {changes}, and the server never gets those weights; give "
                "sampling.weights and sampling.reload, or sample here"
            )
        if changes is not None and adapter:
            raise InputError(
                "sampling.server: weights under an adapter cannot be handed over; train without "
                "[lora], or sample here"
            )


def derived_seed(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2^31) for one phase of one iteration: distinct, and free of state to resume."""
    digest = hashlib.sha256(json.dumps([seed, *parts]).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


@dataclass(frozen=True)
class Sampler:
    """A policy that answers, and the models that score its answers."""

    engine: Engine | Remote
    reward_models: RewardModels
    max_tokens: int
    policy: str
    """the name that responses carry"""

    def of(self, model: Llama) -> "Sampler":
        """The same for the policy's weights in another model (`parallel.whole`)."""
        if model is self.engine.model:
            return self
        return replace(self, engine=self.engine.of(model))

    def complete(
        self, prompts: Sequence[Prompt], *, n: int = 1, temperature: float, seed: int
    ) -> list[Completion]:
        """n samples of each prompt: those of the first prompt, then the second's ... All ranks take
        part, and have them all."""
        return complete(
            self.engine,
            prompts,
            n=n,
            temperature=temperature,
            max_tokens=self.max_tokens,
            seed=seed,
        )

    def score(
        self,
        completions: Sequence[Completion],
        prompts: Sequence[Prompt],
        *,
        temperature: float,
        seed: int,
    ) -> list[Response]:
        """What was drawn for `prompts` with its reward, read at each response's last token, whether
        EOS or cut. All ranks take part, and have it all."""
        answered = [prompts[completion.prompt_index] for completion in completions]
        reward, scores = balance.scores(
            self.reward_models,
            [completion.prompt_tokens + completion.tokens for completion in completions],
            np.array([prompt.kind == "safety" for prompt in answered]),
            [completion.prompt_index for completion in completions],
        )
        return [
            Response(
                prompt=prompt,
                text=completion.text,
                prompt_tokens=completion.prompt_tokens,
                tokens=completion.tokens,
                finished=completion.finish_reason == "stop",
                reward=float(reward[i]),
                scores={name: float(score[i]) for name, score in scores.items()},
                policy=self.policy,
                temperature=temperature,
                seed=seed,
            )
            for i, (prompt, completion) in enumerate(zip(answered, completions, strict=True))
        ]

    def responses(
        self, prompts: Sequence[Prompt], *, n: int = 1, temperature: float, seed: int
    ) -> list[Response]:
        """n scored responses of each prompt, in the order of `complete`."""
        completions = self.complete(prompts, n=n, temperature=temperature, seed=seed)
        return self.score(completions, prompts, temperature=temperature, seed=seed)


def complete(
    engine: Engine | Remote,
    prompts: Sequence[Prompt],
    *,
    n: int = 1,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> list[Completion]:
    """`engine.generate` of all prompts, shared by the ranks so that each expects as many tokens.
    The same samples whatever the number of ranks, up to the rounding of logits."""

    def costs() -> list[float]:
        longest = min(max_tokens, engine.model.config.context)
        return [
            len(chat.encode_prompt(engine.tokenizer, prompt.messages)) + n * longest
            for prompt in prompts
        ]

    def work(indices: list[int]) -> list[list[Completion]]:
        completions = engine.generate(
            [prompts[i].messages for i in indices],
            n=n,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            indices=indices,
        )
        if isinstance(engine, Engine):
            engine.runner.release()  # what follows scores or trains, and needs the memory
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    found = balance.spread(costs, work, len(prompts), group_size=tensor_group.size(engine.model))
    return list(itertools.chain(*found))


def sample(
    folder: Path,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    *,
    n: int,
    temperatures: Sequence[float],
    seed: int,
) -> list[list[Response]]:
    """n scored responses of each prompt, an equal share at each temperature.

    Written to `folder` by rank 0 in files of 512 prompts as they are finished; a file that is there
    is read instead of sampled again, so a killed run loses at most one.
    """
    each = n // len(temperatures)
    by_prompt: list[list[Response]] = []
    for part, begin in enumerate(range(0, len(prompts), PROMPTS_PER_FILE)):
        group = prompts[begin : begin + PROMPTS_PER_FILE]
        path = folder / f"part-{part:05d}.jsonl"
        if not on_main(path.exists):
            responses: list[Response] = []
            for temperature in temperatures:
                part_seed = derived_seed(seed, part, str(temperature))
                responses += sampler.responses(
                    group, n=each, temperature=temperature, seed=part_seed
                )
            # From temperature-major to prompt-major.
            grid = np.arange(len(responses)).reshape(len(temperatures), len(group), each)
            order = grid.transpose(1, 0, 2).ravel()
            groups = by_prompts([responses[i] for i in order], n)
            # All of a prompt's answers are there now, to be compared with each other.
            ranked = balance.ranked(sampler.reward_models, groups)
            ordered = list(itertools.chain(*ranked))
            on_main(functools.partial(write_responses, path, ordered))
        by_prompt += by_prompts(on_main(functools.partial(read_responses, path)), n)
    return by_prompt


def read_samples(folder: Path, n: int) -> list[list[Response]]:
    """What `sample` left in `folder`: n responses of each prompt."""
    parts = sorted(folder.glob("part-*.jsonl"))
    return [group for part in parts for group in by_prompts(read_responses(part), n)]


def by_prompts(responses: Sequence[Response], n: int) -> list[list[Response]]:
    """Groups of n: those of the first prompt, then the second's ..."""
    return [list(responses[i : i + n]) for i in range(0, len(responses), n)]


def draw(prompts: Sequence[Prompt], count: int, seed: int, iteration: int) -> list[Prompt]:
    """An iteration's `count` prompts, from shuffled epochs that are continued across iterations:
    none comes again before all have come."""
    return shuffled(prompts, count, seed, after=iteration * count)


def shuffled(prompts: Sequence[Prompt], count: int, seed: int, *, after: int) -> list[Prompt]:
    """`count` prompts of shuffled epochs, one behind the other, after the first `after`."""
    indices = range(after, after + count)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(len(prompts))
        for epoch in range(indices[0] // len(prompts), indices[-1] // len(prompts) + 1)
    }
    return [prompts[orders[index // len(prompts)][index % len(prompts)]] for index in indices]
