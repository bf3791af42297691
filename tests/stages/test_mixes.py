"""Mixes by shares and filters in recipes: what goes in, what is kept of it, what is refused."""

import json
import logging
from collections import Counter
from pathlib import Path

import pocket as problem
import pytest
from pydantic import ValidationError

import llama2rt
from llama2rt import cli
from llama2rt.data.mixture import Account
from llama2rt.data.readers import write
from llama2rt.data.records import Comparison, Prompt
from llama2rt.errors import InputError
from llama2rt.stages import STAGES, comparisons, dpo, loading, reward

MIXES = ("helpfulness-mix", "safety-mix", "mix-1", "mix-2")


def pairs(source, count, **changes):
    return [
        Comparison(
            [{"role": "user", "content": f"{source} {i}"}], "yes", "no", source=source, **changes
        )
        for i in range(count)
    ]


def mixed(tmp_path, tables, **changes):
    """A reward recipe of [[sources]] tables over files of the given comparisons."""
    sources = []
    for i, (records, said) in enumerate(tables):
        path = tmp_path / f"source-{i}.jsonl"
        write(path, records)
        sources.append({"path": path, **said})
    return reward.RewardRecipe(**{"init": "m", "held_out": 0, "sources": sources, **changes})


def test_the_papers_helpfulness_mix(tmp_path):
    """All of the own comparisons, and as many drawn uniformly from all others together."""
    pool = {"pool": "remaining", "share": 0.5}
    recipe = mixed(
        tmp_path,
        [
            (pairs("own", 300), {}),
            (pairs("safety", 100, kind="safety"), pool),
            (pairs("open", 900), pool),
        ],
        held_out=20,
    )
    account = Account()
    training, held_out, left_out = comparisons.split(recipe, account=account)
    counts = Counter(c.source for c in training)
    assert counts["own"] == 280 == counts["safety"] + counts["open"]
    assert 10 < counts["safety"] < 46  # a tenth of 280, four standard deviations
    assert Counter(c.source for c in held_out) == {"own": 20} and not left_out
    account.use(training)
    rows = account.report()["composition"]
    assert [row["used"] for row in rows] == [280, counts["safety"], counts["open"]]
    assert rows[0]["left_out"] == {"held out": 20}
    assert rows[1]["left_out"] == {"not drawn": 100 - counts["safety"]}
    again, _, _ = comparisons.split(recipe)
    other, _, _ = comparisons.split(recipe.model_copy(update={"seed": 1}))
    assert again == training != other


def test_a_share_that_cannot_be_filled_is_refused(tmp_path):
    recipe = mixed(tmp_path, [(pairs("own", 90), {}), (pairs("few", 30), {"share": 0.5})])
    with pytest.raises(
        InputError, match=r"source-1\.jsonl holds 30 records, and a share of 0\.5 n"
    ):
        comparisons.split(recipe)


def test_where_every_source_has_a_share_all_are_measured(tmp_path):
    tables = [(pairs("a", 100), {"share": 0.75}), (pairs("b", 100), {"share": 0.25})]
    recipe = mixed(tmp_path, tables, held_out=10)
    training, held_out, _ = comparisons.split(recipe)
    assert Counter(c.source for c in training) == {"a": 90, "b": 30}
    assert Counter(c.source for c in held_out) == {"a": 10, "b": 10}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": ["a"]}, "give data, or sources in its place"),
        ({"sources": []}, "give data, or sources in its place"),
        ({"mixed_in": ["a"]}, "mixed_in: sources say what is mixed in"),
        ({"sources": [{"path": "a", "kind": "safety"}]}, "declared safety, .* give it a share"),
        ({"sources": ["a", {"path": "b", "share": 1.0}]}, "leave nothing to the other sources"),
        ({"sources": [{"path": "a", "held_out": 1}], "validation": ["v"]}, "held_out of a: only"),
    ],
)
def test_what_a_recipe_cannot_mean(changes, reason):
    given = {"init": "m", "sources": ["x"], **changes}
    with pytest.raises(ValidationError, match=reason):
        reward.RewardRecipe(**given)


