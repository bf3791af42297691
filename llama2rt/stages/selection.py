"""What rejection sampling trains on: the best usable answer of each prompt, pooled with those of
earlier versions where asked, and what the choice is like (section 3.2.3).

Up to V3 the paper chose among the answers of the preceding version alone; from V4 on among the top
samples of all earlier ones too, which won back skills such as rhyming. Every one of them is scored
anew by the reward models of today, whatever the file says: those that chose it have been replaced.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt.errors import InputError, naming
from llama2rt.evaluate import best_of, diversity
from llama2rt.evaluate.diagnostics import estimate
from llama2rt.rollout import balance
from llama2rt.rollout.responses import Response, read_responses
from llama2rt.rollout.reward import RewardModels
from llama2rt.stages.loading import Outline
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

logger = logging.getLogger("llama2rt.stages.selection")

BEST = "best.jsonl"


def read_earlier(
    folder: Path, tokenizer: Tokenizer, readers: Mapping[str, Outline]
) -> list[Response]:
    """The best samples of the earlier version in run directory `folder`. InputError naming the line
    that does not fit: its prompt's tokens must be those of `tokenizer`, and all `readers` must have
    room for it."""
    if not (folder / "manifest.json").is_file():
        raise InputError(f"earlier: {folder}: no run directory (it holds no manifest.json)")
    path = folder / "samples" / BEST
    embeddings = min(model.config.vocab_size for model in readers.values())
    responses = read_responses(path)
    for number, response in enumerate(responses, start=1):
        with naming(f"{path}:{number}: messages"):
            expected = chat.encode_prompt(tokenizer, response.prompt.messages)
        # Not the tokenizer's pieces: a model may have sampled an id that pads its vocabulary.
        if response.prompt_tokens != expected or max(response.tokens) >= embeddings:
            raise InputError(
                f"{path}:{number}: sampled with another tokenizer or chat format than the policy's"
            )
        length = len(response.prompt_tokens) + len(response.tokens)
        require_room(f"{path}:{number}:", length, readers)
    kept = [response for response in responses if usable(response, tokenizer)]
    if len(kept) < len(responses):
        logger.warning("%s: %d unusable samples left out", path, len(responses) - len(kept))
    return kept


def require_room(what: str, tokens: int, readers: Mapping[str, Outline]) -> None:
    """InputError beginning with `what` where one of the readers has no room for so many tokens."""
    for name, model in readers.items():
        if tokens > model.config.context:
            raise InputError(
                f"{what} {tokens} tokens exceed the context of {name}, {model.config.context}"
            )


def usable(response: Response, tokenizer: Tokenizer) -> bool:
    """Can its tokens be a target? Not where its text cannot, nor with a special token, which its
    text does not show. An added token that is text ("</think>") may stand in it."""
    return not tokenizer.hidden_ids.intersection(response.tokens[:-1]) and usable_text(response)


def usable_text(response: Response) -> bool:
    """Can its text be a target? Not if it was cut (it would gain an EOS that was never produced),
    is empty, or holds a tag of the chat format."""
    answer = {"role": "assistant", "content": response.text}
    try:
        chat.check_messages([*response.prompt.messages, answer], last="assistant")
    except InputError:
        return False
    return response.finished


def select(sampled: Sequence[Sequence[Response]], tokenizer: Tokenizer) -> list[Response]:
    """The usable response with the highest reward of each prompt, the first of equals; prompts
    without one are left out."""
    candidates = ([r for r in responses if usable(r, tokenizer)] for responses in sampled)
    return [max(group, key=lambda response: response.reward) for group in candidates if group]


def pool(best: Sequence[Response], earlier: Sequence[Response]) -> list[Response]:
    """One response a prompt: the better by today's reward models, or the only one. Prompts are the
    same where their messages are."""
    kept = {repr(response.prompt.messages): response for response in best}
    for response in earlier:
        key = repr(response.prompt.messages)
        if key not in kept or response.reward > kept[key].reward:
            kept[key] = response
    return list(kept.values())


def pooled(
    models: RewardModels, best: Sequence[Response], earlier: Sequence[Response]
) -> list[Response]:
    """`pool` by what `models` say today of the earlier responses; a preference model compares all
    responses to one prompt."""
    if models.preference is None:
        return pool(best, balance.rescored(models, earlier))
    groups: dict[str, list[Response]] = {}
    for response in [*best, *earlier]:
        groups.setdefault(repr(response.prompt.messages), []).append(response)
    ranked = balance.ranked(models, list(groups.values()))
    return [max(group, key=lambda response: response.reward) for group in ranked]


def describe(
    sampled: Sequence[Sequence[Response]],
    best: Sequence[Response],
    pooled: Sequence[Response] | None = None,
) -> dict[str, Any]:
    """What was drawn and what was chosen, for the report: `curves`, expected largest and median
    reward among N samples (`best_of.curves`); `gain`'s three numbers; `best_cut`, the share of
    prompts whose highest reward is that of a cut answer, which no target can be; `selection`, rows
    of `_row`: one answer a prompt as the policy gives it, the best usable one, and, of a pool, what
    was trained on; and `pooled`, how many of those each policy gave.

    Rewards that a preference model gave compare within a prompt only; their means over prompts say
    how far the best stand out, not how good they are.
    """
    rewards = np.array([[response.reward for response in group] for group in sampled])
    highest = [max(group, key=lambda response: response.reward) for group in sampled]
    cut = [float(not response.finished) for response in highest]
    rows = [_row("first sample", [group[0] for group in sampled]), _row("best usable", best)]
    found: dict[str, Any] = {
        **gain(rewards),
        "curves": best_of.curves(rewards),
        "best_cut": estimate(cut, share=True),
    }
    if pooled is not None:
        rows.append(_row("pooled", pooled))
        found["pooled"] = dict(Counter(response.policy for response in pooled))
    return {**found, "selection": rows}


def _row(name: str, responses: Sequence[Response]) -> dict[str, Any]:
    """A set of responses: how many, mean and median reward, tokens with their interval, and how
    much they repeat themselves (`diversity`); estimates are {mean, low, high}."""
    texts = [response.text for response in responses]
    row: dict[str, Any] = {"name": name, "responses": len(responses)}
    if responses:
        rewards = [response.reward for response in responses]
        row |= {
            "reward": estimate(rewards),
            "median_reward": float(np.median(rewards)),
            "tokens": estimate([float(len(response.tokens)) for response in responses]),
        }
    row |= {f"distinct_{n}": diversity.distinct(texts, n) for n in (1, 2, 3)}
    return {**row, "self_bleu": diversity.self_bleu(texts)}


def gain(rewards: np.ndarray) -> dict[str, float]:
    """Mean over prompts of the mean, median and maximum of rewards [prompts, K] (Figure 7)."""
    return {
        "sampled/mean_reward": float(rewards.mean()),
        "sampled/median_reward": float(np.median(rewards, axis=1).mean()),
        "sampled/max_reward": float(rewards.max(axis=1).mean()),
    }
