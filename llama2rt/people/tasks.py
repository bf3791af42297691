"""What there is to judge: added once, sampled, and given to annotators in turn."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from llama2rt.data.records import Prompt
from llama2rt.people.store import Conflict, Store, now

# What one annotator wrote, others see once its writer has judged it.
_TO_ALL = """t.owner IS NULL OR EXISTS (SELECT 1 FROM judgements j WHERE j.task = t.id
  AND j.annotator = t.owner AND j.undone = 0 AND j.skipped IS NULL)"""
# Judgements of it, and others who have it before them.
_LIVE = """(SELECT count(*) FROM judgements j WHERE j.task = t.id AND j.undone = 0
             AND j.skipped IS NULL)
  + (SELECT count(*) FROM assignments a WHERE a.task = t.id AND a.time > :since
     AND a.annotator != :me AND NOT EXISTS (SELECT 1 FROM judgements j
       WHERE j.task = a.task AND j.annotator = a.annotator AND j.undone = 0))"""


@dataclass(frozen=True)
class NewTask:
    """A prompt and who answers it, or what they have answered."""

    prompt: Prompt
    variants: tuple[str, str]
    responses: tuple[str | None, str | None] = (None, None)
    """None where it is to be sampled"""
    pair: str | None = None
    """id of the line of pairs.jsonl that it is from"""

    @property
    def key(self) -> str:
        """What makes it the same as one that is there."""
        parts = [self.prompt.id, self.prompt.messages, self.variants, self.responses, self.pair]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Task:
    """A row of the store."""

    id: int
    prompt: Prompt
    variants: tuple[str, str]
    responses: tuple[str | None, str | None]
    state: str
    reason: str | None
    owner: int | None
    """the annotator who wrote its last message"""
    parent: int | None
    """the turn before"""
    attempts: int
    flipped: bool = False
    """whether its annotator sees the second response as A"""

    @classmethod
    def of(cls, row: sqlite3.Row, flipped: bool = False) -> "Task":
        return cls(
            id=row["id"],
            prompt=Prompt(row["prompt_id"], json.loads(row["messages"]), row["kind"]),
            variants=(row["first_variant"], row["second_variant"]),
            responses=(row["first"], row["second"]),
            **{key: row[key] for key in ("state", "reason", "owner", "parent", "attempts")},
            flipped=flipped,
        )

    @property
    def shown(self) -> tuple[str, str]:
        """The responses as A and B."""
        first, second = self.responses
        assert first is not None and second is not None
        return (second, first) if self.flipped else (first, second)

    @property
    def turn(self) -> int:
        """How many messages the user has written."""
        return sum(message["role"] == "user" for message in self.prompt.messages)


class Tasks:
    """The tasks of a store, each for `raters` annotators. `seed`: of the order of responses."""

    def __init__(self, store: Store, *, raters: int, lease_minutes: int, seed: int) -> None:
        self._store, self._raters, self._seed = store, raters, seed
        self._lease = timedelta(minutes=lease_minutes)
        with store.transaction() as db:  # by this number of raters, which may be another one now
            db.execute(
                "UPDATE tasks SET complete = (SELECT count(*) FROM judgements j WHERE "
                "j.task = tasks.id AND j.undone = 0 AND j.skipped IS NULL) >= ? "
                "WHERE state != 'dropped'",
                (raters,),
            )

    def add(self, tasks: Iterable[NewTask]) -> int:
        """Those that are not there yet; how many these are."""
        with self._store.transaction() as db:
            before = db.total_changes
            for task in tasks:
                _insert(db, task)
            return db.total_changes - before

    # --- sampling -------------------------------------------------------------------------------

    def waiting(self, most: int, ahead: int) -> list[Task]:
        """Up to `most` to be sampled now: those that somebody waits for, then as many as keep
        `ahead` ready."""
        owned = self._store.rows(
            "SELECT * FROM tasks WHERE state = 'waiting' AND owner IS NOT NULL AND complete = 0 "
            "ORDER BY id LIMIT ?",
            most,
        )
        ready = self._store.one(
            "SELECT count(*) n FROM (SELECT 1 FROM tasks t WHERE state = 'ready' AND complete = 0 "
            "AND owner IS NULL AND NOT EXISTS (SELECT 1 FROM assignments WHERE task = t.id) "
            "LIMIT ?)",
            ahead,
        )
        assert ready is not None
        count = min(most - len(owned), ahead - ready["n"])
        others = self._store.rows(
            "SELECT * FROM tasks WHERE state = 'waiting' AND owner IS NULL AND complete = 0 "
            "ORDER BY id LIMIT ?",
            max(0, count),
        )
        return [Task.of(row) for row in [*owned, *others]]

    def answered(self, task: int, responses: Sequence[str]) -> None:
        """What was sampled; the task may be shown."""
        with self._store.transaction() as db:
            db.execute(
                "UPDATE tasks SET first = ?, second = ?, state = 'ready' "
                "WHERE id = ? AND state = 'waiting'",
                (*responses, task),
            )

    def again(self, task: int) -> None:
        """Count an attempt that gave no pair to show."""
        with self._store.transaction() as db:
            db.execute("UPDATE tasks SET attempts = attempts + 1 WHERE id = ?", (task,))

    def failed(self, task: int, reason: str) -> None:
        """No pair comes of it; who wrote it is told why."""
        with self._store.transaction() as db:
            db.execute(
                "UPDATE tasks SET state = 'failed', reason = ? WHERE id = ? AND state = 'waiting'",
                (reason, task),
            )

    # --- annotators -----------------------------------------------------------------------------

    def next(self, annotator: int) -> Task | None:
        """What the annotator has before them, else the first task that they may judge, which is
        theirs from now on."""
        with self._store.transaction() as db:
            if (task := _open(db, annotator)) is not None:
                return task
            since = now(before=self._lease)
            row = db.execute(
                "SELECT * FROM tasks t WHERE state = 'ready' AND complete = 0 AND NOT EXISTS "
                "(SELECT 1 FROM judgements j WHERE j.task = t.id AND j.annotator = :me AND "
                f"j.undone = 0) AND ({_TO_ALL}) AND ({_LIVE}) < :raters ORDER BY id LIMIT 1",
                {"me": annotator, "since": since, "raters": self._raters},
            ).fetchone()
            if row is None:
                return None
            flipped = self._assign(db, row["id"], row["key"], annotator)
            return Task.of(row, flipped)

    def waits(self) -> bool:
        """Whether more is to be sampled that anybody may judge."""
        query = (
            "SELECT 1 FROM tasks WHERE state = 'waiting' AND owner IS NULL AND complete = 0 LIMIT 1"
        )
        return self._store.one(query) is not None

    def conversation(self, annotator: int, turns: int) -> tuple[int, Prompt] | None:
        """(the last judged task, the conversation with the chosen response at its end) where it may
        go on for at most `turns` messages of the user."""
        row = self._store.one(
            "SELECT t.*, j.chosen, j.flipped FROM annotators n JOIN tasks t ON t.id = "
            "n.conversation JOIN judgements j ON j.task = t.id AND j.annotator = n.id AND "
            "j.undone = 0 WHERE n.id = ? AND j.chosen IS NOT NULL",
            annotator,
        )
        if row is None or (task := Task.of(row)).turn >= turns:
            return None
        said = {"role": "assistant", "content": row[row["chosen"]]}
        return task.id, Prompt(task.prompt.id, [*task.prompt.messages, said], task.prompt.kind)

    def before(self, annotator: int, turns: int) -> tuple[int, Prompt] | None:
        """The same as `conversation`, also for one whose last message failed."""
        if (found := self.conversation(annotator, turns)) is not None:
            return found
        task = self._store.read(lambda db: _open(db, annotator))
        if task is None or task.state != "failed" or task.parent is None:
            return None
        earlier = task.prompt.messages[:-1]
        return task.parent, Prompt(task.prompt.id, earlier, task.prompt.kind)

    def write(
        self,
        db: sqlite3.Connection,
        annotator: int,
        new: NewTask,
        *,
        nonce: str,
        parent: int | None,
    ) -> None:
        """A task of the annotator's own, in place of one that failed. Conflict while they have one
        of their own before them. The nonce makes it another one than a prompt of the same text."""
        drop_failed(db, annotator)
        task = _open(db, annotator)
        if task is not None and task.owner == annotator:
            raise Conflict("judge or skip what is before you first")
        key = hashlib.sha256(f"{new.key}:{nonce}".encode()).hexdigest()
        identifier = _insert(db, new, key=key, owner=annotator, parent=parent)
        self._assign(db, identifier, key, annotator)
        db.execute("UPDATE annotators SET conversation = NULL WHERE id = ?", (annotator,))

    def give_back(self, db: sqlite3.Connection, task: int, annotator: int) -> None:
        """Put a task that is not judged any more before the annotator again, unless as many others
        as should judge it have judged it or have it before them."""
        values = {"id": task, "me": annotator, "since": now(before=self._lease)}
        row = db.execute(f"SELECT {_LIVE} live FROM tasks t WHERE t.id = :id", values).fetchone()
        if row["live"] < self._raters:
            change = "UPDATE assignments SET time = :now WHERE task = :id AND annotator = :me"
        else:
            change = "DELETE FROM assignments WHERE task = :id AND annotator = :me"
        db.execute(change, values | {"now": now()})

    def judged(self, db: sqlite3.Connection, task: int) -> None:
        """Count how many have judged it."""
        db.execute(
            "UPDATE tasks SET complete = (SELECT count(*) FROM judgements WHERE task = :id AND "
            "undone = 0 AND skipped IS NULL) >= :raters WHERE id = :id",
            {"id": task, "raters": self._raters},
        )

    def _assign(self, db: sqlite3.Connection, task: int, key: str, annotator: int) -> bool:
        """Whether the second response is A for them: one half of all, by the seed."""
        digest = hashlib.sha256(json.dumps([self._seed, key, annotator]).encode()).digest()
        flipped = bool(digest[0] & 1)
        row = (task, annotator, now(), flipped)
        db.execute("INSERT OR REPLACE INTO assignments VALUES (?, ?, ?, ?)", row)
        return flipped


def assigned(db: sqlite3.Connection, task: int, annotator: int) -> bool:
    """Whether they see the second response as A. Conflict where the task is not before them."""
    row = db.execute(
        "SELECT a.flipped FROM assignments a JOIN tasks t ON t.id = a.task "
        "WHERE a.task = ? AND a.annotator = ? AND t.state = 'ready'",
        (task, annotator),
    ).fetchone()
    if row is None:
        raise Conflict("this task is not before you; open the page again")
    return bool(row["flipped"])


def drop(db: sqlite3.Connection, task: int) -> None:
    """Take a task that nobody judged out of everybody's sight."""
    db.execute("UPDATE tasks SET state = 'dropped', complete = 1 WHERE id = ?", (task,))
    db.execute("DELETE FROM assignments WHERE task = ?", (task,))


