"""The whole of `llama2rt corpus`: from files of every kind to shards that pretraining reads."""

import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import json_lines
import numpy as np
import pytest
from pydantic import ValidationError

from llama2rt.corpus import chunks, cleaning, job, workers
from llama2rt.corpus.recipe import CorpusRecipe
from llama2rt.data.shards import Shards
from llama2rt.errors import InputError

WORDS = [
    "river",
    "miller",
    "stone",
    "bridge",
    "autumn",
    "children",
    "water",
    "people",
    "year",
    "line",
    "feet",
    "cart",
    "low",
    "rise",
    "old",
    "dry",
    "never",
    "talk",
    "walk",
    "look",
    "week",
    "fish",
]


def prose(number: int, words: int = 60) -> str:
    drawn = np.random.default_rng(number).choice(WORDS, words)
    return f"The tale {number} of the " + " and the ".join(drawn[:10]) + " " + " ".join(drawn[10:])


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_tokenizer):
    """Sources in four forms, with faults planted by number."""
    root = tmp_path_factory.mktemp("corpus")
    small_tokenizer.save(root / "tokenizer")
    web = [{"text": prose(i), "source": f"https://site{i % 4}.example/{i}"} for i in range(120)]
    web[7]["text"] = web[3]["text"]  # equal
    web[20]["text"] = "Der Fluss ist seit Wochen niedrig und die Leute sagen, dass es nicht das ist"
    web[30]["text"] += " Ann has 21 pears and gives 10 of them to Bob how many"
    web[40]["text"] += " Write to ann.lee@example.org or call 415-555-2671."
    for i in range(2, 120, 4):  # one origin full of addresses
        web[i]["text"] += f" Mail a{i}@example.org, b{i}@example.org, c{i}@example.org"
    web[50]["url"] = "not used"
    json_lines.write(root / "web.jsonl", web)
    books = root / "books"
    (books / "old").mkdir(parents=True)
    for i in range(6):
        (books / "old" / f"{i}.txt").write_text(prose(200 + i) + "\r\n")
    (books / "old" / "0b.txt").write_text(prose(3))  # of another source
    (books / "cover.png").write_bytes(b"no text")
    with gzip.open(books / "more.jsonl.gz", "wt") as file:
        for i in range(9):
            file.write(json.dumps({"text": prose(300 + i)}) + "\n")
    json_lines.write(root / "questions.jsonl", [{"question": "Ann has 21 pears and gives 10 of "
                                                 "them to Bob how many are left"}])  # fmt: skip
    return root


def recipe(world, **changes):
    fields = {
        "sources": [{"path": world / "web.jsonl"}, {"path": world / "books", "languages": []}],
        "languages": ["en"],
        "evaluation": [world / "questions.jsonl"],
        "most_personal_data": 20,
        "tokenizer": world / "tokenizer",
        "chunk_bytes": 6000,
        "workers": 1,
    }
    return CorpusRecipe(**{**fields, **changes})


