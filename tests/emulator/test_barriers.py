"""Leaving any one barrier out of a kernel must be seen: as a wrong result, or as an error.

The emulator lists the barriers and waits that a run came by, and leaves the named one out; nothing
is compiled anew. A race shows only in some orders of threads, hence the seeds. Each kernel's own
check must pass with nothing left out, under every one of them.
"""

from collections.abc import Callable

import attention_cases
import decode_cases
import elementwise_cases
import pytest
import torch

from llama2rt.ops.cuda_kernels import decode_attention

SEEDS = range(6)


def check_rms_norm(emulated) -> None:
    # Two warps, and more rows than blocks.
    elementwise_cases.check_rms_norm(emulated, (20, 150), "normal", torch.float32, 0)


def check_attention(emulated) -> None:
    """Tiles enough for every place of a ring to be filled twice."""
    attention_cases.check(emulated, 1, 1, 128, torch.bfloat16, 0, queries=[200], keys=[230])


def check_attention_fp32(emulated) -> None:
    attention_cases.check(emulated, 1, 1, 16, torch.float32, 0, queries=[70], keys=[100])


def check_decode_attention(emulated) -> None:
    # Three tiles for some warps of a split, so that a ring is filled again, and two splits. In bf16
    # the emulator's matrix instructions meet like barriers; fp32 shows what they hide.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_attention, "split_count", lambda *_: 2)
        for dtype in (torch.bfloat16, torch.float32):
            arguments = decode_cases.make(2, 1, 40, 16, dtype, "normal", 0, [9, 300])
            decode_cases.check(emulated.decode_attention, arguments, 0.2)


CHECKS: dict[str, Callable] = {
    "rms_norm": check_rms_norm,
    "attention": check_attention,
    "attention, fp32": check_attention_fp32,
    "decode_attention": check_decode_attention,
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_every_barrier_is_needed(module, emulated, check, poisoned):
    met = set()
    for seed in SEEDS:
        module.set_seed(seed)
        check(emulated)
        met.update(module.sync_points())
    assert met, "the kernel has no barrier, or the emulator does not see it"
    unnoticed = []
    for point in sorted(met):
        module.leave_out(point)
        try:
            for seed in SEEDS:
                module.set_seed(seed)
                check(emulated)
            unnoticed.append(point)
        except (AssertionError, RuntimeError) as error:
            print(f"without {point}: {error}")
        finally:
            module.leave_out("")
    assert not unnoticed, f"nothing failed without the barrier at {unnoticed}"
