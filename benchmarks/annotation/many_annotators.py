"""Several annotators at once on one page whose server is killed again and again (SIGKILL), then
started again: is a judgement lost, or there twice?

Each annotator judges, skips, undoes, and sends some posts twice, and keeps a ledger of what was
answered; a post that got no answer is sent again with its nonce. At the end the store must hold
exactly the ledgers. All traffic is on the loopback address, bounded in time.

    python -P benchmarks/annotation/many_annotators.py --seconds 60 --record FILE
"""

import argparse
import json
import random
import resource
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
from annotators import Annotator

from llama2rt.people.accounts import Accounts
from llama2rt.people.store import Store

RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
STARTING_S = 120.0


class Server:
    """`llama2rt people serve` as a process that can be killed and started again."""

    def __init__(self, folder: Path, pairs: int, raters: int) -> None:
        rows = [
            {
                "part": "training",
                "id": f"training:{i}",
                "prompt_id": f"p{i}",
                "kind": "safety" if i % 2 else "helpfulness",
                "messages": [{"role": "user", "content": f"question {i} " * 20}],
                "first": f"first answer {i} " * 50,
                "second": f"second answer {i} " * 50,
            }
            for i in range(pairs)
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.store = folder / "store"
        config = (
            f"store = '{self.store}'\npairs = ['{folder / 'pairs.jsonl'}']\nraters = {raters}\n"
        )
        (folder / "config.toml").write_text(config)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-P", "-m", "llama2rt.cli", "people", "serve"]
        self._command += [str(folder / "config.toml"), "--port", str(self.port)]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        watch = threading.Timer(STARTING_S, self.process.kill)
        watch.start()
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        watch.cancel()
        assert self.url in line, line + self.process.stderr.read()

    def invite(self, name: str) -> str:
        """From this process, as `llama2rt people invite` does beside a server."""
        store = Store(self.store, create=False)
        token = Accounts(store).invite(name)
        store.close()
        return token

    def end(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)


@dataclass
class Rater:
    """One annotator's work, and the ledger of what was answered."""

    annotator: Annotator
    seed: int
    ledger: list[dict[str, object]] = field(default_factory=list)
    twice: int = 0
    problem: str = ""

    def work(self, until: float, least: int) -> None:
        """Until then, and at least so many posts, for which there is some time more."""
        generator = random.Random(self.seed)
        try:
            while (now := time.monotonic()) < until or (
                len(self.ledger) < least and now < until + STARTING_S
            ):
                if not self._step(generator):
                    return
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"

    def _step(self, generator: random.Random) -> bool:
        """One page and one post; whether there was anything to judge."""
        page = self.annotator.get()
        assert page.status == 200, page.status
        if "nothing left" in page.text:
            return False
        form, chance = page.form("/judge"), generator.random()
        task = int(form["task"])
        if chance < 0.05 and any(not entry["undone"] for entry in self.ledger):
            self._post("/undo", page.form("/undo"), generator)
            last = [entry for entry in self.ledger if not entry["undone"]][-1]
            last["undone"] = 1
        elif chance < 0.1:
            skip = page.form("/skip") | {"reason": "unclear"}
            self._post("/skip", skip, generator)
            self.ledger.append({"task": task, "rating": None, "skipped": "unclear", "undone": 0})
        else:
            rating = generator.choice(RATINGS)
            said = {"chosen": generator.choice("ab"), "rating": rating, "safety": "both_safe"}
            self._post("/judge", form | said, generator)
            self.ledger.append({"task": task, "rating": rating, "skipped": None, "undone": 0})
        return True

    def _post(self, path: str, form: dict[str, str], generator: random.Random) -> None:
        for _ in range(1 + (generator.random() < 0.2)):
            reply = self.annotator.post(path, form)
            assert reply.status == 303, (path, reply.status, reply.text[-300:])
            self.twice += 1
        self.twice -= 1


def differences(store: Path, raters: dict[str, Rater]) -> list[str]:
    """What the store holds and no ledger does, or the other way round."""
    wrong = []
    db = sqlite3.connect(store / "judgements.sqlite")
    db.row_factory = sqlite3.Row
    (state,) = db.execute("PRAGMA integrity_check").fetchone()
    if state != "ok":
        wrong.append(f"integrity: {state}")
    for name, rater in raters.items():
        rows = db.execute(
            "SELECT task, rating, skipped, undone FROM judgements j JOIN annotators a "
            "ON a.id = j.annotator WHERE a.name = ? ORDER BY j.id",
            (name,),
        )
        stored = [dict(row) for row in rows]
        if stored != rater.ledger:
            wrong.append(f"{name}: {len(rater.ledger)} in the ledger, {len(stored)} stored")
    doubled = db.execute(
        "SELECT task FROM judgements WHERE undone = 0 GROUP BY task, annotator HAVING count(*) > 1"
    ).fetchall()
    many = db.execute(
        "SELECT task FROM judgements WHERE undone = 0 AND skipped IS NULL GROUP BY task "
        "HAVING count(*) > 2"
    ).fetchall()
    db.close()
    wrong += [f"task {row[0]}: judged twice by one annotator" for row in doubled]
    return wrong + [f"task {row[0]}: judged by more than two" for row in many]


def run(
    folder: Path,
    *,
    seconds: float,
    annotators: int,
    kills: int,
    pairs: int,
    seed: int,
    least: int = 0,
) -> dict[str, object]:
    """Everything; what was measured. AssertionError where an annotator met an error."""
    server = Server(folder, pairs, raters=2)
    generator = random.Random(seed)
    server.start()
    raters = {}
    try:
        for number in range(annotators):
            found = Annotator(server.url, patience_s=STARTING_S)
            assert found.log_in(server.invite(f"rater {number}")).status == 303
            raters[f"rater {number}"] = Rater(found, seed + number)
        began, before = time.monotonic(), time.process_time()
        until = began + seconds
        threads = [threading.Thread(target=r.work, args=(until, least)) for r in raters.values()]
        for thread in threads:
            thread.start()
        down = 0.0
        for index in range(kills):
            # Somewhere in its part of the time.
            at = began + seconds * (index + generator.uniform(0.2, 0.8)) / kills
            time.sleep(max(0.0, at - time.monotonic()))
            killed = time.monotonic()
            server.end(signal.SIGKILL)
            server.start()
            down += time.monotonic() - killed
        for thread in threads:
            thread.join(seconds + 2 * STARTING_S)
        took = time.monotonic() - began
        clients_cpu = time.process_time() - before
    finally:
        for rater in raters.values():
            rater.annotator.close()
        server.end(signal.SIGTERM)
    problems = [r.problem for r in raters.values() if r.problem]
    latency = sorted(s for r in raters.values() for s in r.annotator.seconds)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "annotators": annotators,
        "seconds": round(took, 1),
        "kills": kills,
        "seconds_down": round(down, 1),
        "posts": sum(len(r.ledger) for r in raters.values()),
        "undone": sum(entry["undone"] == 1 for r in raters.values() for entry in r.ledger),
        "sent_twice": sum(r.twice for r in raters.values()),
        "requests": len(latency),
        "median_ms": round(1e3 * statistics.median(latency), 1),
        "p99_ms": round(1e3 * latency[int(0.99 * len(latency))], 1),
        "server_cpu_s": round(children.ru_utime + children.ru_stime, 1),
        "clients_cpu_s": round(clients_cpu, 1),
        "problems": problems,
        "differences": differences(server.store, raters),
        "ended_with": server.process.returncode if server.process else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--annotators", type=int, default=8)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    options = {key: value for key, value in vars(given).items() if key != "record"}
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), **options)
    text = json.dumps(found, indent=2)
    print(text)
    if given.record is not None:
        given.record.write_text(text + "\n")
    sys.exit(bool(found["problems"] or found["differences"]))


if __name__ == "__main__":
    main()
