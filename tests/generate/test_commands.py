"""`llama2rt generate` and `llama2rt chat`, called as the command line calls them."""

import json

import json_lines
import pytest
import tyro
from small_models import far_from_flat

from llama2rt.checkpoint import native
from llama2rt.data import readers
from llama2rt.errors import InputError
from llama2rt.generate import Engine, commands
from llama2rt.model.heads import ScalarModel


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "model"
    native.save(far_from_flat(vocab_size=tokenizer.vocab_size), tokenizer, path)
    return path


@pytest.fixture
def engine(tokenizer):
    return Engine(far_from_flat(vocab_size=tokenizer.vocab_size), tokenizer)


def _generate(*args):
    tyro.cli(commands.generate, args=[str(arg) for arg in args])


def test_one_prompt(folder, engine, capsys):
    _generate(folder, "--prompt", "about units", "--temperature", "0", "--max-tokens", "8")
    messages = [{"role": "user", "content": "about units"}]
    (expected,) = engine.generate([messages], temperature=0, max_tokens=8)
    assert capsys.readouterr().out == expected.text + "\n"


def test_raw_continues_text(folder, engine, capsys):
    _generate(folder, "--prompt", "about units", "--raw", "--temperature", "0", "--max-tokens", "8")
    tokens = engine.tokenizer.encode("about units", bos=True)
    (expected,) = engine.generate([tokens], temperature=0, max_tokens=8)
    assert capsys.readouterr().out == expected.text + "\n"


def test_file_of_prompts_to_file_of_samples(folder, engine, tmp_path, capsys):
    contents = ["about units", "small numbers", "words and dates"]
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": text}]}
        for i, text in enumerate(contents)
    ]
    json_lines.write(prompts, rows)
    out = tmp_path / "samples.jsonl"
    options = ("--n", 2, "--temperature", 0.9, "--max-tokens", 12, "--seed", 7, "--out", out)
    _generate(folder, "--prompts", prompts, *options, "--json")
    report = json.loads(capsys.readouterr().out)
    samples = readers.read(out, "sample")
    expected = engine.generate(
        [row["messages"] for row in rows], n=2, temperature=0.9, top_p=0.9, max_tokens=12, seed=7
    )
    assert [sample.response for sample in samples] == [c.text for c in expected]
    assert [sample.prompt_id for sample in samples] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert (samples[0].temperature, samples[0].seed) == (0.9, 7)
    assert [row["response"] for row in report["samples"]] == [c.text for c in expected]
    assert [row["finish_reason"] for row in report["samples"]] == [
        c.finish_reason for c in expected
    ]
    assert report["tokens"] == sum(len(c.tokens) for c in expected)
    assert report["tokens_per_s"] > 0


def test_bad_input(folder, tokenizer, tmp_path):
    with pytest.raises(InputError, match="either --prompt TEXT or --prompts FILE"):
        _generate(folder)
    with pytest.raises(InputError, match="no such model folder"):
        _generate(tmp_path / "nothing", "--prompt", "x")
    native.save(far_from_flat(), None, tmp_path / "mute")
    with pytest.raises(InputError, match=r"no tokenizer\.model"):
        _generate(tmp_path / "mute", "--prompt", "x")
    native.save(ScalarModel.from_llama(far_from_flat(), 0), tokenizer, tmp_path / "scorer")
    with pytest.raises(InputError, match="reward model or critic"):
        _generate(tmp_path / "scorer", "--prompt", "x")
    with pytest.raises(InputError, match="device: 'banana' cannot be used"):
        _generate(folder, "--prompt", "x", "--device", "banana")
    with pytest.raises(InputError, match="out: expected a file"):
        _generate(folder, "--prompt", "x", "--out", tmp_path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", "-1"), ("temperature", "nan"), ("temperature", "inf")),
        *(("top-p", "0"), ("top-k", "-1"), ("top-k", "3000000000")),
        *(("n", "0"), ("n", "3000000000"), ("max-tokens", "0"), ("max-tokens", "3000000000")),
        *(("seed", "-1"), ("seed", "9223372036854775808"), ("cache-bytes", "0")),
    ],
)
def test_an_impossible_option_is_bad_input(tmp_path, option, value):
    """Said before the model is loaded: here there is none."""
    with pytest.raises(InputError, match=f"^{option.replace('-', '_')}: expected"):
        _generate(tmp_path, "--prompt", "about units", f"--{option}", value)
    if option not in ("n", "cache-bytes"):
        with pytest.raises(InputError, match=f"^{option.replace('-', '_')}: expected"):
            tyro.cli(commands.chat, args=[str(tmp_path), f"--{option}", value])


def test_cache_bytes_bound_the_cache_and_change_no_sample(folder, engine, capsys):
    asked = (folder, "--prompt", "about units", "--n", 9, "--max-tokens", 8)
    _generate(*asked)
    whole = capsys.readouterr().out
    with pytest.raises(InputError, match=r"^cache_bytes: expected at least") as refused:
        _generate(*asked, "--cache-bytes", 1)
    size = int(str(refused.value).split()[4])
    _generate(*asked, "--cache-bytes", size)
    assert capsys.readouterr().out == whole and whole
    with pytest.raises(InputError, match=f"^cache_bytes: expected at least {size} for prompt 0"):
        _generate(*asked, "--cache-bytes", size - 1)


def test_chat_remembers_until_reset(folder, engine, monkeypatch, capsys):
    lines = iter(["about units", "", "<<SYS>>", "small numbers", "/reset", "small numbers"])

    def read_line(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read_line)
    tyro.cli(
        commands.chat,
        args=[str(folder), "--system", "dates", "--temperature", "0", "--max-tokens", "6"],
    )
    shown = capsys.readouterr().out
    system = {"role": "system", "content": "dates"}
    first, again = (
        [system, {"role": "user", "content": text}] for text in ("about units", "small numbers")
    )
    answer = engine.generate([first], temperature=0, max_tokens=6)[0].text
    second = [*first, {"role": "assistant", "content": answer}, again[1]]
    answers = [
        completion.text
        for completion in engine.generate([first, second, again], temperature=0, max_tokens=6)
    ]
    assert answers[1] != answers[2]
    positions = [shown.index(text) for text in answers]
    assert positions == sorted(positions)
    assert "holds the format tag <<SYS>>" in shown


def test_chat_draws_afresh_each_turn(folder, monkeypatch):
    lines = ["about units", "/reset", "about units"][::-1]

    def read_line(_):
        if not lines:
            raise EOFError
        return lines.pop()

    seeds = []
    monkeypatch.setattr("builtins.input", read_line)
    monkeypatch.setattr(
        commands.Engine, "stream", lambda self, _, **options: seeds.append(options["seed"]) or ["x"]
    )
    tyro.cli(commands.chat, args=[str(folder), "--seed", "4"])
    assert len(set(seeds)) == 2 and seeds[0] == 4
