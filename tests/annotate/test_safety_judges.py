"""Who says that an answer is unsafe, or a refusal: each kind of judge, and what is refused."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import json_lines
import pocket as problem
import pytest

from llama2rt.annotate import safety
from llama2rt.annotate.safety import SafetyJudgeOptions, Verdict
from llama2rt.data.records import Sample
from llama2rt.errors import InputError


def sample(text: str, name: str = "baba", kind: str = "safety") -> Sample:
    return Sample(name, problem.messages(kind, name), text, kind=kind)


def test_a_reward_model_by_threshold_and_phrases(pocket, tmp_path):
    own = [sample(text, name) for name in problem.HELD_OUT[:8] for text in ("sorry", "gold")]
    judge = SafetyJudgeOptions(safety=pocket.safety).open(own)
    said = judge(own)
    assert [verdict.unsafe for verdict in said] == [False, True] * 8
    assert not any(verdict.refusal for verdict in said)
    strict = SafetyJudgeOptions(safety=pocket.safety, threshold=0.999999).open(own)
    assert all(verdict.unsafe for verdict in strict(own))
    (tmp_path / "phrases.txt").write_text("Sorry\n\n  not   today \n")
    options = SafetyJudgeOptions(safety=pocket.safety, phrases=tmp_path / "phrases.txt")
    assert [verdict.refusal for verdict in options.open(own)(own)] == [True, False] * 8
    assert safety.refuses("well, I CAN\N{RIGHT SINGLE QUOTATION MARK}T\nsay") and safety.refuses(
        "I cannot"
    )
    assert not safety.refuses("You cannot lose: take 3 of them.")
    # A phrase is words, not letters within others.
    assert not any(map(safety.refuses, ("Delhi cannot be far.", "Hanoi will not be cold.")))


def test_a_language_model_that_is_asked():
    asked = []

    def ask(questions):
        asked.extend(questions)
        return ["Yes.", "no", "The answer is: No", "I think so"]

    said = safety.AskedJudge(ask)([sample("gold"), sample("sorry")])
    assert said == [Verdict(True, False), Verdict(False, None)]
    assert "user: what does baba hide\n\nAnswer: gold\n\n" + safety.UNSAFE in asked[0]
    assert safety.REFUSAL in asked[1] and "Answer: sorry" in asked[3]
    assert [safety.yes_or_no(text) for text in ("YES", "**No**", "nothing", "", "yesterday")] == [
        True, False, None, None, None
    ]  # fmt: skip


def test_a_model_here_reads_every_answer_or_says_which_it_cannot(pocket):
    with pytest.raises(InputError, match=r"judge: sample 1, of prompt 'baba': \d+ tokens, and the"):
        SafetyJudgeOptions(judge=pocket.sft).open([sample("gold")])
    with pytest.raises(InputError, match=r"safety: sample 2, of prompt 'baba': .* context is 64"):
        SafetyJudgeOptions(safety=pocket.safety).open([sample("gold"), sample("gold " * 40)])


def test_a_server_is_asked(monkeypatch):
    bodies = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({"data": [{"id": name} for name in served]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            unsafe = "harmful" in body["messages"][0]["content"]
            self.reply({"choices": [{"message": {"content": "Yes" if unsafe else "No"}}]})

        def reply(self, value):
            text = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    served = ["one"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        judge = SafetyJudgeOptions(server=url).open()
        assert judge([sample("gold"), sample("sorry")]) == [Verdict(True, False)] * 2
        assert {(body["model"], body["temperature"]) for body in bodies} == {("one", 0)}
        served.append("two")
        with pytest.raises(InputError, match=r"server_model: .* lists 2 models \(one, two\)"):
            SafetyJudgeOptions(server=url).open()
        assert SafetyJudgeOptions(server=url, server_model="two").open()([]) == []
    finally:
        server.shutdown()
        server.server_close()


def test_peoples_labels(tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [
        {"prompt_id": "baba", "response": "gold", "unsafe": True, "refusal": False},
        {"prompt_id": "baba", "response": "no", "turn": 2, "refusal": True},
    ]
    json_lines.write(path, rows)
    judge = SafetyJudgeOptions(labels=[path]).open()
    later = Sample("baba", [*problem.messages("safety", "baba")] * 2, "no")
    assert judge([sample("gold"), sample("no"), later, sample("other")]) == [
        Verdict(True, False), Verdict(), Verdict(None, True), Verdict()
    ]  # fmt: skip
    with pytest.raises(InputError, match="none of them is of one of these samples"):
        judge([sample("other")])
    for row, said in (
        ({"response": "a", "unsafe": True}, "prompt_id: expected text, got None"),
        ({"prompt_id": "a", "response": "a"}, "unsafe, refusal: expected at least one"),
        ({"prompt_id": "a", "response": "a", "unsafe": 1}, "unsafe: expected true or false"),
        ({"prompt_id": "a", "response": "a", "unsafe": True, "turn": 0}, "turn: expected a whole"),
        ({"prompt_id": "a", "response": "a", "safe": True}, "unknown key 'safe'"),
        ({**rows[0], "unsafe": False}, "'baba' was labelled otherwise before"),
        (["a"], "expected a JSON object, got a list"),
    ):
        json_lines.write(path, [*rows, row])
        with pytest.raises(InputError) as error:
            SafetyJudgeOptions(labels=[path]).open()
        assert str(error.value).startswith(f"{path}:3: ") and said in str(error.value)


def odd(path):
    """Long answers are unsafe."""
    assert path.exists()
    return lambda sample: Verdict(len(sample.response) > 4, "sorry" in sample.response)


def test_a_function_of_ones_own(tmp_path):
    (tmp_path / "keys").touch()
    options = SafetyJudgeOptions(python=f"{__name__}:odd", files=[tmp_path / "keys"])
    assert options.open()([sample("sorry"), sample("gold")]) == [
        Verdict(True, True), Verdict(False, False)
    ]  # fmt: skip
    options = SafetyJudgeOptions(python=f"{__name__}:odd", files=[tmp_path / "none"])
    with pytest.raises(InputError, match=r"files: .*none: no such file"):
        options.check()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "give one of safety, judge, server, python and labels, got none"),
        ({"safety": "sft", "server": "http://x"}, "got safety and server"),
        ({"server": "http://x", "phrases": "sft"}, "phrases: only with safety"),
        ({"labels": ["sft"], "server_model": "m"}, "server_model: only with server"),
        ({"safety": "sft", "files": ["sft"]}, "files: only with python"),
        ({"safety": "sft"}, "expected a reward model, found a language model"),
        ({"judge": "safety"}, "expected a language model, found a reward model"),
        ({"safety": "safety", "threshold": 1.0}, "threshold: expected a number between 0 and 1"),
        ({"safety": "safety", "micro_tokens": 0}, "micro_tokens: expected 1 to"),
        ({"safety": "safety", "phrases": "prompts"}, "phrases: .*sft: cannot be read"),
        ({"python": "nowhere:judge"}, "python: nowhere:judge: No module"),
        ({"python": "nowhere"}, "python: "),
    ],
)
def test_a_judge_that_is_none(pocket, tmp_path, keys, said):
    if keys.get("phrases") == "prompts":
        keys = keys | {"phrases": tmp_path / "sft"}
    given = {
        key: getattr(pocket, value) if value in ("sft", "safety") else value
        for key, value in keys.items()
    }
    for key in ("labels", "files"):
        if key in given:
            given[key] = [pocket.sft]
    with pytest.raises(InputError, match=said):
        SafetyJudgeOptions(**given).check()
