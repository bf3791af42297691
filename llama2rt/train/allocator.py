"""Keep freed memory instead of handing it back to the kernel after every operation.

glibc serves blocks above 128 KiB-32 MiB by mmap and unmaps them on free, so a CPU training step
faults in every activation anew, zeroed page by page: measured, about half of its time. Commands
call `keep_freed_memory` once; importing llama2rt never changes its host's allocator.

Among several processes blocks from 1 MiB on stay with mmap: FSDP gathers and frees weights of many
sizes between activations, and a heap that never shrinks then grew beyond what one process takes
(350M parameters in fp32, two ranks: 7.1 GiB each, 3.3 GiB with mmap). glibc asks the heap first,
whatever the size, and has a large block there where the heap has grown by more than it was asked
for: so it grows in small steps. What mmap gives is faulted in again, each time: by torch's option
in pages of 2 MiB, where the kernel has them (`madvise` in
/sys/kernel/mm/transparent_hugepage/enabled): measured, a tenth of the faults, a quarter of their
time.
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
    large, growth = (_M_MMAP_MAX, 0), 64 << 20
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        large, growth = (_M_MMAP_THRESHOLD, 1 << 20), 1 << 20
        # Read by torch at its first allocation.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    settings = (large, (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, growth))
    return all(mallopt(name, value) == 1 for name, value in settings)
