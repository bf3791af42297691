"""What the tests of stages share besides the pocket problem."""

import pytest
import torch

from llama2rt.checkpoint import native
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.report.plot import Plot
from llama2rt.stages import loading
from llama2rt.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def _one_thread(_same_start) -> None:
    """Models this small gain nothing from a second thread and lose much when a core is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _pages_without_drawings():
    """matplotlib takes longer than a run this short. tests/quickstart draws the
    pages of all stages but iterate's, which is a table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plot, "svg", lambda plot, salt="": "<svg></svg>")
        yield


@pytest.fixture(scope="session")
def strangers(pocket, tmp_path_factory):
    """A reward model and a language model of the policy's size with another tokenizer, and a reward
    model with the policy's and a context of 12."""
    folder = tmp_path_factory.mktemp("strangers")
    policy, tokenizer = loading.load_llama(pocket.sft)
    text = "the quick brown fox jumps over twelve lazy dogs " * 3
    foreign = Tokenizer.train([f"{i} {text}" for i in range(50)], 300, folder / "tokenizer")
    shape = dict(vars(policy.config), vocab_size=max(300, tokenizer.vocab_size))
    native.save(ScalarModel(LlamaConfig(**shape)).initialize(1), foreign, folder / "reward")
    native.save(Llama(LlamaConfig(**shape)).initialize(1), foreign, folder / "policy")
    short = LlamaConfig(**dict(vars(policy.config), context=12))
    native.save(ScalarModel(short).initialize(1), tokenizer, folder / "short")
    return folder
