"""Memory that the allocator keeps costs no page fault in the next step."""

from pathlib import Path

import pytest
from processes import run_python

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_kept_memory_stops_page_faults():
    faults = faults_of_training("leave", "keep", "rank")
    assert faults["keep"] < 0.3 * faults["leave"], faults
    if not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text():
        pytest.skip("this kernel has no huge pages, which a rank's large blocks take")
    assert faults["rank"] < 0.5 * faults["leave"], faults


def faults_of_training(*modes):
    """{mode: page faults of four steps}, each mode in a process of its own, forked from one that
    has imported torch and not used it."""
    # Activations of 40 MiB: above 32 MiB glibc maps and unmaps every block.
    script = """
import os, resource, sys
import torch
from llama2rt.train.allocator import keep_freed_memory
def step(model):
    model(torch.ones(1024, 64)).sum().backward()
def faults(mode):
    if mode == "rank":
        os.environ["WORLD_SIZE"] = "2"
    if mode != "leave":
        assert keep_freed_memory()
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 10240), torch.nn.SiLU(), torch.nn.Linear(10240, 64)
    )
    for _ in range(4):
        step(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step(model)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for mode in sys.argv[1:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, mode
    else:
        print(mode, faults(mode), flush=True)
        os._exit(0)
"""
    lines = run_python("-c", script, *modes).stdout.splitlines()
    return {mode: int(count) for mode, count in map(str.split, lines)}


def test_large_blocks_of_a_rank_leave_no_hole_in_its_heap():
    # The heap grows for the first of these, and what it has then is what malloc gives first.
    script = """
import ctypes
from pathlib import Path
import torch
from llama2rt.train.allocator import keep_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) / 256
ctypes.CDLL(None).malloc_trim(0)
assert keep_freed_memory()
small = [torch.ones(1 << 17) for _ in range(64)]
before = resident()
large = [torch.ones(1 << 19) for _ in range(32)]
assert resident() - before > 60
del large
print(resident() - before)
"""
    left = run_python("-c", script, env={"WORLD_SIZE": "2"}).stdout
    assert float(left) < 8, left
