"""The command line: exit statuses, messages that name file and key, options over recipes."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
from processes import run_python

from llama2rt import cli
from llama2rt.errors import InputError

RECIPE = """
data = ["{text}"]
held_out = 0.1
vocab_size = 310
context = 32
batch_tokens = 256
steps = 4
[model]
dim = 32
layers = 1
heads = 2
[train]
lr = 1e-2
micro_tokens = 256
"""


def call(*arguments: str) -> int:
    """Exit status of the command, run inside this process."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
        raise SystemExit(0)
    return left.value.code


@pytest.fixture(autouse=True)
def _host(monkeypatch):
    # The command owns its process; inside the tests' it must leave allocator and warnings alone.
    import warnings

    import llama2rt.train.allocator

    monkeypatch.setattr(llama2rt.train.allocator, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def recipe(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} says {i * i} and no more than {i}\n" for i in range(200)))
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(text=text))
    return path


def test_help_lists_what_is_installed_and_is_quick(capsys):
    assert call("--help") == 0
    text = capsys.readouterr().out
    for word in ("pretrain", "sft", "check", "tinyshakespeare", "--resume", "Exit status"):
        assert word in text
    script = """
import sys
from llama2rt import cli
from llama2rt.errors import InputError
cli.usage(cli.available())
print("torch" in sys.modules)
"""
    assert run_python("-c", script).stdout == "False\n"


def test_verbs_without_their_module_are_absent(monkeypatch, tmp_path, capsys):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "sft.py").touch()
    monkeypatch.setattr(cli, "_PACKAGE", tmp_path)
    assert list(cli.available()) == ["sft"]
    assert call("pretrain") == 2
    assert "unknown verb 'pretrain': expected one of sft" in capsys.readouterr().err


def test_nothing_and_version(capsys):
    assert call() == 2
    assert call("--version") == 0
    assert "llama2rt " in capsys.readouterr().out


@pytest.mark.parametrize("verb", sorted(cli.available()))
def test_every_verb_has_help(verb, capsys):
    assert call(verb, "--help") == 0
    assert len(capsys.readouterr().out) > 200


