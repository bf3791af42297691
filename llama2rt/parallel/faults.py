"""A rank that fails, dies or hangs is named, and ends the group.

Every rank has a thread that says in the group's store what its rank does and how many collectives
it has entered since all last met. Rank 0's thread reads them all, the others read rank 0's. A rank
that says nothing for the limit (stopped, its machine gone), or for which the others wait as long in
a collective that it has not entered, is named; whoever sees it first tells all, and every rank ends
itself, and the named one with it where that is on the same machine. What fails with an error tells
the others in the store too (`last_words`), so that one message says what happened instead of one
from every rank.

While ranks work apart, as on a rollout, the others meet them in a collective of objects, which
counts for nothing here since ranks wait in such a one for whatever rank 0 does by itself. How long
a share takes is not known beforehand, but each forward pass of one is said (`moved`): a rank that
says none for the limit inside its share is named too. Left out: what rank 0 does by itself.

All of it is nothing in one process. The collectives' own timeouts come a little after the limit:
where the thread cannot run, they end the rank.
"""

import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

LIMIT = datetime.timedelta(minutes=30)
# How long a rank that has lost the connection to another waits for that one's own words.
_WORDS_SECONDS = 3.0
# torchrun's agent keeps the group's store; without one rank 0 does.
_AGENT = "TORCHELASTIC_RUN_ID" in os.environ
_KEEPER = "torchrun" if _AGENT else "rank 0"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int
    """grows with every beat"""
    entered: int
    """collectives of tensors since the ranks last met"""
    doing: str
    apart: bool = False
    """whether the rank works by itself on a share of what all do"""
    passes: int = 0
    """forward passes begun in such shares"""


@dataclass(frozen=True)
class Group:
    """The ranks that are watched, and how this one reaches them."""

    store: dist.Store
    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    """for objects, in which ranks may wait for as long as rank 0 works by itself"""


_watch: "Watch | None" = None


def begin(group: Group) -> None:
    """Watch the ranks of `group` from here on."""
    global _watch
    _watch = Watch(group)
    _watch.start()


def end() -> None:
    """Stop watching: the work is done."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def watched() -> bool:
    """Whether this process is one of several ranks that have met."""
    return _watch is not None


def set_limit(limit: datetime.timedelta) -> None:
    """How long a rank may be waited for, in the process groups made so far too."""
    if _watch is not None:
        _watch.set_limit(limit)


def doing(what: str) -> None:
    """What this rank does now, for a message that names it."""
    if _watch is not None:
        _watch.doing = what


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, this rank works by itself on its share of what all do."""
    if _watch is None:
        yield
        return
    _watch.apart = True
    moved()
    try:
        yield
    finally:
        _watch.apart = False


def moved() -> None:
    """This rank begins another forward pass, which says that it comes on where it works `apart`."""
    if _watch is not None and _watch.apart:
        _watch.passes += 1


def met() -> None:
    """Every rank has come to this point: collectives are counted anew."""
    if _watch is not None:
        _watch.met()


def last_words(error: BaseException, message: str, status: int) -> tuple[str | None, int]:
    """(what this rank is to print of its failure, or None where another rank does; exit status of
    the group) for a rank that ends with `error`, which it would report as `message`."""
    if _watch is None:
        return message, status
    return _watch.last_words(error, message, status)


@dataclass
class Heard:
    """What is known of another rank, by this one's clock."""

    beat: Beat
    said: float
    """when it last said anything"""
    moved: float
    """when that was last anything new"""

    def hear(self, beat: Beat, now: float) -> None:
        if beat.number != self.beat.number:
            self.said = now
        if replace(beat, number=0) != replace(self.beat, number=0):
            self.moved = now
        self.beat = beat


def missing(heard: dict[int, Heard], now: float, limit: float) -> tuple[list[int], str] | None:
    """(ranks that are missing, what to say of them), or None where none is: they have been silent
    for `limit` seconds; or have stood still for so long in their share of what ranks do apart; or
    nothing has moved for so long on any rank, while some wait in a collective that these have not
    entered."""
    silent = [rank for rank, other in heard.items() if now - other.said > limit]
    if silent:
        return silent, f"{_named(silent, heard)} not been heard of for {_seconds(limit)}"
    still = [
        rank for rank, other in heard.items() if other.beat.apart and now - other.moved > limit
    ]
    if still:
        what = f"stood still in a share of the work for {_seconds(limit)}"
        return still, f"{_named(still, heard)} {what}"
    entered = [other.beat.entered for other in heard.values()]
    if min(entered) < max(entered) and all(now - other.moved > limit for other in heard.values()):
        late = [rank for rank, other in heard.items() if other.beat.entered == min(entered)]
        return late, f"{_named(late, heard)} been waited for by the others for {_seconds(limit)}"
    return None