def drop_failed(db: sqlite3.Connection, annotator: int) -> None:
    """Drop what the annotator wrote and nothing could be sampled for, where that is before them."""
    task = _open(db, annotator)
    if task is not None and task.owner == annotator and task.state == "failed":
        drop(db, task.id)


def _open(db: sqlite3.Connection, annotator: int) -> Task | None:
    row = db.execute(
        "SELECT t.*, a.flipped FROM assignments a JOIN tasks t ON t.id = a.task WHERE "
        "a.annotator = :me AND NOT EXISTS (SELECT 1 FROM judgements j WHERE j.task = t.id AND "
        "j.annotator = :me AND j.undone = 0) AND t.complete = 0 "
        "ORDER BY a.time DESC, t.id DESC LIMIT 1",
        {"me": annotator},
    ).fetchone()
    return None if row is None else Task.of(row, bool(row["flipped"]))


def _insert(db: sqlite3.Connection, task: NewTask, **more: Any) -> int:
    row = {
        "key": task.key,
        "prompt_id": task.prompt.id,
        "kind": task.prompt.kind,
        "messages": json.dumps(task.prompt.messages, ensure_ascii=False),
        "first_variant": task.variants[0],
        "second_variant": task.variants[1],
        "first": task.responses[0],
        "second": task.responses[1],
        "pair": task.pair,
        "state": "waiting" if None in task.responses else "ready",
        **more,
    }
    names = ", ".join(row)
    marks = ", ".join(f":{name}" for name in row)
    done = db.execute(f"INSERT OR IGNORE INTO tasks ({names}) VALUES ({marks})", row)
    return done.lastrowid or 0
