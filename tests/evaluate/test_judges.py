"""Judges of all kinds on the same pairs: both orders, what is asked twice, and what a failure
loses."""

import json
import math
import re
import threading

import json_lines
import numpy as np
import pytest
import torch
from judge_server import ChatServer

from llama2rt import cli
from llama2rt.checkpoint import load, native
from llama2rt.data.records import Sample
from llama2rt.errors import InputError
from llama2rt.evaluate.judges import comparing, people
from llama2rt.evaluate.judges.cache import Cache
from llama2rt.evaluate.judges.comparing import Answered, Outcome
from llama2rt.evaluate.judges.judging import Question, Verdict
from llama2rt.evaluate.judges.scorers import LetterJudge, RewardJudge
from llama2rt.evaluate.judges.speakers import Local, Options, Server, replies
from llama2rt.evaluate.judges.speaking import Asking, SpeakingJudge, Template, template
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.rollout.pairwise import PairwiseModel
from llama2rt.rollout.scoring import score

NAMES = ("v1", "v2", "v3")
PROMPTS = 8
_SHOWN = re.compile(r"Answer A: (.*?)\n\nAnswer B: (.*?)\n\nWhich", re.DOTALL)


def versions():
    """Later versions count higher; v1 and v2 say the same to the last prompt."""
    found = {}
    for number, name in enumerate(NAMES):
        found[name] = {}
        for i in range(PROMPTS):
            text = f"sheep {(i * 7 + number * 5) % 11}" if i < PROMPTS - 1 else "sheep 3"
            system = [{"role": "system", "content": "count"}] if i % 2 else []
            messages = [*system, {"role": "user", "content": f"how many sheep {i}"}]
            found[name][f"p{i}"] = Answered(messages, text, "safety" if i < 2 else "helpfulness")
    return found


def higher_number(body):
    """The answer with the higher number; the first one for a tie, as a biased judge would."""
    a, b = (
        int(text.split()[-1]) for text in _SHOWN.search(body["messages"][-1]["content"]).groups()
    )
    return "A" if a >= b else "B"


