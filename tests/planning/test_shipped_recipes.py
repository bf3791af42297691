"""Every shipped recipe of a preset is valid, and its mesh divides its model and fits its GPU."""

import re
from pathlib import Path

import pytest

import llama2rt
from llama2rt import cli
from llama2rt.corpus.recipe import CorpusRecipe
from llama2rt.model import LlamaConfig
from llama2rt.pipeline import dry_run
from llama2rt.planning import Options, Plan
from llama2rt.stages import STAGES

NAME = re.compile(r"(llama2-\d+b)-([a-z]+?)(-node)?")
FOUND = sorted(
    path.stem for path in (Path(llama2rt.__file__).parent / "recipes").glob("llama2-*.toml")
)


def planned(name: str, gpu: str = "a100-80gb", assumed: str | None = None) -> Plan:
    parts = NAME.fullmatch(name)
    assert parts, name
    preset, stage, _ = parts.groups()
    recipe = STAGES[stage].recipe.model_validate(cli.read_recipe(cli.find_recipe(name)))
    return dry_run.stage(stage, recipe, Options(gpu=gpu), assumed or preset)


@pytest.mark.parametrize("name", FOUND)
def test_it_fits_its_gpus(name):
    text = cli.find_recipe(name).read_text()
    plan = planned(name)
    assert plan.fits, plan.memory
    assert plan.ranks % 8 == 0 and plan.degrees["tensor"] in (1, 8)  # inside a node
    assert f"on {plan.ranks} A100 of 80 GB: " in text
    verb, preset = NAME.fullmatch(name)[2], NAME.fullmatch(name)[1]
    assert f"llama2rt {verb} {name} --dry-run --assume {preset}\n" in text
    assert plan.trainable >= LlamaConfig.preset(preset).parameters * 0.9
    assert plan.step_seconds is not None and plan.step_seconds.value > 0


def test_every_size_has_every_stage():
    sizes, stages = (
        ("7b", "13b", "34b", "70b"),
        ["pretrain", "sft", "reward", "rejection", "ppo", "dpo"],
    )
    wanted = {f"llama2-{size}-{stage}" for size in sizes for stage in stages}
    assert wanted <= set(FOUND)


def test_from_34b_on_no_gpu_samples_alone():
    """Before anything is trained, on any mesh: policy and reward model are whole on every rank."""
    for size in ("34b", "70b"):
        for gpu in ("a100-80gb", "h100", "h200"):
            plan = planned("llama2-7b-dpo", gpu, f"llama2-{size}")
            assert sum(plan.memory["sampling"].values()) > plan.usable_bytes


def test_eight_gpus_sample_from_70b():
    """17.2 GB of weights and an eighth of the keys and values on each."""
    plan = planned("llama2-70b-rejection")
    sampling = plan.memory["sampling"]
    assert sampling["weights"] == pytest.approx(2 * 68_976_648_192 / 8, rel=1e-3)
    assert sampling["frozen"] == pytest.approx(2 * 2 * 68.7e9 / plan.ranks, rel=1e-2)
    assert sampling["kv_cache"] > 8 * 2**30


@pytest.mark.parametrize("size", ["7b", "13b", "34b", "70b"])
@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_frozen_models_that_stay_do_not_fit(size, stage, monkeypatch):
    read = cli.read_recipe
    monkeypatch.setattr(cli, "read_recipe", lambda path: {**read(path), "frozen": "resident"})
    assert not planned(f"llama2-{size}-{stage}").fits


def test_the_papers_values():
    """Llama 2, sections 2.2, 3.1, 3.2.2 and 3.2.3; by size where the paper tells them apart."""
    rates = {"pretrain": (3e-4, 3e-4, 1.5e-4, 1.5e-4), "reward": (1e-5, 1e-5, 1e-5, 5e-6)}
    betas = (0.01, 0.01, 0.005, 0.005)
    for i, size in enumerate(("7b", "13b", "34b", "70b")):
        read = {
            stage: STAGES[stage].recipe.model_validate(
                cli.read_recipe(cli.find_recipe(f"llama2-{size}-{stage}"))
            )
            for stage in ("pretrain", "sft", "reward", "rejection", "ppo", "dpo")
        }
        for stage, values in rates.items():
            assert read[stage].train.lr == values[i]
        assert read["pretrain"].batch_tokens * read["pretrain"].steps == pytest.approx(
            2e12, rel=1e-5
        )
        assert (read["sft"].batch_size, read["sft"].epochs, read["sft"].train.lr) == (64, 2, 2e-5)
        assert (read["reward"].batch_size, read["reward"].epochs) == (512, 1)
        rejection, dpo, ppo = (read[stage] for stage in ("rejection", "dpo", "ppo"))
        assert (rejection.batch_size, rejection.epochs, rejection.train.lr) == (64, 2, 2e-5)
        # arXiv 2405.07863, algorithm 1 and its appendix.
        assert (dpo.batch_size, dpo.samples, dpo.beta, dpo.train.lr) == (128, 8, 0.1, 5e-7)
        assert (ppo.batch_size, ppo.mini_batch_size, ppo.train.lr, ppo.beta) == (
            512,
            64,
            1e-6,
            betas[i],
        )
        assert ppo.train.schedule == "constant"


def test_gpu_hours_are_the_papers_order():
    """Table 2, whose runs were on such GPUs: 184,320 to 1,720,320 hours. Tuned steps alone, without
    restarts and evaluation, take less, and not half of it."""
    paper = {"7b": 184320, "13b": 368640, "34b": 1038336, "70b": 1720320}
    for size, hours in paper.items():
        plan = planned(f"llama2-{size}-pretrain")
        assert plan.gpu_hours is not None
        assert 0.5 * hours < plan.gpu_hours.value < hours


def test_one_that_does_not_fit_says_so(capsys):
    name = "llama2-13b-pretrain"
    plan = dry_run.DryRun(True, gpu="a100-40gb", assume="llama2-13b")
    recipe = STAGES["pretrain"].recipe.model_validate(cli.read_recipe(cli.find_recipe(name)))
    lines, values = plan.say("pretrain", recipe, Path("OUT"))
    assert values["fits"] is False and any("DOES NOT FIT" in line for line in lines)


@pytest.mark.parametrize("size", ["7b", "13b", "33b", "65b"])
def test_llama_1_fits_its_gpus_and_has_its_papers_mix(size):
    """arXiv 2302.13971, Tables 1 and 2."""
    name = f"llama1-{size}-pretrain"
    recipe = STAGES["pretrain"].recipe.model_validate(cli.read_recipe(cli.find_recipe(name)))
    plan = dry_run.stage("pretrain", recipe, Options(gpu="a100-80gb"), f"llama1-{size}")
    assert plan.fits, plan.memory
    assert f"on {plan.ranks} A100 of 80 GB: " in cli.find_recipe(name).read_text()
    weights = [source.weight for source in recipe.sources]
    assert weights == [0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02]
    tokens = recipe.steps * recipe.batch_tokens
    assert tokens == pytest.approx(1.0e12 if size in ("7b", "13b") else 1.4e12, rel=1e-5)


def test_the_corpus_recipe_makes_what_pretraining_reads():
    recipe = CorpusRecipe.model_validate(cli.read_recipe(cli.find_recipe("llama1-corpus")))
    made = [f"runs/corpus/tokens/{recipe.name(i)}" for i in range(len(recipe.sources))]
    for name in ("llama1-7b-pretrain", "llama2-70b-pretrain"):
        read = cli.read_recipe(cli.find_recipe(name))["sources"]
        assert [source["path"] for source in read] == made
