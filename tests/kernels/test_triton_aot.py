"""Every Triton kernel compiles for A100 and H100 without a GPU, and takes no more than recorded.

In a process of its own: in this one the kernels may be made for the interpreter.
"""

import json
from pathlib import Path

import pytest
from processes import run_python

triton = pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.xdist_group("aot")  # `found` compiles every kernel once

RECORD = Path(__file__).resolve().parents[2] / "kernels" / "resources.json"
# What names a kernel of a backward pass: these may spill, as much as is recorded.
GRADIENTS = ("backward", "_dq ", "_dkdv ", "_dlogits ")
OPS = ("rms_norm", "swiglu", "rope", "attention", "decode", "logprob")


@pytest.fixture(scope="module")
def found():
    done = run_python("-m", "llama2rt.kernels.aot", env={"TRITON_INTERPRET": "0"})
    return json.loads(done.stdout)["kernels"]


def test_every_kernel_is_compiled_for_both_architectures(found):
    for architecture in (80, 90):
        names = [key for key in found if key.endswith(f", sm_{architecture}")]
        assert all(any(op in name for name in names) for op in OPS)
        assert all(any(op in name for op in OPS) for name in names)


def test_no_forward_kernel_spills(found):
    forward = {key for key in found if not any(gradient in key for gradient in GRADIENTS)}
    assert len(forward) < len(found)
    assert not {key for key in forward if found[key]["stack_bytes"]}


def test_nothing_takes_more_than_recorded(found):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    command = "python -P -m llama2rt.kernels.aot --record kernels/resources.json"
    assert found.keys() == record["kernels"].keys(), f"after a change of cases: {command}"
    if record["triton"] != triton.__version__:
        pytest.skip(f"recorded with Triton {record['triton']}, this is {triton.__version__}")
    worse = [
        f"{key}: {name} {record['kernels'][key][name]} -> {value}"
        for key, used in found.items()
        for name, value in used.items()
        if value > record["kernels"][key][name]
    ]
    assert not worse, "\n".join([*worse, f"if it is worth it: {command}"])
