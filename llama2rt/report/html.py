"""One HTML file that needs nothing else: no scripts, no requests, legible dark, light and printed.

A page is a title, an optional row of headline numbers and sections; a section holds text and
blocks. Everything that comes from data is escaped: a sampled answer may contain any markup.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from llama2rt import atomic
from llama2rt.report.plot import Plot


@dataclass(frozen=True)
class Table:
    """Rows under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    """cells are text, numbers, (mean, low, high), or None, shown as a dash"""
    caption: str = ""


@dataclass(frozen=True)
class Facts:
    """Names and values: what a run was made of."""

    facts: Mapping[str, object]


@dataclass(frozen=True)
class Text:
    """Preformatted text, such as a recipe, shown when its title is clicked."""

    title: str
    content: str


@dataclass(frozen=True)
class Answers:
    """One prompt and what each version answered."""

    messages: Sequence[Mapping[str, str]]
    """the dialogue so far, the user's turn last"""
    answers: Mapping[str, str]
    """version -> response"""
    notes: Mapping[str, str] = field(default_factory=dict)
    """version -> a short verdict ("helpful 0.95, safe"), shown under the answer"""


@dataclass(frozen=True)
class Dialogues:
    """Sample prompts, the versions' answers side by side."""

    samples: Sequence[Answers]
    caption: str = ""


@dataclass(frozen=True)
class Drawn:
    """A figure of a page that was written before (`drawn`)."""

    markup: str


@dataclass(frozen=True)
class Headline:
    """A number worth the first screen: what it is, its value, and a word on what it means."""

    label: str
    value: str
    note: str = ""


