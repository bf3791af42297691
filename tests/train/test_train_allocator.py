"""Memory that the allocator keeps costs no page fault in the next step."""

from processes import run_python


def test_kept_memory_stops_page_faults():
    # Activations of 40 MiB: above 32 MiB glibc maps and unmaps every block.
    script = """
import resource, sys
import torch
from llama2rt.train.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
model = torch.nn.Sequential(torch.nn.Linear(64, 10240), torch.nn.SiLU(), torch.nn.Linear(10240, 64))
def step():
    model(torch.ones(1024, 64)).sum().backward()
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {mode: int(run_python("-c", script, mode).stdout) for mode in ("leave", "keep")}
    assert faults["keep"] < 0.3 * faults["leave"], faults
