"""What ranks do in tests/parallel/test_sharding.py and test_vocabulary.py: ops on DTensors, and on
the whole tensors of which these are parts."""

from collections.abc import Callable
from typing import Any

import torch
from memory import peak_extra_bytes
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import llama2rt.parallel.sharding  # noqa: F401
from llama2rt import ops

TOKENS, HEADS, DIM, KEYS = 11, 4, 8, 2
Placements = dict[str, Placement]
WHOLE, FIRST, SECOND = Replicate(), Shard(0), Shard(1)
CU_SEQLENS = (0, 4, 4, 9, 11)
SEVERAL_QUERIES = "decode_attention of several queries a sequence"


def arguments(op: str) -> dict[str, Tensor]:
    """Whole arguments by name; floating ones are differentiated but for tables."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads, keys = random(TOKENS, HEADS, DIM), random(TOKENS, KEYS, DIM)
    rows = {"x": random(TOKENS, DIM), "weight": random(DIM)}
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32)
    return {
        "rms_norm": lambda: rows,
        "add_rms_norm": lambda: {"residual": random(TOKENS, DIM), **rows},
        "swiglu": lambda: {"gate": random(TOKENS, DIM), "up": random(TOKENS, DIM)},
        "rope": lambda: {
            "q": heads,
            "k": keys,
            "cos": random(TOKENS, DIM // 2),
            "sin": random(TOKENS, DIM // 2),
            "positions": torch.arange(TOKENS).flip(0),
        },
        "attention": lambda: {
            "q": heads,
            "k": keys,
            "v": random(TOKENS, KEYS, DIM),
            "cu_seqlens": cu_seqlens,
        },
        "decode_attention": lambda: {
            "q": random(3, HEADS, DIM),
            "k_cache": random(5, 4, KEYS, DIM),
            "v_cache": random(5, 4, KEYS, DIM),
            "block_table": torch.tensor([[1, 0], [4, 2], [3, 3]]),
            "lengths": torch.tensor([5, 8, 0]),
        },
        SEVERAL_QUERIES: lambda: {
            **arguments("decode_attention"),
            "q": random(7, HEADS, DIM),
            "cu_seqlens_q": torch.tensor([0, 4, 5, 7]),
        },
    }[op]()


def rule(op: str, given: Placements) -> dict[str, Any]:
    """One op with its arguments placed as `given`, the others whole, against the op on whole ones:
    {"placements": of its results, "sent": collectives of its forward, "distances": of results and
    gradients}."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    run: Callable = getattr(ops, op.partition(" ")[0])
    extra = {"eps": 1e-5} if "norm" in op else {}
    whole = arguments(op)
    cut = {name: distribute_tensor(x, mesh, [given.get(name, WHOLE)]) for name, x in whole.items()}
    learned = [n for n in whole if whole[n].is_floating_point() and n not in ("cos", "sin")]
    every, placements = [], []
    for inputs in (whole, cut):
        for name in learned:
            inputs[name].requires_grad_()
        with CommDebugMode() as talk:
            results = run(**inputs, **extra)
        results = results if isinstance(results, tuple) else (results,)
        placements = [x.placements for x in results if isinstance(x, DTensor)]
        results = tuple(full(x) for x in results)
        values = {f"result {i}": x.detach() for i, x in enumerate(results)}
        if not op.startswith("decode_attention"):
            sum((x * x).sum() for x in results).backward()
            values |= {name: full(inputs[name].grad) for name in learned}
        every.append(values)
    distances = {name: distance(every[1][name], x) for name, x in every[0].items()}
    return {"placements": placements, "distances": distances, "sent": talk.get_total_counts()}


