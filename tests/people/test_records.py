"""What goes in and what comes out: configurations, tasks, summaries, exported records."""

import json
from pathlib import Path

import pytest
from annotation_pages import config, pairs_file

from llama2rt.annotate.files import parse
from llama2rt.data import readers
from llama2rt.errors import InputError
from llama2rt.evaluate.agreement import gwet
from llama2rt.people import commands, export, inputs, summary
from llama2rt.people.accounts import Accounts
from llama2rt.people.judgements import Judgements, Said
from llama2rt.people.store import FILE, Conflict, Store, now, week
from llama2rt.people.tasks import Tasks


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("store = 'a'", ["expected two, or pairs"]),
        ("store = 'a'\nprompt = 1", ["prompt", "no such key"]),
        ("store = 'a'\nmode = 'both'", ["mode", "preference"]),
        ("store = 'a'\n[[variants]]\nname = 'x'\nmodel = 'm'", ["variants", "two"]),
        ("store = 'a'\n[[variants]]\nname = 'x'", ["variants.0", "one of model, server"]),
        (
            "store = 'a'\nwrite = true\npairs = ['p']",
            ["write", "each a model or a server"],
        ),
        ("store = 'a'\nmode = 'evaluation'\npairs = ['p']", ["evaluation", "no pairs"]),
        ("store = 'a'\npairs = ['p']\npublic_url = 'http://a.b'", ["public_url", "https"]),
        ("store = 'a'\npairs = ['p']\nraters = 0", ["raters", "greater than or equal to 1"]),
        ("store = = 1\n", ["line 1"]),
    ],
)
def test_configurations_are_refused_by_key(tmp_path, monkeypatch, lines, words) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.toml"
    path.write_text(lines)
    with pytest.raises(InputError) as said:
        commands.Serve(path).run()
    assert all(word in str(said.value) for word in [str(path), *words]), said.value
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first": "second answer 1"}, "equal"),
        ({"first": "  "}, "first: expected text"),
        ({"kind": "other"}, "kind"),
        ({"frist": "x"}, "unknown key 'frist'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
    ],
)
def test_pairs_are_refused_by_line(tmp_path, change, words) -> None:
    path = pairs_file(tmp_path / "pairs.jsonl", 2)
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n" + json.dumps(json.loads(second) | change) + "\n")
    with pytest.raises(InputError, match=rf"pairs.jsonl:2: .*{words}"):
        inputs.tasks(config(tmp_path, pairs=[path]))
    with pytest.raises(InputError, match=r"pairs.jsonl:3"):
        path.write_text(f"{first}\n\n{{\n")
        inputs.tasks(config(tmp_path, pairs=[path]))


def fill(folder, said, raters=2, **values):
    """A store whose annotator number i says said[i] of each task in turn."""
    given = config(folder, raters=raters, **values)
    store = Store(given.store)
    store.remember("mode", given.mode)
    tasks = Tasks(store, raters=raters, lease_minutes=60, seed=given.seed)
    tasks.add(inputs.tasks(given))
    judgements = Judgements(store, tasks)
    for number, row in enumerate(said, start=1):
        Accounts(store).invite(f"rater {number}")
        for index, one in enumerate(row):
            task = tasks.next(number)
            assert task is not None
            judgements.say(number, f"{number}:{index}", task.id, one(task))
    return store


def choose(side, rating="better", safety=None):
    """Choose the first or the second response, wherever it is shown."""

    def say(task):
        letter = "ab"[(side == "second") != task.flipped]
        return Said(letter, rating, safety)

    return say


