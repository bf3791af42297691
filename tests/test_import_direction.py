"""The rule: imports point strictly downward.

Read from the sources, not from what happens to be loaded, so that an import hidden in a function
counts too. Three light-weight promises are proven in a fresh interpreter: `import llama2rt` loads
no torch, `ops` and `model` load neither pydantic nor tyro, and what runs a stage loads nothing that
only several processes need.
"""

import ast
from pathlib import Path

import pytest
from processes import run_python

import llama2rt

PACKAGE = Path(llama2rt.__file__).parent

# Top to bottom; packages on one line are neighbours and do not import each other.
LEVELS = [
    {"cli"},
    {"prepare"},
    {"quickstart"},
    {"pipeline"},
    {"stages", "people", "corpus"},
    {"annotate", "serve", "report", "evaluate", "planning"},
    {"rollout"},
    {"generate", "train"},
    {"run"},
    {"parallel"},
    {"checkpoint", "data"},
    {"text", "model"},
    {"algorithms", "ops"},
    {"kernels", "_cpu", "_cuda"},
]
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}
# Read by every package, importing none: the error type, atomic files, the energy meter, free
# memory, the shipped recipes (data).
EVERYONE = {"errors", "atomic", "energy", "memory", "recipes", "__version__", "version"}
# Front doors: they may look at anything.
UNBOUND = {"__init__", "__main__", "doctor"}
# The cluster models know the shape of a model and nothing else; reports read them (carbon). What
# puts ops into other libraries' models knows the ops alone, and no package knows it.
ONLY = {"cluster": {"cluster", "model"}, "integrations": {"integrations", "ops"}}


def packages_imported_by(source: str, module: str) -> set[str]:
    """Packages of llama2rt that `source`, the text of `module` (dotted, absolute), imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            names = [f"{base}.{a.name}" for a in node.names] if base == "llama2rt" else [base]
        for name in names:
            parts = name.split(".")
            if parts[0] == "llama2rt" and len(parts) > 1:
                found.add(parts[1])
    return found


def violation(importer: str, imported: str) -> bool:
    """Whether package `importer` may not import package `imported`."""
    if importer in UNBOUND or imported in EVERYONE or importer == imported:
        return False
    if importer in ONLY:
        return imported not in ONLY[importer]
    if importer in EVERYONE:
        return True
    if imported == "cluster":
        return LEVEL_OF[importer] > LEVEL_OF["report"]
    return imported not in LEVEL_OF or LEVEL_OF[imported] <= LEVEL_OF[importer]


def modules() -> list[Path]:
    # In a source tree llama2rt/kernels is a link, which rglob does not follow.
    return sorted({*PACKAGE.rglob("*.py"), *PACKAGE.glob("kernels/*.py")})


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    package = relative.parts[0].removesuffix(".py")
    # An __init__ counts as a module inside its package: relative imports start there.
    module = ".".join(["llama2rt", *relative.with_suffix("").parts])
    wrong = {
        imported
        for imported in packages_imported_by(path.read_text(encoding="utf-8"), module)
        if violation(package, imported)
    }
    assert not wrong, f"{relative} imports {sorted(wrong)}, which lie above or beside {package}"


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("import llama2rt.train.loop", "llama2rt.ops.cpu", {"train"}),
        ("from llama2rt import model, ops", "llama2rt.cli", {"model", "ops"}),
        ("from ..text import chat", "llama2rt.data.packing", {"text"}),
        ("from . import reference", "llama2rt.ops.cpu", {"ops"}),
        ("def f():\n    from llama2rt.stages import ppo", "llama2rt.model.llama", {"stages"}),
    ],
)
def test_every_form_of_import_is_seen(source: str, module: str, expected: set[str]) -> None:
    assert packages_imported_by(source, module) == expected


def test_the_rule_refuses_upward_and_sideways_imports() -> None:
    assert violation("ops", "model") and violation("text", "model") and violation("errors", "ops")
    assert violation("cluster", "train") and violation("report", "evaluate")
    assert violation("rollout", "annotate") and violation("evaluate", "annotate")
    assert violation("stages", "pipeline") and violation("pipeline", "quickstart")
    assert violation("integrations", "model") and violation("stages", "integrations")
    assert not violation("stages", "ops") and not violation("cluster", "model")
    assert not violation("integrations", "ops")


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import llama2rt", ["torch", "numpy", "pydantic", "tyro", "transformers"]),
        # What --help lists, it says before anything heavy is loaded.
        ("import llama2rt.cli, llama2rt.stages", ["torch", "pydantic", "tyro", "fastapi"]),
        # A page without models, which is there again at once after a crash.
        ("import llama2rt.people.commands, llama2rt.people.app", ["torch", "transformers"]),
        ("import llama2rt.ops, llama2rt.model", ["pydantic", "tyro", "transformers"]),
        # Seconds, which one process need not wait for.
        (
            "import llama2rt.pipeline.run, llama2rt.quickstart.job\n"
            "[stage.module for stage in llama2rt.stages.STAGES.values()]",
            [
                "torch.distributed.tensor",
                "torch.distributed.fsdp",
                "torch.distributed.pipelining",
                "torch.distributed.checkpoint",
                "torch._dynamo",
            ],
        ),
    ],
)
def test_light_imports_stay_light(statement: str, forbidden: list[str]) -> None:
    program = f"import sys\n{statement}\nprint([m for m in {forbidden} if m in sys.modules])"
    assert run_python("-c", program).stdout.strip() == "[]"
