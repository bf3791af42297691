"""`ops.token_logprob` where the vocabulary is cut over ranks: its DTensor rule.

Each rank runs the op over its own rows of `weight`, in tiles as ever, and the ranks tell each other
two or three numbers a token: log-sum-exp, log-probability, entropy. A target's log-probability is
its log-probability among its rank's tokens times the share of that rank's tokens among all, and the
entropy is that of the choice of a rank and of the choices inside it: sums of terms of one sign,
where differences of large numbers would lose digits. Given the log-sum-exp of all logits, the op's
backward makes of each rank's logits their exact gradient. No rank holds logits beside the op's
tiles, and only [3, T] is sent forward; backward sums the gradient of `hidden` [T, dim].

Left out: the logits that the op stashes for its backward in one process (`ops.logprob_tiles`); here
all are made twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from llama2rt.ops.reference import check_targets
from llama2rt.parallel.collectives import all_gather


@dataclass(frozen=True)
class _Cut:
    """How the weight of one call lies on a mesh, and with it everything else."""

    mesh: DeviceMesh
    weight: tuple[Placement, ...]
    rows: tuple[Placement, ...]
    """of hidden, targets, and results: tokens may be cut along dimensions that vocabulary is not"""
    dimension: int | None
    """of the mesh, along which the vocabulary is cut"""
    vocabulary: int

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor) -> Self:
        mesh = next(x.device_mesh for x in (weight, hidden) if isinstance(x, DTensor))
        whole = (Replicate(),) * mesh.ndim
        given = weight.placements if isinstance(weight, DTensor) else whole
        given_rows = hidden.placements if isinstance(hidden, DTensor) else whole
        # What the op cannot take cut is gathered: a weight cut along dim, hidden likewise.
        placements = tuple(p if p == Shard(0) else Replicate() for p in given)
        cut = [i for i, p in enumerate(placements) if p == Shard(0)]
        if len(cut) > 1:
            raise NotImplementedError(
                f"token_logprob: expected a weight whose rows are cut along one dimension of the "
                f"mesh, got {given}"
            )
        rows = tuple(
            p if p == Shard(0) and i not in cut else Replicate() for i, p in enumerate(given_rows)
        )
        return cls(mesh, placements, rows, cut[0] if cut else None, weight.shape[0])

    def local(self, x: Tensor, placements: tuple[Placement, ...]) -> Tensor:
        """This rank's part of x; a plain tensor is the same on all ranks."""
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, (Replicate(),) * self.mesh.ndim)
        return x.redistribute(placements=placements).to_local()

    def like(self, x: Tensor, placements: tuple[Placement, ...], model: Tensor) -> Tensor:
        """The local result x for what came as `model`, whose shape it shares."""
        if isinstance(model, DTensor):
            shape, stride = model.shape, model.stride()
            return DTensor.from_local(x, self.mesh, placements, shape=shape, stride=stride)
        if self.dimension is not None and placements[self.dimension] == Partial():
            x = x.contiguous()
            dist.all_reduce(x, group=self.mesh.get_group(self.dimension))
        return x

    @property
    def share(self) -> int:
        """Rows of the weight on every rank but the last."""
        ranks = 1 if self.dimension is None else self.mesh.size(self.dimension)
        return -(-self.vocabulary // ranks)

    def column(self, targets: Tensor, elsewhere: int) -> Tensor:
        """Each target's row in this rank's part of the weight, or `elsewhere`; -1 stays."""
        if self.dimension is None:
            return targets
        first = self.mesh.get_local_rank(self.dimension) * self.share
        here = (targets >= first) & (targets < first + self.share)
        return torch.where(targets < 0, targets, torch.where(here, targets - first, elsewhere))

    def merge(
        self, logprob: Tensor, entropy: Tensor, lse: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All ranks' results for their parts of the vocabulary as one op's for all of it."""
        assert self.dimension is not None
        group = self.mesh.get_group(self.dimension)
        own = torch.stack((lse, logprob, entropy) if entropy.numel() else (lse, logprob))
        every = all_gather(own[None], group)  # [ranks, 2 or 3, T]
        lse = every[:, 0].logsumexp(0)
        log_share = every[:, 0] - lse
        predicted = targets >= 0
        # A target beyond the vocabulary, which a CPU has refused, has no owner.
        owner = (targets.clamp_min(0) // self.share).clamp_max(group.size() - 1)
        logprob = (every[:, 1] + log_share).gather(0, owner.long()[None])[0]
        logprob = logprob.masked_fill(targets >= self.vocabulary, torch.nan)
        logprob = torch.where(predicted, logprob, 0.0)
        if not entropy.numel():
            return logprob, entropy, lse
        inside = (log_share.exp() * (every[:, 2] - log_share)).sum(0)
        return logprob, torch.where(predicted, inside, 0.0), lse


def forward(_: type, op: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> tuple:
    hidden, weight, targets, *settings = args
    cut = _Cut.of(hidden, weight)
    local_targets = cut.local(targets, cut.rows)
    if local_targets.device.type == "cpu":
        check_targets(local_targets, cut.vocabulary)
    own_hidden, own_weight = cut.local(hidden, cut.rows), cut.local(weight, cut.weight)
    # The entropy of a row is wanted whichever rank has its target: any column stands for it.
    logprob, entropy, lse = op(own_hidden, own_weight, cut.column(local_targets, 0), *settings)
    if cut.dimension is not None:
        logprob, entropy, lse = cut.merge(logprob, entropy, lse, local_targets)
    results = logprob, entropy, lse
    if not isinstance(hidden, DTensor):
        return results
    # Without entropy its tensor is empty.
    lengths = (hidden.shape[0], hidden.shape[0] * settings[1], hidden.shape[0])
    return tuple(
        DTensor.from_local(x, cut.mesh, cut.rows, shape=torch.Size((length,)), stride=(1,))
        for x, length in zip(results, lengths, strict=True)
    )


def backward(_: type, op: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> tuple:
    dlogprob, dentropy, hidden, weight, targets, lse, entropy, *settings = args
    cut = _Cut.of(hidden, weight)
    optional = (None if x is None else cut.local(x, cut.rows) for x in (dentropy, entropy))
    own_dentropy, own_entropy = optional
    own_hidden, own_weight = cut.local(hidden, cut.rows), cut.local(weight, cut.weight)
    dhidden, dweight = op(
        cut.local(dlogprob, cut.rows),
        own_dentropy,
        *(own_hidden, own_weight),
        # A target in no column: of such a row's logits only their share in the sum matters.
        cut.column(cut.local(targets, cut.rows), own_weight.shape[0]),
        cut.local(lse, cut.rows),
        own_entropy,
        *settings,
    )
    summed: list[Placement] = list(cut.rows)
    if cut.dimension is not None:
        summed[cut.dimension] = Partial()
    of_weight = tuple(
        Partial() if rows == Shard(0) else placement
        for rows, placement in zip(cut.rows, cut.weight, strict=True)
    )
    return cut.like(dhidden, tuple(summed), hidden), cut.like(dweight, of_weight, weight)