def test_comparisons_agreement_and_judgements_of_pairs(tmp_path, capsys) -> None:
    labels = ["chosen_safe", "both_safe", "both_unsafe"]
    ann = [
        choose("first", "significantly_better", labels[0]),
        choose("second", safety=labels[1]),
        choose("first", "negligibly_better", labels[2]),
    ]
    bob = [
        choose("first", "slightly_better", labels[0]),
        choose("first", safety=labels[1]),
        lambda task: Said(skipped="other: no"),
    ]
    pairs = pairs_file(tmp_path / "pairs.jsonl", 4, "safety")
    store = fill(tmp_path, [ann, bob], pairs=[pairs])
    out, batch = tmp_path / "out", week(now())
    commands.Export(store.folder, out, json=True).run()
    said = capsys.readouterr()
    assert f"{batch} is not over" in said.err
    written = json.loads(said.out)
    records = readers.read(out / f"{batch}-safety.jsonl", "comparison")
    assert written == {str(out / f"{batch}-safety.jsonl"): 5, str(out / "judgements.jsonl"): 3}
    assert [(r.chosen, r.rating, r.safety, r.rater) for r in records[:3]] == [
        ("first answer 0", "significantly_better", "chosen_safe", "rater 1"),
        ("second answer 1", "better", "both_safe", "rater 1"),
        ("first answer 2", "negligibly_better", "both_unsafe", "rater 1"),
    ]
    assert {(r.kind, r.source) for r in records} == {("safety", f"store/{batch}")}
    lines = [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]
    said = dict(parse(line) for line in lines)
    assert said["training:0"].rating == "slightly_better" and said["training:0"].first_safe
    assert said["training:1"] is None  # as many say one as the other
    assert said["training:2"].rating == "negligibly_better"
    commands.Summary(store.folder, json=True).run()
    found = json.loads(capsys.readouterr().out)
    assert found["judgements"] == 5 and found["skipped"] == {"other": 1}
    agreement = found["safety"]["agreement"]
    expected = gwet([[0, 2], [6, 1], [3, -1]], categories=8, weights="ordinal")
    assert agreement["choice with rating, AC2"]["coefficient"] == expected.coefficient
    assert agreement["choice with rating, AC2"]["rated_by_two_or_more"] == 2
    expected = gwet([[2, 2], [3, 3], [0, -1]], categories=4)
    assert agreement["safety of both, AC1"]["coefficient"] == expected.coefficient == 1
    commands.Summary(store.folder).run()
    assert "choice, AC1" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"2020-W01.*{batch}"):
        export.export(store, out, "2020-W01")


def test_a_week_holds_its_own_skips(tmp_path) -> None:
    """Skipped in one week and judged in the next, a pair is undecided in the first for good."""
    skip = lambda task: Said(skipped="other: no")  # noqa: E731
    pairs = pairs_file(tmp_path / "pairs.jsonl", 3)
    store = fill(tmp_path, [[skip, skip, choose("first")], [choose("first"), skip]], pairs=[pairs])
    with store.transaction() as db:
        db.execute("UPDATE judgements SET time = '2026-11-09T12:00:00+00:00' WHERE annotator = 1")
        db.execute("UPDATE judgements SET time = '2026-11-16T12:00:00+00:00' WHERE annotator = 2")
    assert week("2026-11-09T12:00:00+00:00") == "2026-W46"

    def said(only):
        folder = tmp_path / str(only)
        export.export(store, folder, only)
        lines = (folder / "judgements.jsonl").read_text().splitlines()
        return {row["pair"]: row["chosen"] for row in map(json.loads, lines)}

    ids = [f"training:{i}" for i in range(3)]
    assert said("2026-W46") == {ids[0]: "neither", ids[1]: "neither", ids[2]: "first"}
    assert said("2026-W47") == {ids[0]: "first", ids[1]: "neither"}
    assert said(None) == {ids[0]: "first", ids[1]: "neither", ids[2]: "first"}
    with store.transaction() as db:
        db.execute("DELETE FROM judgements WHERE skipped IS NULL")
    export.export(store, tmp_path / "skips")
    assert [path.name for path in (tmp_path / "skips").iterdir()] == ["judgements.jsonl"]


def test_what_is_not_sampled_yet_is_not_judged(tmp_path) -> None:
    store = fill(tmp_path, [[]], pairs=[pairs_file(tmp_path / "pairs.jsonl", 1)])
    tasks = Tasks(store, raters=2, lease_minutes=60, seed=0)
    task = tasks.next(1)
    with store.transaction() as db:
        db.execute("UPDATE tasks SET state = 'waiting'")
    with pytest.raises(Conflict):
        Judgements(store, tasks).say(1, "nonce", task.id, Said("a", "better"))
    assert not store.rows("SELECT * FROM judgements")


