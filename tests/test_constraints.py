"""constraints.txt, from which `make test` installs, names every package that it installs.

One left out would be the newest at each installation, and somebody else's release could turn the
tests red. Versions are not compared: `make test LATEST=1` runs with others on purpose.
"""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging.requirements", reason="packaging is not installed")

ROOT = Path(__file__).resolve().parent.parent
MAKE = ("pip", "cmake", "ninja", "scikit-build-core", "pybind11")  # named in the Makefile
LINE = re.compile(r"([a-z0-9-]+)==[0-9][0-9a-z.]*( ; .+)?")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def named(text: str) -> set[str]:
    """Packages of a constraints file; AssertionError for a line that is not NAME==VERSION."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = [(line, LINE.fullmatch(line)) for line in lines]
    assert [line for line, match in found if not match] == []
    return {match[1] for _, match in found if match}


def closure(wanted: list[str]) -> set[str]:
    """Names of these requirements and, as far as they are installed, of all that they require."""
    seen: set[tuple[str, str]] = set()
    open_ = [(packaging.Requirement(text), {""}) for text in wanted]
    while open_:
        requirement, extras = open_.pop()
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            continue
        name = canonical(requirement.name)
        asked = {"", *requirement.extras}
        if all((name, extra) in seen for extra in asked):
            continue
        seen |= {(name, extra) for extra in asked}
        try:
            further = requires(name) or []
        except PackageNotFoundError:
            continue
        open_ += [(packaging.Requirement(text), asked) for text in further]
    return {name for name, _ in seen}


def wanted() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    return [
        *project["project"]["dependencies"],
        *(text for extra in ("test", "bench", "data") for text in extras[extra]),
        *project["build-system"]["requires"],
        *MAKE,
    ]


def test_every_package_of_the_tests_is_named():
    lacking = closure(wanted()) - named((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    # A build of torch for CUDA brings libraries of its own, and triton; neither is installed by it.
    assert {name for name in lacking if not name.startswith(("nvidia-", "cuda-"))} == set()


def test_what_is_left_out_is_found():
    """Of requirements of requirements too; and a line that is not exact."""
    found = closure(["pytest", "rich>=1; python_version < '3'"])
    assert {"pytest", "pluggy", "iniconfig"} <= found and "rich" not in found
    assert named("# a comment\nrich==15.0.0\ntriton==3.6.0 ; sys_platform == 'linux'\n") == {
        "rich",
        "triton",
    }
    with pytest.raises(AssertionError, match="rich>=15"):
        named("rich>=15\n")
