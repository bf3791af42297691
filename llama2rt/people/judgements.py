"""What annotators say, from a form to the store, each in one transaction."""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

from llama2rt.data.records import RATINGS, SAFETY
from llama2rt.errors import InputError
from llama2rt.people.store import Conflict, Store, now, week
from llama2rt.people.tasks import Tasks, assigned, drop, drop_failed

# Best for A to best for B, and what each counts for A (appendix A.3.7).
SCALE = {
    "A is much better": 3,
    "A is better": 2,
    "A is slightly better": 1,
    "About the same": 0,
    "B is slightly better": -1,
    "B is better": -2,
    "B is much better": -3,
}
REASONS = {
    "unclear": "I do not understand the prompt",
    "expertise": "It needs knowledge that I do not have",
    "broken": "A response is damaged or in another language",
    "upsetting": "I would rather not read it",
    "other": "Something else",
}
_MOST_OF_A_REASON = 1000


@dataclass(frozen=True)
class Said:
    """What a form says, of A and B."""

    chosen: str | None = None
    """a or b"""
    rating: str | None = None
    """one of `RATINGS`"""
    safety: str | None = None
    """one of `SAFETY`"""
    score: int | None = None
    """-3..3, above 0 where A is better"""
    skipped: str | None = None
    """why"""


def preference(form: Mapping[str, str], kind: str) -> Said:
    """A choice with its rating, in a safety batch with the label. InputError naming what is
    missing."""
    chosen = _one_of(form, "chosen", ("a", "b"), "which response is better")
    rating = _one_of(form, "rating", RATINGS, "how much better it is")
    safety = None
    if kind == "safety":
        safety = _one_of(form, "safety", SAFETY, "which responses are safe")
    return Said(chosen, rating, safety)


def evaluation(form: Mapping[str, str]) -> Said:
    """A point of the 7-point scale, by its number from 1."""
    points = tuple(str(point) for point in range(1, len(SCALE) + 1))
    point = _one_of(form, "score", points, "which response is better")
    return Said(score=tuple(SCALE.values())[int(point) - 1])


def skip(form: Mapping[str, str]) -> Said:
    """Why nothing is said of a pair."""
    reason = _one_of(form, "reason", tuple(REASONS), "why")
    detail = form.get("detail", "").strip()
    if reason == "other" and not detail:
        raise InputError("say in a few words why")
    if len(detail) > _MOST_OF_A_REASON or "\0" in detail:
        raise InputError(f"why: expected text of at most {_MOST_OF_A_REASON} characters")
    return Said(skipped=f"{reason}: {detail}" if detail else reason)


def _one_of(form: Mapping[str, str], key: str, choices: tuple[str, ...], what: str) -> str:
    if form.get(key) not in choices:
        raise InputError(f"say {what}")
    return form[key]


class Judgements:
    """Puts what is said into a store, and takes it back."""

    def __init__(self, store: Store, tasks: Tasks) -> None:
        self._store, self._tasks = store, tasks

    def say(self, annotator: int, nonce: str, task: int, said: Said) -> None:
        """Once for each nonce. Conflict where the annotator has judged the task already, or does
        not have it before them."""
        with self._store.post(nonce, annotator, f"say {task}") as db:
            if db is None:
                return
            flipped = assigned(db, task, annotator)
            try:
                db.execute(
                    "INSERT INTO judgements (task, annotator, time, flipped, chosen, rating, "
                    "first_safe, second_safe, score, skipped) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (task, annotator, now(), flipped, *_unflipped(said, flipped), said.skipped),
                )
            except sqlite3.IntegrityError:
                raise Conflict(
                    "you have judged this task already, perhaps in another tab"
                ) from None
            self._tasks.judged(db, task)
            # A conversation goes on from what was chosen last.
            goes_on = task if said.chosen else None
            db.execute("UPDATE annotators SET conversation = ? WHERE id = ?", (goes_on, annotator))

    def undo(self, annotator: int, nonce: str) -> None:
        """Take the annotator's last judgement back: its task is before them again, unless it was
        skipped and as many others as should judge it have it by now. Conflict where there is none,
        and where its week is over: a batch that is closed does not change."""
        with self._store.post(nonce, annotator, "undo") as db:
            if db is None:
                return
            last = db.execute(
                "SELECT * FROM judgements WHERE annotator = ? AND undone = 0 "
                "ORDER BY id DESC LIMIT 1",
                (annotator,),
            ).fetchone()
            if last is None:
                raise Conflict("there is nothing to undo")
            if week(last["time"]) != week(now()):
                raise Conflict("that was in an earlier week, whose batch is closed")
            task = last["task"]
            query = "SELECT id FROM tasks WHERE parent = ? AND owner = ? AND state != 'dropped'"
            for turn in db.execute(query, (task, annotator)).fetchall():
                drop(db, turn["id"])  # not judged, or that judgement would be the last
            db.execute("UPDATE judgements SET undone = 1 WHERE id = ?", (last["id"],))
            self._tasks.give_back(db, task, annotator)
            db.execute("UPDATE annotators SET conversation = NULL WHERE id = ?", (annotator,))
            self._tasks.judged(db, task)

    def finish(self, annotator: int, nonce: str) -> None:
        """End the conversation that might go on, or whose last message could not be answered."""
        with self._store.post(nonce, annotator, "finish") as db:
            if db is not None:
                drop_failed(db, annotator)
                db.execute("UPDATE annotators SET conversation = NULL WHERE id = ?", (annotator,))


def _unflipped(
    said: Said, flipped: bool
) -> tuple[str | None, str | None, bool | None, bool | None, int | None]:
    """chosen, rating, first_safe, second_safe, score of the first and the second response."""
    chosen = None
    if said.chosen is not None:
        chosen = "second" if (said.chosen == "b") != flipped else "first"
    first_safe = second_safe = None
    if said.safety is not None:
        both = said.safety == "both_safe"
        one = said.safety == "chosen_safe"
        first_safe = both or (one and chosen == "first")
        second_safe = both or (one and chosen == "second")
    score = None if said.score is None else said.score * (-1 if flipped else 1)
    return chosen, said.rating, first_safe, second_safe, score
