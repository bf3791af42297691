"""`llama2rt generate --resume`: killed at any sample, the same file as without."""

import dataclasses
import json
import signal
import subprocess
import sys

import json_lines
import pytest
import tyro
from small_models import far_from_flat

from llama2rt.checkpoint import native
from llama2rt.data import readers
from llama2rt.errors import InputError
from llama2rt.generate import commands
from llama2rt.generate.unfinished import Unfinished


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("resume") / "model"
    native.save(far_from_flat(vocab_size=tokenizer.vocab_size), tokenizer, path)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    words = ["about units", "small numbers", "words", "dates and units", "a small assistant"]
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"{words[i % 5]} {i}"}]}
        for i in range(10)
    ]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    json_lines.write(path, rows)
    return path


def generate(folder, prompts, out, *options):
    asked = (folder, "--prompts", prompts, "--out", out, "--max-tokens", 8, "--seed", 3, *options)
    tyro.cli(commands.generate, args=[str(arg) for arg in asked])


class Stop(Exception):
    pass


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("after", [1, 4, 9])
def test_the_same_samples_wherever_it_was_stopped(
    folder, prompts, tmp_path, monkeypatch, capsys, n, after
):
    monkeypatch.setattr(commands, "_SAMPLES_PER_CALL", 6)  # two prompts of three samples
    generate(folder, prompts, tmp_path / "whole.jsonl", "--n", n, "--json")
    whole = json.loads(capsys.readouterr().out)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    seen = []

    def advance(self, completion):
        seen.append(completion.prompt_index)
        if len(seen) == after * n + n // 2:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(commands._Progress, "advance", advance)
        with pytest.raises(Stop):
            generate(folder, prompts, out, "--n", n)
    kept = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    if n == 1:
        assert len(kept) == 1 + after
    assert not out.exists()
    if kept:
        partial.write_bytes(b"".join(kept) + kept[-1][: len(kept[-1]) // 2])  # and torn
    asked = []
    sample = commands._Work._sample

    def watched(self, engine, indices, on_finish):
        asked.extend(indices)
        return sample(self, engine, indices, on_finish)

    monkeypatch.setattr(commands._Work, "_sample", watched)
    generate(folder, prompts, out, "--n", n, "--resume", "--json")
    resumed = json.loads(capsys.readouterr().out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert resumed["samples"] == whole["samples"]
    assert not partial.exists()
    done = max(0, len(kept) - 1)
    assert resumed["resumed"] == done and len(asked) == 10 - done // n
    # Once more: nothing is left to do.
    generate(folder, prompts, out, "--n", n, "--resume")
    assert "all samples are in" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds other samples than are asked for"):
        generate(folder, prompts, out, "--n", n + 1, "--resume")


@pytest.fixture
def stopped(folder, prompts, tmp_path, monkeypatch):
    """An output with two of its ten samples."""

    def advance(self, completion):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(commands._Progress, "advance", advance)
        with pytest.raises(KeyboardInterrupt, match=r"interrupted: 2 of 10 samples are in .*--res"):
            generate(folder, prompts, tmp_path / "out.jsonl")
    return tmp_path / "out.jsonl"


def test_only_what_was_asked_for_is_resumed(folder, prompts, stopped, tokenizer, tmp_path):
    """Said before a model is loaded, and nothing is changed."""
    before = stopped.with_name("out.jsonl.partial").read_bytes()
    with pytest.raises(InputError, match="did not finish: --resume goes on with it"):
        generate(folder, prompts, stopped)
    for key, value, pattern in (
        ("--temperature", 0.5, "temperature: begun with 0.6, resumed with 0.5"),
        ("--top-k", 7, "top_k: begun with 0, resumed with 7"),
        ("--n", 2, "n: begun with 1, resumed with 2"),
        ("--dtype", "bf16", "dtype: begun with None, resumed with 'bf16'"),
        ("--weights", "int8", "weights: begun with 'same', resumed with 'int8'"),
    ):
        with pytest.raises(InputError, match=rf"out\.jsonl\.partial:1: {pattern}"):
            generate(folder, prompts, stopped, "--resume", key, value)
    other = tmp_path / "other"
    native.save(far_from_flat(vocab_size=tokenizer.vocab_size, seed=1), tokenizer, other)
    with pytest.raises(InputError, match="partial:1: model: begun with"):
        generate(other, prompts, stopped, "--resume")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(prompts.read_text().splitlines(keepends=True)[:9]))
    with pytest.raises(InputError, match="partial:1: prompts: begun with"):
        generate(folder, fewer, stopped, "--resume")
    with pytest.raises(InputError, match="resume: expected --out FILE"):
        tyro.cli(commands.generate, args=[str(folder), "--prompt", "x", "--resume"])
    assert stopped.with_name("out.jsonl.partial").read_bytes() == before


def test_a_damaged_line_is_named(folder, prompts, stopped):
    partial = stopped.with_name("out.jsonl.partial")
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text(lines[0] + lines[1].replace('"prompt"', '"promt"') + lines[2])
    with pytest.raises(InputError, match=r"out\.jsonl\.partial:2: damaged \('prompt'\)"):
        generate(folder, prompts, stopped, "--resume")
    partial.write_text("".join(lines[1:]))
    with pytest.raises(InputError, match=r"out\.jsonl\.partial:1: damaged"):
        generate(folder, prompts, stopped, "--resume")


def test_bad_input_leaves_no_file(folder, prompts, tmp_path, tokenizer):
    native.save(far_from_flat(), None, tmp_path / "mute")
    with pytest.raises(InputError, match=r"no tokenizer\.model"):
        generate(tmp_path / "mute", prompts, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["mute"]


def test_one_process_at_a_time(folder, prompts, stopped):
    work = commands._Work(readers.read(prompts, "prompt"), 1, False, commands.Sampling(), "")
    work.sampling = dataclasses.replace(work.sampling, max_tokens=8, seed=3)
    with (
        Unfinished(stopped, work.asked(folder, commands.Opening()), resume=True) as file,
        pytest.raises(InputError, match=r"out\.jsonl\.partial: another process is writing it"),
    ):
        assert len(file.finished) == 2
        generate(folder, prompts, stopped, "--resume")


KILLED = """
import os, signal, sys
from llama2rt import cli
from llama2rt.generate.unfinished import Unfinished

add = Unfinished.add

def killed(self, *sample):
    add(self, *sample)
    if len(self.finished) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

Unfinished.add = killed
cli.main(sys.argv[1:])
"""


def test_killed_as_a_process(folder, prompts, tmp_path):
    asked = ["generate", folder, "--prompts", prompts, "--out", tmp_path / "out.jsonl"]
    asked += ["--max-tokens", "8", "--seed", "3"]
    command = [sys.executable, "-c", KILLED, *map(str, asked)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.partial"]
    generate(folder, prompts, tmp_path / "out.jsonl", "--resume")
    generate(folder, prompts, tmp_path / "whole.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
