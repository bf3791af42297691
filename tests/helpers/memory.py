"""How much memory a call takes at once, as torch's own allocator counts it.

Exact and repeatable, where a process's resident size depends on what ran before. Not counted is
what a library takes by itself: oneDNN's scratch memory for one product, a few MiB at most.
"""

from collections.abc import Callable

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(run: Callable[[], tuple[Tensor, ...]]) -> int:
    """Bytes allocated at the highest point of `run()`, beyond those of the tensors it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        results = run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - sum(tensor.nbytes for tensor in results)