def files(folder):
    """Content of all shards and the report, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for top in ("text", "tokens", "report.json")
        for path in sorted([folder / top, *(folder / top).rglob("*")])
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "out"
    assert job.run(recipe(world), folder) == folder / "tokens"
    return folder


def test_every_step_says_what_it_did(made, world):
    report = json.loads((made / "report.json").read_text())
    web, books = report["sources"]["web"], report["sources"]["books"]
    removed = {step: said["removed"] for step, said in web["removed"].items()}
    assert removed == {"language": 1, "contamination": 1, "personal_data": 29, "duplicates": 1}
    assert web["removed"]["duplicates"]["examples"] == [
        f"{world}/web.jsonl:8: the same as {world}/web.jsonl:4"
    ]
    assert web["removed"]["language"]["examples"][0].startswith(f"{world}/web.jsonl:21: de: 'Der")
    assert "questions.jsonl:1: ann has 21" in web["removed"]["contamination"]["examples"][0]
    assert (web["read"], web["kept"]) == (120, 88)
    # Items are counted wherever they stand, and replaced; the report quotes none of them whole.
    assert web["personal_data"] == {"EMAIL": 88, "PHONE_NUMBER": 1}
    assert "example.org" not in (made / "report.json").read_text()
    assert list(report["origins_removed"]) == ["site2.example"]
    assert web["keys_not_used"] == {"url": 1}
    assert (books["read"], books["kept"]) == (16, 15)
    assert books["removed"]["duplicates"]["examples"][0].endswith("web.jsonl:4")
    assert books["changed"]["normalise"] == 6
    assert report["read"] == 136 and report["kept"] == 103
    page = (made / "report.html").read_text()
    assert "site2.example" in page and "duplicates: the text of an earlier document" in page
    assert not (made / "work").exists()


def test_the_shards_hold_what_is_left(made, world, small_tokenizer):
    texts = [
        json.loads(line)
        for path in sorted((made / "text" / "web").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert len(texts) == 88 and len(list((made / "text" / "web").iterdir())) > 4
    assert texts[0] == {"text": prose(0), "source": "https://site0.example/0"}
    assert any("Write to <EMAIL> or call <PHONE_NUMBER>." in one["text"] for one in texts)
    shards = Shards(made / "tokens" / "web")
    shards.require(small_tokenizer)
    shards.verify({})
    ids = [i for n in range(len(shards.lengths)) for i in shards.stream(n).ids().tolist()]
    expected = [i for one in texts for i in small_tokenizer.encode(one["text"], True, True)]
    assert ids == expected
    assert shards.text_bytes == sum(len(one["text"].encode()) for one in texts)
    summary = json.loads((made / "manifest.json").read_text())["summary"]
    assert summary["tokens"] == shards.tokens + Shards(made / "tokens" / "books").tokens


@pytest.mark.parametrize("step", ["cleaned", "compared", "written"])
def test_stopped_and_resumed_is_uninterrupted(made, world, tmp_path, monkeypatch, step):
    calls = []

    def failing(original):
        def call(*given):
            calls.append(1)
            if len(calls) == (3 if step != "compared" else 1):
                raise KeyboardInterrupt
            return original(*given)

        return call

    owner, name = {
        "cleaned": (workers.Worker, "clean"),
        "compared": (job.Compared, "count"),
        "written": (workers.Worker, "write"),
    }[step]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    with pytest.raises(KeyboardInterrupt):
        job.run(recipe(world), tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "out" / "text").mkdir(exist_ok=True)
    (tmp_path / "out" / "text" / ".half.4194305.llama2rt-partial").write_bytes(
        b"a kill leaves such files"
    )
    cleaned = []
    original = cleaning._Cleaner.lines
    monkeypatch.setattr(
        cleaning._Cleaner, "lines", lambda self: cleaned.append(1) or original(self)
    )
    job.run(recipe(world, workers=1), tmp_path / "out", resume=True)
    total = len(chunks.divide(recipe(world)))
    assert len(cleaned) == (total - 2 if step == "cleaned" else 0)
    assert files(tmp_path / "out") == files(made)
    assert not list((tmp_path / "out").rglob("*-partial"))
    job.run(recipe(world), tmp_path / "out", resume=True)  # complete: left as it is


def test_killed_with_its_processes_and_resumed_with_others(made, world, tmp_path):
    """The command is killed while two processes are at work: none of them stays. With --resume two
    others leave what one process does."""
    out = tmp_path / "out"
    program = (
        "import pickle, sys; from pathlib import Path; from llama2rt.corpus import job\n"
        "job.run(pickle.loads(bytes.fromhex(sys.argv[1])), Path(sys.argv[2]))"
    )
    given = recipe(world, workers=2)
    arguments = [sys.executable, "-c", program, pickle.dumps(given).hex(), str(out)]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not list((out / "work").glob("*.json")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        children = [int(child) for child in _children(process.pid)]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 120
    while any(map(_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) >= 2 and not any(map(_alive, children))
    job.run(given, out, resume=True)
    assert files(out) == files(made)


def _children(process):
    with open(f"/proc/{process}/task/{process}/children") as file:
        return file.read().split()


def _alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _interrupted(*_):
    raise KeyboardInterrupt


def test_what_differs_in_personal_data_alone_is_alike(world, tmp_path):
    """Documents are compared as they are written, with personal data replaced: two letters to
    different people are one text to a model, and the shards hold it once."""
    pytest.importorskip("datasketch", reason="datasketch is not installed (extra data)")
    path = tmp_path / "letters.jsonl"

    def letter(number, place):
        people = " ".join(f"tell {number}{i}@example.org" for i in range(15))
        return {"text": f"{prose(1)} {people} of {place}"}

    json_lines.write(path, [letter("a", "Rome"), letter("b", "Bern"), {"text": prose(2)}])
    given = recipe(world, sources=[{"path": path}], evaluation=[], languages=[], workers=1,
                   most_personal_data=None, near_duplicates=0.8)  # fmt: skip
    job.run(given, tmp_path / "out")
    [said] = json.loads((tmp_path / "out" / "report.json").read_text())["sources"].values()
    assert said["removed"]["near_duplicates"]["removed"] == 1 and said["kept"] == 2
    kept = recipe(world, **{**given.model_dump(), "personal_data": False})
    job.run(kept, tmp_path / "as-it-is")
    [said] = json.loads((tmp_path / "as-it-is" / "report.json").read_text())["sources"].values()
    assert said["kept"] == 3


def test_a_changed_input_is_refused_by_name(world, tmp_path):
    data = tmp_path / "a.jsonl"
    json_lines.write(data, [{"text": prose(1)}, {"text": "x"}])
    given = recipe(world, sources=[{"path": data}], evaluation=[], languages=[])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "_summary", _interrupted)
        job.run(given, tmp_path / "out")
    json_lines.write(data, [{"text": prose(2)}])
    with pytest.raises(InputError, match=r"a\.jsonl: sources\.0 has changed since the run"):
        job.run(given, tmp_path / "out", resume=True)


def test_bad_records_are_named_by_line_in_every_chunk(world, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": prose(i)}) for i in range(40)]
    rows[33] = '{"text": 5}'
    path.write_text("\n".join(rows[:20]) + "\n\n" + "\n".join(rows[20:]) + "\n")
    given = {"sources": [{"path": path}], "evaluation": [], "languages": []}
    with pytest.raises(InputError, match=r"a\.jsonl:35: text: expected") as error:
        job.run(recipe(world, **given), tmp_path / "out-1")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # as of a process
    job.run(recipe(world, skip_invalid=1, **given), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["read"] == 39 and report["sources"]["a"]["skipped"][0].startswith(f"{path}:35")


def test_chunks_hold_every_line_once(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [f'{{"text": "{"x" * (i % 50)} {i}"}}' for i in range(200)]
    path.write_text("\n".join(lines))  # without a last line end
    for size in (1, 40, 333, 10**6):
        divided = chunks.divide(
            CorpusRecipe(sources=[{"path": path}], chunk_bytes=size, evaluation=[])
        )
        found = [row for c in divided for piece in c.pieces for row in chunks.rows(piece, None)]
        assert [line for line, _ in found] == list(range(1, 201))
        assert [row["text"].split()[-1] for _, row in found] == [str(i) for i in range(200)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "sources"),
        ({"languages": ["klingon"]}, "languages: expected some of en, de.* got 'klingon'"),
        ({"rules": ["gofer"]}, "rules"),
        ({"tokenizer": None, "text": False}, "nothing would be written"),
        ({"sources": [{"path": "a/x.jsonl"}, {"path": "b/x.jsonl"}]}, "two are called 'x'"),
        ({"sources": [{"path": "a", "kind": "safety"}]}, "kind: means nothing"),
        ({"ngram": 3}, "ngram"),
    ],
)
def test_impossible_recipes(world, changes, message):
    with pytest.raises((ValidationError, InputError), match=message):
        recipe(world, **changes)


def test_the_corpus_is_not_below_its_sources(world, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("words")
    with pytest.raises(InputError, match="lies in the source"):
        job.run(recipe(world, sources=[{"path": folder}], evaluation=[]), folder / "out")
    assert not (folder / "out").exists()


def test_missing_inputs_are_said_before_anything_is_written(world, tmp_path, monkeypatch):
    for changes, message in [
        ({"sources": [{"path": tmp_path / "absent"}]}, "absent: no such file"),
        ({"evaluation": [tmp_path / "absent"]}, "absent: cannot be read"),
        ({"tokenizer": tmp_path}, "tokenizer"),
    ]:
        with pytest.raises(InputError, match=message):
            job.run(recipe(world, **changes), tmp_path / "out")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"pictures: no file below it ends with"):
        job.run(recipe(world, sources=[{"path": tmp_path / "pictures"}]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert job.dry_run(recipe(world))[0][1].startswith("books: 0.0 MB, 8 files, ")
    assert os.environ.get("WORLD_SIZE", "1") == "1"
