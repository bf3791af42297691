"""What ranks do in tests/parallel/test_tensor_group.py: they sample from a model that none of them
holds whole."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from parallel_rollouts import held_bytes
from small_models import Ids, far_from_flat, packed

from llama2rt.errors import InputError
from llama2rt.generate import Engine, engine, generation
from llama2rt.generate.kv_cache import page_bytes
from llama2rt.generate.sampling import Choice
from llama2rt.model import Llama
from llama2rt.parallel import Mesh, ParallelOptions, tensor_group, whole, world
from llama2rt.parallel.parallelize import parallelize
from llama2rt.parallel.shards import local_part
from llama2rt.planning import Model as Planned
from llama2rt.planning import Sampling, inference
from llama2rt.planning.memory import Setting

# 401 tokens, which no two ranks share evenly; prompts of one page and of several.
PROMPTS = [[5, 9, 17], [33], [400, 8, 8, 121, 64, 7, 250, 3, 19]]
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.7, "top_k": 20},
]


def model_of(kv_heads: int, tied: bool) -> Llama:
    model = far_from_flat(kv_heads, vocab_size=401)
    if not tied:
        return model
    shape = {**vars(model.config), "tied": True}
    small = Llama(type(model.config)(**shape)).initialize(0)
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return small


def drawn(model: Llama) -> list[list[tuple[list[int], list[float]]]]:
    """Samples of the prompts in all ways, in small pages and few at a time."""
    sampler = Engine(model, Ids(-1), page_size=4, max_sequences=3)
    return [
        [
            (completion.tokens, completion.logprobs)
            for completion in sampler.generate(PROMPTS, n=2, max_tokens=6, seed=3, **way)
        ]
        for way in WAYS
    ]


def sampled(options: ParallelOptions, kv_heads: int, tied: bool) -> dict[str, Any]:
    """One process's samples and those of a gathered policy, drawn by each group of tensor ranks,
    of which the first decides and the others would choose something else."""
    model = model_of(kv_heads, tied)
    expected = drawn(model)
    trained = copy.deepcopy(model)
    mesh = Mesh.build(options, model.config)
    parallelize(trained, mesh)
    batch = packed(PROMPTS[2], PROMPTS[1])
    with disagreeing(mesh), tensor_group.gathered(trained, mesh, torch.float32) as policy:
        found = drawn(policy)
        with torch.no_grad():
            logits, one_processs = policy.logits(*batch), model.logits(*batch)
        result = {
            "share": held_bytes(policy) / held_bytes(model),
            "planned": inference.answering(
                Sampling(Planned("policy", model.config), None, 1, 1, 1, 1),
                Setting(mesh.degrees, 4, 0, 0),
            )["weights"]
            / held_bytes(policy),
            "pages": page_bytes(policy, 4) / page_bytes(model, 4),
            "size": tensor_group.size(policy),
        }
    left = sum(local_part(p.detach()).untyped_storage().nbytes() for p in policy.parameters())
    return result | {
        "expected": expected,
        "found": found,
        "logits": logits,
        "logit_error": float((logits - one_processs).abs().max() / one_processs.abs().max()),
        "left": left,
    }


@contextmanager
def disagreeing(mesh: Mesh) -> Iterator[None]:
    """Inside, tensor ranks other than the first have another amount of memory free, and always
    choose token 0."""
    number = mesh.index("tensor")
    free, choose = engine.free_bytes, generation.choose

    def other(*given: Any) -> Choice:
        choice = choose(*given)
        return replace(choice, tokens=choice.tokens * 0) if number else choice

    # Enough for the sequences that may run at once, and for one.
    engine.free_bytes = lambda device: 10**6 if number else 1_600_000
    generation.choose = other
    try:
        yield
    finally:
        engine.free_bytes, generation.choose = free, choose


def refused(options: ParallelOptions) -> str:
    """What is said where rank 1 has too little memory for its part."""
    model = model_of(4, tied=False)
    mesh = Mesh.build(options, model.config)
    parallelize(model, mesh)
    free = whole.free_bytes
    whole.free_bytes = lambda device: 1000 if world().rank == 1 else 10**12
    try:
        with tensor_group.gathered(model, mesh, torch.float32):
            raise AssertionError("it was gathered all the same")
    except InputError as error:
        return str(error)
    finally:
        whole.free_bytes = free