def test_a_run_keeps_what_went_in(pocket, tmp_path, caplog, capsys):
    """In its manifest from the start, in its report, and in its log; a dry run says the same."""
    caplog.set_level(logging.INFO)
    own = problem.comparisons("helpfulness", problem.TRAINING, seed=5)
    other = problem.comparisons("safety", problem.TRAINING, seed=6)
    long = Comparison(problem.messages("helpfulness", "baba " * 60), "yes", "no")
    recipe = mixed(
        tmp_path,
        [(own + own[:7] + [long], {}), (other, {"share": 0.2})],
        init=pocket.sft,
        held_out=10,
        batch_size=64,
        filters={"duplicates": True},
        train={"lr": 1e-3, "checkpoint_every": 0},
    )
    inputs = reward.open_inputs(recipe)
    notes = STAGES["reward"].plan(recipe, inputs, lambda folder: inputs.result.config).notes
    reward.run(recipe, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    first, second = manifest["composition"]
    assert first["read"] == len(own) + 8
    assert first["left_out"]["filtered"] == len(own) - len({repr(c) for c in own}) + 8
    assert second["used"] == round(first["used"] / 4)
    assert second["read"] == second["used"] + sum(second["left_out"].values())
    assert first["used"] + second["used"] == manifest["summary"]["trained_on"] == len(inputs.pairs)
    filters = manifest["filters"]
    assert filters["longest"]["removed"] == 1  # the context's: it must go before a share is drawn
    assert filters["longest"]["examples"][0].startswith(f"{tmp_path / 'source-0.jsonl'}:")
    assert filters["duplicates"]["removed"] >= 7
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["composition"] == manifest["composition"] and report["filters"] == filters
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Records by source" in page and filters["duplicates"]["examples"][0] in page
    for note in notes:
        assert note in caplog.messages
    assert notes[0].startswith("sources.0: ")
    # A resumed run finds it there.
    assert reward.run(recipe, tmp_path / "run", resume=True) == tmp_path / "run" / "model"


def test_filters_of_a_reward_recipe(tmp_path):
    """Across files; a comparison of validation stays before the same one to train on."""
    write(tmp_path / "validation.jsonl", pairs("v", 5))
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps(c.to_json()) + "\n" for c in pairs("a", 20) + pairs("v", 5))
        + '{"prompt": "u", "chosen": " ", "rejected": "no"}\n'
    )
    write(tmp_path / "mixed.jsonl", pairs("b", 30) + pairs("a", 10))
    recipe = reward.RewardRecipe(
        init="m",
        data=[tmp_path / "data.jsonl"],
        mixed_in=[tmp_path / "mixed.jsonl"],
        validation=[tmp_path / "validation.jsonl"],
        filters={"duplicates": True, "empty_turns": True},
    )
    account = Account()
    training, held_out, left_out = comparisons.split(recipe, account=account)
    assert Counter(c.source for c in training) == {"a": 20, "b": 20}
    assert len(held_out) == 5 and not left_out
    assert account.removed.counts == {"duplicates": 15, "empty_turns": 1}
    account.use(training)
    first, second = account.report()["composition"]
    assert (first["read"], first["left_out"]) == (26, {"filtered": 6})
    assert second["left_out"] == {"filtered": 10, "not drawn": 10}
    with pytest.raises(InputError, match="filters: leave nothing to train on"):
        write(tmp_path / "data.jsonl", pairs("a", 5, rating="negligibly_better"))
        comparisons.split(recipe.model_copy(update={
            "mixed_in": [], "filters": recipe.filters.model_copy(update={"least_rating": "better"}),
        }))  # fmt: skip


def prompts(name, count):
    return [
        Prompt(f"{name}-{i}", problem.messages("helpfulness", f"{name}{i}")) for i in range(count)
    ]