@pytest.fixture(scope="module")
def folders(small_tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    config = LlamaConfig(32, 1, 2, 2, 64, vocab_size=small_tokenizer.vocab_size, context=256)
    for number, model in enumerate((ScalarModel(config), Llama(config))):
        torch.manual_seed(number)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        native.save(model, small_tokenizer, root / type(model).__name__)
    return root / "ScalarModel", root / "Llama"


def files(folder, found=None):
    """The versions as files of samples."""
    paths = []
    for name, answers in (found or versions()).items():
        rows = []
        for prompt, answered in answers.items():
            sample = Sample(prompt, answered.messages, answered.text)
            rows.append({**sample.to_json(), "kind": answered.kind})
        json_lines.write(folder / f"{name}.jsonl", rows)
        paths.append(folder / f"{name}.jsonl")
    return paths


def test_a_server_in_both_orders_once_and_the_same_from_the_other_side(tmp_path):
    with ChatServer(higher_number).running() as server:
        judge = SpeakingJudge(Server(server.url))
        pairs = comparing.shown(versions())
        with Cache(tmp_path / "said.jsonl") as cache:
            found = comparing.outcomes(judge, pairs, cache)
        rows = comparing.results(judge, pairs, found)
        equal = sum(p.question.first == p.question.second for p in pairs)
        assert equal == 3 and server.sent == judge.requests - 1 == 2 * (len(pairs) - equal)
        for row in rows["pairs"]:
            mine = [
                (p, o)
                for p, o in zip(pairs, found, strict=True)
                if (p.a, p.b) == (row["a"], row["b"])
            ]
            numbers = [
                [int(t.split()[-1]) for t in (p.question.first, p.question.second)] for p, _ in mine
            ]
            margins = [np.sign(a - b) for a, b in numbers]
            assert [o.margin for _, o in mine] == margins
            assert row["rate"]["mean"] == pytest.approx(0.5 + np.mean(margins) / 2)
            assert row["wins"] + row["ties"] + row["losses"] == row["prompts"] == PROMPTS
            assert row["kinds"]["safety"]["prompts"] == 2
            assert row["groups"]["with a system prompt"]["prompts"] == PROMPTS / 2
            assert row["equal"] == 1 and row["unreadable"] == 0
        assert rows["position"]["flipped"]["mean"] == 0

        # The versions the other way round: nothing is asked, and every number is mirrored.
        again = SpeakingJudge(Server(server.url))
        backwards = dict(reversed(versions().items()))
        with Cache(tmp_path / "said.jsonl") as cache:
            mirrored = comparing.outcomes(again, comparing.shown(backwards), cache)
            assert cache.asked == 0 and again.requests == 1  # the list of models
        swapped = comparing.results(again, comparing.shown(backwards), mirrored)
        by_pair = {(row["a"], row["b"]): row for row in rows["pairs"]}
        for row in swapped["pairs"]:
            other = by_pair[row["b"], row["a"]]
            assert (row["wins"], row["losses"]) == (other["losses"], other["wins"])
            assert row["rate"]["mean"] == pytest.approx(1 - other["rate"]["mean"], abs=1e-12)
            assert row["rate"]["low"] == pytest.approx(1 - other["rate"]["high"], abs=1e-12)
        assert swapped["position"] == rows["position"]


def test_a_server_that_fails_half_of_its_calls_loses_nothing(tmp_path):
    pairs = comparing.shown(versions(), "v1")
    with ChatServer(higher_number).running() as server:
        with Cache() as cache:
            right = comparing.outcomes(SpeakingJudge(Server(server.url)), pairs, cache)
        calls = server.sent
        server.sent, server.fail = 0, lambda number: number % 2 == 1
        judge = SpeakingJudge(Server(server.url, attempts=1, at_once=3))
        with Cache(tmp_path / "said.jsonl") as cache:
            assert comparing.outcomes(judge, pairs, cache) == right
        assert judge.requests - 1 == server.sent >= 2 * calls - 1

        # One that is gone for good: what it said before is there, and the rest is asked again.
        server.sent, server.fail = 0, lambda number: number > 5
        judge = SpeakingJudge(Server(server.url, attempts=1, at_once=1))
        path = tmp_path / "gone.jsonl"
        with Cache(path) as cache, pytest.raises(ConnectionError, match=r"not answered: .*busy"):
            comparing.outcomes(judge, pairs, cache)
        assert len(path.read_bytes().splitlines()) == 5
        with open(path, "ab") as file:
            file.write(b'{"key": "cut by a ki')
        server.fail = lambda number: False
        with Cache(path) as cache:
            assert comparing.outcomes(judge, pairs, cache) == right
            assert cache.asked == calls - 5
            with pytest.raises(InputError, match="another process is writing"):
                Cache(path)
    path.write_text("{}\n")
    with pytest.raises(InputError, match=r"gone.jsonl:1: not an entry"):
        Cache(path)


def test_a_judge_of_a_position_only_gives_ties_and_says_so():
    pairs = comparing.shown(versions(), "v1")

    class First:
        name, kind, ordered, requests = "first", "model", True, 0

        def verdicts(self, questions, cache):
            return [Verdict(1.0) for _ in questions]

    found = comparing.outcomes(First(), pairs, Cache())
    row = comparing.results(First(), pairs, found)
    assert {pair["rate"]["mean"] for pair in row["pairs"]} == {0.5}
    assert row["position"]["first"]["mean"] == row["position"]["flipped"]["mean"] == 1.0
    assert row["pairs"][0]["a_first"]["mean"] > 0.8 > 0.2 > row["pairs"][0]["a_second"]["mean"]
    progress = comparing.progress(row["pairs"], "v1")
    assert list(progress) == ["v2", "v3"] and progress["v3"]["harmlessness"]["mean"] == 0.5


def test_models_judge_as_their_own_functions_say(folders, small_tokenizer):
    pairs = comparing.shown(versions(), "v1")
    shown = [(p.question.messages, p.question.first, p.question.second) for p in pairs]
    different = [i for i, (_, a, b) in enumerate(shown) if a != b]
    scalar, llama = (load(folder)[0].eval() for folder in folders)
    items = [(m, t) for m, a, b in shown for t in (a, b)]
    scores = score(scalar, small_tokenizer, items).reshape(-1, 2)
    reward = RewardJudge("reward", {"helpfulness": folders[0], "safety": folders[0]})
    with Cache() as cache:
        found = comparing.outcomes(reward, pairs, cache)
        assert [o.margin for o in found] == np.sign(scores[:, 0] - scores[:, 1]).tolist()
        asked = cache.asked
        assert asked == len({(str(m), t) for m, a, b in shown for t in (a, b) if a != b})
        comparing.outcomes(reward, pairs, cache)
        assert cache.asked == asked
        letters = LetterJudge("preference", folders[1], preference=True)
        found = comparing.outcomes(letters, pairs, cache)
        both = PairwiseModel(llama, small_tokenizer).probabilities(shown)
        means = [0.5 + found[i].margin / 2 for i in different]
        assert means == pytest.approx(both.mean(axis=1)[different].tolist(), abs=1e-6)
        prompted = LetterJudge("model", folders[1], preference=False)
        found = comparing.outcomes(prompted, pairs, cache)
        assert 0 < min(0.5 + found[i].margin / 2 for i in different) < 1
    for wrong in (
        RewardJudge("r", {"helpfulness": folders[1]}),
        LetterJudge("p", folders[0], preference=True),
    ):
        with pytest.raises(InputError, match="expected a"):
            wrong.check([p.question for p in pairs])
    long = Question([{"role": "user", "content": "sheep"}], "sheep " * 300, "sheep")
    with pytest.raises(InputError, match=r"tokens to judge, the model's context is 256"):
        reward.check([long])


def test_a_local_model_answers_alike_whichever_prompts_are_in_the_cache(folders):
    prompts = [[{"role": "user", "content": f"count {i}"}] for i in range(4)]
    options = Options(temperature=1.0, max_tokens=6)
    with Cache() as cache:
        whole = replies(Local(folders[1]), prompts, options, cache)
    with Cache() as cache:
        replies(Local(folders[1]), prompts[2:3], options, cache)
        assert replies(Local(folders[1]), prompts, options, cache) == whole
        assert cache.asked == 4
        with pytest.raises(InputError, match="graded"):
            replies(Local(folders[1]), prompts, Options(alternatives=2), cache)


def test_replies_are_read_as_the_template_says(tmp_path):
    labels = 'labels = {"[[A]]" = 1.0, "[[B]]" = 0.0, "[[C]]" = 0.5}\n'
    path = tmp_path / "ask.toml"
    path.write_text('name = "t"\nsystem = "S"\nuser = "{conversation}|{first}|{second}"\n' + labels)
    asked = template(path)
    assert asked.read("first [[A]], no: [[B]]") == 0.0 and asked.read("[[C]]") == 0.5
    assert asked.read("A") is None and Template().read(" The answer is B.") == 0.0
    question = Question([{"role": "user", "content": "{x}"}], "{first}", "b")
    assert asked.messages(question) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "user: {x}|{first}|b"},
    ]
    for text, said in (
        ('user = "{first} {second}"', "lacks {conversation}"),
        ('user = "{conversation} {first} {second} {x}"', "no such field: 'x'"),
        ('labels = {"[[A]]" = 1.0}', "one for 0"),
        ('labels = {"[[A]]" = 2.0}', r"in \[0, 1\]"),
        ("unknown = 1", "unknown"),
        ("user = ", "Invalid value"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=rf"ask.toml: .*{said}"):
            template(path)


def test_a_graded_judge_takes_the_probability_of_its_letters():
    with ChatServer(lambda body: "A").running() as server:
        judge = SpeakingJudge(Server(server.url), None, Asking(graded=True))
        question = Question([{"role": "user", "content": "x"}], "a", "b")
        with Cache() as cache:
            (verdict,) = judge.verdicts([question], cache)
        expected = math.exp(-0.5) / (math.exp(-0.5) + math.exp(-1.5))
        assert verdict.first == pytest.approx(expected) and verdict.completion_tokens == 1
        assert server.asked[0]["top_logprobs"] == 20 and server.asked[0]["max_tokens"] == 1
        with pytest.raises(InputError, match="no tokens"):
            SpeakingJudge(
                Server(server.url), Template(labels={"x": 1, "y": 0}), Asking(graded=True)
            )


def points(**more):
    return {
        "prompt_id": "p0",
        "messages": [{"role": "user", "content": "x"}],
        "variant": "v2",
        "against": "v1",
        "responses": ["a", "b"],
        "score": 2,
        "shown_first": "v2",
        "rater": "ada",
        "time": "2026-11-30T00:00:00Z",
        **more,
    }


def test_people_are_a_judge_too(tmp_path):
    path = tmp_path / "2026-W49-evaluation.jsonl"
    rows = [
        points(prompt_id=f"p{i}", score=s, rater=r)
        for i in range(4)
        for r, s in (("ada", i), ("bo", i - 1))
    ]
    json_lines.write(path, rows)
    (row,) = (found := people.results([path]))["pairs"]
    # Medians -0.5, 0.5, 1.5, 2.5.
    assert (row["wins"], row["ties"], row["losses"]) == (3, 0, 1)
    assert row["rate"]["mean"] == 0.75 and row["raters"] == 2
    assert row["agreement"]["AC1"]["mean"] < row["agreement"]["AC2"]["mean"] < 1
    assert found["position"]["first"]["mean"] == pytest.approx(5 / 6)
    for wrong, said in (
        ({"score": 4}, "score: expected a whole number from -3 to 3"),
        ({"score": True}, "score"),
        ({"shown_first": "v3"}, "shown_first: expected 'v2' or 'v1'"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"rater": ""}, "rater: expected text"),
    ):
        json_lines.write(path, [points(), points(**wrong)])
        with pytest.raises(InputError, match=rf"evaluation.jsonl:2: {said}"):
            people.results([path])
    json_lines.write(path, [{"prompt_id": "p"}])
    with pytest.raises(InputError, match=r":1: missing key 'messages'"):
        people.results([path])


