"""What ranks do in tests/parallel/test_tensor.py and its neighbours: a model spread over them,
beside the same model whole in each of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from small_models import packed
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama2rt.data.packing import Batch, Example
from llama2rt.data.shared import pack_shared
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.parallel import Mesh, ParallelOptions
from llama2rt.parallel.context import split_micro_batches
from llama2rt.parallel.pipeline import cut_layers
from llama2rt.parallel.tensor import tensor_parallel

SHAPE = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_hidden": 48, "vocab_size": 61}


def spread(model: Llama | ScalarModel, mesh: Mesh) -> None:
    if mesh.degrees["tensor"] > 1:
        tensor_parallel(model, mesh)
    split_micro_batches(model, mesh)


def micro_batch(lengths: list[int], seed: int = 0) -> tuple[Tensor, ...]:
    """(tokens, positions, cu_seqlens, targets), two of seven targets not predicted."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = SHAPE["vocab_size"]
    tokens, positions, cu_seqlens = packed(
        *(torch.randint(vocabulary, (n,), generator=generator) for n in lengths)
    )
    targets = torch.randint(vocabulary, tokens.shape, generator=generator)
    targets[1::7] = targets[3::7] = -1
    return tokens, positions, cu_seqlens, targets


def shared_batch() -> Batch:
    """Answers of 1 to 7 tokens to two prompts, each of which is there once."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 61, n) for n in (13, 6)]
    examples = []
    for prompt in prompts:
        for length in (3, 1, 7):
            answer = random.integers(0, 61, length)
            trainable = np.arange(len(prompt) + length) >= len(prompt)
            examples.append(Example.of(np.concatenate([prompt, answer]), trainable))
    return pack_shared(examples)


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(
    options: ParallelOptions,
    lengths: list[int] | None,
    kind: type = Llama,
    shape: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Largest relative differences of outputs and gradients from one process's. `lengths` of
    documents; None for some that share tokens."""
    config = LlamaConfig(**{**SHAPE, "context": 64, **(shape or {})})
    mesh = Mesh.build(options, config)
    keys: dict[str, Any] = {}
    if lengths is None:
        batch = shared_batch()
        keys["keys"] = batch.keys
        assert batch.keys is not None and len(batch.keys.rows) > len(batch.tokens)
        *inputs, targets = (batch.tokens, batch.positions, batch.cu_seqlens, batch.targets)
    else:
        *inputs, targets = micro_batch(lengths)
    settings = dict(keys)
    if kind is Llama:
        inputs.append(targets)
        settings |= {"temperature": 0.8, "entropy": True}
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, len(targets), generator=generator)
    every = []
    for parallel in (False, True):
        model = kind(config).initialize(5)
        if parallel:
            spread(model, mesh)
        outputs = model(*inputs, **settings)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum((x * u).sum() for x, u in zip(outputs, upstream, strict=False)).backward()
        results = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
        results["hidden"] = model.hidden(*inputs[:3], **keys).detach()
        for name, p in model.named_parameters():
            gradient = full(p.grad).clone()
            if parallel and (group := mesh.group("context")) is not None:
                dist.all_reduce(gradient, group=group)  # FSDP's task
            results[name] = gradient
        every.append(results)
    one, many = every
    assert one.keys() == many.keys()
    return {name: distance(many[name], one[name]) for name in one}


def distance(x: Tensor, y: Tensor) -> float:
    """The largest difference, relative to the largest of y; a gradient may be nothing but 0, as
    that of queries that see one key is."""
    assert x.shape == y.shape and x.dtype == y.dtype
    return float((x - y).abs().max() / y.abs().max().clamp_min(1e-3))


def said(call: Callable[[], object]) -> str:
    """The error of `call`."""
    try:
        call()
    except (InputError, NotImplementedError) as error:
        return str(error)
    return ""


def pipeline_refusals() -> dict[str, str]:
    """What is said of what a pipeline does not do."""
    options, config = ParallelOptions(pipeline=2), LlamaConfig(**SHAPE)
    mesh = Mesh.build(options, config, pipelined=True)
    model = Llama(config).initialize(0)
    cut_layers(model, mesh, torch.float32)
    batch = micro_batch([3])
    with torch.no_grad():
        entropy = said(lambda: model(*batch, entropy=True))
    return {
        "stage of training": said(lambda: Mesh.build(options, config)),
        "scalar": said(lambda: cut_layers(ScalarModel(config), mesh, torch.float32)),
        "hidden": said(lambda: model.hidden(*batch[:3])),
        "gradients": said(lambda: model(*batch)),
        "entropy": entropy,
    }


def refusals() -> dict[str, str]:
    """What is said of what tensor parallelism does not do."""

    class Paged:
        pass

    options = ParallelOptions(context=2, tensor=2)
    config = LlamaConfig(**SHAPE)
    mesh = Mesh.build(options, config)
    tiny = Llama(LlamaConfig(**{**SHAPE, "vocab_size": 1}))
    other = Llama(config)
    other.transformer.blocks[1].gate = torch.nn.Linear(32, 48, bias=False)
    model = Llama(config)
    spread(model, mesh)
    tokens, positions, _, _ = micro_batch([3])
    return {
        "vocabulary": said(lambda: tensor_parallel(tiny, mesh)),
        "kind": said(lambda: tensor_parallel(other, mesh)),
        "generate": said(lambda: model.transformer(tokens, positions, Paged())),
    }
