"""AdamW as large-model training needs it: fp32 state whatever the compute precision.

Masters, moments and gradient sums are fp32, and the model's bf16 weights are copies (`precision`
has the rule); `moments` may keep its own in bf16 between steps. The update itself is PyTorch's
fused AdamW.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from llama2rt.checkpoint.native import stored_name
from llama2rt.parallel.mesh import DIMENSIONS, Mesh
from llama2rt.parallel.shards import is_dtensor, local_part
from llama2rt.train.moments import in_fp32, moment_dtype
from llama2rt.train.options import TrainOptions
from llama2rt.train.outliers import Outliers
from llama2rt.train.precision import MasterWeights

# Weights updated per call of the inner AdamW: bounds the fp32 copies of bf16 gradients alive at
# once (128 MiB) and still makes one call of some forty for a 1B model.
_CHUNK_ELEMENTS = 32 << 20
_PIECE_ELEMENTS = 1 << 18


class Diverged(FloatingPointError):
    """A loss or gradient norm is not finite. No weight or moment has been changed by it."""


class Optimizer:
    """AdamW over a model's trainable parameters, which are put into `options.precision`.

    `master` names the masters: {parameter name: fp32 tensor}; in fp32 training these are the
    parameters. Of a model that is spread over `mesh` they are this rank's shards, and every rank
    takes each step. ValueError where nothing is trainable.
    """

    def __init__(self, model: nn.Module, options: TrainOptions, mesh: Mesh | None = None) -> None:
        self.options, self._mesh = options, mesh or Mesh.single()
        self._weights = MasterWeights(model, options.dtype, options.optimizer_device)
        self.names, self.parameters = self._weights.names, self._weights.parameters
        self._masters = masters = self._weights.tensors
        self._stored_names = [stored_name(model, name) for name in self.names]
        self.master = dict(zip(self.names, masters, strict=True))
        self._gradients: list[Tensor | None] = [None] * len(masters)
        self.outliers = Outliers(options)
        self._settings: dict[str, Any] = {
            "beta1": options.beta1,
            "beta2": options.beta2,
            "eps": options.eps,
            "fused": True,
            "amsgrad": False,
            "maximize": False,
        }
        dtype = moment_dtype(options.moments)
        self._states = [
            {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, dtype=dtype),
                "exp_avg_sq": torch.zeros_like(master, dtype=dtype),
            }
            for master in masters
        ]

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take over the gradients of the backward pass just run; sums are kept in fp32.

        The first micro-batch's gradients stay in the compute precision until a second arrives: a
        step of one micro-batch never holds an fp32 copy of all gradients.
        """
        for i, parameter in enumerate(self.parameters):
            new, total = parameter.grad, self._gradients[i]
            parameter.grad = None
            if new is None:
                continue
            new = local_part(new).to(self._masters[i].device)
            if total is None:
                self._gradients[i] = new
            elif total.dtype == torch.float32:
                total.add_(new)
            else:
                self._gradients[i] = total.to(torch.float32).add_(new)

    @torch.no_grad()
    def step(self, lr: float, loss: float | None = None) -> float:
        """Clip, update and forget the accumulated gradients; returns their norm before clipping.

        Gradients still on the parameters are accumulated first. An outlier by its norm, or by the
        step's `loss` where that says something, changes nothing (`outliers`). Raises Diverged, with
        every weight and moment as it was, when the norm is not finite, or outliers are too many.
        """
        self.accumulate()
        norm = self._norm()
        if not math.isfinite(norm):
            self.zero_grad()
            raise Diverged(f"gradient norm is {norm}")
        if not self.outliers.accept(loss, norm):
            self.zero_grad()
            if self.outliers.too_many:
                raise Diverged(self.outliers.too_many)
            return norm
        scale = min(1.0, self.options.clip / (norm + 1e-6))
        for chunk in self._chunks():
            gradients: dict[int, Tensor] = {}
            for i in chunk:
                gradient, self._gradients[i] = self._gradients[i], None
                if gradient is not None:
                    gradient = gradient.to(torch.float32)
                    gradients[i] = gradient.mul_(scale) if scale < 1.0 else gradient
            with in_fp32({i: self._states[i] for i in gradients}):
                self._update(gradients, lr)
            del gradients
            for i in chunk:
                self._weights.publish(i)
        return norm

    def _update(self, gradients: dict[int, Tensor], lr: float) -> None:
        """One update of the masters by their fp32 gradients. Norms do not decay."""
        for matrices, decay in ((True, self.options.weight_decay), (False, 0.0)):
            some = [i for i in gradients if (self._masters[i].ndim >= 2) == matrices]
            if not some:
                continue
            states = [self._states[i] for i in some]
            # The function, not the class, whose constructor imports torch's compiler with all that
            # it stands on (sympy, Triton): 1.6 s and 125 MiB that no run has any use for.
            adamw(
                [self._masters[i] for i in some],
                [gradients[i] for i in some],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                lr=lr,
                **self._settings | {"weight_decay": decay},
            )

    def zero_grad(self) -> None:
        """Drop what has been accumulated."""
        self._gradients = [None] * len(self._masters)
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Masters, moments and step counts by flat name (`stored_name`), for `checkpoint.store`.

        The model's trainable weights follow from the masters and need no saving beside them. What
        is sharded is a DTensor.
        """
        state = {}
        for name, parameter, master, moments in zip(
            self._stored_names, self.parameters, self._masters, self._states, strict=True
        ):
            state[f"master.{name}"] = placed(master, parameter)
            state[f"exp_avg.{name}"] = placed(moments["exp_avg"], parameter)
            state[f"exp_avg_sq.{name}"] = placed(moments["exp_avg_sq"], parameter)
            state[f"step.{name}"] = moments["step"]
        return {**state, **self.outliers.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict` and the model's weights; ValueError where names or shapes differ."""
        own = self.state_dict()
        if state.keys() != own.keys():
            missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise ValueError(
                f"state: expected this model's parameters, missing {missing[:3]}, "
                f"unexpected {extra[:3]}"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"state[{name!r}]: expected shape {tuple(tensor.shape)}, "
                    f"got {tuple(state[name].shape)}"
                )
        for name, tensor in own.items():
            local_part(tensor).copy_(local_part(state[name]))
        for i in range(len(self._masters)):
            self._weights.publish(i)

    def _norm(self) -> float:
        if self._mesh.devices is not None:
            return self._norm_of_all()
        squares = [_squares(gradient) for gradient in self._gradients if gradient is not None]
        return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0

    def _norm_of_all(self) -> float:
        """The norm over all ranks' shards, each element counted once; the same on every rank."""
        devices = self._mesh.devices
        assert devices is not None
        total = torch.zeros((), dtype=torch.float64, device=devices.device_type)
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if gradient is not None:
                copies = devices.size() / self._mesh.degrees["pipeline"] / _shards(parameter)
                total += _squares(gradient).double() / copies
        return math.sqrt(float(self._mesh.sum(total, DIMENSIONS)))

    def _chunks(self) -> Iterator[list[int]]:
        chunk: list[int] = []
        elements = 0
        for i, master in enumerate(self._masters):
            if chunk and elements + master.numel() > _CHUNK_ELEMENTS:
                yield chunk
                chunk, elements = [], 0
            chunk.append(i)
            elements += master.numel()
        if chunk:
            yield chunk


def _squares(gradient: Tensor) -> Tensor:
    """Sum of squares, fp32, whatever the gradient's dtype.

    PyTorch's CPU norm adds squares one after the other: over 2e8 fp32 values it comes out 3 % low,
    and a dot product of 1e6, on one thread, 0.03 %. `sum` adds pairwise. Pieces that fit the cache
    are converted from bf16 and squared at the speed of reading them.
    """
    if gradient.device.type != "cpu":
        return torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
    pieces = (p.to(torch.float32) for p in gradient.reshape(-1).split(_PIECE_ELEMENTS))
    return torch.stack([piece.square().sum() for piece in pieces]).sum()


def placed(local: Tensor, like: Tensor) -> Tensor:
    """A rank's part of what lies over the ranks as `like` does; `local` itself where that is
    whole."""
    if not is_dtensor(like):
        return local
    return like.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _shards(parameter: Tensor) -> int:
    """Into how many different parts `parameter` is cut."""
    if not is_dtensor(parameter):
        return 1
    sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())
