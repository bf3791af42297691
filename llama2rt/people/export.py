"""Judgements as files: comparisons by week and kind, judgements for the stage annotate, or the
points of an evaluation."""

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama2rt import atomic
from llama2rt.annotate import AnswerPair, Judgement
from llama2rt.data import readers
from llama2rt.data.records import RATINGS, Comparison, Prompt
from llama2rt.errors import InputError
from llama2rt.people.store import Store, now, week

JUDGEMENTS = "judgements.jsonl"
_JUDGED = """SELECT j.*, t.kind, t.prompt_id, t.messages, t.first, t.second, t.pair,
  t.first_variant, t.second_variant, n.name
FROM judgements j JOIN tasks t ON t.id = j.task JOIN annotators n ON n.id = j.annotator
WHERE j.undone = 0 AND j.skipped IS NULL ORDER BY j.id"""


def export(store: Store, out: Path, only: str | None = None) -> dict[str, int]:
    """Write what was judged into the folder `out`; how many records each file got. `only`: the
    judgements of one week. A week that is over gives the same file whenever it is exported.
    InputError where there is nothing to write."""
    rows = [dict(row) for row in store.rows(_JUDGED)]
    found = [row for row in rows if only in (None, week(row["time"]))]
    evaluation = store.recall("mode") == "evaluation"
    skipped = [] if evaluation else [*_skipped_pairs(store, only)]
    if not found and not skipped:
        weeks = ", ".join(sorted({week(row["time"]) for row in rows})) or "none"
        raise InputError(f"week: nothing was judged in {only or 'any'} (weeks: {weeks})")
    if evaluation:
        files = _points(found)
    else:
        files = _comparisons(found, store.folder.resolve().name)
        if judgements := [*_of_pairs(found), *skipped]:
            files[JUDGEMENTS] = judgements
    for name, records in files.items():
        if isinstance(records[0], Comparison):
            readers.write(out / name, records)
        else:
            lines = (json.dumps(row, ensure_ascii=False) for row in records)
            atomic.write(out / name, "".join(f"{line}\n" for line in lines))
    return {str(out / name): len(records) for name, records in files.items()}


def open_week(store: Store) -> str | None:
    """The present week, where something was judged in it that may still be undone."""
    last = store.one("SELECT max(time) time FROM judgements WHERE undone = 0")
    present = week(now())
    return present if last and last["time"] and week(last["time"]) == present else None


def _comparisons(rows: Sequence[dict[str, Any]], origin: str) -> dict[str, list[Any]]:
    """One comparison a judgement, in a file for each week and kind."""
    files: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        batch = week(row["time"])
        prompt = Prompt(row["prompt_id"], json.loads(row["messages"]), row["kind"])
        pair = AnswerPair(str(row["task"]), prompt, row["first"], row["second"])
        comparison = _judgement(row).comparison(pair, f"{origin}/{batch}")
        # The page offers no label for a chosen answer that is unsafe beside one that is safe.
        assert comparison is not None
        comparison = dataclasses.replace(comparison, rater=row["name"])
        files[f"{batch}-{row['kind']}.jsonl"].append(comparison)
    return files


def _judgement(row: dict[str, Any]) -> Judgement:
    safe = [None if row[key] is None else bool(row[key]) for key in ("first_safe", "second_safe")]
    return Judgement(row["chosen"], row["rating"], *safe)


def _of_pairs(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One line for each pair of a pairs.jsonl, as `annotator.files` reads them: what most raters
    say; "neither" where as many say one as the other."""
    by_pair: dict[str, list[Judgement]] = defaultdict(list)
    for row in rows:
        if row["pair"] is not None:
            by_pair[row["pair"]].append(_judgement(row))
    for pair, said in by_pair.items():
        votes = Counter(judgement.chosen for judgement in said).most_common()
        if len(votes) > 1 and votes[0][1] == votes[1][1]:
            yield {"pair": pair, "chosen": "neither"}
            continue
        agreed = [judgement for judgement in said if judgement.chosen == votes[0][0]]
        # The less sure of the two in the middle, and their safety labels with it.
        agreed.sort(key=lambda judgement: RATINGS.index(str(judgement.rating)))
        middle = agreed[len(agreed) // 2]
        safe = {"first_safe": middle.first_safe, "second_safe": middle.second_safe}
        labels = {key: value for key, value in safe.items() if value is not None}
        yield {"pair": pair, "chosen": middle.chosen, "rating": middle.rating, **labels}


def _skipped_pairs(store: Store, only: str | None) -> Iterator[dict[str, Any]]:
    """Those that somebody skipped (in the week `only`) and nobody had judged (by its end): they
    cannot be decided."""
    query = (
        "SELECT t.pair, j.time, j.skipped FROM judgements j JOIN tasks t ON t.id = j.task "
        "WHERE t.pair IS NOT NULL AND j.undone = 0 ORDER BY t.id, j.id"
    )
    skips: dict[str, set[str]] = {}
    judged: dict[str, set[str]] = defaultdict(set)
    for row in store.rows(query):
        weeks = skips.setdefault(row["pair"], set()) if row["skipped"] else judged[row["pair"]]
        weeks.add(week(row["time"]))
    for pair, weeks in skips.items():
        late = [one for one in judged[pair] if only is not None and one > only]
        if only in (None, *weeks) and len(late) == len(judged[pair]):
            yield {"pair": pair, "chosen": "neither"}


def _points(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Every judgement of an evaluation; `score` 3..-3, above 0 where `variant` is better."""
    files: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        batch = week(row["time"])
        files[f"{batch}-evaluation.jsonl"].append(
            {
                "prompt_id": row["prompt_id"],
                "messages": json.loads(row["messages"]),
                "variant": row["first_variant"],
                "against": row["second_variant"],
                "responses": [row["first"], row["second"]],
                "score": row["score"],
                "shown_first": row["second_variant" if row["flipped"] else "first_variant"],
                "rater": row["name"],
                "time": row["time"],
            }
        )
    return files
