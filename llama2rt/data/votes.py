"""Several raters' judgements of one pair of answers: gathered, decided, laid out for agreement.

Llama 2 has each example judged by three people and takes the majority (section 4.4, of safety
violations; its human evaluation of helpfulness, section 3.4.2, has three raters too). The rule here
is the same for any number of votes: an answer wins by more than half of them, and votes for neither
count. The paper does not say how ratings combine: the middle one of those who voted for the winner
holds, of two in the middle the weaker.
"""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import replace
from hashlib import sha256

import numpy as np

from llama2rt.data.records import RATINGS, Comparison, Votes

_OTHER = {"chosen": "rejected", "rejected": "chosen", "neither": "neither"}


def gather(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Each pair that raters judged once, with all their votes, in the order in which pairs first
    occur; `chosen` is what the first of them says. A pair is two answers, in either order, to one
    prompt, judged by one kind of criterion. Comparisons that name no rater stay as they are.
    """
    groups: dict[Hashable, list[Comparison]] = {}
    for index, comparison in enumerate(comparisons):
        key: Hashable = index
        if comparison.rater or comparison.votes:
            prompt = tuple((m["role"], m["content"]) for m in comparison.prompt)
            pair = frozenset((comparison.chosen, comparison.rejected))
            key = (prompt, pair, comparison.kind, comparison.source)
        groups.setdefault(key, []).append(comparison)
    return [_gathered(group) for group in groups.values()]


def consensus(comparisons: Iterable[Comparison]) -> tuple[list[Comparison], Counter[str]]:
    """`gather`, and each pair with votes decided by their majority, also against its own `chosen`;
    and what was left out, by reason. Among it are pairs whose winner is unsafe while the other is
    safe, as section 3.2.1 has it, with an answer safe where more than half of those say so who
    label it."""
    decided, left_out = [], Counter[str]()
    for comparison in gather(comparisons):
        found = _decided(comparison) if comparison.votes else comparison
        if isinstance(found, str):
            left_out[found] += 1
        else:
            decided.append(found)
    return decided, left_out


def vote_table(comparisons: Iterable[Comparison], rated: bool = False) -> tuple[np.ndarray, int]:
    """(ratings, categories) for `evaluate.agreement.gwet`: fp64 [pairs, most votes of a pair], NaN
    where a pair has fewer.

    Categories are the two answers and, where somebody voted for it, neither; or, `rated`, the scale
    from significantly better to significantly worse (8 steps, 9 with neither in its middle), for
    ordinal weights; votes without a rating are missing there. Which answer comes first is drawn by
    a hash of their texts: where it was the winner, raters who agree by chance would seem to agree
    more. Pairs without a majority belong here: give what `consensus` takes, not what it leaves.
    ValueError where no pair has votes.
    """
    pairs = [comparison for comparison in gather(comparisons) if comparison.votes]
    if not pairs:
        raise ValueError("no comparison has votes")
    neither = any(vote["prefers"] == "neither" for pair in pairs for vote in pair.votes)
    table = np.full((len(pairs), max(len(pair.votes) for pair in pairs)), np.nan)
    for row, pair in zip(table, pairs, strict=True):
        first = "chosen" if _digest(pair.chosen) < _digest(pair.rejected) else "rejected"
        for column, vote in enumerate(pair.votes):
            category = _category(vote, first, rated, neither)
            if category is not None:
                row[column] = category
    return table, (2 * len(RATINGS) if rated else 2) + neither


def _gathered(group: list[Comparison]) -> Comparison:
    first = group[0]
    if len(group) == 1 and not first.rater:
        return first
    votes: Votes = []
    raters: set[str] = set()
    for comparison in group:
        same = comparison.chosen == first.chosen
        for vote in comparison.votes or [_vote(comparison)]:
            rater = vote.get("rater", "")
            if rater and rater in raters:
                continue  # a person has one vote on a pair: the first
            raters.add(rater)
            votes.append(vote if same else vote | {"prefers": _OTHER[vote["prefers"]]})
    return replace(first, rater="", votes=votes)


def _vote(comparison: Comparison) -> dict[str, str]:
    said = {"rating": comparison.rating, "safety": comparison.safety}
    vote = {"rater": comparison.rater, "prefers": "chosen"}
    return vote | {key: value for key, value in said.items() if value is not None}


def _decided(pair: Comparison) -> Comparison | str:
    """The pair as its votes have it; the reason where it is left out."""
    [(winner, count)] = Counter(vote["prefers"] for vote in pair.votes).most_common(1)
    if winner == "neither" or 2 * count <= len(pair.votes):
        return "pairs without a majority of votes"
    rating, safety = pair.rating, pair.safety
    if winner == "rejected":  # what the record said of its answers is not true of them changed over
        rating = safety = None
        votes = [vote | {"prefers": _OTHER[vote["prefers"]]} for vote in pair.votes]
        pair = replace(pair, chosen=pair.rejected, rejected=pair.chosen, votes=votes)
    winners = [vote for vote in pair.votes if vote["prefers"] == "chosen"]
    ratings = sorted(RATINGS.index(vote["rating"]) for vote in winners if "rating" in vote)
    if ratings:
        rating = RATINGS[ratings[len(ratings) // 2]]
    safe = _safe(pair.votes)
    if safe == (False, True):
        return "safety pairs that prefer an unsafe answer to a safe one"
    if safe is not None:
        label = {(True, True): "both_safe", (True, False): "chosen_safe"}
        safety = label.get(safe, "both_unsafe")
    return replace(pair, rating=rating, safety=safety)


def _safe(votes: Votes) -> tuple[bool, bool] | None:
    """Whether the chosen answer and the rejected one are safe by majority; None without labels."""
    labels = [vote for vote in votes if "safety" in vote]
    if not labels:
        return None
    counts = [0, 0]
    for vote in labels:
        preferred = 1 if vote["prefers"] == "rejected" else 0
        counts[preferred] += vote["safety"] != "both_unsafe"
        counts[1 - preferred] += vote["safety"] == "both_safe"
    return 2 * counts[0] > len(labels), 2 * counts[1] > len(labels)


def _category(vote: dict[str, str], first: str, rated: bool, neither: bool) -> int | None:
    prefers = vote["prefers"]
    if not rated:
        return 2 if prefers == "neither" else int(prefers != first)
    if prefers == "neither":
        return len(RATINGS)
    if "rating" not in vote:
        return None
    step = RATINGS.index(vote["rating"])
    return step if prefers == first else 2 * len(RATINGS) - 1 + neither - step


def _digest(text: str) -> bytes:
    return sha256(text.encode()).digest()