def test_prompts_are_mixed_too(pocket, tmp_path, capsys):
    write(tmp_path / "a.jsonl", prompts("ba", 30))
    write(tmp_path / "b.jsonl", prompts("lu", 40) + prompts("ba", 1)[:0])
    sources = [
        {"path": tmp_path / "a.jsonl"},
        {"path": tmp_path / "b.jsonl", "share": 0.25, "kind": "helpfulness"},
    ]
    given = {"init": pocket.sft, "rewards": {"helpfulness": pocket.helpfulness}}
    given |= {"sampling": {"max_tokens": 8}}
    recipe = dpo.DpoRecipe(**given, sources=sources)
    inputs = dpo.open_inputs(recipe)
    assert Counter(p.id[:2] for p in inputs.prompts) == {"ba": 30, "lu": 10}
    assert dpo.open_inputs(recipe).prompts == inputs.prompts
    work = dpo.plan(recipe, inputs, lambda folder: loading.outline(folder).config)
    assert [note for note in work.notes if note.startswith("sources")] == [
        f"sources.0: 30 of 30 records of {tmp_path / 'a.jsonl'}, 75.0% of what is trained on",
        f"sources.1: 10 of 40 records of {tmp_path / 'b.jsonl'}, 25.0% of what is trained on "
        "(30 not drawn)",
    ]
    whole = dpo.DpoRecipe(**given, data=[tmp_path / "a.jsonl"])
    assert dpo.open_inputs(whole).prompts == prompts("ba", 30)
    with pytest.raises(ValidationError, match="give data, or sources in its place"):
        dpo.DpoRecipe(**given)
    with pytest.raises(ValidationError, match=r"filters\.small_margin: means nothing to prompts"):
        dpo.DpoRecipe(**given, sources=sources, filters={"small_margin": 1})
    sources[1]["share"] = 0.9
    with pytest.raises(
        InputError, match=r"b\.jsonl holds 40 records, and a share of 0\.9 needs 270"
    ):
        dpo.open_inputs(dpo.DpoRecipe(**given, sources=sources))


@pytest.mark.parametrize("name", MIXES)
def test_shipped_mixes_are_valid_and_a_dry_run_shows_them(name, capsys):
    path = Path(llama2rt.__file__).parent / "recipes" / f"{name}.toml"
    recipe = reward.RewardRecipe.model_validate(cli.read_recipe(path))
    for source in recipe.sources:
        source.require_meaning("comparison")  # a format that there is
    preset = "llama3-8b" if name.startswith("mix") else "llama2-7b"
    command = f"reward {name} --dry-run --assume {preset}"
    assert f"llama2rt {command}\n" in path.read_text()
    cli.main([*command.split(), "--json"])
    notes = json.loads(capsys.readouterr().out)["notes"]
    for index, source in enumerate(recipe.sources):
        assert any(
            note.startswith(f"sources.{index}: ") and note.endswith(str(source)) for note in notes
        )
    names = {source.path.name.split(".")[0] for source in recipe.sources}
    small = {"hh-rlhf", "shp", "ultrafeedback", "summarize-from-feedback"}
    if name == "mix-1":
        assert names == small
    if name == "mix-2":
        more = {"helpsteer", "pku-saferlhf", "ultrainteract"}
        assert names == small | more | {"distilabel-capybara", "distilabel-orca"}
    whole = {s.path.name.split(".")[0] for s in recipe.sources if s.share is None}
    if name == "helpfulness-mix":
        assert (whole, {s.share for s in recipe.sources}) == ({"helpfulness"}, {None, 0.5})
    if name == "safety-mix":
        assert (whole, {s.share for s in recipe.sources}) == (
            {"safety", "hh-harmless"},
            {None, 0.1},
        )
        assert {s.kind for s in recipe.sources if s.share} == {"helpfulness"}


def test_sources_are_an_option_and_a_table(tmp_path):
    table = f'{{path={json.dumps(str(tmp_path / "b"))}, share=0.1, pool="p"}}'
    found = cli._stage_options(
        "reward",
        reward.RewardRecipe,
        "x.toml",
        {"init": "m"},
        ["--out", "o", "--sources", "a.jsonl", table, "--filters.near-duplicates", "0.9"],
    ).recipe
    assert [str(source) for source in found.sources] == ["a.jsonl", str(tmp_path / "b")]
    assert (found.sources[1].share, found.sources[1].pool) == (0.1, "p")
    assert found.filters.near_duplicates == 0.9
