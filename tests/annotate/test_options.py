"""The annotator as a recipe names it: exactly one, of the right kind, there before it is needed."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from llama2rt.annotate import AnnotatorOptions
from llama2rt.annotate.files import FileAnnotator
from llama2rt.annotate.models import JudgeAnnotator, RewardAnnotator
from llama2rt.checkpoint import load, native
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig, ScalarModel

PAIRS = Path("pairs.jsonl")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give one of files, helpfulness, judge and python"),
        ({"helpfulness": "a", "judge": "b"}, "give one of"),
        ({"helpfulness": "a", "files": ["b"]}, "give one of"),
        ({"judge": "a", "python": "b:c"}, "give one of"),
        ({"judge": "a", "safety": "b"}, "safety: only beside helpfulness"),
        ({"files": ["a"], "safety": "b"}, "safety: only beside helpfulness"),
        ({"python": "package.module"}, "python: expected package.module:function"),
        ({"people": ["a"]}, "people"),
    ],
)
def test_an_annotator_is_one(given, said):
    with pytest.raises(ValidationError, match=said):
        AnnotatorOptions.model_validate(given)


@pytest.fixture
def hook(monkeypatch):
    """A module named `hook`, whose `make` keeps what it is called with."""
    module = ModuleType("hook")
    module.called = []

    def make(*files):
        module.called.append(files)
        return "an annotator"

    module.make = make
    monkeypatch.setitem(sys.modules, "hook", module)
    return module


def test_a_function_gets_its_files(hook, tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    options = AnnotatorOptions(python="hook:make", files=files)
    with pytest.raises(InputError, match=r"annotator.files: .*a: no such file"):
        options.check()
    options.check(files=files)  # which an earlier step leaves
    files[0].touch()
    files[1].touch()
    options.check()
    assert options.annotator(PAIRS, "cpu") == "an annotator"
    assert hook.called == [tuple(files)]


@pytest.mark.parametrize("name", ["hook:missing", "no_such_module_here:make"])
def test_a_function_that_is_not_there_is_named(hook, name):
    with pytest.raises(InputError, match=f"annotator.python: {name}: "):
        AnnotatorOptions(python=name).check()


def test_files_alone_are_peoples(tmp_path):
    options = AnnotatorOptions(files=[tmp_path / "later.jsonl"])
    options.check()  # they may come later
    assert isinstance(options.annotator(PAIRS, "cpu"), FileAnnotator)


@pytest.fixture
def folders(tmp_path, small_tokenizer):
    config = LlamaConfig(
        dim=16, layers=1, heads=2, kv_heads=2, ffn_hidden=32, context=64,
        vocab_size=small_tokenizer.vocab_size,
    )  # fmt: skip
    scalar = ScalarModel(config, dtype=torch.float32).initialize(0)
    native.save(scalar, small_tokenizer, tmp_path / "reward")
    native.save(Llama(config).initialize(0), small_tokenizer, tmp_path / "language")
    return tmp_path


def test_models_are_of_their_kind(folders):
    reward, language = folders / "reward", folders / "language"
    for wrong, said in (
        ({"helpfulness": language}, "annotator.helpfulness: .* expected a reward model, found a l"),
        (
            {"helpfulness": reward, "safety": language},
            "annotator.safety: .* expected a reward model, found a language model",
        ),
        ({"judge": reward}, "annotator.judge: .* expected a language model, found a reward model"),
        ({"judge": folders / "none"}, "none"),
    ):
        with pytest.raises(InputError, match=said):
            AnnotatorOptions(**wrong).check()
    config = load(language, "meta")[0].config
    for scalar in (False, True):
        to_come = {folders / "none": SimpleNamespace(config=config, scalar=scalar)}
        options = AnnotatorOptions(judge=folders / "none")
        if scalar:
            with pytest.raises(InputError, match=r"annotator\.judge: .* found a reward model"):
                options.check(to_come)
            continue
        options.check(to_come, longest=config.context)
        with pytest.raises(InputError, match=r"annotator\.judge: .* its context of"):
            options.check(to_come, longest=config.context + 1)
    for right, made in (
        ({"helpfulness": reward, "safety": reward}, RewardAnnotator),
        ({"judge": language}, JudgeAnnotator),
    ):
        options = AnnotatorOptions(**right)
        options.check()
        assert isinstance(options.annotator(PAIRS, "cpu"), made)