def test_an_evaluation_and_the_blind_check(tmp_path) -> None:
    dialogues = tmp_path / "sft.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": f"human {i}"},
            ]
        }
        for i in range(200)
    ]
    dialogues.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = tmp_path / "samples.jsonl"
    samples.write_text(
        "".join(
            json.dumps(
                {
                    "prompt_id": f"s{i}",
                    "messages": [{"role": "user", "content": f"q{i}"}],
                    "response": f"model {i}",
                }
            )
            + "\n"
            for i in range(190)
        )
    )
    variants = [
        {"name": "model", "samples": [str(samples)]},
        {"name": "human", "dialogues": [str(dialogues)]},
    ]
    values = {"mode": "evaluation", "variants": variants, "draw": 180}
    found = inputs.tasks(config(tmp_path, **values))
    again = inputs.tasks(config(tmp_path, **values))
    assert [task.key for task in found] == [task.key for task in again]
    assert len(found) == 180 and {task.variants for task in found} == {("model", "human")}
    assert all(task.responses[0][6:] == task.responses[1][6:] for task in found)

    def score(points):
        return lambda task: Said(score=-points if task.flipped else points)

    said = [[score(p) for p in row] for row in ([3, 1, 0, -2], [2, 1, 0, -3], [3, -1, 1, -1])]
    store = fill(tmp_path, said, raters=3, **values)
    numbers = summary.summarise(store)
    (result,) = numbers["results"]
    assert (result["variant"], result["against"], result["prompts"]) == ("model", "human", 4)
    assert [result[key]["count"] for key in ("wins", "ties", "losses", "win_rate")] == [
        2,
        1,
        1,
        2.5,
    ]
    ratings = [[0, 1, 0], [2, 2, 4], [3, 3, 2], [5, 6, 4]]
    expected = gwet(ratings, categories=7, weights="ordinal").coefficient
    assert numbers["agreement"]["7 points, AC2"]["coefficient"] == expected
    (name,) = export.export(store, tmp_path / "out")
    points = [json.loads(line) for line in Path(name).read_text().splitlines()]
    assert [row["score"] for row in points[:4]] == [3, 1, 0, -2] and len(points) == 12
    assert "model against human" in summary.describe(numbers)


def test_stores_are_what_they_say(tmp_path, capsys) -> None:
    with pytest.raises(InputError, match=FILE):
        commands.Summary(tmp_path).run()
    (tmp_path / FILE).write_text("no database, whatever it is called" * 100)
    with pytest.raises(InputError, match=FILE):
        Store(tmp_path)
    store = Store(tmp_path / "a")
    store.remember("mode", "preference")
    store.remember("mode", "preference")
    with pytest.raises(InputError, match="evaluation was asked for"):
        store.remember("mode", "evaluation")
    # A task that is there already is not added again.
    given = config(tmp_path, pairs=[pairs_file(tmp_path / "pairs.jsonl", 3)])
    tasks = Tasks(store, raters=1, lease_minutes=1, seed=0)
    assert [tasks.add(inputs.tasks(given)) for _ in range(2)] == [3, 0]
    for name in ("", " a", "a\n", "a" * 101):
        with pytest.raises(InputError, match="name: expected"):
            commands.Invite(tmp_path / "a", name).run()
    commands.Invite(tmp_path / "a", "ann").run()
    token = capsys.readouterr().out.strip()
    assert len(token) == 43 and Accounts(store).log_in(token)
    commands.Invite(tmp_path / "a", "ann", revoke=True).run()
    assert Accounts(store).log_in(token) is None
    with pytest.raises(InputError, match="bob"):
        commands.Invite(tmp_path / "a", "bob", revoke=True).run()


def test_one_server_at_a_time(tmp_path) -> None:
    given = config(tmp_path, pairs=[pairs_file(tmp_path / "pairs.jsonl", 1)])
    with commands.opened(given) as (store, tasks):
        assert store.path.exists() and tasks.add(inputs.tasks(given)) == 1
        with pytest.raises(InputError, match="another page"), commands.opened(given):
            pass
    with commands.opened(given):
        pass