def _named(ranks: list[int], heard: dict[int, Heard]) -> str:
    named = ", ".join(f"{rank} ({heard[rank].beat.doing})" for rank in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {named}{more} has" if len(ranks) == 1 else f"ranks {named}{more} have"


def _seconds(limit: float) -> str:
    return f"{limit / 60:.0f} minutes" if limit >= 120 else f"{limit:.0f} seconds"


def wait_until_said(by_me: bool) -> None:
    """Before this process ends: torchrun ends all ranks when the first one does, and the one that
    says why must have come to it. Where the ranks have not met, that is rank 0."""
    if _watch is not None:
        _watch.wait_until_said(by_me)
    elif not by_me:
        time.sleep(2 * _WORDS_SECONDS)


class Watch:
    """One rank's thread."""

    def __init__(self, group: Group) -> None:
        self._group = group
        # A connection of its own: on the shared one a rank may wait for a key.
        store: Any = group.store
        self._store = dist.PrefixStore("watch", store.clone())
        self._limit = LIMIT
        self._number = 0
        self._base = 0
        self.doing = "at its start"
        self.apart, self.passes = False, 0
        self._heard: dict[int, Heard] = {}
        self._looked = time.monotonic()
        self._ended = threading.Event()
        # The first waits for the store's answers, the second for the first.
        self._threads = [threading.Thread(target=self._run, name="watch", daemon=True)]
        if not _AGENT:
            self._threads += [threading.Thread(target=self._guard, name="guard", daemon=True)]

    def start(self) -> None:
        self._store.set(f"process/{self._group.rank}", json.dumps(_process()))
        self._beat()
        self._first = self._process(0)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            # One that the interpreter's end meets inside the store aborts the process.
            thread.join(_WORDS_SECONDS)

    def set_limit(self, limit: datetime.timedelta) -> None:
        self._limit = limit
        for group in self._groups():
            group.set_timeout(limit * 1.25 + datetime.timedelta(seconds=10))

    def met(self) -> None:
        self._base = self._collectives()

    def _run(self) -> None:
        failures = 0
        while not self._ended.wait(min(10.0, self._limit.total_seconds() / 10)):
            try:
                self._beat()
                self._listen()
                failures = 0
            except RuntimeError:  # what the store raises
                failures += 1
            if failures == 3 and not self._ended.is_set():
                self._leave(f"{_KEEPER} has ended without a word; the group ends", [])

    def _guard(self) -> None:
        """Where rank 0 keeps the store and is stopped, the store does not answer either."""
        limit, late = self._limit.total_seconds(), 0
        while self._group.rank and not self._ended.wait(min(10.0, limit / 10)):
            limit = self._limit.total_seconds()
            # Twice: after a while in which this process was stopped, the first thread comes to it.
            late = late + 1 if time.monotonic() - self._looked > limit else 0
            if late == 2:
                what = f"rank 0 has not been heard of for {_seconds(limit)}; the group ends"
                self._leave(what if self._group.rank == 1 else None, [0])

    def _beat(self) -> None:
        self._number += 1
        entered = self._collectives() - self._base
        beat = Beat(self._number, entered, self.doing, self.apart, self.passes)
        self._store.set(f"beat/{self._group.rank}", json.dumps(asdict(beat)))

    def _listen(self) -> None:
        """Hear the ranks that this one watches; leave where one is missing, or where another rank
        has found that one is."""
        if self._store.check(["verdict"]):
            self._leave(None, json.loads(self._store.get("verdict")))
        ranks = list(range(self._group.size)) if self._group.rank == 0 else [0]
        keys = [f"beat/{rank}" for rank in ranks]
        if not self._store.check(keys):
            return  # not all have begun
        now, limit = time.monotonic(), self._limit.total_seconds()
        if now - self._looked > limit / 2:
            self._heard = {}  # this process was stopped for a while, perhaps all were
        self._looked = now
        for rank, said in zip(ranks, self._store.multi_get(keys), strict=True):
            beat = Beat(**json.loads(said))
            self._heard.setdefault(rank, Heard(beat, now, now)).hear(beat, now)
        found = missing(self._heard, now, limit)
        if found is not None:
            ranks, what = found
            given = json.dumps(ranks)
            first = self._store.compare_set("verdict", "", given).decode() == given
            self._leave(f"{what}; the group ends" if first else None, ranks)

    def _leave(self, message: str | None, ranks: list[int]) -> None:
        """End this process, whose main thread may be waiting for ever, and those of `ranks`."""
        if message is not None:
            print(f"llama2rt: {message}", file=sys.stderr, flush=True)
        for rank in ranks:
            process = self._first if rank == 0 else self._process(rank)
            if process["host"] == _process()["host"] and process["pid"] != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process["pid"], signal.SIGKILL)
        os._exit(1)

    def _process(self, rank: int) -> dict[str, Any]:
        process: dict[str, Any] = json.loads(self._store.get(f"process/{rank}"))
        return process

    def _groups(self) -> list[dist.ProcessGroup]:
        """All process groups for tensors, the default one included."""
        everyone = list(dist.distributed_c10d._world.pg_map)
        return [group for group in everyone if group is not self._group.control]

    def _collectives(self) -> int:
        """How many collectives of tensors this rank has entered."""
        count = 0
        for group in self._groups():
            with contextlib.suppress(RuntimeError):  # a group of another kind of device
                backend: Any = group._get_backend(self._group.device)
                count += backend._get_sequence_number_for_group()
        return count

    def last_words(self, error: BaseException, message: str, status: int) -> tuple[str | None, int]:
        rank = self._group.rank
        self.stop()
        if getattr(error, "everywhere", False):
            return (message if rank == 0 else None), status
        lost = _lost_another(error)
        try:
            words = json.dumps({"message": message, "status": status, "lost": lost})
            self._store.set(f"words/{rank}", words)
            if lost:
                return self._of_a_lost_rank(message, "Timed out" in str(error))
            return self._of_this_rank(message, status)
        except RuntimeError:  # the store is gone
            if lost and rank > 1:
                return None, status  # rank 1 says it, if it can
            if lost:
                return f"{_KEEPER} has ended without a word; the group ends", status
            return f"rank {rank}: {message}", status

    def wait_until_said(self, by_me: bool) -> None:
        group = self._group
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it whoever kept it
            if by_me:
                self._store.set("said", "")
            else:
                self._wait_for(["said"])
            self._store.set(f"left/{group.rank}", "")
            # Without torchrun rank 0 keeps the store, and leaves last.
            if group.rank == 0 and not _AGENT:
                self._wait_for([f"left/{rank}" for rank in range(group.size)])

    def _of_this_rank(self, message: str, status: int) -> tuple[str | None, int]:
        """Where all ranks fail alike, rank 0 says it for all."""
        rank = self._group.rank
        other = 0 if rank else 1
        words = self._wait_for_words([other])
        alike = other in words and words[other]["message"] == message
        if not alike:
            return f"rank {rank}: {message}", status
        return (message if rank == 0 else None), status

    def _of_a_lost_rank(self, message: str, late: bool) -> tuple[str | None, int]:
        """Another rank's own words say more than that the connection to it was lost; only where
        there are none is it named here, by one of those that have lost it."""
        others = [other for other in range(self._group.size) if other != self._group.rank]
        words = self._wait_for_words(others)
        told = [said for said in words.values() if not said["lost"]]
        if told or self._store.check(["verdict"]):
            return None, int(told[0]["status"]) if told else 1
        rank = str(self._group.rank)
        if self._store.compare_set("spoken", "", rank).decode() != rank:
            return None, 1
        silent = [other for other in others if other not in words]
        if not silent:
            return f"the ranks have lost each other: {message}", 1
        named = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
        what = "not come to a collective" if late else "ended without a word (killed, no memory?)"
        return f"{named} {'has' if len(silent) == 1 else 'have'} {what}; the group ends", 1

    def _wait_for_words(self, ranks: list[int]) -> dict[int, dict[str, Any]]:
        """What each of `ranks` has said as it ended, waiting a while for those that have not."""
        self._wait_for([f"words/{rank}" for rank in ranks])
        said = [rank for rank in ranks if self._store.check([f"words/{rank}"])]
        return {rank: json.loads(self._store.get(f"words/{rank}")) for rank in said}

    def _wait_for(self, keys: list[str]) -> None:
        end = time.monotonic() + _WORDS_SECONDS
        while not self._store.check(keys) and time.monotonic() < end:
            time.sleep(0.05)


def _process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _lost_another(error: BaseException) -> bool:
    """Whether an error says that a collective has failed, which is another rank's doing."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    )
