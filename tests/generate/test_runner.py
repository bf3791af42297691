"""Forward passes of the engine: what runs natively, that it is the model's, when it is packed."""

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest
import torch
from small_models import Ids, far_from_flat, packed

from llama2rt import ops
from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.generate.kv_cache import Addresses, KVCache
from llama2rt.generate.runner import Runner, why_not_native
from llama2rt.model import adapters
from llama2rt.ops import linear

pytestmark = pytest.mark.skipif(
    "cpu" not in ops.backends("cpu")["swiglu"]["native"], reason="_cpu is not built"
)
PROMPTS = [[5, 6, 7], [9] * 20, [4, 8] * 5]


def run(engine, **options):
    completions = engine.generate(PROMPTS, n=2, max_tokens=12, seed=3, **options)
    return [c.tokens for c in completions], np.concatenate([c.logprobs for c in completions])


def by_modules(model):
    """The same model, which a hook keeps on its modules."""
    model = copy.deepcopy(model)
    model.register_forward_pre_hook(lambda *_: None)
    return model


def mixed_step(model, prompts, decoding):
    """(tokens, positions, cache) of a step over `prompts` and one token after each of `decoding`,
    whose other tokens are in the cache already."""
    page_size, config = 4, model.config
    cache = KVCache(config.layers, 64, page_size)
    pages, tables = iter(range(64)), []
    for document in (*decoding, *prompts):
        tables.append([next(pages) for _ in range(-(-len(document) // page_size))])

    def slots(table, tokens):
        return [table[t // page_size] * page_size + t % page_size for t in tokens]

    def step(new, old):
        tables_of = {id(d): t for d, t in zip((*decoding, *prompts), tables, strict=True)}
        width = max((len(tables_of[id(d)]) for d in old), default=0)
        at = [slots(tables_of[id(d)], range(len(d))) for d in new]
        at += [slots(tables_of[id(d)], [len(d) - 1]) for d in old]
        cu = np.cumsum([0, *map(len, new)])
        table = [tables_of[id(d)] + [0] * (width - len(tables_of[id(d)])) for d in old]
        cache.addresses = Addresses(
            slots=torch.tensor(list(chain(*at))),
            prompt_cu_seqlens=torch.tensor(cu, dtype=torch.int32),
            prompt_tokens=int(cu[-1]),
            longest_prompt=max(map(len, new), default=0),
            block_table=torch.tensor(table, dtype=torch.int32).view(len(old), width),
            lengths=torch.tensor([len(d) for d in old], dtype=torch.int32),
            cu_seqlens_q=None,
        )
        tokens = torch.tensor([*chain(*new), *(d[-1] for d in old)])
        positions = torch.tensor(
            [i for d in new for i in range(len(d))] + [len(d) - 1 for d in old]
        )
        return tokens, positions, cache

    with torch.no_grad():
        model.transformer(*step([d[:-1] for d in decoding] and decoding, []))
    return step(prompts, decoding)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_mixed_step_is_the_models_own(kv_heads):
    """Prompts and decoding sequences together, all rows' logits, against the training path."""
    model = far_from_flat(kv_heads)
    prompts, decoding = [[3, 9, 27, 5, 8], [7]], [[11, 12, 13, 14, 15], [21, 22], [31]]
    tokens, positions, cache = mixed_step(model, prompts, decoding)
    runner = Runner(model)
    runner.refresh()
    assert runner.path == "packed fp32"
    with torch.no_grad():
        expected = [model.logits(*packed(d)) for d in prompts]
        expected += [model.logits(*packed(d))[-1:] for d in decoding]
        expected = torch.cat(expected)
        got = runner.forward(tokens, positions, cache, slice(None)).clone()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        rows = torch.tensor([1, 4, 7])
        assert torch.equal(runner.forward(tokens, positions, cache, rows), got[rows])
        for bad, message in (
            ({"tokens": tokens + 400}, "outside the vocabulary"),
            ({"positions": positions + 96}, "positions"),
            ({"rows": torch.tensor([9])}, "rows"),
            ({"rows": torch.tensor([1, 0])}, "rising"),
        ):
            inputs = {"tokens": tokens, "positions": positions, "cache": cache, "rows": rows} | bad
            with pytest.raises(ValueError, match=message):
                runner.forward(**inputs)
        cache.addresses.slots[2] = 64 * 4
        with pytest.raises(ValueError, match="slots"):
            runner.forward(tokens, positions, cache, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_engine_is_itself_on_packed_weights(dtype):
    model = far_from_flat(2, dtype=dtype)
    ours, theirs = Engine(model, Ids()), Engine(by_modules(model), Ids())
    tokens, logprobs = run(ours, temperature=0)
    expected, their_logprobs = run(theirs, temperature=0)
    assert (
        ours.runner.path == f"packed {str(dtype)[6:].replace('float', 'fp').replace('bfp', 'bf')}"
    )
    assert theirs.runner.path == "modules: the model has forward hooks"
    assert ours.runner.nbytes > 0 and theirs.runner.nbytes == 0
    if dtype == torch.float32:
        assert tokens == expected
        np.testing.assert_allclose(logprobs, their_logprobs, atol=2e-5)
        tokens, logprobs = run(ours, temperature=0.8, top_p=0.9)
        expected, their_logprobs = run(theirs, temperature=0.8, top_p=0.9)
        assert tokens == expected
        np.testing.assert_allclose(logprobs, their_logprobs, atol=2e-5)


def test_changed_weights_are_packed_again_however_they_changed():
    model = far_from_flat()
    engine = Engine(model, Ids())
    fills = []
    native = None

    def samples():
        nonlocal native
        result = run(engine, temperature=0)
        if engine.runner._native is not native:
            native = engine.runner._native
            fill = native._output.packed.fill
            native._output.packed.fill = lambda *xs: fills.append(1) or fill(*xs)
        return result

    def fresh():
        return run(Engine(model, Ids()), temperature=0)

    before = samples()
    assert samples()[0] == before[0] and not fills, "packed once while nothing changed"
    changes = [
        lambda: model.transformer.blocks[1].down.weight.data.neg_(),
        lambda: model.output.weight.detach().mul_(0.5),
        lambda: setattr(model.output.weight, "data", model.output.weight.data * 3),
        lambda: model.transformer.norm.weight.data.mul_(-1),
    ]
    for i, change in enumerate(changes):
        change()
        tokens, logprobs = samples()
        assert (tokens, logprobs.tolist()) == (fresh()[0], fresh()[1].tolist())
        assert tokens != before[0] or logprobs.tolist() != before[1].tolist()
        assert len(fills) == min(i + 1, 3), "a norm's weight is read where it is"
        before = tokens, logprobs
    model.to(torch.bfloat16)
    assert samples()[0] == fresh()[0] and engine.runner.path == "packed bf16"
    engine.runner.release()
    assert engine.runner.nbytes == 0 and samples()[0] == fresh()[0]


def test_all_else_takes_its_modules():
    model = far_from_flat()
    assert why_not_native(model) == ""
    with ops.use("reference"):
        assert why_not_native(model) == "ops run on the backend 'reference'"
        engine = Engine(model, Ids())
        expected = run(engine, temperature=0)[0]
        assert engine.runner.path.startswith("modules: ops run")
    assert run(engine, temperature=0)[0] == expected and engine.runner.path == "packed fp32"
    model.transformer.run_block = lambda block, *inputs: block(*inputs)
    assert "run_block" in why_not_native(model)
    assert "torch.float64" in why_not_native(far_from_flat(dtype=torch.float64))
    mixed = far_from_flat()
    mixed.transformer.norm.bfloat16()
    assert why_not_native(mixed).startswith("transformer.norm.weight is of torch.bfloat16")
    pytest.importorskip("peft")
    adapted = far_from_flat()
    adapters.adapt(adapted, rank=2, alpha=4, targets=["query"])
    assert "query is a" in why_not_native(adapted)
    for odd in (mixed, adapted):
        with pytest.raises(InputError, match=r"^weights: int8 is for a plain model on a CPU, and "):
            Engine(odd, Ids(), weights="int8")
    with pytest.raises(InputError, match=r"^weights: expected same or int8, got 'int4'"):
        Engine(far_from_flat(), Ids(), weights="int4")


def test_int8_is_near_and_said():
    model = far_from_flat()
    engine = Engine(model, Ids(), weights="int8")
    _, logprobs = run(engine, temperature=0)
    assert engine.runner.path == "packed int8" and engine.of(model).runner.weights == "int8"
    same = Engine(model, Ids())
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if weight.dim() == 2 and "embedding" not in name:
                step = weight.abs().amax(1, keepdim=True) / 127
                weight.copy_((weight / step).round() * step)
    assert run(engine, temperature=0.7)[0] == run(Engine(rounded, Ids()), temperature=0.7)[0]
    assert not np.array_equal(run(same, temperature=0)[1], logprobs)
    assert engine.runner.nbytes < same.runner.nbytes / 3
    model.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(InputError, match=r"^weights: int8 .* the model has forward hooks"):
        run(engine, temperature=0)


def test_threads_share_an_engine(small_tokenizer):
    """The native pass leaves the interpreter to others, which may be in a pass of their own."""
    engine = Engine(far_from_flat(vocab_size=small_tokenizer.vocab_size), small_tokenizer)
    prompts = [[small_tokenizer.bos, 5 + i] for i in range(4)]

    def answer(seed: int) -> list[tuple[list[int], list[float]]]:
        found = engine.generate(prompts, n=2, max_tokens=24, seed=seed)
        return [(completion.tokens, completion.logprobs) for completion in found]

    alone = [answer(seed) for seed in range(8)]
    assert engine.runner.path.startswith("packed")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, range(8))) == alone


def test_what_is_to_be_trained_on_is_rounded_as_in_training(monkeypatch):
    """In 16 bits packed passes round less often than the modules, whose distribution is trained;
    where those round by the number of rows, neither is nearer to it."""
    model = far_from_flat().bfloat16()

    def apart(engine):
        tokens, found = run(engine)
        trained = []
        for i, sampled in enumerate(tokens):
            ids = torch.tensor(PROMPTS[i // 2] + sampled)
            with torch.no_grad():
                logprobs = model(*packed(ids), ids.roll(-1))
            trained.append(logprobs[len(PROMPTS[i // 2]) - 1 : -1].float().numpy())
        return np.abs(found - np.concatenate(trained)), tokens, found

    blocked = linear._BY_ONEDNN[torch.bfloat16]
    engine = Engine(model, Ids(), as_trained=True)
    gap, *_ = apart(engine)
    if blocked:
        assert engine.runner.path == "packed bf16"
        monkeypatch.setitem(linear._BY_ONEDNN, torch.bfloat16, False)
    else:
        assert gap.max() < 1e-4
    exact, fast = Engine(model, Ids(), as_trained=True), Engine(model, Ids())
    by_modules, tokens, found = apart(exact)
    assert exact.runner.path == "modules: torch.bfloat16 is to be rounded as in training"
    by_packed, packed_tokens, packed_found = apart(fast)
    assert fast.runner.path == "packed bf16"
    assert max(gap.mean(), by_modules.mean(), by_packed.mean()) < 0.03  # noise of bf16
    assert packed_tokens != tokens or np.abs(packed_found - found).max() > 1e-3