NONE = "\N{EN DASH}"
Block = Plot | Drawn | Table | Facts | Text | Dialogues


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, and blocks in order."""

    title: str
    blocks: Sequence[Block]
    text: str = ""


def write(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    headlines: Sequence[Headline] = (),
) -> Path:
    """Write the page to `path`, atomically, and return the path."""
    path = Path(path)
    atomic.write(path, page(title, sections, subtitle=subtitle, headlines=headlines))
    return path


def page(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    headlines: Sequence[Headline] = (),
) -> str:
    """The page as text."""
    links = "".join(
        f'<a href="#section-{i}">{escape(section.title)}</a>' for i, section in enumerate(sections)
    )
    cards = "".join(
        f"<div><dt>{escape(card.label)}</dt><dd>{escape(card.value)}</dd>"
        f"<dd class=note>{escape(card.note)}</dd></div>"
        for card in headlines
    )
    body = "".join(
        f'<section id="section-{i}"><h2>{escape(section.title)}</h2>'
        + (f"<p>{escape(section.text)}</p>" if section.text else "")
        + "".join(_block(block, f"{i}-{j}") for j, block in enumerate(section.blocks))
        + "</section>"
        for i, section in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{_CSS}</style></head><body><main><header><h1>{escape(title)}</h1>"
        + (f"<p>{escape(subtitle)}</p>" if subtitle else "")
        + (f'<nav aria-label="Sections">{links}</nav>' if len(sections) > 2 else "")
        + "</header>"
        + (f"<dl class=headlines>{cards}</dl>" if cards else "")
        + body
        + "</main></body></html>\n"
    )


def drawn(path: Path, title: str) -> list[Drawn]:
    """The figures in section `title` of the page that `write` left at `path`, in order; none where
    there is no such page or section. A drawing takes half a second, its text nothing."""
    if not path.exists():
        return []
    begins = rf'<section id="section-\d+"><h2>{re.escape(escape(title))}</h2>'
    section = re.search(rf"{begins}(.*?)</section>", path.read_text(encoding="utf-8"), re.DOTALL)
    figures = re.findall(r"<figure>.*?</figure>", section[1], re.DOTALL) if section else []
    return [Drawn(markup) for markup in figures]


def cell(value: object) -> str:
    """A value as a reader wants it: four significant digits, "mean [low, high]", a dash if none."""
    if value is None:
        return NONE
    if isinstance(value, tuple):
        mean, low, high = value
        # Two digits of the interval's width, more would be noise; shares in a column look alike.
        width = abs(high - low)
        digits = min(6, max(0, 1 - math.floor(math.log10(width)))) if width else 3
        digits = max(digits, 3) if abs(high) <= 1 else digits
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if hasattr(value, "item"):  # a NumPy scalar
        value = value.item()
    if isinstance(value, int):
        # No separators below 10 000: steps and years are read as plain digits.
        return f"{value:,}".replace(",", "\N{THIN SPACE}") if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return NONE if value != value else f"{value:.4g}"
    return str(value)


def _block(block: Block, salt: str) -> str:
    match block:
        case Plot():
            return (
                f"<figure><h3>{escape(block.title)}</h3><div class=drawing>{block.svg(salt)}</div>"
                f"<figcaption>{escape(block.read)}</figcaption>"
                f"<details><summary>The numbers</summary>"
                f"{_table(block.header, block.rows)}</details></figure>"
            )
        case Drawn():
            # Two pages' figures may have the same ids.
            return re.sub(r'( id="|href="#|url\(#)([^")]+)', rf"\1\2-{salt}", block.markup)
        case Table():
            return _table(block.header, block.rows, block.caption)
        case Facts():
            pairs = "".join(
                f"<dt>{escape(name)}</dt><dd>{escape(cell(value))}</dd>"
                for name, value in block.facts.items()
            )
            return f"<dl class=facts>{pairs}</dl>"
        case Text():
            return (
                f"<details><summary>{escape(block.title)}</summary>"
                f"<pre>{escape(block.content)}</pre></details>"
            )
        case Dialogues():
            return _dialogues(block)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    numeric = [
        all(not isinstance(row[i], str) for row in rows) and bool(rows) for i in range(len(header))
    ]
    kinds = [" class=number" if flag else "" for flag in numeric]
    head = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for kind, name in zip(kinds, header, strict=True)
    )
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{escape(cell(value))}</td>" for kind, value in zip(kinds, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        "<div class=scroll><table>"
        + (f"<caption>{escape(caption)}</caption>" if caption else "")
        + f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _dialogues(block: Dialogues) -> str:
    versions = list(dict.fromkeys(name for sample in block.samples for name in sample.answers))
    head = '<th scope="col">Prompt</th>' + "".join(
        f'<th scope="col">{escape(name)}</th>' for name in versions
    )
    lines = []
    for sample in block.samples:
        turns = "".join(
            f"<p class={_ROLES.get(turn['role'], 'other')}>"
            f"<b>{escape(turn['role'])}</b> {escape(turn['content'])}</p>"
            for turn in sample.messages
        )
        answers = []
        for name in versions:
            if name not in sample.answers:
                answers.append(f"<td>{NONE}</td>")
                continue
            text = sample.answers[name]
            shown = escape(text) if text.strip() else "<i>empty answer</i>"
            note = sample.notes.get(name, "")
            answers.append(
                f"<td><p>{shown}</p>"
                + (f"<p class=note>{escape(note)}</p>" if note else "")
                + "</td>"
            )
        lines.append(f"<tr><td>{turns}</td>{''.join(answers)}</tr>")
    return (
        "<div class=scroll><table class=dialogues>"
        + (f"<caption>{escape(block.caption)}</caption>" if block.caption else "")
        + f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


_ROLES = {"user": "user", "assistant": "assistant", "system": "system"}

_LIGHT = """
--paper:#ffffff;--page:#f6f7f9;--ink:#20242c;--muted:#5f6672;--grid:#dde1e7;
--series-0:#0072b2;--series-1:#d55e00;--series-2:#009e73;--series-3:#b8578f;--series-4:#b87d00;
--series-5:#3d95c9;--series-6:#8a6d3b;"""
_DARK = """
--paper:#1b1e24;--page:#13151a;--ink:#e7eaf0;--muted:#a3abb8;--grid:#343a45;
--series-0:#5ab4ea;--series-1:#f08a45;--series-2:#35c79b;--series-3:#e2a0c4;--series-4:#f0b93a;
--series-5:#8fd0f5;--series-6:#c9ab73;"""
_CSS = f"""
:root{{{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
@media print{{:root{{{_LIGHT}--page:#ffffff}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}}
main{{max-width:1000px;margin:0 auto;padding:2.2rem 1.2rem 4rem}}
h1{{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem}}
h2{{font-size:1.3rem;margin:0 0 .4rem}}
h3{{font-size:1rem;margin:0 0 .5rem}}
header p,section>p{{color:var(--muted);margin:.2rem 0 1rem;max-width:46rem}}
nav{{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:.8rem 0 0;font-size:.92rem}}
nav a{{color:var(--series-0);text-decoration:none}}
nav a:hover,nav a:focus{{text-decoration:underline}}
section{{background:var(--paper);border:1px solid var(--grid);border-radius:10px;
padding:1.3rem 1.5rem;margin:1.3rem 0}}
figure{{margin:1.4rem 0 1.6rem}}
.drawing{{overflow-x:auto}}
.drawing svg{{display:block;max-width:100%;height:auto;margin:0 auto}}
figcaption{{color:var(--muted);font-size:.92rem;margin:.5rem 0 .3rem;max-width:46rem}}
summary{{cursor:pointer;color:var(--muted);font-size:.88rem}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:.9rem;margin:.6rem 0;min-width:40%;
font-variant-numeric:tabular-nums}}
caption{{text-align:left;color:var(--muted);padding:0 0 .4rem;font-size:.92rem}}
th,td{{text-align:left;padding:.34rem 1.1rem .34rem 0;border-bottom:1px solid var(--grid);
vertical-align:top}}
th{{font-weight:600;border-bottom-color:var(--muted)}}
.number{{text-align:right;white-space:nowrap}}
.dialogues{{width:100%}}
.dialogues td{{min-width:7.5rem;overflow-wrap:anywhere}}
.dialogues p{{margin:0 0 .35rem;white-space:pre-wrap}}
.dialogues b{{font-weight:600;font-size:.8rem;color:var(--muted)}}
.note,.dialogues .note{{color:var(--muted);font-size:.84rem}}
.headlines{{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.9rem;
margin:1.4rem 0}}
.headlines div{{background:var(--paper);border:1px solid var(--grid);border-radius:10px;
padding:.8rem 1rem}}
.headlines dt{{color:var(--muted);font-size:.88rem}}
.headlines dd{{margin:0;font-size:1.35rem;font-weight:600;line-height:1.35;
font-variant-numeric:tabular-nums}}
.headlines dd.note{{font-size:.84rem;font-weight:400}}
.facts{{display:grid;grid-template-columns:minmax(9rem,auto) 1fr;gap:.25rem 1.4rem;
font-size:.9rem;margin:.6rem 0}}
.facts dt{{color:var(--muted)}}
.facts dd{{margin:0;overflow-wrap:anywhere}}
pre{{overflow-x:auto;font-size:.84rem;line-height:1.45;background:var(--page);
padding:.8rem 1rem;border-radius:8px}}
@media (max-width:600px){{section{{padding:1rem}}.drawing svg{{min-width:560px}}}}
@media print{{main{{max-width:none;padding:0}}nav,figure details{{display:none}}
section{{border:0;padding:0;break-inside:auto}}figure,tr,.headlines div{{break-inside:avoid}}
h2,h3{{break-after:avoid}}.scroll,.drawing,pre{{overflow:visible}}pre{{white-space:pre-wrap}}}}
"""
