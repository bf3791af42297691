"""Every Triton kernel compiles for A100 and H100 without a GPU, and takes no more than recorded.

In a process of its own: in this one the kernels may be made for the interpreter. What is compared
is the table of the installed release; the tables of other releases are held to what needs no
compiler: the same kernels, and no forward kernel that spills.
"""

import inspect
import json
from pathlib import Path

import pytest
from processes import run_python

triton = pytest.importorskip("triton", reason="Triton is not installed")


RECORD = Path(__file__).resolve().parents[2] / "kernels" / "resources.json"
TABLES = json.loads(RECORD.read_text(encoding="utf-8"))
COMMAND = "python -P -m llama2rt.kernels.aot --record kernels/resources.json"
# What names a kernel of a backward pass: these may spill, as much as is recorded.
GRADIENTS = ("backward", "_dq ", "_dkdv ", "_dlogits ")
OPS = ("rms_norm", "swiglu", "rope", "attention", "decode", "logprob")


@pytest.fixture(scope="module")
def found():
    # The default is what Triton 3.10 will have: kernels that leave fusion to it differ from the
    # tables, and 3.9 warns of them.
    env = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "0"}
    tables = json.loads(run_python("-m", "llama2rt.kernels.aot", env=env).stdout)
    assert list(tables) == [triton.__version__]
    return tables[triton.__version__]


def spilling_forward(kernels):
    forward = {key for key in kernels if not any(gradient in key for gradient in GRADIENTS)}
    assert len(forward) < len(kernels)
    return {key for key in forward if kernels[key]["stack_bytes"]}


def test_every_kernel_is_compiled_for_both_architectures(found):
    for architecture in (80, 90):
        names = [key for key in found if key.endswith(f", sm_{architecture}")]
        assert all(any(op in name for name in names) for op in OPS)
        assert all(any(op in name for op in OPS) for name in names)


def test_no_forward_kernel_spills(found):
    assert not spilling_forward(found)


@pytest.mark.parametrize("release", TABLES)
def test_a_table_has_every_kernel_and_no_forward_kernel_that_spills(found, release):
    assert found.keys() == TABLES[release].keys(), f"with Triton {release}: {COMMAND}"
    assert not spilling_forward(TABLES[release])


def test_nothing_takes_more_than_recorded(found):
    if triton.__version__ not in TABLES:
        pytest.skip(
            f"no table for Triton {triton.__version__}, which is installed (tables for "
            f"{', '.join(TABLES)}): {COMMAND}"
        )
    table = TABLES[triton.__version__]
    worse = [
        f"{key}: {name} {table[key][name]} -> {value}"
        for key, used in found.items()
        for name, value in used.items()
        if value > table[key][name]
    ]
    assert not worse, "\n".join([*worse, f"if it is worth it: {COMMAND}"])


def test_recording_one_release_keeps_the_tables_of_others(tmp_path):
    script = """
    import sys
    from llama2rt.kernels import aot
    aot.table = lambda: {"kernel, sm_80": {"registers": 1}}
    aot.main(["--record", sys.argv[1]])
    """
    path = tmp_path / "resources.json"
    path.write_text('{"3.0.0": {"kernel, sm_80": {"registers": 2}}}', encoding="utf-8")
    env = {"TRITON_INTERPRET": "0"}
    run_python("-c", inspect.cleandoc(script), str(path), env=env)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "3.0.0": {"kernel, sm_80": {"registers": 2}},
        triton.__version__: {"kernel, sm_80": {"registers": 1}},
    }