def test_the_verb_judges_by_two_sides(folders, tmp_path, capsys):
    paths = list(map(str, files(tmp_path)))
    by_people = tmp_path / "people.jsonl"
    json_lines.write(by_people, [points()])
    with ChatServer(higher_number).running() as server:
        given = ["judge", *paths, "--reward", str(folders[0]), "--preference", str(folders[1])]
        given += ["--server", server.url, "--people", str(by_people), "--against", "v1"]
        given += ["--out", str(tmp_path / "out")]
        cli.main([*given])
        text = capsys.readouterr().out
        sent = server.sent
        cli.main([*given, "--json"])
        assert server.sent == sent
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "judged.json").read_text())
    assert [row["kind"] for row in found["judges"]] == ["reward", "preference", "server", "people"]
    assert all(row["cost"]["asked"] == 0 for row in found["judges"][:3])
    assert found["judges"][2]["cost"]["requests"] == 0 < found["judges"][2]["cost"]["prompt_tokens"]
    assert [row["name"] for row in found["versions"]] == list(NAMES)
    assert len(found["agreement"]) == 3 and -1 <= found["agreement"][0]["ac1"]["mean"] <= 1
    assert "v3 over v1" in text and f"{sent} requests, {sent} asked, 0 from the cache" in text
    for arguments, said in (
        (paths[:1], "two versions or more"),
        (paths, "who judges them"),
        ([*paths, "--reward", "x", "--against", "v9"], "no version 'v9'"),
        ([*paths, "--reward", "x", "--safety", "y", "z"], "safety: give one for each"),
        ([*paths, "--reward", str(folders[1])], "expected a reward model"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(["judge", *arguments, "--out", str(tmp_path / "bad")])
        assert left.value.code == 2 and said in capsys.readouterr().err


def test_equal_pairs_are_asked_once_and_threads_do_not_mix_answers():
    seen = threading.Lock(), set()

    def echo(body):
        with seen[0]:
            seen[1].add(body["messages"][-1]["content"])
        return body["messages"][-1]["content"]

    with ChatServer(echo).running() as server, Cache() as cache:
        prompts = [[{"role": "user", "content": f"say {i % 5}"}] for i in range(20)]
        said = replies(Server(server.url, at_once=5), prompts, Options(), cache)
        assert [reply.text for reply in said] == [f"say {i % 5}" for i in range(20)]
        assert server.sent == 5 and cache.asked == 5 and cache.found == 15


def test_agreement_counts_only_what_both_decide():
    def outcome(margin):
        return Outcome(Verdict(0.5 + margin / 2), Verdict(0.5 - margin / 2))

    ours, theirs = ([outcome(m) for m in ms] for ms in ((1, 1, 0, -1), (1, -1, 1, -1)))
    asked = [Answered([{"role": "user", "content": f"q{i}"}], "x") for i in range(4)]
    early = {f"p{i}": one for i, one in enumerate(asked)}
    late = {prompt: Answered(one.messages, "y") for prompt, one in early.items()}
    pairs = comparing.shown({"v1": early, "v2": late})
    (row,) = comparing.agreement(pairs, {"a": ours, "b": theirs})
    assert row["decided"] == 3 and row["same_winner"]["mean"] == pytest.approx(2 / 3)

    # A version that answers as another one does tells nothing new, on either side.
    more = comparing.shown({"v1": early, "v2": late, "v2 again": late}, "v1")
    more += comparing.shown({"v2": late, "v1": early})
    turned = [outcome(-o.margin) for o in ours], [outcome(-o.margin) for o in theirs]
    found = {"a": ours * 2 + turned[0], "b": theirs * 2 + turned[1]}
    assert comparing.agreement(more, found) == [row] and row["pairs"] == 4
