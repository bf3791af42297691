"""Several answers of one policy to each of many prompts, for a study of length bias (RLHF Workflow,
arXiv 2405.07863, section 2: 8 answers to each of 2,000 prompts).

They are kept as Sample records in files of 512 prompts, so that a killed study loses at most one.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama2rt import atomic
from llama2rt.data.records import Prompt, Sample
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.parallel import on_main
from llama2rt.rollout import sampling
from llama2rt.rollout.sampling import PROMPTS_PER_FILE, SamplingOptions, derived_seed
from llama2rt.run import check_integers
from llama2rt.stages import loading


class LengthOptions(BaseModel):
    """The study of length bias: how far each model's score goes with an answer's length."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    policy: Path | None = None
    """the language model that answers; None for no such study"""
    data: list[Source] = Field(default=[])
    """the prompts that it answers"""
    prompts: int = Field(default=2000, gt=0)
    """the first so many"""
    samples: int = Field(default=8, gt=2)
    """answers to each; two correlate perfectly or not at all"""
    temperature: float = Field(default=1.0, gt=0)
    """at which the policy answers"""
    sampling: SamplingOptions = SamplingOptions()
    """length of answers, and what sampling may take"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_integers(self)
        if (self.policy is None) != (not self.data):
            raise ValueError("policy and data: one answers the other; give both")
        return self


class Answer(NamedTuple):
    """A sampled answer."""

    text: str
    tokens: int
    """with the EOS, where there is one"""
    finished: bool
    """False where the length limit cut it"""


def read_prompts(options: LengthOptions) -> list[Prompt]:
    """The prompts of a study with a policy, checked against it without its weights."""
    assert options.policy is not None
    options.sampling.check_server(None)
    tokenizer, found = loading.outlines(None, {"length.policy": options.policy})
    prompts = loading.read_prompts(
        options.data,
        tokenizer,
        found["length.policy"],
        options.sampling.max_tokens,
        cache=loading.CacheLimit(options.sampling.cache_bytes, torch.float32),
    )
    return prompts[: options.prompts]


def sample(
    options: LengthOptions, prompts: list[Prompt], folder: Path, seed: int
) -> list[list[Answer]]:
    """`options.samples` answers to each prompt, read from the files in `folder` that are there.
    Every rank takes part, and has them all."""
    assert options.policy is not None
    parts = range(0, len(prompts), PROMPTS_PER_FILE)
    paths = [folder / f"part-{part:05d}.jsonl" for part in range(len(parts))]
    engine = None
    for number, (begin, path) in enumerate(zip(parts, paths, strict=True)):
        if on_main(path.exists):
            continue
        if engine is None:
            engine = options.sampling.engine(*loading.load_llama(options.policy))
        group = prompts[begin : begin + PROMPTS_PER_FILE]
        part_seed = derived_seed(seed, "length", number)
        completions = sampling.complete(
            engine,
            group,
            n=options.samples,
            temperature=options.temperature,
            max_tokens=options.sampling.max_tokens,
            seed=part_seed,
        )
        lines = []
        for completion in completions:
            asked = group[completion.prompt_index]
            record = Sample(
                asked.id,
                asked.messages,
                completion.text,
                policy=str(options.policy),
                temperature=options.temperature,
                seed=part_seed,
            )
            finished = completion.finish_reason == "stop"
            kept = record.to_json() | {"tokens": completion.tokens, "finished": finished}
            lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
        on_main(functools.partial(atomic.write, path, "".join(lines)))
    found = [answer for path in paths for answer in on_main(functools.partial(_read, path))]
    if len(found) != len(prompts) * options.samples:
        raise InputError(
            f"{folder}: expected {options.samples} answers to each of {len(prompts)} prompts, "
            f"found {len(found)}"
        )
    return [found[i : i + options.samples] for i in range(0, len(found), options.samples)]


def _read(path: Path) -> list[Answer]:
    answers = []
    # Not splitlines(): an answer may hold any of Unicode's other line ends.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            answers.append(Answer(row["response"], len(row["tokens"]), row["finished"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a sample of a study ({error!r})") from None
    return answers
