"""Run directories: started once, resumed only as the same run, never written over."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, ClassVar

import json_lines
import pytest
from pydantic import Field, ValidationError

from llama2rt.errors import InputError
from llama2rt.run import Recipe, Run, abandon
from llama2rt.train import TrainOptions


class Tiny(Recipe):
    seed: int = 7
    train: TrainOptions = TrainOptions()


def test_a_new_run_writes_recipe_and_manifest(tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("hello")
    parent = Run.open(tmp_path / "parent", Tiny())
    run = Run.open(tmp_path / "run", Tiny(), inputs={"data": data}, parents=[parent.directory])
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert manifest["seed"] == 7
    assert manifest["inputs"]["data"]["sha256"].startswith("2cf24dba5fb0a30e26e83b2ac5b9e29e")
    assert len(manifest["parents"][0]["manifest_sha256"]) == 64
    assert "torch" in manifest["versions"]
    assert "lr = 0.0003" in (run.directory / "recipe.toml").read_text()
    assert not run.complete


def test_a_used_directory_needs_resume(tmp_path):
    Run.open(tmp_path, Tiny())
    with pytest.raises(InputError, match="--resume"):
        Run.open(tmp_path, Tiny())
    Run.open(tmp_path, Tiny(), resume=True)


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for resume in (False, True):
        with pytest.raises(InputError, match="not empty"):
            Run.open(tmp_path, Tiny(), resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_cut_short_leaves_nothing_in_the_way(tmp_path):
    (tmp_path / "recipe.toml").write_text("half")
    (tmp_path / ".manifest.json.123").write_text("half")
    Run.open(tmp_path, Tiny())


def test_resume_with_another_recipe_names_the_key(tmp_path):
    Run.open(tmp_path, Tiny())
    with pytest.raises(InputError, match=r"train\.lr = 0\.0003.*0\.5"):
        Run.open(tmp_path, Tiny(train=TrainOptions(lr=0.5)), resume=True)


class Staged(Tiny):
    data: list[Path] = Field(default=[])
    init: Path | None = None
    epochs: int = 2
    settings: dict[str, Any] = Field(default={})
    durations: ClassVar = ("epochs",)


CONSTANT = {"schedule": "constant"}


def test_resume_takes_what_changes_no_result_and_says_so(tmp_path, caplog):
    Run.open(tmp_path, Staged())
    changed = {"log_every": 5, "checkpoint_every": 1, "validate_every": 3}
    run = Run.open(tmp_path, Staged(train=changed), resume=True)
    assert "train.log_every = 5 (was 1)" in caplog.text
    assert "train.checkpoint_every = 1 (was 200)" in caplog.text
    assert tomllib.loads((tmp_path / "recipe.toml").read_text())["train"]["log_every"] == 5
    # Recorded, and from then on the run's recipe.
    (resumed,) = json.loads((tmp_path / "manifest.json").read_text())["resumed"]
    assert resumed["changes"]["train.log_every"] == {"from": 1, "to": 5}
    caplog.clear()
    Run.open(tmp_path, Staged(train=changed), resume=True)
    assert not caplog.text
    # Of a run that is done nothing is left to record otherwise.
    run.finish()
    assert Run.open(tmp_path, Staged(), resume=True).complete


def test_where_and_how_often_the_same_is_computed_may_change(tmp_path, caplog):
    Run.open(tmp_path, Staged())
    changed = {"optimizer_device": "cpu", "activation_checkpointing": "full"}
    Run.open(tmp_path, Staged(train=changed), resume=True)
    assert "train.activation_checkpointing = 'full' (was 'none')" in caplog.text
    assert "train.optimizer_device = 'cpu' (was None)" in caplog.text
    with pytest.raises(InputError, match=r"train\.compile = False, asked to resume with True"):
        Run.open(tmp_path, Staged(train=changed | {"compile": True}), resume=True)


class Nullable(Staged):
    rate: float | None = 0.5


def test_a_run_older_than_a_key_goes_on(tmp_path, caplog):
    """A manifest of a program that had no `train.moments` and another type of a switch."""
    begun = Nullable(rate=None, train={"activation_checkpointing": "full"})
    Run.open(tmp_path, begun)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["recipe"]["train"]["moments"]
    manifest["recipe"]["train"]["activation_checkpointing"] = True
    path.write_text(json.dumps(manifest))
    Run.open(tmp_path, begun, resume=True)
    assert not caplog.text
    # The default that a key had, not none at all, is what another value is compared with.
    half = begun.model_copy(update={"train": TrainOptions(moments="bf16")})
    with pytest.raises(InputError, match=r"train\.moments = 'fp32', asked to resume with 'bf16'"):
        Run.open(tmp_path, half, resume=True)
    with pytest.raises(InputError, match=r"rate = None, asked to resume with 0\.5"):
        Run.open(tmp_path, Nullable(train=begun.train), resume=True)


def test_more_epochs_go_on_under_a_constant_schedule(tmp_path, caplog):
    Run.open(tmp_path, Staged(train=CONSTANT)).finish(loss=1.0)
    run = Run.open(tmp_path, Staged(epochs=3, train=CONSTANT), resume=True)
    assert not run.complete and "summary" not in run.manifest
    assert "epochs = 3 (was 2)" in caplog.text
    with pytest.raises(InputError, match="epochs = 3, asked to resume with 1"):
        Run.open(tmp_path, Staged(epochs=1, train=CONSTANT), resume=True)


@pytest.mark.parametrize(
    "train", [{}, {**CONSTANT, "warmup_ratio": 0.1}], ids=["cosine", "warm-up of a share"]
)
def test_more_epochs_are_another_run_where_the_learning_rate_depends_on_them(tmp_path, train):
    Run.open(tmp_path, Staged(train=train))
    with pytest.raises(InputError, match="epochs = 2, asked to resume with 3"):
        Run.open(tmp_path, Staged(epochs=3, train=train), resume=True)


def test_a_path_may_be_spelled_otherwise(tmp_path, monkeypatch, caplog):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for name in ("data/a.txt", "data/b.txt", "elsewhere/a.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)

    def recipe(folder, name="a.txt"):
        first, own = f"{folder}/a.txt", {"dialogues": [f"{folder}/{name}"]}
        return Staged(data=[first, f"{folder}/{name}"], init=folder, settings=own)

    Run.open("run", recipe("data"))
    # From another folder, and with the path that a link leads to.
    monkeypatch.chdir(tmp_path / "elsewhere")
    Run.open(tmp_path / "run", recipe(tmp_path / "data"), resume=True)
    assert "data.0 = " in caplog.text and "settings.dialogues.0 = " in caplog.text
    (tmp_path / "link").symlink_to(tmp_path / "data")
    Run.open(tmp_path / "run", recipe("../link"), resume=True)
    for other in (recipe("../data", "b.txt"), recipe(".")):
        with pytest.raises(InputError, match="asked to resume with"):
            Run.open(tmp_path / "run", other, resume=True)
    with pytest.raises(InputError, match="asked to resume with"):
        # A list's first entries are not the list.
        Run.open(tmp_path / "run", recipe("../data").model_copy(update={"data": []}), resume=True)


def test_a_parent_that_is_no_run_leaves_no_directory(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json: cannot be read"):
        Run.open(tmp_path / "run", Tiny(), parents=[tmp_path])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "values", [{"seed": 2**63}, {"epochs": 2**31}, {"train": {"log_every": 2**40}}]
)
def test_numbers_beyond_their_counters_are_named(values):
    with pytest.raises(
        ValidationError, match=r"(seed|epochs|log_every): expected at most \d+, got"
    ):
        Staged(**values)
    Staged(seed=2**63 - 1, epochs=2**31 - 1)


def test_resume_on_changed_data_names_the_file(tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("hello")
    Run.open(tmp_path / "run", Tiny(), inputs={"data": data})
    data.write_text("hullo")
    with pytest.raises(InputError, match=r"data\.txt: data has changed"):
        Run.open(tmp_path / "run", Tiny(), inputs={"data": data}, resume=True)


def test_a_missing_input_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"absent\.txt: cannot be read"):
        Run.open(tmp_path / "run", Tiny(), inputs={"data": tmp_path / "absent.txt"})
    assert not (tmp_path / "run").exists()


def test_finish_marks_the_run_complete(tmp_path):
    Run.open(tmp_path, Tiny()).finish(loss=1.5)
    run = Run.open(tmp_path, Tiny(), resume=True)
    assert run.complete
    assert run.manifest["summary"] == {"loss": 1.5}


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    run = Run.open(tmp_path, Tiny())
    for step in (1, 2, 3):
        run.log(step, loss=1 / step)
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')
    run.truncate_metrics(2)
    assert json_lines.read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
    ]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_one_process_at_a_time(tmp_path):
    script = """
