"""The loop: global normalisation, resume to the bit, Ctrl-C, divergence, recomputation."""

import math
import os
import signal
from collections import Counter
from pathlib import Path

import json_lines
import numpy as np
import power
import pytest
import torch
from processes import run_python
from small_models import packed
from torch.utils._python_dispatch import TorchDispatchMode

from llama2rt import energy
from llama2rt.data.loader import ExampleLoader
from llama2rt.data.packing import Batch, Example
from llama2rt.model import Llama, LlamaConfig
from llama2rt.model.transformer import Block
from llama2rt.run import Recipe, Run
from llama2rt.train import TrainOptions, fit

CONFIG = LlamaConfig(32, 2, 4, 2, 64, vocab_size=41, context=64)


class Tiny(Recipe):
    train: TrainOptions = TrainOptions()


def examples(count: int = 24) -> list[Example]:
    rng = np.random.default_rng(0)
    made = []
    for k in range(count):
        tokens = (np.arange(rng.integers(3, 30)) * (k % 7 + 1)) % 41
        made.append(Example.of(tokens, rng.random(len(tokens)) < 0.7))
    return made


def objective(model: Llama, batch: Batch):
    logprob = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.targets)
    return -logprob.sum(), {"tokens": batch.weight}


def train(directory: Path, *, steps: int, batch: int = 8, loss=objective, **options) -> Llama:
    options = TrainOptions(**{"lr": 1e-2, "checkpoint_every": 3, **options})
    run = Run.open(directory, Tiny(train=options), resume=True)
    model = Llama(CONFIG).initialize(0)
    loader = ExampleLoader(examples(), batch, options.micro_tokens, seed=1)
    fit(run, model, loader, loss, options, steps=steps)
    return model


def weights(model: Llama) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def losses(directory: Path) -> list[tuple[int, float, float]]:
    lines = json_lines.read(directory / "metrics.jsonl")
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]


def test_one_batch_of_eight_is_eight_of_one(tmp_path):
    # 30 tokens hold one long example or two short ones: micro-batches of unequal weight.
    whole = train(tmp_path / "1x8", steps=6, micro_tokens=4096)
    parts = train(tmp_path / "8x1", steps=6, micro_tokens=30)
    for a, b in zip(losses(tmp_path / "1x8"), losses(tmp_path / "8x1"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-3, atol=1e-4)


def test_bf16_learns_like_fp32(tmp_path):
    train(tmp_path / "fp32", steps=30)
    model = train(tmp_path / "bf16", steps=30, precision="bf16", micro_tokens=100)
    assert next(model.parameters()).dtype == torch.bfloat16
    full, half = losses(tmp_path / "fp32")[-1][1], losses(tmp_path / "bf16")[-1][1]
    assert losses(tmp_path / "fp32")[0][1] - full > 1.0
    assert half == pytest.approx(full, rel=0.05)


def test_recomputation_changes_nothing(tmp_path, monkeypatch):
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *args: calls.append(1) or forward(*args))
    plain = train(tmp_path / "plain", steps=4)
    assert len(calls) == 4 * CONFIG.layers
    for taken, how in enumerate(("full", "selective"), start=1):
        recomputed = train(tmp_path / how, steps=4, activation_checkpointing=how)
        assert len(calls) == (4 + taken * 2 * 4) * CONFIG.layers
        assert torch.equal(weights(plain), weights(recomputed))
        assert recomputed.transformer.run_block is plain.transformer.run_block


def test_how_recipes_ask_for_recomputation():
    asked = [TrainOptions(activation_checkpointing=how) for how in (True, False, "selective")]
    assert [options.activation_checkpointing for options in asked] == ["full", "none", "selective"]
    with pytest.raises(ValueError, match="selective excludes compile"):
        TrainOptions(activation_checkpointing="selective", compile=True)


def test_recomputation_keeps_one_activation_a_block():
    from llama2rt.train.recompute import recompute_blocks

    model = Llama(LlamaConfig(32, 8, 4, 4, 128, vocab_size=41, context=64)).initialize(0)
    tokens = torch.arange(64) % 41

    def saved() -> int:
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            held = model(*packed(tokens), tokens)  # noqa: F841, its graph keeps the storages alive
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    plain = saved()
    with recompute_blocks(model):
        assert saved() < plain / 3


def test_selective_recomputation_takes_no_product_twice():
    from llama2rt.train.recompute import recompute_blocks

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            counts[op] += 1
            return op(*args, **(kwargs or {}))

    model = Llama(CONFIG).initialize(0)
    tokens = torch.arange(40) % 41
    found = {}
    for how in ("none", "selective", "full"):
        counts: Counter = Counter()
        with recompute_blocks(model, how), Count():
            (-model(*packed(tokens), tokens).sum()).backward()
        found[how] = [
            counts[op]
            for op in (
                torch.ops.aten.mm.default,
                torch.ops.llama2rt.attention.default,
                torch.ops.llama2rt.swiglu.default,
            )
        ]
    products, attention, swiglu = found["none"]
    assert (attention, swiglu) == (CONFIG.layers, CONFIG.layers)
    assert found["selective"] == [products, attention, 2 * swiglu]
    # Six of a block's seven: nothing in it needs what the last one gave.
    assert found["full"] == [products + 6 * CONFIG.layers, 2 * attention, 2 * swiglu]


def test_resume_after_every_step_is_bit_for_bit(tmp_path):
    # Steps 1 to 8 cross two epochs of 24 examples in batches of 8.
    for precision in ("fp32", "bf16"):
        whole = train(tmp_path / f"{precision}-whole", steps=8, precision=precision)
        directory = tmp_path / f"{precision}-parts"
        for stop in range(1, 8):
            train_until(directory, stop, precision)
        parts = train(directory, steps=8, precision=precision, micro_tokens=4096)
        assert torch.equal(weights(whole), weights(parts))
        assert losses(tmp_path / f"{precision}-whole") == losses(directory)


