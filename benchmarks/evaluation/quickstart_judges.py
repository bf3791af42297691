"""A quickstart's versions judged from two sides, and by a served judge of ours that fails half the
time.

    python -P benchmarks/evaluation/quickstart_judges.py runs/quickstart --out FOLDER

SFT, RLHF-V1 and RLHF-V2, on the answers of the run's evaluate step: by the run's reward models,
which chose the answers that V2 was trained on, and by the toy's own judge, which no model saw
(Llama 2, Fig. 11). (PPO may keep the weights it began with, and be no version of its own.)
Then the chat model is taught by the annotators' comparisons to say A or B
(`helpers/taught_judge.py`, or the model folder of `--judge`), `llama2rt serve` serves it on
loopback, and it judges the same pairs, fewer prompts of them, in both orders: as it is, once more
from the cache, with the versions the other way round, and behind a proxy that answers every second
call with 503; what the toy's judge says of them stands beside it. FOLDER gets judged.json, the page
that `llama2rt compare` makes of it, and record.json.
"""

import argparse
import itertools
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
import records
import taught_judge

from llama2rt import atomic
from llama2rt.evaluate.intervals import wilson
from llama2rt.evaluate.judges import comparing
from llama2rt.evaluate.judges.cache import Cache
from llama2rt.evaluate.judges.commands import judged, read_versions
from llama2rt.evaluate.judges.judging import Question, Verdict
from llama2rt.evaluate.judges.scorers import RewardJudge
from llama2rt.evaluate.judges.speakers import Server
from llama2rt.evaluate.judges.speaking import Asking, SpeakingJudge
from llama2rt.pipeline.comparison import page
from llama2rt.quickstart.data import read_keys
from llama2rt.quickstart.judge import judge as verdict_of

VERSIONS = {"SFT": "sft", "RLHF-V1": "rlhf-v1", "RLHF-V2": "rlhf-v2"}


class TrueJudge:
    """The toy's judge: helpfulness, and on safety prompts safety first."""

    name, kind, ordered, requests = "toy judge (no model saw it)", "model", False, 0

    def __init__(self, run: Path, prompts: dict[str, str]) -> None:
        self._keys, self._prompts = read_keys(run / "judge" / "keys.json"), prompts

    def check(self, questions: Any) -> None:
        pass

    def verdicts(self, questions: list[Question], cache: Cache) -> list[Verdict]:
        def worth(question: Question, text: str) -> float:
            found = verdict_of(self._keys[self._prompts[json.dumps(question.messages)]], text)
            return found.helpfulness + (found.safety if question.kind == "safety" else 0.0)

        both = [(worth(q, q.first), worth(q, q.second)) for q in questions]
        return [Verdict(0.5 if a == b else float(a > b)) for a, b in both]


