"""What lm-eval asks, against models asked one request at a time; its own files where it is there.

`benchmarks/evaluation/against_lm_eval.py` compares with its Hugging Face backend.
"""

import json

import json_lines
import numpy as np
import pytest
import torch
from small_models import packed

from llama2rt import cli
from llama2rt.checkpoint import native
from llama2rt.errors import InputError
from llama2rt.evaluate.calibration import expected_error
from llama2rt.evaluate.harness.requests import Encoder, Scored, sampling_options
from llama2rt.evaluate.harness.scoring import log_likelihoods
from llama2rt.evaluate.harness.versions import compare, model_folders
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.text import chat

CONTEXT = 48


@pytest.fixture(scope="module")
def model(small_tokenizer):
    config = LlamaConfig(32, 2, 2, 2, 64, vocab_size=small_tokenizer.vocab_size, context=CONTEXT)
    model = Llama(config).initialize(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model.eval()


@pytest.fixture(scope="module")
def encoder(small_tokenizer):
    return Encoder(small_tokenizer)


def one_by_one(model, tokens, count):
    """(log-likelihood of the last tokens, whether each is the likeliest) by plain logits."""
    tokens = torch.as_tensor(np.asarray(tokens)[-(model.config.context + 1) :]).long()
    count = min(count, len(tokens) - 1)
    with torch.no_grad():
        logprobs = model.logits(*packed(tokens[:-1])).double().log_softmax(-1)[-count:]
    targets = tokens[-count:]
    greedy = bool((logprobs.argmax(1) == targets).all())
    return float(logprobs.gather(1, targets[:, None]).sum()), greedy


def test_tokens_of_a_continuation_are_those_of_the_whole(encoder, small_tokenizer):
    whole = small_tokenizer.encode("the quick brown fox", bos=True)
    for context, continuation in (
        ("the quick", " brown fox"),
        ("the quick ", "brown fox"),
        ("the quick \n", " brown fox"),
    ):
        found = encoder.pair(context, continuation)
        text = context + continuation
        assert found.tokens.tolist() == small_tokenizer.encode(text, bos=True)
        alone = small_tokenizer.encode("the quick", bos=True)
        assert found.count == len(found.tokens) - len(alone)
    # Without a context BOS stands for it, also where contexts have none.
    empty = Encoder(small_tokenizer, add_bos_token=False).pair("", "the quick brown fox")
    assert (empty.tokens.tolist(), empty.count) == (whole, len(whole) - 1)
    # A word that ends in the continuation: lm-eval's rule, and the token itself where none is left.
    before = small_tokenizer.encode("the qui", bos=True)
    inside = encoder.pair("the qui", "ck brown fox jumps over")
    longer = small_tokenizer.encode("the quick brown fox jumps over", bos=True)
    assert inside.tokens.tolist() == before + longer[len(before) :]
    assert inside.count == len(longer) - len(before)
    one = encoder.pair("the qui", "ck")
    assert one.count >= 1 and one.tokens[-1] == small_tokenizer.encode("the quick")[-1]
    with pytest.raises(InputError, match="a continuation without tokens"):
        encoder.pair("the quick", "")


def test_windows_predict_each_token_once_and_from_as_much_as_fits(encoder, small_tokenizer):
    text = "the quick brown fox jumps over the lazy dog " * 12
    ids = small_tokenizer.encode(text, bos=True)
    assert len(ids) > 2 * CONTEXT
    windows = encoder.windows(text, CONTEXT)
    predicted = np.concatenate([w.tokens[-w.count :] for w in windows])
    assert predicted.tolist() == ids and windows[0].tokens[0] == small_tokenizer.bos
    assert all(len(window.tokens) == CONTEXT + 1 for window in windows)
    short = encoder.windows("the", CONTEXT)
    assert [w.tokens.tolist() for w in short] == [[1, *small_tokenizer.encode("the", bos=True)]]


@pytest.mark.parametrize("micro_tokens", [60, 4000])
def test_log_likelihoods_equal_those_of_single_requests(model, micro_tokens):
    generator = np.random.default_rng(0)
    draw = lambda n: generator.integers(3, model.config.vocab_size, n)  # noqa: E731
    shots, question = draw(20), draw(8)
    requests = [Scored(np.r_[1, shots, question, draw(n)], n) for n in (1, 1, 1, 4, 2)]
    requests += [Scored(np.r_[1, shots, draw(9)], 3), Scored(np.r_[1, draw(1)], 1)]
    requests += [Scored(np.r_[1, draw(80)], 5), Scored(np.r_[1, draw(80)], 80)]
    requests.append(requests[0])
    greedy = np.r_[1, shots].astype(np.int64)
    for _ in range(4):
        with torch.no_grad():
            logits = model.logits(*packed(torch.from_numpy(greedy)))
        greedy = np.r_[greedy, int(logits[-1].argmax())]
    requests += [Scored(greedy, 4), Scored(np.r_[greedy[:-1], (greedy[-1] + 1) % 300], 4)]
    seen = {}
    found, flags = log_likelihoods(
        model, requests, micro_tokens, lambda i, value, flag: seen.update({i: (value, flag)})
    )
    wanted = [one_by_one(model, request.tokens, request.count) for request in requests]
    np.testing.assert_allclose(found, [value for value, _ in wanted], rtol=1e-5, atol=1e-5)
    assert flags.tolist() == [flag for _, flag in wanted]
    assert flags[-2] and not flags[-1]
    alone, none = log_likelihoods(model, requests, micro_tokens, flags=False)
    np.testing.assert_allclose(alone, found, rtol=1e-5, atol=1e-5)
    assert not none.any()
    assert seen == {i: (found[i], flags[i]) for i in range(len(requests))}


@pytest.mark.parametrize("scale", [0.2, 2.0])
def test_greedy_continuations_are_known_however_sure_the_model_is(scale, small_tokenizer):
    config = LlamaConfig(32, 2, 2, 2, 64, vocab_size=small_tokenizer.vocab_size, context=CONTEXT)
    model = Llama(config).initialize(seed=2).eval()
    with torch.no_grad():
        model.output.weight.mul_(scale * 20)
    requests, wanted = [], []
    for begin in range(3, 9):
        greedy = np.array([1, begin])
        for _ in range(6):
            with torch.no_grad():
                logits = model.logits(*packed(torch.from_numpy(greedy)))
            greedy = np.r_[greedy, int(logits[-1].argmax())]
        requests.append(Scored(greedy, 6))
        for place in range(2, 8):
            other = greedy.copy()
            other[place] = 3 if greedy[place] != 3 else 4
            requests.append(Scored(other, 6))
        wanted += [True] + [False] * 6
    _, flags = log_likelihoods(model, requests, 4000)
    assert flags.tolist() == wanted


def test_a_chat_is_scored_and_answered_in_the_tokens_of_training(encoder, small_tokenizer):
    messages = [{"role": "user", "content": "count sheep"}]
    text = encoder.render(messages)
    assert text == "<s>[INST] count sheep [/INST]" and encoder.is_chat(text)
    assert encoder.prompt(text, 100) == chat.encode_prompt(small_tokenizer, messages)
    ids, trainable = chat.encode_response(small_tokenizer, messages, "the fox")
    found = encoder.pair(text, "the fox")
    assert found.tokens.tolist() == ids[:-1] and found.count == sum(trainable) - 1


def test_generation_options_are_used_or_refused():
    options = sampling_options({"until": "\n", "do_sample": False, "temperature": 0.7}, 3)
    assert (options.stop, options.temperature, options.seed) == (("\n",), 0, 3)
    assert options.max_tokens == 256
    given = {"until": ["", "a"], "do_sample": True, "top_p": 0.9, "max_tokens": 7}
    options = sampling_options(given, 0)
    assert (options.stop, options.temperature, options.top_p) == (("a",), 1, 0.9)
    assert options.max_tokens == 7
    assert sampling_options({"temperature": 0.5, "max_gen_toks": 4, "max_tokens": 9}, 0) == (
        sampling_options({"do_sample": True, "temperature": 0.5, "max_gen_toks": 4}, 0)
    )
    with pytest.raises(InputError, match="generation_kwargs: num_beams: not known"):
        sampling_options({"num_beams": 4}, 0)
    with pytest.raises(InputError, match="generation_kwargs: top_p"):
        sampling_options({"do_sample": True, "top_p": 2}, 0)


def test_calibration_error_of_claims():
    assert expected_error([0.75] * 4, [1, 1, 1, 0]) == 0
    assert expected_error([0.95, 0.95, 0.55, 0.55], [1, 0, 1, 0]) == pytest.approx(0.25)
    assert expected_error([1.0, 1.0], [True, True]) == 0


def test_versions_of_a_plan_and_their_difference(tmp_path, model, small_tokenizer):
    native.save(model, small_tokenizer, tmp_path / "pretrain" / "model")
    reward = ScalarModel(model.config).initialize(seed=1)
    for name in ("sft", "rlhf-v1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(tmp_path / "pretrain" / "model")
    native.save(reward, small_tokenizer, tmp_path / "reward-1" / "model")
    steps = dict.fromkeys(("data", "pretrain", "sft", "reward-1", "rlhf-v1"), 1.0)
    (tmp_path / "phases.json").write_text(json.dumps({"seconds": steps}))
    folders = model_folders(tmp_path)
    assert folders == {name: tmp_path / name / "model" for name in ("sft", "rlhf-v1")}
    assert list(model_folders(tmp_path / "sft")) == ["sft"]
    with pytest.raises(InputError, match="neither a model folder nor the run directory"):
        model_folders(tmp_path / "pretrain" / "model" / "nothing")

    about = {"metric": "acc", "shots": 0, "samples": 40, "higher_is_better": True}
    values = {i: float(i % 2) for i in range(40)}
    worse = values | dict.fromkeys(range(20), 0.0)
    sft = {"value": 0.5, "low": 0.4, "high": 0.6, "values": values, **about}
    v1 = {"value": 0.25, "values": worse, **about}
    (row,) = compare({"sft": {"t": sft}, "rlhf-v1": {"t": v1}})
    assert row["task"] == "t" and "difference" not in row["versions"]["sft"]
    difference = row["versions"]["rlhf-v1"]["difference"]
    assert difference["mean"] == -0.25 and difference["high"] < 0


def write_task(folder, name, rows, **settings):
    json_lines.write(folder / f"{name}.jsonl", rows)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        **settings,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task))  # YAML is a superset of JSON
    return path


