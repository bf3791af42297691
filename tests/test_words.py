"""One vocabulary: the field's terms, one docstring style, and help that says something.

The list holds the words that this project once used in a sense of its own. They are looked for in
code, comments, docstrings, messages and documentation alike.
"""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("*.py", "*.md", "*.cpp", "*.cu", "*.cuh", "*.h", "*.toml")
KERNELS = ("kernels/", "csrc/cpu/", "csrc/cuda/")


class Dropped(NamedTuple):
    pattern: str
    instead: str
    folders: tuple[str, ...] = ("llama2rt/", "kernels/", "csrc/", "docs/")


# A folder is a package and code is divided into layers; "room for 16 warps" is English.
DROPPED = (
    Dropped(
        r"\brooms\b|\b(?:an?|each|every|no|other|that|the|this|which) room\b(?! for| in| to| on)",
        "package, layer or module",
    ),
    Dropped(r"\bhouses?\b", "package, layer or module"),
    Dropped(r"(?i)\bguests?\b", "partial backend; what runs the rest is its fallback"),
    Dropped(r"(?<![a-z])[Pp]ark(?:ed|ing)", "stashed, or recomputed"),
    Dropped(r"\bke(?:pt|eps?) malloc\b", "the allocator keeps freed memory"),
    Dropped(r"\bpi0\b(?!\s*[(|)])", "reference policy; pi0 in formulas alone"),
    Dropped(r"\brules on any\b", "the safety score replaces the helpfulness score"),
    Dropped(r"\bendless row\b", "shuffled epochs, continued across iterations"),
    Dropped(r"\bspread\b\s*(?:=[^=]|\[)", "entropy, range or coefficient of variation"),
    Dropped(r"\bspeaks_for_warp\b", "elect_one", KERNELS),
    Dropped(r"\braise_registers\b", "setmaxnreg", ("csrc/",)),
    Dropped(r"\bblind\b", "masked", KERNELS),
    Dropped(r"\b(?:peak|maxima)\b", "row_max", KERNELS),
    Dropped(r"^from __future__ import annotations", "the name in quotes where it comes later"),
    Dropped(r"(?<!`)``(?!`)", "single backticks for code", ("llama2rt/", "kernels/")),
)


def files() -> Iterator[tuple[str, str]]:
    """(path below the root, text) of every file that is read by people."""
    for folder in ("llama2rt", "kernels", "csrc", "docs"):
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            # llama2rt/kernels is a link to kernels.
            wanted = any(fnmatchcase(path.name, pattern) for pattern in SOURCES)
            if wanted and path.is_file() and not name.startswith("llama2rt/kernels/"):
                yield name, path.read_text(encoding="utf-8")


def dropped_words(name: str, text: str) -> list[str]:
    """FILE:LINE, the word and what to write, for each word of DROPPED in a file."""
    found = []
    for pattern, instead, folders in DROPPED:
        if name.startswith(folders):
            for match in re.finditer(pattern, text, re.MULTILINE):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{name}:{line}: {match[0]!r}: write {instead}")
    return found


def empty_help(name: str, text: str) -> list[str]:
    """FILE:LINE of each field whose string below it says no more than its name."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                words = re.findall(r"\w+", below.value.value.lower().replace("_", " "))
                if not set(words) - {*field.target.id.lower().split("_"), "the", "a", "an"} or (
                    len("".join(words)) < 3
                ):
                    found.append(f"{name}:{below.lineno}: {below.value.value!r} says nothing")
    return found


def wrong_in(name: str, text: str) -> list[str]:
    return dropped_words(name, text) + (empty_help(name, text) if name.endswith(".py") else [])


def test_the_words_are_the_fields() -> None:
    wrong = [line for name, text in files() for line in wrong_in(name, text)]
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_read() -> None:
    read = [name for name, _ in files()]
    for folder in ("llama2rt/", "kernels/", "csrc/", "docs/"):
        assert sum(name.startswith(folder) for name in read) > 5, folder


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("llama2rt/a.py", "# this room may not import; two rooms", 2),
        ("llama2rt/a.py", "# leaves no room in the context, room for 16 warps", 0),
        ("llama2rt/a.py", '"""pi0 of the KL penalty"""', 1),
        ("llama2rt/a.py", '"""beta KL(pi || pi0), log pi0(y | x)"""', 0),
        ("llama2rt/a.py", "from __future__ import annotations\n", 1),
        ("llama2rt/a.py", '"""Code such as ``len``."""', 2),
        ("docs/a.md", "```\ncode\n```", 0),
        ("csrc/cuda/a.cu", "float peak[2];", 1),
        ("llama2rt/a.py", "peak = memory()", 0),
        ("llama2rt/a.py", "class A:\n    top_k: int\n    '''the top k'''", 1),
        ("llama2rt/a.py", "class A:\n    tokens: int\n    '''T'''", 1),
        ("llama2rt/a.py", "class A:\n    top_k: int\n    '''tokens to draw from; 0 for all'''", 0),
    ],
)
def test_finds_what_it_says(name: str, text: str, count: int) -> None:
    assert len(wrong_in(name, text)) == count
