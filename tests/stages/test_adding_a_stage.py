"""A new stage is one module and one line: the diff in docs/architecture.md is applied, and the
command line, plans and reports know the stage."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama2rt import cli, stages
from llama2rt.checkpoint import load, native
from llama2rt.errors import InputError
from llama2rt.model import Llama
from llama2rt.pipeline import iterate
from llama2rt.stages import STAGES, Stage, loading

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
REGISTRY = "llama2rt/stages/__init__.py"


def diff() -> str:
    """The one in the page."""
    (found,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return found


def added(file: str) -> str:
    """The lines that the page's diff adds to `file`."""
    part = diff().split(f"+++ b/{file}\n")[1].split("\n--- ")[0]
    return "".join(f"{line[1:]}\n" for line in part.splitlines() if line.startswith("+"))


@pytest.fixture
def average(tmp_path, monkeypatch):
    """The stage of the page, as if its module lay among the others."""
    folder = tmp_path / "package" / "stages"
    folder.mkdir(parents=True)
    (folder / "average.py").write_text(added("llama2rt/stages/average.py"))
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(folder)])
    monkeypatch.setattr(cli, "_PACKAGE", folder.parent)  # where verbs' modules are looked for
    (stage,) = eval(f"[{added(REGISTRY)}]", {"Stage": Stage})
    monkeypatch.setitem(STAGES, stage.name, stage)
    yield stage
    monkeypatch.delattr(stages, "average", raising=False)
    sys.modules.pop("llama2rt.stages.average", None)


@pytest.fixture
def models(pocket, tmp_path):
    """Three models of one shape and tokenizer: the pocket policy and two with random weights."""
    model, tokenizer = loading.load_llama(pocket.sft)
    folders = [pocket.sft]
    for seed in (1, 2):
        folders.append(tmp_path / f"random-{seed}")
        native.save(Llama(model.config).initialize(seed), tokenizer, folders[-1])
    return folders


def test_the_diff_applies(tmp_path):
    copy = tmp_path / REGISTRY
    copy.parent.mkdir(parents=True)
    copy.write_bytes(Path(stages.__file__).read_bytes())
    patch = tmp_path / "average.diff"
    patch.write_text(diff())
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    assert 'Stage("average", ' in copy.read_text()
    assert (copy.parent / "average.py").read_text() == added("llama2rt/stages/average.py")


def test_the_command_line_knows_it(average, capsys):
    assert cli.with_recipe()["average"] == ("stages.average", average.help)
    assert re.search(rf"^  average +{average.help}$", cli.usage(cli.available()), re.MULTILINE)
    with pytest.raises(SystemExit) as end:
        cli.main(["average", "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert "Average the weights of several models." in said and "--models" in said


def test_it_runs_as_a_verb(average, models, tmp_path):
    recipe = tmp_path / "average.toml"
    recipe.write_text(f"models = {[str(folder) for folder in models]}\n")
    cli.main(["average", str(recipe), "--out", str(tmp_path / "run")])
    merged, _ = load(tmp_path / "run" / "model")
    weights = [dict(load(folder)[0].named_parameters()) for folder in models]
    for name, weight in merged.named_parameters():
        mean = torch.stack([own[name] for own in weights]).double().mean(0)
        torch.testing.assert_close(weight.double(), mean, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["models"] == 3
    cli.main(["average", str(recipe), "--out", str(tmp_path / "run"), "--resume"])


def test_it_is_a_step_of_a_plan(average, pocket, models, tmp_path):
    plan = {
        "sft": pocket.sft,
        "rewards": {"helpfulness": pocket.helpfulness},
        "data": [pocket.prompts],
        "validation": [pocket.validation],
        "sampling": {"max_tokens": 8},
        "steps": [
            {"name": "soup", "stage": "average", "models": ["@sft", str(models[1])]},
            {"name": "table", "stage": "evaluate", "versions": {"SFT": "@sft", "soup": "@soup"}},
        ],
    }
    iterate.run(iterate.IterateRecipe.model_validate(plan), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["name"] for row in report["versions"]] == ["SFT", "soup"]
    plan["steps"][0]["models"] = ["@sft", pocket.helpfulness]
    with pytest.raises(InputError, match=r"steps: soup: .*expected a language model"):
        iterate.run(iterate.IterateRecipe.model_validate(plan), tmp_path / "other")
