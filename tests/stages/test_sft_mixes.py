"""Fine-tuning on a mix: shares, filters and what is kept of it; blocks that are full."""

import itertools
import json

import json_lines
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llama2rt.checkpoint import native
from llama2rt.data.loader import BlockLoader, blocks
from llama2rt.data.packing import Example, best_fit
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig
from llama2rt.stages import sft
from llama2rt.stages.sft import SftRecipe
from llama2rt.text import Tokenizer
from llama2rt.text.chat import encode_dialogue
from llama2rt.train import TrainOptions


def dialogue(name: str, i: int, words: int = 2) -> dict:
    answer = {"role": "assistant", "content": f"{name} {i}" + " fox" * words}
    return {"messages": [{"role": "user", "content": f"say {name} {i}"}, answer]}


@pytest.fixture
def world(tmp_path, small_tokenizer):
    config = LlamaConfig(32, 2, 2, 2, 64, vocab_size=small_tokenizer.vocab_size, context=96)
    native.save(Llama(config).initialize(0), small_tokenizer, tmp_path / "base")
    own = [*(dialogue("own", i) for i in range(60)), dialogue("own", 5), dialogue("own", 9, 200)]
    json_lines.write(tmp_path / "own.jsonl", own)
    json_lines.write(tmp_path / "open.jsonl", (dialogue("open", i) for i in range(200)))
    return tmp_path


def recipe(world, **changes):
    given = {
        "init": world / "base",
        "sources": [{"path": world / "own.jsonl"}, {"path": world / "open.jsonl", "share": 0.6}],
        "filters": {"duplicates": True},
        "held_out": 0.1,
        "block_tokens": 96,
        "batch_size": 4,
        "epochs": 1,
        "train": TrainOptions(lr=1e-2, micro_tokens=192),
    }
    return SftRecipe(**{**given, **changes})


def test_a_mix_is_filtered_drawn_and_accounted_for(world):
    sft.run(recipe(world), world / "run")
    report = json.loads((world / "run" / "report.json").read_text())
    own, others = report["composition"]
    left_out = {"filtered": 1, "longer than the context": 1, "held out": 6}
    assert (own["read"], own["used"], own["left_out"]) == (62, 54, left_out)
    assert (others["used"], others["left_out"]) == (81, {"not drawn": 119})  # 60 % of 135
    assert report["filters"]["duplicates"]["removed"] == 1
    assert report["dialogues"] == 135
    again = sft.open_inputs(recipe(world))
    tokens = [example.tokens.tolist() for example in again.training]
    assert [e.tokens.tolist() for e in sft.open_inputs(recipe(world)).training] == tokens


def test_plain_data_stays_as_it_was(world, small_tokenizer):
    plain = recipe(world, data=[world / "open.jsonl"], sources=[], filters={}, block_tokens=None)
    inputs = sft.open_inputs(plain)
    training, _ = sft.split(plain)
    expected = [encode_dialogue(small_tokenizer, d.messages)[0] for d in training]
    assert [e.tokens.tolist() for e in inputs.training] == expected and not inputs.account.lines()
    assert sft.loader_of(plain, inputs.training).steps_per_epoch == 45


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 30))
def test_best_fit_holds_each_once_and_never_more_than_fits(lengths, capacity):
    bins = best_fit(lengths, capacity)
    assert sorted(i for one in bins for i in one) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in one) for one in bins]
    assert all(n <= capacity or len(one) == 1 for n, one in zip(sums, bins, strict=True))
    fitting = [n for n in lengths if n <= capacity]
    # Best fit decreasing needs at most 11/9 of the least and one more (Johnson 1974).
    assert sum(n <= capacity for n in sums) <= 11 / 9 * -(-sum(fitting) // capacity) * 2 + 1
    # No two bins could be one.
    least = sorted(n for n in sums if n <= capacity)[:2]
    assert len(least) < 2 or sum(least) > capacity


def test_full_blocks_are_fuller_and_documents_stay_apart():
    lengths = np.random.default_rng(0).integers(5, 60, 400).tolist()
    in_order, full = (sum(lengths) / (64 * len(blocks(lengths, 64, 0, f))) for f in (False, True))
    assert full > 0.93 > in_order + 0.1
    examples = [Example.of([i] * n) for i, n in enumerate(lengths)]
    loader = BlockLoader(examples, 64, 4, 128, 0, full=True)
    for _ in range(loader.steps_per_epoch):
        for micro in loader.next():
            edges = micro.cu_seqlens.tolist()
            for begin, end in itertools.pairwise(edges):
                assert len(set(micro.tokens[begin:end].tolist())) == 1
    with pytest.raises(InputError, match="cannot resume: "):
        loader.load_state_dict(BlockLoader(examples, 64, 4, 128, 0).state_dict())


def test_4096_tokens_are_filled_on_real_dialogues(shared_data):
    tokenizer = Tokenizer.load(shared_data("llama_tokenizer.model"))
    rows = [json.loads(line) for line in shared_data("gsm8k_train.jsonl").open()][:600]
    lengths = [len(tokenizer.encode(row["question"] + row["answer"])) + 12 for row in rows]
    filled = blocks(lengths, 4096, 0, full=True)
    # The last block is what was left over.
    assert sum(lengths) / (4096 * len(filled)) > 0.98 * (len(filled) - 1) / len(filled)


def test_a_share_that_is_none_is_refused(world):
    given = {"sources": [], "filters": {}, "data": [world / "own.jsonl"], "block_tokens": None}
    with pytest.raises(InputError, match=r"shares: 0.001 of .*own.jsonl, 62, is none"):
        sft.open_inputs(recipe(world, **given, shares=[0.001]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ["x"]}, "give data, or sources in its place"),
        ({"sources": []}, "give data, or sources in its place"),
        ({"limit": 5}, "limit: bounds data"),
        ({"shares": [0.5]}, "shares: of plain data"),
        ({"sources": [], "data": ["x"], "shares": [0.5]}, "shares: of plain data"),  # filtered
        ({"filters": {"unsafe_chosen": True}}, "means nothing to dialogues"),
        ({"sources": [{"path": "a", "share": 0.5}]}, "shares add up to 0.5"),
    ],
)
def test_impossible_mixes(world, changes, message):
    with pytest.raises((ValidationError, InputError), match=message):
        recipe(world, **changes)


def test_blocks_hold_the_longest_dialogue(world):
    with pytest.raises(InputError, match="block_tokens: 64 has no room for a dialogue of context"):
        sft.open_inputs(recipe(world, block_tokens=64))
    with pytest.raises(InputError, match=r"sources: .*open\.jsonl holds 200 records, and a share"):
        sources = [{"path": world / "own.jsonl"}, {"path": world / "open.jsonl", "share": 0.9}]
        sft.open_inputs(recipe(world, sources=sources))