def test_a_run_with_options_and_json(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        call("pretrain", recipe, "--out", out, "--train.lr", "2e-3", "--steps", "3", "--json") == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == str(out / "model")
    assert result["summary"]["bits_per_byte"] > 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["recipe"]["train"]["lr"], manifest["recipe"]["steps"]) == (2e-3, 3)
    # The resolved recipe is itself a recipe.
    assert call("pretrain", out / "recipe.toml", "--out", tmp_path / "again") == 0
    assert call("pretrain", recipe, "--out", out) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("stepz = 3", "stepz: no such key in this recipe"),
        ("[train]\nlr = -1", "train.lr: input should be greater than 0, got -1"),
        ("[train]\nlr = 'fast'", "train.lr: input should be a valid number"),
        ("[train]\nlrr = 1", "train.lrr: no such key in this recipe"),
        ("epochs = 3", "give exactly one of steps and epochs"),
        ("[train", "Expected ']'"),
    ],
)
def test_a_bad_recipe_names_file_and_key(recipe, tmp_path, capsys, extra, message):
    text = recipe.read_text()
    if extra.startswith("[train"):
        text = text[: text.index("[train]")] + extra
    else:
        text = extra + text
    recipe.write_text(text)
    assert call("pretrain", recipe, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "tiny.toml: " in error
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.lr", "-1"], "greater than 0"),
        (["--train.lrr", "1"], "--train.lrr"),
        (["--epochs", "3"], "give exactly one of steps and epochs"),
        (["--data", "absent.txt"], "absent.txt: cannot be read"),
    ],
)
def test_bad_options(recipe, tmp_path, capsys, arguments, message):
    assert call("pretrain", recipe, "--out", tmp_path / "run", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


@pytest.mark.parametrize("verb", ["rejection", "ppo", "dpo", "iterate"])
def test_more_tokens_than_can_be_counted_are_an_error(tmp_path, capsys, verb):
    path = tmp_path / "recipe.toml"
    names = {"rejection": ("policy", "init"), "iterate": ("sft",)}.get(verb, ("init",))
    models = "".join(f'{name} = "model"\n' for name in names)
    models += 'rewards.helpfulness = "model"\n'
    path.write_text(f'{models}data = ["prompts.jsonl"]\nvalidation = ["held-out.jsonl"]\n')
    for name in ("max_tokens", "max_sequences"):
        key = f"--sampling.{name.replace('_', '-')}"
        assert call(verb, path, "--out", tmp_path / "run", key, 3_000_000_000) == 2
        said = capsys.readouterr()
        assert f"{name}: expected at most 2147483647, got 3000000000" in said.err + said.out


PPO = """
init = "model"
data = ["prompts.jsonl"]
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("max_tokens = 9", "max_tokens: no such key in this recipe; did you mean sampling.max_tok"),
        ('safety = "s"', "safety: no such key in this recipe; did you mean rewards.safety?"),
        ("lr = 1e-3", "lr: no such key in this recipe; did you mean train.lr?"),
        ("[sampling]\nmax_tokenz = 9", "sampling.max_tokenz: no such key in this recipe"),
        ("[sampling]\nmax_tokens = 0", "sampling.max_tokens: input should be greater than 0, got"),
        ("[rewards]\nthreshold = 2", "rewards.threshold: input should be less than or equal to 1"),
    ],
)
def test_keys_of_tables_are_named_whole(tmp_path, capsys, line, said):
    path = tmp_path / "ppo.toml"
    path.write_text(PPO + line)
    given = ("--rewards.helpfulness", "r")
    assert call("ppo", path, "--out", tmp_path / "run", *given) == 2
    assert f"ppo.toml: {said}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def begun(monkeypatch):
    """The recipes with which PPO would have begun."""
    from llama2rt.stages import ppo

    recipes = []

    def run(recipe: ppo.PpoRecipe, directory, *, resume=False):
        recipes.append(recipe)
        raise InputError("far enough")

    monkeypatch.setattr(ppo, "run", run)
    return recipes


def test_tables_come_from_file_and_options_together(tmp_path, begun, capsys):
    """Whole, in part, or as options only; what neither names keeps the stage's default."""
    path = tmp_path / "ppo.toml"
    out = ("--out", tmp_path / "run")
    path.write_text(PPO)
    assert call("ppo", path, *out, "--rewards.helpfulness", "r", "--sampling.max-tokens", "9") == 2
    path.write_text(PPO + '[rewards]\nsafety = "s"\nthreshold = 0.3\n[sampling]\nmax_tokens = 7')
    assert call("ppo", path, *out, "--rewards.helpfulness", "r", "--rewards.threshold", "0.2") == 2
    assert "far enough" in capsys.readouterr().err
    alone, both = begun
    assert alone.rewards.model_dump(mode="json", exclude={"preference", "ranking"}) == {
        "helpfulness": "r", "safety": None, "threshold": 0.15
    }  # fmt: skip
    assert both.rewards.model_dump(mode="json", exclude_defaults=True) == {
        "helpfulness": "r", "safety": "s", "threshold": 0.2
    }  # fmt: skip
    assert (alone.sampling.max_tokens, both.sampling.max_tokens) == (9, 7)
    assert alone.train.schedule == "constant"  # PPO's own default for a table nobody names
    assert call("ppo", path, *out) == 2
    said = capsys.readouterr()
    assert "rewards.helpfulness" in said.err + said.out


def test_a_table_that_no_option_completes_is_said_with_its_file(tmp_path, capsys):
    path = tmp_path / "ppo.toml"
    path.write_text(PPO + "[rewards]\nthreshold = 0.2")
    assert call("ppo", path, "--out", tmp_path / "run", "--sampling.max-tokens", "9") == 2
    assert "ppo.toml: rewards: give rewards.helpfulness" in capsys.readouterr().err


def test_a_warmup_longer_than_the_run_is_said(recipe, tmp_path, caplog):
    assert call("pretrain", recipe, "--out", tmp_path / "run", "--train.warmup-steps", "9") == 0
    assert "the warm-up of 9 steps is longer than the run of 4" in caplog.text


def test_what_ranks_log(monkeypatch):
    from torch.distributed.tensor import _redistribute

    ours, others = logging.getLogger("llama2rt"), _redistribute.logger
    before = warnings.showwarning, ours.level, others.level
    try:
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            cli._listen()
            assert ours.isEnabledFor(logging.WARNING) == (rank == "0")
            assert not others.isEnabledFor(logging.WARNING)
    finally:
        warnings.showwarning = before[0]
        ours.setLevel(before[1])
        others.setLevel(before[2])


def test_a_wrong_option_is_said_without_addresses(recipe, tmp_path):
    command = [sys.executable, "-P", "-m", "llama2rt.cli", "pretrain", str(recipe)]
    command += ["--out", str(tmp_path / "run"), "--train.lr", "-1"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 2
    assert "greater than 0" in said.stderr
    assert "http" not in said.stderr


def test_bad_input_leaves_the_place_free(recipe, tmp_path, capsys):
    text = tmp_path / "text.txt"
    good = text.read_bytes()
    text.write_bytes(b"\xff" + good)
    assert call("pretrain", recipe, "--out", tmp_path / "run") == 2
    assert "text.txt:1: not valid UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    text.write_bytes(good)
    assert call("pretrain", recipe, "--out", tmp_path / "run") == 0
    # A finished run is not touched by a command that is refused.
    text.write_bytes(b"\xff" + good)
    assert call("pretrain", recipe, "--out", tmp_path / "run", "--resume") == 2
    assert (tmp_path / "run" / "model").is_dir()


def test_unknown_recipe_names_the_shipped_ones(capsys):
    assert call("pretrain", "shakespear", "--out", "x") == 2
    assert "tinyshakespeare" in capsys.readouterr().err


def test_a_missing_key_may_come_as_an_option(recipe, tmp_path):
    lines = recipe.read_text().splitlines()
    data = next(line for line in lines if line.startswith("data"))
    recipe.write_text("\n".join(line for line in lines if line != data))
    assert call("pretrain", recipe, "--out", tmp_path / "run") == 2
    assert call("pretrain", recipe, "--out", tmp_path / "run", "--data", tmp_path / "text.txt") == 0


def test_check(tmp_path, capsys):
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert call("check", good, "--as", "document", "--json") == 0
    assert json.loads(capsys.readouterr().out)["records"] == 2
    assert call("check", good, "--as", "document") == 0
    assert "2 documents" in capsys.readouterr().out
    good.write_text('{"text": "one"}\n{"text": 2}\n')
    assert call("check", good, "--as", "document") == 2
    assert "good.jsonl:2: " in capsys.readouterr().err


def test_tokenizer_and_convert(recipe, tmp_path, capsys):
    arguments = ("--vocab-size", "310", "--out", tmp_path / "tokenizer", "--json")
    assert call("tokenizer", tmp_path / "text.txt", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 310
    assert call("pretrain", recipe, "--out", tmp_path / "run") == 0
    assert call("convert", tmp_path / "run" / "model", tmp_path / "hf", "--to", "hf") == 0
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert call("convert", tmp_path / "nowhere", tmp_path / "hf2", "--to", "hf") == 2


def test_a_full_disk_is_status_one_without_traceback(recipe, tmp_path, capsys, monkeypatch):
    from llama2rt.checkpoint import store

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    arguments = ("--out", tmp_path / "run", "--train.checkpoint-every", "1")
    assert call("pretrain", recipe, *arguments) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "--resume" in error


def test_ctrl_c_saves_and_says_how_to_go_on(recipe, tmp_path):
    command = [
        sys.executable,
        "-P",
        "-m",
        "llama2rt.cli",
        "pretrain",
        str(recipe),
        "--steps",
        "100000",
    ]
    command += ["--out", str(tmp_path / "run"), "--train.checkpoint-every", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1, error
    assert "continue with --resume" in error
    assert "Traceback" not in error
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"saved {saved}" in error
