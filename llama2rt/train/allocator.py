"""Keep freed memory instead of handing it back to the kernel after every operation.

glibc serves blocks above 128 KiB-32 MiB by mmap and unmaps them on free, so a CPU training step
faults in every activation anew, zeroed page by page: measured, about half of its time. Commands
call `keep_freed_memory` once; importing llama2rt never changes its host's allocator.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Serve every block from a heap that never shrinks; False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # mallopt sign-extends to size_t: -1 is the largest threshold there is.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)
