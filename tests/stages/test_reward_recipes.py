"""The shipped reward recipes on the files they name (their first lines, a smaller model)."""

import gzip
import json
import tomllib
from pathlib import Path

import pytest

import llama2rt
from llama2rt.stages import reward

RECIPES = Path(llama2rt.__file__).parent / "recipes"


@pytest.mark.parametrize(
    "name, file, lines",
    [
        ("reward-gsm8k", "gsm8k_model_solutions.jsonl", slice(0, 40)),
        # Line 668 is the first transcript that is no dialogue.
        ("reward-hh", "hh_harmless_base_test.jsonl.gz", slice(640, 700)),
    ],
)
def test_recipe_runs_on_its_real_data(shared_data, tmp_path, name, file, lines):
    given = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    assert [Path(path).name for path in given["data"]] == [file]
    source = shared_data(file)
    with (gzip.open if source.suffix == ".gz" else open)(source, "rt") as stream:
        (tmp_path / "data.jsonl").write_text("".join(list(stream)[lines]))
    given |= {
        "data": [tmp_path / "data.jsonl"],
        "tokenizer": shared_data("llama_tokenizer.model"),
        "model": {"dim": 16, "layers": 1, "heads": 2},
        "held_out": 10,
    }
    reward.run(reward.RewardRecipe(**given), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["accuracy"]) == {"unrated", "average"}
    assert report["trained_on"] > 20