import sys
from llama2rt.run import Recipe, Run
run = Run.open(sys.argv[1], Recipe())
print("open", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-P", "-c", script, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(InputError, match="another process is at work in it"):
            Run.open(tmp_path / "run", Recipe(), resume=True)
        other.kill()
        other.wait()
    run = Run.open(tmp_path / "run", Recipe(), resume=True)
    Run.open(tmp_path / "run", Recipe(), resume=True)
    run.finish()
    assert not list((tmp_path / "run").glob(".*"))


def test_what_a_killed_process_left_half_written_is_removed_by_the_next(tmp_path):
    script = """
import contextlib, os, sys
from pathlib import Path
from llama2rt import atomic
from llama2rt.checkpoint.files import new_folder
from llama2rt.run import Recipe, Run
with contextlib.ExitStack() as halves:
    for path in map(Path, sys.argv[1:]):
        run = Run.open(path, Recipe())
        folder = halves.enter_context(new_folder(run.model_directory))
        (folder / "config.json").write_text("half")
        file = halves.enter_context(atomic.replacing(run.samples_directory / "best.jsonl"))
        file.write(b"half")
    os._exit(9)
"""
    outer, inner = tmp_path / "run", tmp_path / "run" / "V1"
    command = [sys.executable, "-P", "-c", script, str(outer), str(inner)]
    assert subprocess.run(command, check=False).returncode == 9
    assert len(list(tmp_path.rglob("*-partial"))) == 4
    kept = [outer / ".notes.2024.partial", outer / f".best.jsonl.{os.getppid()}.llama2rt-partial"]
    for path in kept:  # somebody's, and a process's that is at work
        path.write_text("half")
    (outer / f".best.jsonl.{os.getpid()}.llama2rt-partial").write_text("of a dead one")
    (outer / "tokens").mkdir()  # token shards have a manifest, and are no run
    (outer / "tokens" / "manifest.json").write_text("{}")
    (outer / "tokens" / ".manifest.json.4194305.llama2rt-partial").write_text("half")
    for opened in (outer, inner):
        Run.open(opened, Recipe(), resume=True)
        # A run inside may be another process's, and is swept when it is opened itself.
        assert len(list(tmp_path.rglob("*partial"))) == (4 if opened == outer else 2)
    assert sorted(tmp_path.rglob("*partial")) == sorted(kept)


def test_a_folder_that_was_about_to_be_replaced_gets_its_name_back(tmp_path, caplog):
    Run.open(tmp_path, Tiny())
    scratch = tmp_path / ".model.4194305.abcd1234.llama2rt-partial"
    for name in ("old", "new"):
        (scratch / name).mkdir(parents=True)
        (scratch / name / "config.json").write_text(name)
    link = tmp_path / ".other.4194305.abcd1234.llama2rt-partial"
    link.symlink_to(scratch)
    Run.open(tmp_path, Tiny(), resume=True)
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert not scratch.exists() and not link.is_symlink()


def test_what_cannot_be_removed_is_said(tmp_path, caplog, monkeypatch):
    Run.open(tmp_path, Tiny())
    (tmp_path / ".best.jsonl.4194305.llama2rt-partial").write_text("half")

    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    Run.open(tmp_path, Tiny(), resume=True)
    assert ".best.jsonl.4194305.llama2rt-partial: left by a process that was killed" in caplog.text


def test_an_abandoned_run_leaves_its_place_free(tmp_path):
    Run.open(tmp_path / "run", Tiny())
    Run.open(tmp_path / "run" / "V1", Tiny()).log(1, loss=1.0)
    Run.open(tmp_path / "run" / "V2", Tiny())
    abandon(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").glob("[!.]*")) == [
        "V1",
        "manifest.json",
        "recipe.toml",
    ]
    Run.open(tmp_path / "other", Tiny())
    abandon(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    Run.open(tmp_path / "other", Tiny())
