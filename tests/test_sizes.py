"""No file, function or call grows beyond what a reader takes in at once.

How it is counted: a file's lines are all its lines. A function's run from its `def` to its last
statement, docstring included and decorators not; a function inside another counts for both. A
call's arguments are the positional ones and the keywords, `*rest` and `**rest` one each.

Functions and calls of kernels/ count, since they are installed as llama2rt.kernels; the lengths of
its files do not, which hold a kernel, its launch settings and its host function in reading order.
"""

import ast
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
MOST = {"file": 400, "function": 70, "call": 8}
UNITS = {"file": "lines", "function": "lines", "call": "arguments"}

# Pattern of a name (fnmatch) -> why it may be larger. A pattern that nothing needs is an error.
_LOOP = "Triton: what a loop carries cannot be split over helpers"
EXCEPTIONS = {
    "function": {
        "kernels/attention.py:attention_forward_kernel": _LOOP,
        "kernels/attention_backward.py:attention_d*_kernel": _LOOP,
        "kernels/decode_attention.py:decode_attention_kernel": _LOOP,
        "kernels/attention_backward.py:attention_backward": "two launches, one argument a line",
    },
    "call": {
        "kernels/*:*_kernel[[]*": "a Triton launch: pointers, sizes and settings, no structs",
        "kernels/*_kernel:*": "a helper of a Triton kernel: what it reads, no structs",
        "llama2rt/ops/*:attention:*": "q, k, v, two offsets, settings, results: the op's own",
        "llama2rt/ops/*:attention_backward:*": "the same, and what forward has saved",
        "llama2rt/text/tokenizer.py:*:sentencepiece.SentencePieceTrainer.train": (
            "every option of the trainer that tokens depend on, named, whatever its default"
        ),
        "llama2rt/cluster/hardware.py::Gpu": "a data sheet: one named number a line",
        "llama2rt/planning/duration.py:layout:Layout": "the cluster model's: a degree a line",
        "llama2rt/quickstart/*Recipe": "a recipe: one key a line, as a file would have it",
        "llama2rt/generate/batch.py:*:Batch": "what a device needs of a step: one array a line",
        "llama2rt/generate/session.py:*:Statistics": "a record: one named number a line",
        "llama2rt/rollout/*Response": "a record: one named field a line",
        "llama2rt/rollout/responses.py:Response.from_json:cls": "the same",
        "llama2rt/quickstart/tasks.py:*:Task": "a task: its wordings and its answer, one a line",
    },
}


class Size(NamedTuple):
    name: str
    """file, file:function or file:function:callee; the function is empty at module level"""
    size: int
    line: int


def in_source(source: str, file: str) -> dict[str, list[Size]]:
    """Sizes of a file, its functions and its calls."""
    sizes: dict[str, list[Size]] = {
        "file": [Size(file, len(source.splitlines()), 1)],
        "function": [],
        "call": [],
    }

    def visit(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = names
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = (*names, child.name)
                if not isinstance(child, ast.ClassDef):
                    assert child.end_lineno is not None
                    lines = child.end_lineno - child.lineno + 1
                    name = f"{file}:{'.'.join(inner)}"
                    sizes["function"].append(Size(name, lines, child.lineno))
            elif isinstance(child, ast.Call):
                name = f"{file}:{'.'.join(names)}:{ast.unparse(child.func)}"
                sizes["call"].append(
                    Size(name, len(child.args) + len(child.keywords), child.lineno)
                )
            visit(child, inner)

    visit(ast.parse(source), ())
    return sizes


def sizes_of(kind: str) -> list[Size]:
    """Of the whole library, largest first."""
    files = [
        path
        for folder in ("llama2rt", "kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        # llama2rt/kernels is a link to kernels.
        if not (folder == "llama2rt" and path.relative_to(ROOT / folder).parts[0] == "kernels")
        and not (folder == "kernels" and kind == "file")
    ]
    every = [
        size
        for path in files
        for size in in_source(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())[
            kind
        ]
    ]
    assert len(every) > 100, f"{len(every)} of a {kind}: the library was not found"
    return sorted(every, key=lambda size: (-size.size, size.name))


@pytest.mark.parametrize("kind", MOST)
def test_nothing_grows_beyond_what_a_reader_takes_in(kind: str) -> None:
    sizes = sizes_of(kind)
    print(f"\nlargest {kind}s, at most {MOST[kind]} {UNITS[kind]}:")
    for size in sizes[:5]:
        print(f"  {size.size:4d}  {size.name} (line {size.line})")
    large = [size for size in sizes if size.size > MOST[kind]]
    allowed = EXCEPTIONS.get(kind, {})
    wrong = [
        f"{size.name}, line {size.line}: {size.size} {UNITS[kind]}"
        for size in large
        if not any(fnmatchcase(size.name, pattern) for pattern in allowed)
    ]
    stale = [
        f"{pattern!r}: an exception that no {kind} needs any more"
        for pattern in allowed
        if not any(fnmatchcase(size.name, pattern) for size in large)
    ]
    assert not wrong + stale, "\n".join([f"at most {MOST[kind]} {UNITS[kind]}:", *wrong, *stale])


def test_counts_what_it_says() -> None:
    source = '''
class Thing:
    @property
    def outer(self):
        """Counted."""
        def inner():
            return f(1, *rest, key=2, **more)
        return inner

g[0](lambda: h(1,
               2))
'''
    sizes = in_source(source, "a.py")
    assert sizes["file"] == [("a.py", 11, 1)]
    assert sizes["function"] == [("a.py:Thing.outer", 5, 4), ("a.py:Thing.outer.inner", 2, 6)]
    assert sizes["call"] == [
        ("a.py:Thing.outer.inner:f", 4, 7),
        ("a.py::g[0]", 1, 10),
        ("a.py::h", 2, 10),
    ]
