"""The phases of a rollout that rejection sampling, PPO and online DPO share: sample, score,
recompute, measure.

Everything after sampling works on tokens exactly as they were sampled: re-encoding a response's
text could give other tokens, and a response cut off by the length limit would gain an EOS that the
policy never produced.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama2rt import atomic, report
from llama2rt.algorithms import advantages, rewards
from llama2rt.data.packing import Batch, Example, micro_batches
from llama2rt.data.records import Prompt, Sample
from llama2rt.errors import InputError
from llama2rt.evaluate.scoring import score_tokens
from llama2rt.generate import Completion, Engine
from llama2rt.model import Llama, ScalarModel
from llama2rt.stages import loading
from llama2rt.stages.loading import RolloutInputs
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.run import Run


def derived_seed(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2^31) for one phase of one iteration: distinct, and free of state to resume."""
    digest = hashlib.sha256(json.dumps([seed, *parts]).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


@dataclass(frozen=True)
class Response:
    """A scored sample with what training needs and a Sample record does not hold: its tokens."""

    prompt: Prompt
    text: str
    prompt_tokens: list[int]
    tokens: list[int]
    finished: bool
    """False where the length limit cut it: its tokens then end without an EOS"""
    reward: float
    scores: dict[str, float]
    policy: str
    temperature: float
    seed: int

    def to_json(self) -> dict[str, Any]:
        """A Sample record with further keys, which readers of records ignore."""
        record = Sample(
            self.prompt.id,
            self.prompt.messages,
            self.text,
            self.scores,
            self.reward,
            self.policy,
            self.temperature,
            self.seed,
        )
        return record.to_json() | {
            "kind": self.prompt.kind,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "finished": self.finished,
        }

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "Response":
        for key in ("prompt_tokens", "tokens"):
            if not line[key] or not all(type(token) is int and token >= 0 for token in line[key]):
                raise ValueError(f"{key}: expected token ids")
        return cls(
            prompt=Prompt(line["prompt_id"], line["messages"], line["kind"]),
            text=line["response"],
            prompt_tokens=line["prompt_tokens"],
            tokens=line["tokens"],
            finished=line["finished"],
            reward=line["reward"],
            scores=line["scores"],
            policy=line["policy"],
            temperature=line["temperature"],
            seed=line["seed"],
        )


@dataclass(frozen=True)
class RewardModels:
    """The models that rank responses. Without a safety model, helpfulness alone decides."""

    helpfulness: ScalarModel
    safety: ScalarModel | None = None
    threshold: float = 0.15  # section 3.2.3

    @classmethod
    def load(
        cls,
        helpfulness: Path,
        safety: Path | None,
        threshold: float,
        dtype: torch.dtype = torch.float32,
        tokenizer: Tokenizer | None = None,
    ) -> "RewardModels":
        """From folders; `tokenizer` is the policy's, which the models must share."""
        return cls(
            loading.load_scalar(helpfulness, dtype, tokenizer),
            loading.load_scalar(safety, dtype, tokenizer) if safety is not None else None,
            threshold,
        )

    @property
    def by_key(self) -> dict[str, ScalarModel]:
        """The models by their key in a recipe."""
        models = {"helpfulness": self.helpfulness}
        return models if self.safety is None else models | {"safety": self.safety}

    def score(
        self, sequences: Sequence[list[int]], is_safety: np.ndarray, micro_tokens: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Reward fp64 [n], and the scores in (0, 1) behind it by model.

        The reward is logit(Rc), Rc the piecewise rule of section 3.2.3 (`rewards.combine`):
        unwhitened, so comparable between iterations. `sequences` are prompts with responses as
        sampled, `is_safety` is bool [n].
        """
        scores = {
            # In fp64: in fp32 the sigmoid of 17 is already 1 and its logit lost.
            name: torch.from_numpy(score_tokens(model, sequences, micro_tokens=micro_tokens))
            .double()
            .sigmoid()
            for name, model in self.by_key.items()
        }
        combined = scores["helpfulness"]
        if self.safety is not None:
            combined = rewards.combine(
                combined, scores["safety"], torch.from_numpy(is_safety), self.threshold
            )
        reward = rewards.logit(combined).numpy()
        return reward, {name: score.numpy() for name, score in scores.items()}


def engine(recipe: Any, model: Llama, tokenizer: Tokenizer) -> Engine:
    """The sampler of a recipe with `max_sequences` and `cache_bytes`."""
    return Engine(
        model, tokenizer, max_sequences=recipe.max_sequences, cache_bytes=recipe.cache_bytes
    )


def response_example(response: Response | Completion) -> Example:
    """Prompt and response as sampled; the response's tokens are the targets."""
    tokens = [*response.prompt_tokens, *response.tokens]
    trainable = np.arange(len(tokens)) >= len(response.prompt_tokens)
    return Example.of(tokens, trainable)


def inference_batches(
    examples: Sequence[Example], micro_tokens: int, device: torch.device
) -> list[Batch]:
    """Packed in order; a single example longer than `micro_tokens` gets a batch of its own size."""
    longest = max(len(example.tokens) for example in examples)
    return [b.to(device) for b in micro_batches(examples, max(micro_tokens, longest))]


@torch.no_grad()
def response_logprobs(
    model: Llama, examples: Sequence[Example], temperature: float, micro_tokens: int
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy fp32 [R] of all response tokens, in order, by the training path.

    `temperature` must be the one the responses were sampled at: log-probabilities at another one
    belong to another policy, and a KL computed from them comes out negative or exploding.
    """
    parts = []
    for batch in inference_batches(examples, micro_tokens, model.output.weight.device):
        logprob, entropy = model(
            batch.tokens,
            batch.positions,
            batch.cu_seqlens,
            batch.targets,
            temperature=temperature,
            entropy=True,
        )
        parts.append(torch.stack([logprob, entropy])[:, batch.targets >= 0])
    logprob, entropy = torch.cat(parts, dim=1)
    return logprob, entropy


@torch.no_grad()
def response_values(critic: ScalarModel, examples: Sequence[Example], micro_tokens: int) -> Tensor:
    """Value fp32 [R] of the state before each response token, aligned with `response_logprobs`."""
    parts = []
    for batch in inference_batches(examples, micro_tokens, critic.head.weight.device):
        values = critic(batch.tokens, batch.positions, batch.cu_seqlens)
        parts.append(values[batch.targets >= 0])
    return torch.cat(parts)


def segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive segments: [T] and int64 [B] -> [B], at least fp32; differentiable,
    deterministic."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))  # else bf16 stops at 256
    return torch.segment_reduce(wide, "sum", lengths=lengths, initial=0)


def draw(prompts: Sequence[Prompt], count: int, seed: int, iteration: int) -> list[Prompt]:
    """An iteration's `count` prompts: the next of an endless row of permutations, so that none is
    ever left over and none comes again before all have come."""
    places = range(iteration * count, (iteration + 1) * count)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(len(prompts))
        for epoch in range(places[0] // len(prompts), places[-1] // len(prompts) + 1)
    }
    return [prompts[orders[place // len(prompts)][place % len(prompts)]] for place in places]


def write_responses(path: Path, responses: Sequence[Response]) -> None:
    """JSON lines, visible only when complete."""
    lines = (json.dumps(response.to_json(), ensure_ascii=False) for response in responses)
    atomic.write(path, "".join(f"{line}\n" for line in lines))


def read_responses(path: Path) -> list[Response]:
    """What `write_responses` wrote; InputError naming the file and line otherwise."""
    try:
        # Not splitlines(): a response may hold any of Unicode's other line ends.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    responses = []
    for number, line in enumerate(lines, start=1):
        try:
            responses.append(Response.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a sample of this stage ({error!r})") from None
    return responses


PROMPTS_PER_FILE = 512


def sample(
    folder: Path,
    engine: Engine,
    reward_models: RewardModels,
    prompts: Sequence[Prompt],
    *,
    n: int,
    temperatures: Sequence[float],
    max_tokens: int,
    seed: int,
    policy: str,
    micro_tokens: int,
) -> list[list[Response]]:
    """n scored responses of each prompt, an equal share at each temperature.

    Written to `folder` in files of 512 prompts as they are finished; a file that is there is read
    instead of sampled again, so a killed run loses at most one.
    """
    each = n // len(temperatures)
    by_prompt: list[list[Response]] = []
    for part, begin in enumerate(range(0, len(prompts), PROMPTS_PER_FILE)):
        group = prompts[begin : begin + PROMPTS_PER_FILE]
        path = folder / f"part-{part:05d}.jsonl"
        if not path.exists():
            responses: list[Response] = []
            for temperature in temperatures:
                part_seed = derived_seed(seed, part, str(temperature))
                completions = engine.generate(
                    [prompt.messages for prompt in group],
                    n=each,
                    temperature=temperature,
                    max_tokens=max_tokens,
                    seed=part_seed,
                )
                responses += score_responses(
                    completions, group, reward_models, temperature, part_seed, policy, micro_tokens
                )
            # From temperature-major to prompt-major.
            grid = np.arange(len(responses)).reshape(len(temperatures), len(group), each)
            order = grid.transpose(1, 0, 2).ravel()
            write_responses(path, [responses[i] for i in order])
        responses = read_responses(path)
        by_prompt += [responses[i : i + n] for i in range(0, len(responses), n)]
    return by_prompt


def score_responses(
    completions: Sequence[Completion],
    prompts: Sequence[Prompt],
    reward_models: RewardModels,
    temperature: float,
    seed: int,
    policy: str,
    micro_tokens: int,
) -> list[Response]:
    """Completions of `prompts` with their rewards."""
    sequences = [c.prompt_tokens + c.tokens for c in completions]
    is_safety = np.array([prompts[c.prompt_index].kind == "safety" for c in completions])
    reward, scores = reward_models.score(sequences, is_safety, micro_tokens)
    return [
        Response(
            prompt=prompts[completion.prompt_index],
            text=completion.text,
            prompt_tokens=completion.prompt_tokens,
            tokens=completion.tokens,
            finished=completion.finish_reason == "stop",
            reward=float(reward[i]),
            scores={name: float(score[i]) for name, score in scores.items()},
            policy=policy,
            temperature=temperature,
            seed=seed,
        )
        for i, completion in enumerate(completions)
    ]


def rescore(
    responses: Sequence[Response], reward_models: RewardModels, micro_tokens: int
) -> list[Response]:
    """The same responses with the rewards these models give them."""
    sequences = [response.prompt_tokens + response.tokens for response in responses]
    is_safety = np.array([response.prompt.kind == "safety" for response in responses])
    reward, scores = reward_models.score(sequences, is_safety, micro_tokens)
    return [
        replace(
            response,
            reward=float(reward[i]),
            scores={name: float(score[i]) for name, score in scores.items()},
        )
        for i, response in enumerate(responses)
    ]


def measure(
    path: Path,
    engine: Engine,
    reference: Llama,
    reward_models: RewardModels,
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
    policy: str,
    micro_tokens: int,
) -> dict[str, float]:
    """One answer to each held-out prompt, written to `path`: mean reward and scores, KL to the
    reference in nats per response by two estimators, mean length in tokens, share cut short."""
    completions = engine.generate(
        [prompt.messages for prompt in prompts],
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
    )
    responses = score_responses(
        completions, prompts, reward_models, temperature, seed, policy, micro_tokens
    )
    write_responses(path, responses)
    examples = [response_example(response) for response in responses]
    logprob, entropy = response_logprobs(engine.model, examples, temperature, micro_tokens)
    reference_logprob, _ = response_logprobs(reference, examples, temperature, micro_tokens)
    return {
        **summary(responses),
        **kl_per_response(logprob, reference_logprob, len(responses)),
        "entropy": float(entropy.mean()),
    }


def measure_held_out(
    recipe: Any,
    inputs: RolloutInputs,
    model: Llama,
    reference: Llama,
    reward_models: RewardModels,
    run: Run,
) -> dict[str, float]:
    """`measure` of a model that a run has trained on the recipe's held-out prompts: at temperature
    1, with the same random numbers every time."""
    return measure(
        run.samples_directory / "held_out.jsonl",
        engine(recipe, model, inputs.tokenizer),
        reference,
        reward_models,
        inputs.held_out,
        temperature=1.0,
        max_tokens=recipe.max_tokens,
        seed=derived_seed(recipe.seed, "held-out"),
        policy=str(run.directory),
        micro_tokens=recipe.train.micro_tokens,
    )


def summary(responses: Sequence[Response]) -> dict[str, float]:
    """What a set of responses is like on average.

    `reward` is the mean of logit(Rc), in which one kind of prompts can drown the other; `score` is
    Rc in (0, 1), averaged over the prompts of each kind and then over the kinds, which are there
    too (`score/on_safety`), and `score_deviation` its standard deviation over all responses.
    """
    scores = {
        f"score/{name}": float(np.mean([response.scores[name] for response in responses]))
        for name in responses[0].scores
    }
    combined = 1 / (1 + np.exp(-np.array([response.reward for response in responses])))
    kinds = np.array([response.prompt.kind for response in responses])
    by_kind = {
        f"score/on_{kind}": float(combined[kinds == kind].mean()) for kind in sorted({*kinds})
    }
    return {
        "reward": float(np.mean([response.reward for response in responses])),
        "score": float(np.mean([*by_kind.values()])),
        "score_deviation": float(combined.std()),
        **scores,
        **by_kind,
        "response_tokens": float(np.mean([len(response.tokens) for response in responses])),
        "cut_share": float(np.mean([not response.finished for response in responses])),
    }


def kl_per_response(logprob: Tensor, reference: Tensor, responses: int) -> dict[str, float]:
    """KL(policy || reference) in nats per response: the unbiased k1 and the never negative k3."""
    return {
        f"kl_{estimator}": float(advantages.kl(logprob, reference, estimator).sum() / responses)
        for estimator in ("k1", "k3")
    }


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def unprefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def write_report(run: Run, numbers: dict[str, Any]) -> None:
    """The run complete, with its report.json and report.html."""
    run.finish(**numbers)
    report.of_run(run.directory)
