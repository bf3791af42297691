"""What `make gpu` needs, proven on a machine without a GPU.

A machine that is rented for its GPU has torch and pytest and lacks much of what the command line
asks for. Such a Python is made here: this one's packages without LACKING. And the script that runs
there keeps its promises: time, status, one archive.
"""

import json
import sys
import sysconfig
import tarfile
import time
import venv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import load_script, run_python

ROOT = Path(__file__).resolve().parents[1]
LACKING = ("pydantic", "tyro", "rich", "sentencepiece", "tensorboard", "tomli_w", "transformers")


gpu = load_script(ROOT / "benchmarks/gpu.py")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python with the packages of this one, but for LACKING."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    variables = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=variables))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(LACKING):
            (packages / entry.name).symlink_to(entry)
    python = folder / "bin/python"
    for name in ("pydantic", "tyro", "rich"):
        done = run_python("-c", f"import {name}", python=python, status=1)
        assert "ModuleNotFoundError" in done.stderr
    return python


def output_of(python, *arguments):
    return run_python(*arguments, python=python, cwd=ROOT).stdout


def test_the_library_trains_there(bare_python):
    """Ops and a model, as a training script uses them."""
    program = """
import torch
from llama2rt.model import Llama, LlamaConfig
shape = dict(dim=32, layers=1, heads=2, kv_heads=2, ffn_hidden=64, vocab_size=50, context=16)
tokens = torch.arange(9)
logprob = Llama(LlamaConfig(**shape))(tokens, tokens, torch.tensor([0, 9]).int(), tokens)
logprob.sum().backward()
print(logprob.shape[0])
"""
    assert output_of(bare_python, "-c", program).strip() == "9"


def test_the_benchmarks_are_collected_there(bare_python):
    said = output_of(bare_python, "-m", "pytest", "-q", "--collect-only", "benchmarks/ops")
    assert "test_attention[cuda-" in said


def test_the_doctor_needs_no_option_there(bare_python):
    report = json.loads(output_of(bare_python, "-m", "llama2rt.doctor"))
    assert report["problems"] == [] and report["torch"]["version"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU `make gpu` itself shows it")
def test_the_phases_run_there(bare_python, tmp_path, monkeypatch):
    """Without a GPU the tests skip, each with its reason, which counts as failed; the doctor finds
    nothing wrong; and all is packed."""
    monkeypatch.setattr(gpu, "PYTHON", (str(bare_python), "-P"))
    chosen = [
        replace(phase, budget_s=3600)  # this machine may be a busy one
        for phase in gpu.phases(tmp_path, tmp_path / "results")
        if phase.name in ("doctor", "tests", "memcheck")
    ]
    outcomes = {each.phase: each for each in gpu.run_all(chosen, tmp_path, total_s=3600)}
    assert outcomes["doctor"].result == "done"
    assert outcomes["tests"].result == "failed" and "nothing was tested" in outcomes["tests"].why
    said = (tmp_path / "tests.txt").read_text()
    tests, skips = said.splitlines()[-1], [x for x in said.splitlines() if "SKIPPED" in x]
    assert " skipped" in tests and "passed" not in tests
    assert skips and all("no usable NVIDIA GPU" in line for line in skips)
    gpu.pack(tmp_path, tmp_path / "found.tar.gz")
    with tarfile.open(tmp_path / "found.tar.gz") as tar:
        report = tar.extractfile("llama2rt-gpu/doctor.txt").read()
        summary = json.load(tar.extractfile("llama2rt-gpu/summary.json"))
    found = json.loads(report)
    assert found["problems"] == [] and found["torch"]["version"] == torch.__version__
    assert [each["phase"] for each in summary] == ["doctor", "tests", "memcheck"]


def test_the_script_packs_one_archive_and_tells_how_it_went(tmp_path):
    """A phase that is skipped wherever no wheels were brought along."""
    said = output_of(
        sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path), "--phases", "wheels"
    )
    assert "wheels      skipped  there is no wheels/*.whl" in said
    assert [path.name for path in tmp_path.iterdir()] == ["llama2rt-gpu.tar.gz"]


def program(text):
    return [sys.executable, "-P", "-c", text]


def test_a_phase_that_fails_or_overruns_does_not_stop_the_rest(tmp_path):
    sleeper = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    started = time.monotonic()
    outcomes = gpu.run_all(
        [
            gpu.Phase("fails", 60, program("print('so far'); raise SystemExit(3)")),
            gpu.Phase("overruns", 2, program(sleeper)),
            gpu.Phase("absent", 60, ["no-such-program"], skip="it is not installed"),
            gpu.Phase("wrong", 60, program(""), check=lambda: "it did nothing"),
            gpu.Phase("works", 60, program("import os; print(os.environ['X'])"), {"X": "value"}),
        ],
        tmp_path,
    )
    assert [(each.phase, each.result, each.why) for each in outcomes] == [
        ("fails", "failed", "status 3"),
        ("overruns", "cut", "after 2 s"),
        ("absent", "skipped", "it is not installed"),
        ("wrong", "failed", "it did nothing"),
        ("works", "done", ""),
    ]
    assert time.monotonic() - started < 60, "what a phase started outlives it"
    assert (tmp_path / "works.txt").read_text() == "value\n"
    assert (tmp_path / "fails.txt").read_text() == "so far\n"


def test_no_phase_starts_after_the_time_is_up(tmp_path):
    chosen = [gpu.Phase("first", 60, program("")), gpu.Phase("second", 60, program(""))]
    outcomes = gpu.run_all(chosen, tmp_path, total_s=0)
    assert [(each.result, each.why) for each in outcomes] == [
        ("cut", "no time was left for it")
    ] * 2


def test_the_budgets_that_matter_fit_what_is_promised():
    budgets = {phase.name: phase.budget_s for phase in gpu.phases(Path(), Path())}
    longest = sum(budgets[name] for name in ("install", "tests", "benchmarks"))
    assert longest <= gpu.TOTAL_SECONDS - 60 and gpu.TOTAL_SECONDS < 9 * 60


@pytest.mark.parametrize(("tests", "skipped", "wrong"), [(3, 3, True), (3, 2, False), (0, 0, True)])
def test_a_run_that_tested_nothing_is_no_success(tmp_path, tests, skipped, wrong):
    report = tmp_path / "report.xml"
    counts = f'tests="{tests}" skipped="{skipped}"'
    report.write_text(f"<testsuites><testsuite {counts}/></testsuites>")
    assert bool(gpu.all_skipped(report)) == wrong
