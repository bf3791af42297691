"""`llama2rt people`: serve the page, let annotators in, read what they said.

No module that these verbs load at once loads torch, so that a page without models is there in a
second, again too after a crash.
"""

import contextlib
import fcntl
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from llama2rt.errors import InputError
from llama2rt.people import config as configuration
from llama2rt.people import inputs, summary
from llama2rt.people.accounts import Accounts
from llama2rt.people.config import Config
from llama2rt.people.store import Store
from llama2rt.people.tasks import Tasks
from llama2rt.serve.address import is_loopback, listening

if TYPE_CHECKING:
    from llama2rt.people.sampling import Answerer

_SHUTDOWN_SECONDS = 10


@dataclass(frozen=True)
class Serve:
    """Serve the page until SIGTERM or Ctrl-C; started again, it goes on with what is stored."""

    config: tyro.conf.Positional[Path]
    """TOML file; docs/annotation.md has its keys."""
    host: str = "127.0.0.1"
    """Address to listen at; another than a loopback one only with public_url in the file."""
    port: int = 8010
    """0 takes a free one, and says which."""

    def run(self) -> None:
        """Read and check all that is named, listen, serve."""
        config = configuration.read(self.config)
        if not 0 <= self.port <= 65535:
            raise InputError(f"port: expected 0 to 65535, got {self.port}")
        if not is_loopback(self.host) and config.public_url is None:
            raise InputError(
                f"host: {self.host} may be reached from other machines, which would send tokens in "
                "clear text; give public_url, whose proxy has TLS, or listen at 127.0.0.1"
            )
        try:
            from llama2rt.people import app, guard
            from llama2rt.people.sampling import Sampler
            from llama2rt.people.views import Views
            from llama2rt.serve.process import Process
        except ModuleNotFoundError as error:
            raise InputError(f"needs {error.name}: pip install 'llama2rt[serve]'") from None
        views = Views(configuration.guidelines(config))
        new = inputs.tasks(config)
        with listening(self.host, self.port) as listener:
            variants = _answerers(config)
            with opened(config) as (store, tasks):
                tasks.add(new)
                port = listener.getsockname()[1]
                site = app.Site(
                    config=config,
                    store=store,
                    tasks=tasks,
                    views=views,
                    sampler=Sampler(tasks, variants, config.ahead),
                    cookie=f"llama2rt-people-{port}",
                )
                built = app.build(site, guard.origins(self.host, port, config.public_url))
                process = Process(built, _SHUTDOWN_SECONDS, lambda: None)
                process.serve_at(listener, self.host, f"{config.mode} page of {config.store}")


@dataclass(frozen=True)
class Invite:
    """Print a token for an annotator; in place of an earlier one, which lets nobody in any more."""

    folder: tyro.conf.Positional[Path]
    """The configuration's store."""
    name: tyro.conf.Positional[str]
    """As exported records name the rater."""
    coordinator: bool = False
    """Let them see how everybody judges."""
    revoke: bool = False
    """Let them in no more; what they have judged stays."""

    def run(self) -> None:
        """The token goes to stdout, and is not stored."""
        accounts = Accounts(Store(self.folder, create=not self.revoke))
        if self.revoke:
            accounts.revoke(self.name)
            return
        print(accounts.invite(self.name, coordinator=self.coordinator))


@dataclass(frozen=True)
class Summary:
    """Counts, agreement of annotators and, for an evaluation, wins, ties and losses."""

    folder: tyro.conf.Positional[Path]
    """The configuration's store."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        """While the page is served, or after."""
        found = summary.summarise(Store(self.folder, create=False))
        print(json.dumps(found) if self.json else summary.describe(found))


@dataclass(frozen=True)
class Export:
    """Write judgements as records, in a file for each week and kind of batch."""

    folder: tyro.conf.Positional[Path]
    """The configuration's store."""
    out: Path
    """Folder of the files."""
    week: str | None = None
    """Only this ISO week's, such as 2026-W49."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        """While the page is served, or after."""
        from llama2rt.people import export

        store = Store(self.folder, create=False)
        written = export.export(store, self.out, self.week)
        if self.week in (None, open_week := export.open_week(store)) and open_week:
            print(f"{open_week} is not over: its judgements may change", file=sys.stderr)
        lines = [f"{path}: {count}" for path, count in written.items()]
        print(json.dumps(written) if self.json else "\n".join(lines))


@contextlib.contextmanager
def opened(config: Config) -> Iterator[tuple[Store, Tasks]]:
    """The configuration's store, for one server at a time."""
    config.store.mkdir(parents=True, exist_ok=True)
    with open(config.store / ".lock", "w") as file:
        try:  # the kernel drops the lock of a process that dies
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"store: another page is served from {config.store}") from None
        store = Store(config.store)
        store.remember("mode", config.mode)
        yield (
            store,
            Tasks(
                store,
                raters=config.raters,
                lease_minutes=config.lease_minutes,
                seed=config.seed,
            ),
        )
        store.close()


def _answerers(config: Config) -> "dict[str, Answerer]":
    """Variants that answer when they are asked; where there are none, nothing is loaded for it."""
    if not any(variant.samples_now for variant in config.variants):
        return {}
    from llama2rt.people.answerers import answerers

    return answerers(config)


def command(action: Annotated[Serve | Invite | Summary | Export, tyro.conf.arg(name="")]) -> None:
    """People compare responses on a page of this machine; what they say becomes records."""
    action.run()
