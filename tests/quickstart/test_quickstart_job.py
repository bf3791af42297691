"""The whole job on next to nothing: its report, its command, and that a kill costs nothing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llama2rt.data import readers
from llama2rt.errors import InputError
from llama2rt.quickstart import command, data, job
from llama2rt.quickstart.recipe import smoke

COMMAND = (sys.executable, "-P", "-m", "llama2rt.cli", "quickstart", "--smoke-test", "--seed", "1")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")


def start(directory, *arguments):
    return subprocess.Popen(
        [*COMMAND, "--out", str(directory), *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quickstart") / "job"
    process = start(directory, "--json")
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return directory, json.loads(out), err


def test_report_has_the_promised_keys(finished):
    directory, printed, _ = finished
    report = json.loads((directory / "report.json").read_text())
    assert printed == report
    assert report["seconds"] > 1
    assert 10**8 < report["peak_memory_bytes"] < 4 * 10**9
    for kind in ("helpfulness", "safety"):
        accuracy = report["reward_models"][kind]["accuracy"]
        assert 0 <= accuracy["average"] <= 1
        assert set(accuracy) - {"average"} <= set(RATINGS)
    # One of each study's models is the job's own first one, measured again.
    for kind, title, own in (
        ("helpfulness", "Margins", "small margin"),
        ("safety", "Safety loss", "ranking and classification"),
    ):
        (models,) = (found["models"] for found in report["studies"][title]["tests"].values())
        assert len(models) == (3 if kind == "helpfulness" else 2)
        average = models[own]["intervals"][-1]["mean"]
        own_report = directory / f"reward-{kind}-1" / "report.json"
        assert average == json.loads(own_report.read_text())["accuracy"]["average"]
    names = [version["name"] for version in report["versions"]]
    assert names == ["SFT", "RLHF-V1", "RLHF-V2", "RLHF-V2 + PPO", "Online DPO"]
    for version in report["versions"]:
        for key in ("helpfulness", "unsafe"):
            interval = version[key]
            assert 0 <= interval["low"] <= interval["mean"] <= interval["high"] <= 1
    page = (directory / "report.html").read_text()
    assert "<svg" in page and "RLHF-V2 + PPO" in page and "large margin" in page


def test_the_terminal_names_phases_versions_answers_and_the_report(finished):
    _, _, err = finished
    for words in ("pretrain", "annotate", "RLHF-V1", "Online DPO", "Held-out prompts"):
        assert words in err
    assert "report.html" in err


def test_data_and_keys_are_kept_apart(finished):
    directory, _, _ = finished
    recipe = smoke(1)
    assert len(readers.read(directory / "data" / "documents.jsonl", "document")) == recipe.documents
    prompts = readers.read(directory / "data" / "evaluation.jsonl", "prompt")
    keys = data.read_keys(data.keys_path(directory))
    assert {p.id for p in prompts} <= set(keys)
    trained = ("pretrain", "sft", "reward-helpfulness-2", "rlhf-v1", "rlhf-v2", "ppo", "dpo")
    for folder in trained:
        inputs = json.loads((directory / folder / "manifest.json").read_text())["inputs"]
        assert inputs
        assert not [i for i in inputs.values() if "judge" in i["path"] or "evaluation" in i["path"]]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["complete"] and "data/documents.jsonl" in manifest["summary"]["data"]


def test_a_finished_job_is_not_done_again_and_not_overwritten(finished):
    directory, printed, _ = finished
    with pytest.raises(InputError, match="--resume"):
        job.run(smoke(1), directory)
    began = time.monotonic()
    assert job.run(smoke(1), directory, resume=True) == printed
    assert time.monotonic() - began < 2


def test_killed_anywhere_it_goes_on_to_the_same_numbers(finished, tmp_path):
    _, uninterrupted, _ = finished
    directory = tmp_path / "job"
    for waits_for in ("pretrain/metrics.jsonl", "reward-helpfulness-1/manifest.json", "rlhf-v2"):
        process = start(directory, *(["--resume"] if directory.exists() else []))
        while process.poll() is None and not (directory / waits_for).exists():
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(directory, "--resume", "--json")
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    resumed = json.loads(out)
    assert resumed["versions"] == uninterrupted["versions"]
    assert resumed["reward_models"] == uninterrupted["reward_models"]
    for title, found in uninterrupted["studies"].items():
        assert resumed["studies"][title]["tests"] == found["tests"]


def test_ranks_that_torchrun_starts_anew_go_on_and_leave_at_once(tmp_path, monkeypatch, capsys):
    class Left(BaseException):
        pass

    def leave():
        raise Left

    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(command.command, "joined", contextlib.nullcontext)
    monkeypatch.setattr(command.command, "finish", leave)
    monkeypatch.setattr(command.console, "summary", lambda out, numbers: None)
    monkeypatch.setattr(
        command.job, "run", lambda recipe, out, *, resume: asked.append(resume) or {"seconds": 1}
    )
    with pytest.raises(Left):
        command.quickstart(out=tmp_path, as_json=True)
    assert asked == [True] and json.loads(capsys.readouterr().out) == {"seconds": 1}
