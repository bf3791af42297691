"""The rule by which every kernel is judged (one place, so that no test invents a looser one).

Against the fp64 reference, with torch's own formulation in the same dtype as the yardstick:
the largest error is at most twice torch's (three times for gradients) plus two ulps at the largest
reference value, and the relative L2 error at most 1.5 times torch's plus one ulp.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def judge(
    name: str, ours: Tensor, reference: Tensor, same_dtype: Tensor, *, gradient: bool = False
) -> None:
    """AssertionError, with the figures, unless `ours` keeps the rule. `reference` is fp64."""
    assert ours.shape == reference.shape, f"{name}: {ours.shape} for {reference.shape}"
    assert ours.dtype == same_dtype.dtype, f"{name}: {ours.dtype} for {same_dtype.dtype}"
    assert reference.dtype == torch.float64
    if reference.numel() == 0:
        return
    assert torch.isfinite(ours).all(), f"{name}: not finite (an element left unwritten?)"
    epsilon = torch.finfo(ours.dtype).eps
    peak = reference.abs().max().item()
    ulp = epsilon * 2.0 ** math.floor(math.log2(peak)) if peak else epsilon
    our_error = ours.double() - reference
    torch_error = same_dtype.double() - reference

    most = (3 if gradient else 2) * torch_error.abs().max().item() + 2 * ulp
    got = our_error.abs().max().item()
    assert got <= most, f"{name}: largest error {got:.3g}, allowed {most:.3g}"
    norm = reference.norm().item()
    if norm:
        most = 1.5 * torch_error.norm().item() / norm + epsilon
        got = our_error.norm().item() / norm
        assert got <= most, f"{name}: relative L2 error {got:.3g}, allowed {most:.3g}"


def judge_gradients(
    names: str, ours: Iterable[Tensor], reference: Iterable[Tensor], same_dtype: Iterable[Tensor]
) -> None:
    """`judge` for each of the gradients called `names`, separated by spaces."""
    for name, *three in zip(names.split(), ours, reference, same_dtype, strict=True):
        judge(name, *three, gradient=True)


def wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in fp64, for the reference."""
    return [x.double() for x in tensors]


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    """Copies that autograd starts from, for the yardstick's gradients."""
    return [x.clone().requires_grad_() for x in tensors]


Results = Tensor | Sequence[Tensor]


def same_bits(first: Results, second: Results) -> bool:
    """Whether two results, each a tensor or several, are equal in every element; no NaN is."""
    first, second = ((x,) if isinstance(x, Tensor) else x for x in (first, second))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def draw(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """Random values whose `kind` would expose a particular mistake.

    normal; small (scale 1e-3: a wrong eps); tail (heavy last columns: a dropped remainder); offset
    (a large mean: a biased scale).
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "small":
        x = x * 1e-3
    elif kind == "tail":
        x[..., -3:] *= 40
    elif kind == "offset":
        x = x + 30
    else:
        assert kind == "normal"
    return x.to(dtype)
