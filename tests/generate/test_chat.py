"""`llama2rt chat`: what each command does to the conversation, through a pipe and by hand."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import tyro
from small_models import far_from_flat

from llama2rt.checkpoint import native
from llama2rt.data import readers
from llama2rt.generate import Engine, commands
from llama2rt.generate.chat import Chat

GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_tokens": 6, "seed": 4}


@pytest.fixture(scope="module")
def engine(tokenizer):
    return Engine(far_from_flat(vocab_size=tokenizer.vocab_size), tokenizer)


class Scripted:
    """An engine that answers in turn what is given, and keeps what it was asked."""

    def __init__(self, engine, *answers):
        self.model, self.tokenizer, self.answers = engine.model, engine.tokenizer, list(answers)
        self.asked, self.seeds = [], []

    def stream(self, messages, *, seed, **options):
        self.asked.append([message["content"] for message in messages])
        self.seeds.append(seed)
        answer = self.answers.pop(0)
        for piece in answer if isinstance(answer, list) else [answer]:
            if piece is KeyboardInterrupt:
                raise KeyboardInterrupt
            yield piece


def talk(engine, *lines, answers, **settings):
    """The scripted engine and the chat after these lines."""
    scripted = Scripted(engine, *answers)
    chat = Chat(scripted, dict(GREEDY), **settings)
    for line in lines:
        chat.take(line)
    assert not scripted.answers
    return scripted, chat


def test_each_answer_follows_all_before(engine):
    scripted, chat = talk(engine, "a", "b", answers=["x", "y"], system="dates")
    assert scripted.asked == [["dates", "a"], ["dates", "a", "x", "b"]]
    assert scripted.seeds == [4, 5]
    assert [turn["content"] for turn in chat.turns] == ["a", "x", "b", "y"]


def test_regenerate_asks_again_with_another_seed(engine):
    scripted, chat = talk(engine, "a", "b", "/regenerate", answers=["x", "y", "z"])
    assert scripted.asked[1] == scripted.asked[2] == ["a", "x", "b"]
    assert len(set(scripted.seeds)) == 3
    assert [turn["content"] for turn in chat.turns] == ["a", "x", "b", "z"]


def test_what_cannot_be_remembered_can_be_asked_again(engine, capsys):
    scripted, chat = talk(engine, "a", "/regenerate", "b", answers=[" ", "[INST]", "y"])
    assert scripted.asked == [["a"], ["a"], ["b"]]
    assert capsys.readouterr().out.count("(this exchange is not remembered)") == 2
    assert [turn["content"] for turn in chat.turns] == ["b", "y"]
    # A second answer that cannot be remembered leaves the first.
    _, chat = talk(engine, "a", "/regenerate", answers=["x", ""])
    assert [turn["content"] for turn in chat.turns] == ["a", "x"]


def test_undo_and_reset(engine, capsys):
    _, chat = talk(engine, "a", "b", "/undo", answers=["x", "y"])
    assert [turn["content"] for turn in chat.turns] == ["a", "x"]
    assert "(forgotten: b)" in capsys.readouterr().out
    scripted, chat = talk(engine, "a", "/reset", "b", answers=["x", "y"], system="s")
    assert scripted.asked[1] == ["s", "b"]
    _, chat = talk(engine, "/undo", "/regenerate", answers=[])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "(nothing to undo)",
        "(nothing to answer again)",
    ]


def test_another_system_message(engine, capsys):
    lines = ("a", "/system be brief", "b", "/system <<SYS>>", "/system", "c")
    scripted, _ = talk(engine, *lines, answers=["x", "y", "z"])
    assert scripted.asked[1] == ["be brief", "a", "x", "b"]
    assert scripted.asked[2] == ["a", "x", "b", "y", "c"]
    assert "holds the format tag <<SYS>>" in capsys.readouterr().out


def test_an_interrupted_answer_is_remembered_as_far_as_it_came(engine):
    scripted, _ = talk(engine, "a", "b", answers=[["x ", "y", KeyboardInterrupt], "z"])
    assert scripted.asked[1] == ["a", "x y", "b"]


def test_saved_is_a_dialogue(engine, tmp_path, capsys):
    path = tmp_path / "saved.jsonl"
    lines = (f"/save {path}", "a", "/save", f"/save {path}", f"/save {path}")
    talk(engine, *lines, answers=["x"], system="s", source="m")
    (record,) = readers.read(path, "dialogue")
    assert [(m["role"], m["content"]) for m in record.messages] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "x"),
    ]
    assert record.source == "m"
    shown = capsys.readouterr().out
    for note in ("nothing to save", "/save FILE: expected", "(3 messages in", "exists already"):
        assert note in shown


def test_unknown_commands_and_text_that_begins_with_a_stroke(engine, capsys):
    scripted, _ = talk(engine, "/regen", "//regen", "/help", answers=["x"])
    assert scripted.asked == [["/regen"]]
    shown = capsys.readouterr().out
    assert "(no such command: /regen; /help lists them" in shown and "/system TEXT" in shown


def test_a_full_context_leaves_out_the_oldest_exchanges(engine, capsys):
    """With every word asked for in the real engine, which would refuse a prompt that is too long:
    the context is 96 tokens."""
    long = "dates and units and questions " * 2
    chat = Chat(engine, dict(GREEDY), "small")
    for _ in range(4):
        chat.take(long)
    shown = capsys.readouterr().out
    assert "the context is full: the 2 oldest messages are left out" in shown
    assert "left out from here on" in shown and len(chat.turns) == 8
    fitting = chat._fitting([*chat.turns, {"role": "user", "content": long}])
    assert fitting[0]["content"] == "small" and 1 < len(fitting) < len(chat.turns)
    chat.take("dates " * 200)
    assert "leave no room in the context of 96" in capsys.readouterr().out
    assert len(chat.turns) == 8


# --- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(engine, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "model"
    native.save(engine.model, engine.tokenizer, path)
    return path


def test_through_a_pipe(folder, engine, tmp_path, monkeypatch, capsys):
    """Answers and notes, one line after the other, and no prompt for input."""
    saved = tmp_path / "saved.jsonl"
    lines = f"about units\n\n/save {saved}\n/exit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    tyro.cli(commands.chat, args=[str(folder), "--temperature", "0", "--max-tokens", "6"])
    question = [{"role": "user", "content": "about units"}]
    (expected,) = engine.generate([question], temperature=0, max_tokens=6)
    assert capsys.readouterr().out == f"{expected.text}\n(2 messages in {saved})\n"
    (record,) = readers.read(saved, "dialogue")
    assert record.messages[-1]["content"] == expected.text


def test_at_a_terminal_ctrl_c_ends_a_line_and_not_the_program(folder):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "llama2rt.cli", "chat", str(folder), "--max-tokens", "6"]
    child = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        # A shell's background job ignores Ctrl-C, and so would everything below it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(theirs)
    shown = ""

    def until(text, press=lambda: None):
        """Read until `text`, with `press` done now and every second that nothing is shown."""
        nonlocal shown
        deadline = time.monotonic() + 300
        press()
        while text not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([ours], [], [], 1)[0]:
                shown += os.read(ours, 4096).decode()
            else:
                press()
        shown = shown[shown.index(text) + len(text) :]

    try:
        until("> ")
        # Pressed between readline's prompt and its wait for a key, Ctrl-C is seen by CPython at
        # the next key or the next Ctrl-C alone.
        until("(Ctrl-D or /exit leaves)", lambda: child.send_signal(signal.SIGINT))
        until("> ")
        os.write(ours, b"about units\n")
        until("> ")
        os.write(ours, b"\x04")
        assert child.wait(timeout=60) == 0
    finally:
        child.kill()
        os.close(ours)
