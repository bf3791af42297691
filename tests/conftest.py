"""What every test shares: real inputs where they are present, one seed, few threads."""

import mmap
import os
import random
from pathlib import Path

import hypothesis
import hypothesis.core
import pytest

# Before torch or numpy start their thread pools. `make test` says 1, as it starts several workers.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch

# An assertion that fails inside a helper shows its values, as one in a test does.
pytest.register_assert_rewrite(
    *(path.stem for path in Path(__file__).with_name("helpers").glob("*.py"))
)

# Without a GPU, Triton's kernels run in its interpreter, which must be chosen before their import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _shared_data_folder() -> Path:
    """LLAMA2RT_TEST_DATA, or the folder that lies beside a checkout where real inputs are kept."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    return Path(os.environ.get("LLAMA2RT_TEST_DATA", default))


@pytest.fixture(scope="session")
def shared_data():
    """``shared_data(name)``: the path of a real input, or a skip that says what is missing."""

    def path(name: str) -> Path:
        found = _shared_data_folder() / name
        if not found.is_file():
            pytest.skip(f"real input {found} is absent (set LLAMA2RT_TEST_DATA to its folder)")
        return found

    return path


def pytest_configure(config: pytest.Config) -> None:
    seed = os.environ.get("SEED", "0")
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist: one seed for the whole run
        seed = config.workerinput["llama2rt_seed"]
    config.llama2rt_seed = random.randrange(2**31) if seed == "random" else int(seed)
    # No deadline: on a busy machine an example's time says nothing about the code.
    hypothesis.settings.register_profile("llama2rt", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("llama2rt")
    if config.option.hypothesis_seed is None:
        hypothesis.core.global_force_seed = config.llama2rt_seed  # what that option sets


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    node.workerinput["llama2rt_seed"] = node.config.llama2rt_seed


TABLES = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session")
def print_after_the_tests(request: pytest.FixtureRequest):
    """`print_after_the_tests(title, text)`: a section of its own, once every test has run."""

    def keep(title: str, text: str) -> None:
        config = request.config
        if hasattr(config, "workeroutput"):
            config.workeroutput.setdefault("llama2rt_tables", {})[title] = text
        else:
            config.stash.setdefault(TABLES, {})[title] = text

    return keep


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    # A worker that died has handed over nothing.
    tables = getattr(node, "workeroutput", {}).get("llama2rt_tables", {})
    node.config.stash.setdefault(TABLES, {}).update(tables)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for title, text in config.stash.get(TABLES, {}).items():
        terminalreporter.section(title)
        terminalreporter.write_line(text)


def pytest_report_header(config: pytest.Config) -> str:
    return f"SEED={config.llama2rt_seed} (SEED=random draws another one)"


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A 400-piece tokenizer trained on a few made sentences."""
    from llama2rt.text import Tokenizer

    sentence = "the quick brown fox jumps over lazy dogs and counts sheep from zero to twelve"
    words = sentence.split()
    sentences = [
        f"{a} {b} {c}, {a}{c}. 2+{len(b)}={len(b) + 2}; what is {b}? [INST] {c} [/INST]"
        for a in words
        for b in words[::2]
        for c in words[::3]
    ]
    return Tokenizer.train(sentences, 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def pocket(tmp_path_factory: pytest.TempPathFactory):
    """One small problem for all stages of RLHF and plans of them, built once."""
    import pocket as problem

    torch.set_num_threads(1)
    return problem.build(tmp_path_factory.mktemp("pocket"))


@pytest.fixture(scope="session")
def strangers(pocket, tmp_path_factory):
    """A reward model and a language model of the policy's size with another tokenizer, and a reward
    model with the policy's and a context of 12."""
    from llama2rt.checkpoint import native
    from llama2rt.model import Llama, LlamaConfig, ScalarModel
    from llama2rt.stages import loading
    from llama2rt.text.tokenizer import Tokenizer

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


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return request.config.llama2rt_seed


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> None:
    """Each test starts from the same seeds, whichever ran before it."""
    import numpy

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    random.seed(request.config.llama2rt_seed)
    numpy.random.seed(request.config.llama2rt_seed)
    torch.manual_seed(request.config.llama2rt_seed)


@pytest.fixture
def poisoned():
    """torch.empty returns NaN (or the largest integer), so an unwritten element is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def far():
    """`far(x)`: a copy of x whose rows lie 2^30 elements apart, in memory reserved but not filled.

    The stride fits 32 bits and, from the third row on, the offset does not.
    """

    def copy(x: torch.Tensor) -> torch.Tensor:
        stride = 2**30
        size = x.element_size() * (stride * (len(x) - 1) + x[0].numel())
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
        try:
            memory = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            pytest.skip(f"{size} bytes of address space: {error}")
        apart = torch.frombuffer(memory, dtype=x.dtype).as_strided(
            x.shape, (stride, *x[0].contiguous().stride())
        )
        return apart.copy_(x)

    return copy


# A module's: idle ranks keep a hundred threads of gloo, which wake all the time.
@pytest.fixture(scope="module")
def on_ranks():
    """`on_ranks(size, function, *arguments)`: see helpers/rank_pool.py."""
    from rank_pool import pools

    with pools() as run:
        yield run
