"""Run directories: started once, resumed only as the same run, never written over."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from llama2rt.errors import InputError
from llama2rt.train import Recipe, Run, TrainOptions
from llama2rt.train.run import abandon


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
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_kept_malloc_stops_page_faults():
    # Activations of 40 MiB: above 32 MiB glibc maps and unmaps every block.
    script = """
import resource, sys
import torch
from llama2rt.train.allocator import keep_malloc
if sys.argv[1] == "keep":
    assert keep_malloc()
model = torch.nn.Sequential(torch.nn.Linear(64, 10240), torch.nn.SiLU(), torch.nn.Linear(10240, 64))
def step():
    model(torch.ones(1024, 64)).sum().backward()
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-P", "-c", script, mode],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for mode in ("leave", "keep")
    }
    assert faults["keep"] < 0.3 * faults["leave"], faults


def test_one_process_at_a_time(tmp_path):
    script = """
import sys
from llama2rt.train import Recipe, Run
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


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "warmup_ratio"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_options_are_finite(name, value):
    with pytest.raises(ValidationError, match=name):
        TrainOptions(**{name: value})
    assert TrainOptions(clip=float("inf")).clip == float("inf")