@contextmanager
def served(model: Path) -> Iterator[str]:
    """`llama2rt serve` of a model on a free port."""
    command = [sys.executable, "-P", "-m", "llama2rt.cli", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if " at http://" in line:
                yield line.split(" at ")[1].split()[0].rstrip("/")
                break
        else:
            raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def failing(url: str) -> Iterator[str]:
    """A proxy of `url` that answers every second call with 503."""
    count, lock = itertools.count(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._pass(None)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                fails = next(count) % 2 == 0
            if fails:
                self._send(503, b'{"error": {"message": "made to fail"}}')
            else:
                self._pass(body)

        def _pass(self, body: bytes | None) -> None:
            asked = urllib.request.Request(url + self.path, body, dict(self.headers))
            with urllib.request.urlopen(asked, timeout=300) as reply:
                self._send(reply.status, reply.read())

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def written(run: Path, out: Path, each: int) -> list[Path]:
    """Files of the versions' samples to `each` prompts of each kind."""
    paths = []
    for name, folder in VERSIONS.items():
        parts = sorted((run / "evaluate" / "samples" / f"{folder}-2-at-1.0").glob("part-*.jsonl"))
        lines = [line for part in parts for line in part.read_text().splitlines()]
        chosen: dict[str, list[str]] = {"helpfulness": [], "safety": []}
        seen = set()
        for line in lines:
            row = json.loads(line)
            if row["prompt_id"] not in seen and len(chosen[row["kind"]]) < each:
                seen.add(row["prompt_id"])
                chosen[row["kind"]].append(line)
        path = out / f"{name}.jsonl"
        atomic.write(path, "".join(f"{line}\n" for both in chosen.values() for line in both))
        paths.append(path)
    return paths


def by_server(url: str, versions: Any, cache: Path) -> tuple[Any, dict[str, int]]:
    """((margins, results), what it took) of a served judge."""
    judge = SpeakingJudge(Server(url, attempts=2), taught_judge.ASKED, Asking(graded=True))
    pairs = comparing.shown(versions)
    before = judge.requests
    with Cache(cache) as kept:
        found = comparing.outcomes(judge, pairs, kept)
        took = {"requests": judge.requests - before, "asked": kept.asked}
    margins = {(p.a, p.b, p.prompt): o.margin for p, o in zip(pairs, found, strict=True)}
    row = comparing.results(judge, pairs, found)
    unreadable = sum(pair["unreadable"] for pair in row["pairs"])
    return (margins, row), took | {"unreadable": unreadable}


def judged_by_server(model: Path, few: Any, out: Path) -> dict[str, Any]:
    """What a served judge says, four times; AssertionError where the order of versions, the cache
    or failing calls change any of it, or where it does not answer."""
    with served(model) as url:
        (first, row), took = by_server(url, few, out / "said.jsonl")
        (again, _), free = by_server(url, few, out / "said.jsonl")
        backwards = dict(reversed(few.items()))
        (swapped, _), mirrored = by_server(url, backwards, out / "said.jsonl")
        with failing(url) as broken:
            (through, _), lossy = by_server(broken, few, out / "failing.jsonl")
    assert took["unreadable"] == 0 and len(set(first.values())) > 2
    assert again == first and free["requests"] == free["asked"] == 0
    assert {(b, a, p): -m for (a, b, p), m in swapped.items()} == first
    assert mirrored["requests"] == 0 and through.keys() == first.keys()
    # Asked anew, a request may stand among others in the server's batch.
    apart = max(abs(through[pair] - margin) for pair, margin in first.items())
    assert apart < 1e-4
    return {
        "margins": first,
        "pairs": len(first),
        "win_rates": [
            {k: v for k, v in pair.items() if k != "unreadable"} for pair in row["pairs"]
        ],
        "position": row["position"],
        "first_run": took,
        "second_run": free,
        "versions_swapped": mirrored,
        "every_second_call_fails": lossy | {"largest_difference_of_a_margin": apart},
    }


def with_truth(margins: Any, few: Any, truth: TrueJudge) -> dict[str, Any]:
    """How often the served judge names the winner of the toy's judge, of pairs that both decide,
    each two answers once."""
    pairs = comparing.shown(few)
    pairs = [pairs[i] for i in comparing.distinct(pairs)]
    with Cache() as cache:
        true = comparing.outcomes(truth, pairs, cache)
    both = [
        (margins[p.a, p.b, p.prompt], o.margin)
        for p, o in zip(pairs, true, strict=True)
        if margins[p.a, p.b, p.prompt] and o.margin
    ]
    same = wilson(sum((a > 0) == (b > 0) for a, b in both), len(both))
    return {"decided": len(both), "same_winner": same._asdict()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--judge", type=Path, help="its model folder, in place of training one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100, help="of each kind, for the models")
    parser.add_argument("--served", type=int, default=12, help="of each kind, for the server")
    given = parser.parse_args()
    run, out = given.run, given.out
    started = time.process_time()
    versions = read_versions(written(run, out, given.prompts))
    ids = {
        json.dumps(answered.messages): prompt
        for answers in versions.values()
        for prompt, answered in answers.items()
    }
    models = {kind: run / f"reward-{kind}-2" / "model" for kind in ("helpfulness", "safety")}
    judges = [RewardJudge("reward models", models), TrueJudge(run, ids)]
    with Cache() as cache:
        found = judged(versions, judges, cache, against="SFT")
    atomic.write(out / "judged.json", json.dumps(found, indent=2) + "\n")
    report = json.loads((run / "report.json").read_text())
    tasks = {
        row["name"]: {
            "helpfulness": row["helpfulness"],
            "correct": row["correct"],
            "safe": {
                end: 1 - row["unsafe"][other]
                for end, other in (("mean", "mean"), ("low", "high"), ("high", "low"))
            },
            "declines": row["declines"],
        }
        for row in report["versions"]
    }
    atomic.write(out / "tasks.json", json.dumps(tasks) + "\n")
    files = [out / f"{name}.jsonl" for name in VERSIONS]
    page(
        out / "compare.html",
        judged_file=out / "judged.json",
        measured=run / "evaluate" / "report.json",
        tasks=out / "tasks.json",
        samples=files,
    )
    few = {
        name: {
            prompt: answered
            for kind in models
            for prompt, answered in [i for i in answers.items() if i[1].kind == kind][
                : given.served
            ]
        }
        for name, answers in versions.items()
    }
    record: dict[str, Any] = records.header("cpu") | {
        "two_sides": {row["name"]: row["progress"] for row in found["judges"]}
    }
    record["agreement"] = found["agreement"]
    model = given.judge or taught_judge.train(run, out / "taught")
    record["served"] = judged_by_server(model, few, out)
    record["served"]["with_the_toy_judge"] = with_truth(
        record["served"].pop("margins"), few, judges[1]
    )
    record["cpu_s"] = round(time.process_time() - started, 1)
    atomic.write(out / "record.json", json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["served"], indent=2))


if __name__ == "__main__":
    main()
