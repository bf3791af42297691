"""What a policy's answers are like: rewards, lengths, and how far it has moved."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from llama2rt.algorithms import advantages
from llama2rt.data.records import Prompt
from llama2rt.parallel import on_main
from llama2rt.rollout import balance
from llama2rt.rollout.responses import Response, response_example, write_responses
from llama2rt.rollout.sampling import Sampler


def measure(
    path: Path,
    sampler: Sampler,
    reference: nn.Module,
    prompts: Sequence[Prompt],
    *,
    temperature: float = 1.0,
    seed: int,
) -> dict[str, float]:
    """One answer to each of `prompts`, written to `path`: mean reward and scores, KL to the
    reference in nats per response by two estimators, mean length in tokens, share cut short. All
    ranks take part, and have the numbers."""
    responses = sampler.responses(prompts, temperature=temperature, seed=seed)
    on_main(lambda: write_responses(path, responses))
    examples = [response_example(response) for response in responses]
    micro_tokens = sampler.reward_models.micro_tokens
    logprob, entropy = balance.logprobs(sampler.engine.model, examples, temperature, micro_tokens)
    reference_logprob, _ = balance.logprobs(reference, examples, temperature, micro_tokens)
    return {
        **summary(responses),
        **kl_per_response(logprob, reference_logprob, len(responses)),
        "entropy": float(entropy.mean()),
    }


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
