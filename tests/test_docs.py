"""Every link in README and docs leads somewhere: files, and headings inside them. So does every
path of a source, test or record that they name between backticks; and every recipe shown is one.

Addresses on the web are not fetched (the suite needs no network); they must only be well formed.
"""

import importlib
import re
import tomllib
from pathlib import Path
from typing import get_type_hints
from urllib.parse import urlparse

import pytest

from llama2rt import cli
from llama2rt.pipeline.plan import resolve

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)

# A path from the root, to a file whose name is not a placeholder in capitals.
NAMED = re.compile(
    r"`((?:benchmarks|csrc|docs|examples|kernels|llama2rt|tests)/[\w./-]*?[a-z_]\w*\.\w+)"
)


def anchors(page: Path) -> set[str]:
    """Heading anchors of a Markdown page, spelled as code hosts spell them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+\s+(.*?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken(page: Path) -> list[str]:
    """The links of `page` that lead nowhere."""
    wrong = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http:", "https:", "mailto:")):
            if not urlparse(link).netloc and not link.startswith("mailto:"):
                wrong.append(link)
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = target.exists() and target.is_relative_to(ROOT)
        if not inside or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


def missing(page: Path) -> list[str]:
    """The files that `page` names and that do not exist."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [name for name in NAMED.findall(text) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    assert missing(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    fake = tmp_path / "page.md"
    fake.write_text("[a](missing.md) [b](#nowhere) [c](http:x)\n# Here\n[d](#here)")
    assert broken(fake) == ["missing.md", "#nowhere", "http:x"]


def test_a_file_that_is_gone_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    fake = tmp_path / "page.md"
    fake.write_text("`tests/gone.py` and `tests/a/gone.py::test_x`, not `csrc/NAME.cu` or `a.py`")
    assert missing(fake) == ["tests/gone.py", "tests/a/gone.py"]


RECIPES = re.findall(
    r"```toml\n(# llama2rt ([\w-]+) \S+ --out \S+\n.*?)```",
    "".join(page.read_text(encoding="utf-8") for page in PAGES),
    re.DOTALL,
)


@pytest.mark.parametrize("text, verb", RECIPES, ids=[verb for _, verb in RECIPES])
def test_recipes_in_the_pages_are_valid(text: str, verb: str) -> None:
    module = importlib.import_module(f"llama2rt.{cli.with_recipe()[verb][0]}")
    recipe = get_type_hints(module.run)["recipe"].model_validate(tomllib.loads(text))
    if verb == "iterate":
        assert resolve(module.Plan(recipe).steps(), Path("runs"))


def test_the_pages_show_recipes() -> None:
    assert {verb for _, verb in RECIPES} >= {"ppo", "annotate", "iterate"}