def vocabulary(
    size: int, shape: tuple[int, int, int], backend: str, mode: dict[str, Any] | None = None
) -> dict:
    """Distances of results and gradients of token_logprob, the weight cut over `size` ranks, from
    the op's on the whole weight."""
    tokens, vocabulary, dim = shape
    mode = mode or {}
    dtype = mode.get("dtype", torch.float32)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tensor",))
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, dim, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, dim, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::4] = -1
    upstream = torch.randn(2, tokens, generator=generator)
    distances = {}
    for entropy in (False, True):
        outputs = []
        for placement in (None, *mode.get("hidden", ("plain", WHOLE))):
            h, w, t = _placed(mesh, placement, hidden, weight, targets)
            with ops.use(backend):
                out = ops.token_logprob(h, w, t, temperature=0.7, entropy=entropy)
                out = [full(x) for x in (out if entropy else (out,))]
                sum((x * u).sum() for x, u in zip(out, upstream, strict=False)).backward()
            assert placement is None or w.grad.placements == (FIRST,)
            outputs.append([*(x.detach() for x in out), full(h.grad), full(w.grad)])
        names = ("logprob", *["entropy"] * entropy, "hidden", "weight")
        for number, output in enumerate(outputs[1:]):
            for name, a, b in zip(names, output, outputs[0], strict=True):
                distances[number, entropy, name] = distance(a, b)
    return distances


def _placed(
    mesh: DeviceMesh, placement: Placement | str | None, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """hidden, weight and targets: whole (None), or the weight cut by rows and the others plain or
    placed so."""
    hidden, weight, targets = tensors
    if placement is None:
        return hidden.clone().requires_grad_(), weight.clone().requires_grad_(), targets
    cut = distribute_tensor(weight, mesh, [FIRST]).requires_grad_()
    if isinstance(placement, str):
        return hidden.clone().requires_grad_(), cut, targets
    hidden, targets = (distribute_tensor(x, mesh, [placement]) for x in (hidden, targets))
    return hidden.requires_grad_(), cut, targets


def vocabulary_memory(size: int, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Most bytes that forward, and forward with backward, take beyond what they return."""
    tokens, vocabulary, dim = shape
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tensor",))
    hidden = torch.randn(tokens, dim, requires_grad=True)
    weight = distribute_tensor(torch.randn(vocabulary, dim), mesh, [FIRST]).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return ops.token_logprob(hidden, weight, targets, entropy=True)

    def step() -> tuple[Tensor, ...]:
        logprob, entropy = ops.token_logprob(hidden, weight, targets, entropy=True)
        (logprob + entropy).sum().backward()
        return logprob, entropy, hidden.grad, weight.grad.to_local()

    return peak_extra_bytes(forward), peak_extra_bytes(step)


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def distance(x: Tensor, y: Tensor) -> float:
    """The largest difference, relative to the largest of y."""
    assert x.shape == y.shape and x.dtype == y.dtype
    return float((x - y).abs().max() / y.abs().max())


def refused() -> str:
    """What a weight that is cut twice is told."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    weight = distribute_tensor(torch.randn(8, 4), mesh, [FIRST, FIRST])
    try:
        ops.token_logprob(torch.randn(3, 4), weight, torch.tensor([1, 2, 3]))
    except NotImplementedError as error:
        return str(error)
    return ""


def rows_and_vocabulary() -> dict[str, float]:
    """Tokens cut along one dimension of a mesh, the vocabulary along the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "tensor"))
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(n, 4, generator=generator) for n in (9, 7)]
    targets = torch.randint(7, (9,), generator=generator)
    upstream = torch.randn(9, generator=generator)
    cut = [
        distribute_tensor(x, mesh, placements)
        for x, placements in zip(whole, ((FIRST, WHOLE), (WHOLE, FIRST)), strict=True)
    ]
    outputs = []
    for (h, w), t in ((whole, targets), (cut, distribute_tensor(targets, mesh, (FIRST, WHOLE)))):
        logprob = full(ops.token_logprob(h.requires_grad_(), w.requires_grad_(), t))
        (logprob * upstream).sum().backward()
        outputs.append([logprob.detach(), full(h.grad), full(w.grad)])
    return {
        name: distance(a, b)
        for name, b, a in zip(("logprob", "hidden", "weight"), *outputs, strict=True)
    }


def rules(cases: list[tuple[str, Placements]]) -> list[dict[str, Any]]:
    return [rule(*case) for case in cases]