def train_until(directory: Path, stop: int, precision: str) -> None:
    def interrupting(model: Llama, batch: Batch):
        interrupting.steps += 1
        os.kill(os.getpid(), signal.SIGINT)
        return objective(model, batch)

    interrupting.steps = 0
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {stop} of 8"):
        train(directory, steps=8, precision=precision, loss=interrupting)
    assert interrupting.steps == 1


def test_the_handler_is_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    train(tmp_path, steps=1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_stops_before_the_weights(tmp_path, what):
    def diverging(model: Llama, batch: Batch):
        loss, metrics = objective(model, batch)
        diverging.calls += 1
        if diverging.calls > 4:
            loss = loss * math.nan if what == "loss" else loss + (loss - loss.detach()) * math.inf
        return loss, metrics

    diverging.calls = 0
    with pytest.raises(FloatingPointError, match=r"at step 5; step-3 is the last good checkpoint"):
        train(tmp_path, steps=8, loss=diverging)
    resumed = train(tmp_path, steps=8)
    assert torch.equal(weights(resumed), weights(train(tmp_path / "whole", steps=8)))


def test_metrics_are_means_over_the_whole_step(tmp_path):
    train(tmp_path, steps=2, micro_tokens=64)
    line = json_lines.read(tmp_path / "metrics.jsonl")[0]
    assert line["tokens"] == 1.0
    assert 0.9 * math.log(41) < line["loss"] < 1.1 * math.log(41)
    assert {"lr", "gradient_norm", "tokens_per_second", "mfu"} <= line.keys()


def test_validation_runs_without_gradients_and_is_returned(tmp_path):
    calls = []

    def validate(model: Llama) -> dict[str, float]:
        assert not torch.is_grad_enabled()
        assert not model.training
        calls.append(1)
        return {"held_out_loss": 1.5}

    options = TrainOptions(validate_every=2)
    run = Run.open(tmp_path, Tiny(train=options))
    model = Llama(CONFIG).initialize(0)
    loader = ExampleLoader(examples(), 8, 4096, seed=1)
    assert fit(run, model, loader, objective, options, steps=5, validate=validate) == {
        "held_out_loss": 1.5
    }
    assert len(calls) == 3


# One process imports once; each life is a fork of it that a timer kills after a random time, with
# no more warning than SIGKILL gives. The first two deaths are set in processor time, which a busy
# machine hardly moves; the others by the clock, which runs on while a checkpoint is written.
KILLED = """
import os, random, shutil, signal, sys
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/../helpers"]
import torch
from torch.utils.tensorboard import SummaryWriter
from test_train_loop import *
torch.set_num_threads(1)

def job(directory, precision):
    model = train(directory, steps=30, precision=precision, micro_tokens=100)
    torch.save(weights(model), directory / "weights.pt")

def live(directory, precision, seconds, timer=signal.ITIMER_PROF):
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.setitimer(timer, seconds)
        try:
            job(directory, precision)
            code = 0
        finally:
            os._exit(code)
    _, status, used = os.wait4(pid, 0)
    return status, used.ru_utime + used.ru_stime

random.seed(int(sys.argv[3]))
whole, parts = Path(sys.argv[2]) / "whole", Path(sys.argv[2]) / "parts"
status, life = live(whole, "bf16", 0)
assert status == 0
killed = 0
while not (parts / "weights.pt").exists():
    # After six deaths a life is spared: each does again what follows its last checkpoint.
    seconds = random.uniform(0.1, 0.6) * life if killed < 6 else 0
    timer = signal.ITIMER_PROF if killed < 2 else signal.ITIMER_REAL
    status, used = live(parts, "bf16", seconds, timer)
    killed += os.WIFSIGNALED(status)
    if status == 0 and killed < 2:
        # Something else slowed the first life down: this one is the better measure.
        life, killed = min(life, used), 0
        shutil.rmtree(parts)
assert torch.equal(torch.load(whole / "weights.pt"), torch.load(parts / "weights.pt"))
assert losses(whole) == losses(parts)
print("killed", killed, "times")
"""


def test_death_at_random_moments_changes_no_bit(tmp_path, seed):
    arguments = Path(__file__).parent, tmp_path, seed
    done = run_python("-c", KILLED, *arguments, timeout_seconds=300)
    assert int(done.stdout.split()[1]) >= 2, done.stdout


def test_energy_is_logged_per_token_and_step(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(
        energy,
        "of_device",
        lambda device, **_: power.tree(tmp_path / "power", 50.0, lambda: now[0]),
    )

    def slow(model, batch):
        now[0] += 2.0
        return objective(model, batch)

    train(tmp_path / "run", steps=4, batch=24, loss=slow, log_every=2)
    lines = json_lines.read(tmp_path / "run" / "metrics.jsonl")
    tokens = sum(len(example.tokens) for example in examples())
    assert [line["joules_per_step"] for line in lines] == pytest.approx([100.0, 100.0], rel=1e-6)
    assert [line["joules_per_token"] for line in lines] == pytest.approx([100 / tokens] * 2)


def test_energy_that_nobody_measures_is_said_once(tmp_path, monkeypatch):
    meter = energy.EnergyMeter(powercap=tmp_path / "nothing")
    monkeypatch.setattr(energy, "of_device", lambda device, **_: meter)
    train(tmp_path / "run", steps=4)
    lines = json_lines.read(tmp_path / "run" / "metrics.jsonl")
    assert "not measured (CPU: no RAPL domain" in lines[0]["energy"]
    assert not any("energy" in line for line in lines[1:])
    assert not any("joules" in key for line in lines for key in line)