def mean(metric):
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]


def test_tasks_from_local_files(tmp_path, model, encoder, small_tokenizer, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval, of the extra of that name, is not installed")
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    native.save(model, small_tokenizer, folder)
    rows = [{"q": f"the {w} fox", "options": ["quick", "lazy dog", "brown"]} for w in ("red", "a")]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_task(
        tasks, "options", rows, output_type="multiple_choice", doc_to_text="{{q}}",
        doc_to_choice="{{options}}", doc_to_target=1, metric_list=mean("acc"),
    )  # fmt: skip
    write_task(
        tasks, "answers", rows, output_type="generate_until", doc_to_text="{{q}}",
        doc_to_target="quick", metric_list=mean("exact_match"),
        generation_kwargs={"until": ["e"], "max_gen_toks": 8},
    )  # fmt: skip
    out = tmp_path / "out"
    files = [str(folder), "--tasks", str(tasks), "--out", str(out)]
    cli.main(["evaluate", *files, "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_name = {row["task"]: row["versions"]["model"] for row in result["tasks"]}
    (written,) = out.rglob("results_*.json")
    assert (
        json.loads(written.read_text())["results"]["options"]["acc,none"]
        == (by_name["options"]["value"])
    )
    (samples,) = out.rglob("samples_options_*.jsonl")
    right = []
    for row, logged in zip(rows, json_lines.read(samples), strict=True):
        wanted = []
        for option in row["options"]:
            scored = encoder.pair(row["q"], " " + option)
            wanted.append(one_by_one(model, scored.tokens, scored.count))
        found = [(float(value), flag == "True") for [[value, flag]] in logged["resps"]]
        np.testing.assert_allclose([v for v, _ in found], [v for v, _ in wanted], rtol=1e-5)
        assert [flag for _, flag in found] == [flag for _, flag in wanted]
        right.append(int(np.argmax([value for value, _ in wanted]) == 1))
    assert by_name["options"]["value"] == np.mean(right) and "calibration" in by_name["options"]
    (samples,) = out.rglob("samples_answers_*.jsonl")
    for logged in json_lines.read(samples):
        assert "e" not in logged["resps"][0][0]

    cli.main(["evaluate", str(folder), "--tasks", str(tasks / "options.yaml"), "--limit", "1"])
    assert "options: acc, 0 shots, 1" in capsys.readouterr().out
    write_task(tasks, "absent", rows, output_type="loglikelihood", doc_to_text="a",
               doc_to_target="b").with_name("absent.jsonl").unlink()  # fmt: skip
    for wrong, message in (
        (["--tasks", str(tasks / "absent.yaml")], "absent.yaml: cannot be loaded"),
        (["--tasks", str(tasks / "none.yaml")], "none.yaml: no such task file"),
        (["--tasks", str(tasks / "options.yaml"), "--limit", "0"], "limit: expected at least 1"),
        (["--shots", "2"], "shots: means nothing without --tasks"),
        (["--tasks", str(tasks / "options.yaml"), "--samples", "a"], "tasks: go without"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["evaluate", str(folder), *wrong])
        assert end.value.code == 2 and message in capsys.readouterr().err
