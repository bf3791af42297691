"""The pages as HTML. Templates escape all that is inserted; only a guideline becomes markup, by a
renderer that escapes markup in it and shows no images."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from llama2rt.data.records import Messages
from llama2rt.people import summary
from llama2rt.people.accounts import Annotator
from llama2rt.people.judgements import REASONS, SCALE

FOLDER = Path(__file__).with_name("page")
FILES = {"page.js": "text/javascript", "page.css": "text/css"}

RATINGS = {
    "significantly_better": "Significantly better",
    "better": "Better",
    "slightly_better": "Slightly better",
    "negligibly_better": "Negligibly better / unsure",
}
SAFETY = {
    "chosen_safe": "The better one is safe, the other is not",
    "both_safe": "Both are safe",
    "both_unsafe": "Both are unsafe",
}


@dataclass(frozen=True)
class Frame:
    """What every page of somebody who is logged in shows around its own content."""

    annotator: Annotator
    csrf: str
    judged: int
    """how much they have judged"""
    write: bool
    """whether they may write prompts"""


class Views:
    """Renders the templates in `page/`."""

    def __init__(self, guidelines: dict[str, str]) -> None:
        self._environment = Environment(
            loader=FileSystemLoader(FOLDER),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals.update(
            nonce=lambda: secrets.token_hex(16),
            ratings=RATINGS,
            safety=SAFETY,
            scale=list(SCALE),
            reasons=REASONS,
        )
        self._environment.filters.update(percent=summary.percent, coefficient=summary.coefficient)
        markdown = MarkdownIt("commonmark", {"html": False}).disable("image")
        self._guidelines = {
            kind: Markup(markdown.render(text)) for kind, text in guidelines.items()
        }

    def log_in(self, message: str = "") -> str:
        """The form for a token."""
        return self._render("log_in.html", frame=None, message=message)

    def task(
        self, frame: Frame, task: int, messages: Messages, shown: tuple[str, str], **more: Any
    ) -> str:
        """Two responses side by side; `kind` and `evaluation` say what is asked of them."""
        return self._render(
            "task.html",
            frame=frame,
            task=task,
            messages=messages,
            shown=dict(zip("ab", shown, strict=True)),
            guideline=self._guidelines.get(more["kind"]),
            **more,
        )

    def write(self, frame: Frame, kinds: list[str], **more: Any) -> str:
        """A message to begin a conversation with, or (`parent`) to go on with one."""
        begun: dict[str, Any] = {
            "messages": [],
            "parent": None,
            "text": "",
            "message": "",
            "ends": False,
        }
        values = begun | {"kind": kinds[0]} | more
        guideline = self._guidelines.get(values["kind"])
        return self._render("write.html", frame=frame, kinds=kinds, guideline=guideline, **values)

    def wait(self, frame: Frame, trouble: str | None) -> str:
        """Responses are being sampled; the page loads itself again."""
        return self._render("wait.html", frame=frame, trouble=trouble, refresh=2)

    def done(self, frame: Frame) -> str:
        """There is nothing left to judge."""
        return self._render("done.html", frame=frame)

    def refused(self, frame: Frame | None, message: str) -> str:
        """Why a post was not taken."""
        return self._render("refused.html", frame=frame, message=message)

    def overview(self, frame: Frame, found: dict[str, Any]) -> str:
        """What `summary.summarise` finds."""
        return self._render("overview.html", frame=frame, found=found, ratings=RATINGS)

    def _render(self, name: str, **values: Any) -> str:
        return self._environment.get_template(name).render({"refresh": None, **values})
