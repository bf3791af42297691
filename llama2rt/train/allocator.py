"""Keep freed memory instead of handing it back to the kernel after every operation.

glibc serves blocks above 128 KiB-32 MiB by mmap and unmaps them on free, so a CPU training step
faults in every activation anew, zeroed page by page: measured, about half of its time. Commands
call `keep_freed_memory` once; importing llama2rt never changes its host's allocator.

Among several processes blocks from 1 MiB on stay with mmap: FSDP gathers and frees weights of many
sizes between activations, and a heap that never shrinks then grew beyond what one process takes
(350M parameters in fp32, two ranks: 7.1 GiB each, 3.3 GiB with mmap).
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4


def keep_freed_memory() -> bool:
    """Serve every block, of several processes every small one, from a heap that never shrinks;
    False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # mallopt sign-extends to size_t: -1 is the largest threshold there is.
    mmap, ahead = (_M_MMAP_MAX, 0), 64 << 20
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # What the heap has at its end serves large blocks too, so it has little there.
        mmap, ahead = (_M_MMAP_THRESHOLD, 1 << 20), 1 << 20
    settings = (mmap, (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, ahead))
    return all(mallopt(name, value) == 1 for name, value in settings)
