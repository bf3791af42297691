"""Fine-tuning: only answers are learned, long dialogues are left out whole, the loss falls."""

import json_lines
import pytest

import llama2rt
from llama2rt.checkpoint import native
from llama2rt.data.records import Dialogue
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig
from llama2rt.stages import sft
from llama2rt.stages.sft import SftRecipe
from llama2rt.train import TrainOptions


def dialogue(i: int) -> dict:
    answer = {"role": "assistant", "content": f"{i} and {i}"}
    return {"messages": [{"role": "user", "content": f"say {i} twice"}, answer]}


@pytest.fixture
def init(tmp_path, small_tokenizer):
    config = LlamaConfig(32, 2, 2, 2, 64, vocab_size=small_tokenizer.vocab_size, context=96)
    native.save(Llama(config).initialize(0), small_tokenizer, tmp_path / "base")
    data = tmp_path / "dialogues.jsonl"
    json_lines.write(data, (dialogue(i) for i in range(60)))
    return {"init": tmp_path / "base", "data": [data]}


def losses(directory) -> list[float]:
    lines = json_lines.read(directory / "metrics.jsonl")
    return [line["held_out_loss"] for line in lines if "held_out_loss" in line]


def test_held_out_loss_falls_and_the_model_answers(init, tmp_path):
    options = TrainOptions(lr=1e-2, micro_tokens=512)
    recipe = SftRecipe(**init, batch_size=16, epochs=12, held_out=0.1, train=options)
    folder = sft.run(recipe, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[-1] < 0.4 * found[0]
    model, tokenizer = llama2rt.load(folder)
    assert isinstance(model, Llama)
    assert tokenizer is not None


def test_only_answers_are_targets(small_tokenizer):
    (example,) = sft.encode([Dialogue(**dialogue(7))], small_tokenizer, 96)
    learned = [int(t) for t, on in zip(example.tokens, example.trainable, strict=True) if on]
    assert learned[-1] == small_tokenizer.eos
    assert small_tokenizer.decode(learned[:-1]).strip() == "7 and 7"


def test_too_long_is_left_out_and_not_cut(small_tokenizer, caplog):
    long = dialogue(1)
    long["messages"][1]["content"] = "one " * 200
    dialogues = [Dialogue(**dialogue(0)), Dialogue(**long)]
    assert len(sft.encode(dialogues, small_tokenizer, 96)) == 1
    assert "1 dialogues longer than the context of 96 left out" in caplog.text
    with pytest.raises(InputError, match="all 1 dialogues are longer"):
        sft.encode(dialogues[1:], small_tokenizer, 96)


def test_split_is_seeded_and_disjoint(init):
    recipe = SftRecipe(**init, held_out=0.25, limit=40, seed=3)
    training, held_out = sft.split(recipe)
    assert (len(training), len(held_out)) == (30, 10)
    texts = [d.messages[0]["content"] for d in training + held_out]
    assert len(set(texts)) == 40
    assert sft.split(recipe)[1] == held_out
    assert sft.split(SftRecipe(**init, held_out=0.25, limit=40, seed=4))[1] != held_out


def test_real_dialogues(init, shared_data):
    data = shared_data("gsm8k_train.jsonl")
    recipe = SftRecipe(init=init["init"], data=[data], limit=20, held_out=0.2)
    training, held_out = sft.split(recipe)
    assert (len(training), len(held_out)) == (16, 4)
    assert all("####" in d.messages[-1]["content"] for d in training)


def test_more_epochs_go_on_to_the_same_bits(init, tmp_path, caplog):
    def recipe(epochs, **train):
        options = TrainOptions(lr=1e-2, schedule="constant", checkpoint_every=2, **train)
        return SftRecipe(**init, batch_size=20, epochs=epochs, held_out=0.1, train=options)

    def weights(folder):
        return (folder / "model.safetensors").read_bytes()

    whole = sft.run(recipe(3), tmp_path / "whole")
    shorter = weights(sft.run(recipe(2), tmp_path / "run"))
    longer = sft.run(recipe(3, log_every=2), tmp_path / "run", resume=True)
    assert weights(whole) == weights(longer) != shorter
    assert "resumed with epochs = 3 (was 2), train.log_every = 2 (was 1)" in caplog.text
    assert (tmp_path / "run" / "report.json").is_file()


def test_prompts_trained_on_and_held_out_are_said(init, tmp_path, caplog):
    shared = [dialogue(i) for i in (3, 5)]
    shared[1]["messages"][-1]["content"] = "another answer to the same"
    json_lines.write(tmp_path / "validation.jsonl", [*shared, dialogue(70)])
    recipe = SftRecipe(**init, validation=[tmp_path / "validation.jsonl"])
    inputs = sft.open_inputs(recipe)
    assert (len(inputs.training), len(inputs.held_out)) == (60, 3)
    assert "data: 2 prompts are in validation too" in caplog.text


def test_the_shipped_recipe_is_valid():
    from llama2rt.cli import find_recipe, read_recipe

    SftRecipe.model_validate(read_recipe(find_recipe("gsm8k-sft")))
