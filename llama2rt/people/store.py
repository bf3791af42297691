"""Where judgements are kept: one SQLite file, in which a judgement is on the disk before its post
is answered.

WAL with synchronous=FULL: each commit is flushed, so a process that is killed, and a machine whose
power fails, lose nothing that was answered. Everything a post does is one transaction, which begins
by writing down the post's nonce: the same post sent again finds it there and changes nothing.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from llama2rt.errors import InputError

Result = TypeVar("Result")

FILE = "judgements.sqlite"
_VERSION = 1
_SCHEMA = """
CREATE TABLE annotators (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    token BLOB NOT NULL UNIQUE,             -- SHA-256 of 256 random bits
    coordinator INTEGER NOT NULL,
    revoked INTEGER NOT NULL DEFAULT 0,
    conversation INTEGER REFERENCES tasks   -- the judged task that may go on
);
CREATE TABLE sessions (
    secret BLOB PRIMARY KEY,                -- SHA-256 of the cookie
    annotator INTEGER NOT NULL REFERENCES annotators
);
CREATE TABLE tasks (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,               -- so that adding what is there already adds nothing
    prompt_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    messages TEXT NOT NULL,                 -- JSON
    first_variant TEXT NOT NULL,
    second_variant TEXT NOT NULL,
    first TEXT,                             -- NULL until sampled
    second TEXT,
    pair TEXT,                              -- id of a line of pairs.jsonl
    owner INTEGER REFERENCES annotators,    -- who wrote its last message
    parent INTEGER REFERENCES tasks,        -- the turn before
    state TEXT NOT NULL CHECK (state IN ('waiting', 'ready', 'failed', 'dropped')),
    reason TEXT,                            -- of failure
    attempts INTEGER NOT NULL DEFAULT 0,
    complete INTEGER NOT NULL DEFAULT 0     -- whether as many have judged it as should
);
CREATE INDEX open_tasks ON tasks (state, id) WHERE complete = 0;
CREATE TABLE assignments (
    task INTEGER NOT NULL REFERENCES tasks,
    annotator INTEGER NOT NULL REFERENCES annotators,
    time TEXT NOT NULL,
    flipped INTEGER NOT NULL,               -- whether the second response is shown as A
    PRIMARY KEY (task, annotator)
) WITHOUT ROWID;
CREATE TABLE judgements (
    id INTEGER PRIMARY KEY,
    task INTEGER NOT NULL REFERENCES tasks,
    annotator INTEGER NOT NULL REFERENCES annotators,
    time TEXT NOT NULL,
    flipped INTEGER NOT NULL,
    chosen TEXT CHECK (chosen IN ('first', 'second')),
    rating TEXT,
    first_safe INTEGER,
    second_safe INTEGER,
    score INTEGER CHECK (score BETWEEN -3 AND 3),   -- above 0: the first response is better
    skipped TEXT,                           -- why
    undone INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX one_each ON judgements (task, annotator) WHERE undone = 0;
CREATE INDEX by_annotator ON judgements (annotator, id) WHERE undone = 0;
CREATE TABLE posts (
    nonce TEXT PRIMARY KEY,
    annotator INTEGER NOT NULL REFERENCES annotators,
    action TEXT NOT NULL,
    time TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


class Conflict(Exception):
    """What a post asks for does not fit what is stored; the message is for the annotator."""


class Store:
    """The file in `folder`, made where there is none unless `create` is False. Threads share it;
    other processes may read it, and invite, meanwhile. InputError for a file that is none of ours.
    """

    def __init__(self, folder: Path, *, create: bool = True) -> None:
        self.folder, self.path = folder, folder / FILE
        if not create and not self.path.is_file():
            raise InputError(f"{folder}: holds no {FILE}")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        try:
            # Transactions begin and end here alone; the lock keeps threads apart.
            self._db = sqlite3.connect(
                self.path, timeout=30, isolation_level=None, check_same_thread=False
            )
            self._db.row_factory = sqlite3.Row
            self._prepare()
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.path}: {error}") from None

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        with self.transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in _SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise InputError(
                    f"{self.path}: expected judgements of version {_VERSION}, found {version}"
                )

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; nothing where the block raises."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def post(self, nonce: str, annotator: int, action: str) -> Iterator[sqlite3.Connection | None]:
        """`transaction` of the post that carries `nonce`; None where it was done before. Conflict
        where the nonce was somebody else's or another action's."""
        with self.transaction() as db:
            found = db.execute("SELECT * FROM posts WHERE nonce = ?", (nonce,)).fetchone()
            if found is None:
                row = (nonce, annotator, action, now())
                db.execute("INSERT INTO posts VALUES (?, ?, ?, ?)", row)
                yield db
            elif (found["annotator"], found["action"]) != (annotator, action):
                raise Conflict("this form was used for something else; open the page again")
            else:
                yield None

    def read(self, look: Callable[[sqlite3.Connection], Result]) -> Result:
        """What `look` finds, which changes nothing."""
        with self._lock:
            return look(self._db)

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """What a query finds."""
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def one(self, query: str, *values: Any) -> sqlite3.Row | None:
        """The first row that a query finds."""
        with self._lock:
            row: sqlite3.Row | None = self._db.execute(query, values).fetchone()
            return row

    def remember(self, key: str, value: str) -> None:
        """Keep `value` under `key`; InputError where another one is kept there."""
        with self.transaction() as db:
            found = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            if found is None:
                db.execute("INSERT INTO meta VALUES (?, ?)", (key, value))
            elif found["value"] != value:
                raise InputError(
                    f"{key}: {value} was asked for, and {self.folder} began with {found['value']}: "
                    "give another store"
                )

    def recall(self, key: str) -> str | None:
        """What is kept under `key`."""
        found = self.one("SELECT value FROM meta WHERE key = ?", key)
        return None if found is None else str(found["value"])


def now(before: timedelta = timedelta(0)) -> str:
    """UTC, as the file holds times, which sort as text; or the time `before` it."""
    return (datetime.now(UTC) - before).isoformat(timespec="microseconds")


def week(time: str) -> str:
    """The ISO week of a time, such as 2026-W49: the batch that a judgement belongs to."""
    return datetime.fromisoformat(time).strftime("%G-W%V")
