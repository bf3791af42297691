"""Who may annotate. Tokens and sessions are 256 random bits, kept as their SHA-256 alone: a copy of
the file opens nothing, and guessing is hopeless, so that no slow hash is needed."""

import hmac
import secrets
import sqlite3
from dataclasses import dataclass

from llama2rt.errors import InputError
from llama2rt.people.store import Store
from llama2rt.serve.digest import digest

_ACTIVE = "SELECT * FROM annotators WHERE revoked = 0"


@dataclass(frozen=True)
class Annotator:
    """Somebody who is logged in."""

    id: int
    name: str
    coordinator: bool
    """whether they may see how everybody judges"""


class Accounts:
    """The annotators of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def invite(self, name: str, *, coordinator: bool = False) -> str:
        """A token for `name`, which is shown once; in place of an earlier one, whose sessions end.
        InputError for a name that is blank, long or holds what does not print."""
        if not name.strip() or name != name.strip() or len(name) > 100 or not name.isprintable():
            raise InputError(f"name: expected up to 100 printable characters, got {name!r}")
        token = secrets.token_urlsafe(32)
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO annotators (name, token, coordinator) VALUES (?, ?, ?) ON CONFLICT "
                "(name) DO UPDATE SET token = excluded.token, coordinator = excluded.coordinator, "
                "revoked = 0",
                (name, digest(token), coordinator),
            )
            _end_sessions(db, name)
        return token

    def revoke(self, name: str) -> None:
        """Let `name` in no more; what they have judged stays. InputError for nobody of that
        name."""
        with self._store.transaction() as db:
            changed = db.execute("UPDATE annotators SET revoked = 1 WHERE name = ?", (name,))
            if not changed.rowcount:
                raise InputError(f"name: nobody called {name!r} was invited")
            _end_sessions(db, name)

    def log_in(self, token: str) -> str | None:
        """The secret of a new session; None for a token that is nobody's."""
        given, found = digest(token.strip()), None
        for row in self._store.rows(_ACTIVE):  # all of them, whichever it is
            if hmac.compare_digest(given, row["token"]):
                found = row["id"]
        if found is None:
            return None
        secret = secrets.token_urlsafe(32)
        with self._store.transaction() as db:
            db.execute("INSERT INTO sessions VALUES (?, ?)", (digest(secret), found))
        return secret

    def log_out(self, secret: str) -> None:
        """End a session."""
        with self._store.transaction() as db:
            db.execute("DELETE FROM sessions WHERE secret = ?", (digest(secret),))

    def who(self, secret: str) -> Annotator | None:
        """Whose session it is."""
        row = self._store.one(
            f"{_ACTIVE} AND id = (SELECT annotator FROM sessions WHERE secret = ?)", digest(secret)
        )
        if row is None:
            return None
        return Annotator(row["id"], row["name"], bool(row["coordinator"]))


def _end_sessions(db: sqlite3.Connection, name: str) -> None:
    db.execute(
        "DELETE FROM sessions WHERE annotator = (SELECT id FROM annotators WHERE name = ?)", (name,)
    )
