"""A folder's own chat template: Jinja, rendered as transformers renders it.

Sandbox, block trimming, filters and functions are the same (transformers, chat_template_utils.py),
so that the text is that of its apply_chat_template. A template is code that comes with somebody's
weights: it runs in Jinja's immutable sandbox and sees only the messages and the special tokens.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama2rt.errors import InputError

# Stand in the rendered text around what {% generation %} encloses; no text holds noncharacters.
_BEGIN, _END = "\ufdd0", "\ufdd1"

# The dialogue format of Llama 3's tokenizer, which Meta's folders carry in code instead of in a
# template: ChatFormat in the llama3 repository, llama/tokenizer.py.
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A folder's chat template."""

    source: str
    tokens: tuple[tuple[str, str], ...]
    """(name, text) of the special tokens that it may use"""
    unusable: str = ""
    """why there is none to render, where a folder has templates but not the one that is needed"""

    @property
    def marks_answers(self) -> bool:
        """Whether {% generation %} blocks say what a model is to write."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
    ) -> str:
        """The dialogue as text; InputError with the template's own words where it refuses."""
        return self._render(messages, add_generation_prompt, marked=False)

    def render_marked(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The dialogue as text, and (begin, end) of what {% generation %} encloses in it."""
        text, spans, begin = "", [], 0
        for part in re.split(f"([{_BEGIN}{_END}])", self._render(messages, False, marked=True)):
            if part == _BEGIN:
                begin = len(text)
            elif part == _END:
                spans.append((begin, len(text)))
            else:
                text += part
        if text != self.render(messages):
            raise InputError("the chat template changes what its {% generation %} blocks enclose")
        return text, spans

    def _render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, marked: bool
    ) -> str:
        if self.unusable:
            raise InputError(self.unusable)
        for message in messages:
            if _BEGIN in message["content"] or _END in message["content"]:
                raise InputError("a message holds a Unicode noncharacter")
        import jinja2

        try:
            return _compiled(self.source, marked).render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **dict(self.tokens),
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses: {error}") from None
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InputError(f"the chat template fails: {error}") from None


@functools.lru_cache(maxsize=16)
def _compiled(source: str, marked: bool) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_enclose")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _enclose(self, caller: Any) -> str:
            return f"{_BEGIN}{caller()}{_END}" if marked else caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent,
                          separators=separators, sort_keys=sort_keys)  # fmt: skip

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template, line {error.lineno}: {error.message}") from None
