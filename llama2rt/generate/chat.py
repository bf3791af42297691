"""A conversation at a terminal or through a pipe: what is remembered, and the lines that are
commands instead of messages.

Nothing is left out of the record of a conversation but what cannot be part of a prompt. What no
longer fits the model's context is left out of the prompt alone, oldest exchange first.
"""

import bisect
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2rt.data import readers
from llama2rt.data.records import Dialogue
from llama2rt.errors import InputError
from llama2rt.generate.engine import Engine
from llama2rt.text.chat import check_messages, encode_prompt

HELP = """\
/regenerate     another answer to the last message, in place of the one before
/undo           forget the last message and its answer
/reset          forget the conversation; the system message stays
/system TEXT    another system message from here on; without TEXT, none
/save FILE      write the conversation as a dialogue record
/exit           leave, as Ctrl-D does
//TEXT          say /TEXT to the model
Ctrl-C stops an answer; what was said of it is remembered."""


@dataclass
class Chat:
    """A conversation with `engine`'s model. `options` are those of `Engine.stream`; each answer is
    drawn with another seed, counted from theirs."""

    engine: Engine
    options: dict[str, Any]
    system: str | None = None
    source: str = ""
    """what a saved record says of where it is from"""
    turns: list[dict[str, str]] = field(default_factory=list)
    """user, assistant, user, ..., assistant"""
    _unanswered: str | None = None
    """the last message, where its answer could not be remembered"""
    _drawn: int = 0
    _left_out: int = 0

    def run(self) -> None:
        """Talk until the input ends."""
        terminal = sys.stdin is not None and sys.stdin.isatty()
        if terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - from now on, `input` edits lines and recalls them
        while True:
            try:
                line = input("> " if terminal else "").strip()
            except EOFError:
                if terminal:
                    print()
                return
            except KeyboardInterrupt:
                if not terminal:
                    raise
                print("\n(Ctrl-D or /exit leaves)")
                continue
            if line == "/exit":
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """Carry out a command, or answer a message."""
        name, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(HELP),
            "/regenerate": self._regenerate,
            "/reset": self._reset,
            "/save": self._save,
            "/system": self._system,
            "/undo": self._undo,
        }
        if name in commands:
            commands[name](rest.strip())
        elif line.startswith("/") and not line.startswith("//"):
            print(f"(no such command: {name}; /help lists them, //... says it to the model)")
        else:
            self._answer(line.removeprefix("/"), self.turns)

    # --- commands ---------------------------------------------------------------------------------

    def _reset(self, _: str) -> None:
        self.turns, self._unanswered, self._left_out = [], None, 0

    def _undo(self, _: str) -> None:
        if self._unanswered is None and not self.turns:
            print("(nothing to undo)")
        elif self._unanswered is not None:
            self._unanswered = None
        else:
            print(f"(forgotten: {self.turns[-2]['content']})")
            self.turns = self.turns[:-2]

    def _regenerate(self, _: str) -> None:
        if self._unanswered is not None:
            self._answer(self._unanswered, self.turns)
        elif self.turns:
            self._answer(self.turns[-2]["content"], self.turns[:-2])
        else:
            print("(nothing to answer again)")

    def _system(self, text: str) -> None:
        if text:
            try:
                check_messages([_message("system", text), _message("user", "x")], last="user")
            except InputError as error:
                print(f"({error})")
                return
        self.system = text or None

    def _save(self, name: str) -> None:
        messages = self._messages(self.turns)
        try:
            if not name:
                raise InputError("/save FILE: expected a file")
            if not self.turns:
                raise InputError("nothing to save")
            if Path(name).exists():
                raise InputError(f"{name}: exists already")
            record = Dialogue.from_json({"messages": messages, "source": self.source})
            readers.write(name, [record])
        except (InputError, OSError) as error:
            print(f"({error})")
        else:
            print(f"({len(messages)} messages in {name})")

    # --- answers ----------------------------------------------------------------------------------

    def _messages(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        return ([_message("system", self.system)] if self.system else []) + turns

    def _answer(self, text: str, before: list[dict[str, str]]) -> None:
        """Stream the answer to `text` after the turns `before`, and remember both where they can be
        part of a prompt; otherwise what was remembered stays."""
        question = _message("user", text)
        options = self.options | {"seed": (self.options["seed"] + self._drawn) % 2**63}
        self._drawn += 1
        pieces: list[str] = []
        try:
            for piece in self.engine.stream(self._fitting([*before, question]), **options):
                print(piece, end="", flush=True)
                pieces.append(piece)
        except KeyboardInterrupt:
            pass
        except InputError as error:
            print(f"({error})")
            return
        print()
        answered = [*before, question, _message("assistant", "".join(pieces).strip())]
        try:  # an empty answer, or one with format tags in it, cannot be part of a prompt
            check_messages(answered, last="assistant")
        except InputError:
            print("(this exchange is not remembered)")
            if len(before) == len(self.turns):
                self._unanswered = text
        else:
            self.turns, self._unanswered = answered, None

    def _fitting(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        """The messages of a prompt that leaves a part of the context to the answer: without the
        oldest exchanges, where those do not fit. InputError where the last message alone does
        not."""
        context = self.engine.model.config.context
        answer = min(self.options["max_tokens"], context // 4)

        def fits(exchanges: int) -> bool:
            messages = self._messages(turns[2 * exchanges :])
            return len(encode_prompt(self.engine.tokenizer, messages)) + answer <= context

        # The last message is asked in any case; the engine says where there is no room for it.
        left_out = 2 * bisect.bisect_left(range(len(turns) // 2), True, key=fits)
        if left_out > self._left_out:
            print(
                f"(the context is full: the {left_out} oldest messages are left out from here on)"
            )
        self._left_out = left_out
        return self._messages(turns[left_out:])


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
