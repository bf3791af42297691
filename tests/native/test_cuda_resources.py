"""Every CUDA kernel, compiled for A100 and Hopper: no forward spill, no more than recorded, and the
instructions that it is written around. Needs no GPU; it reads the module that the build made.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from processes import load_script

FOLDER = Path(__file__).resolve().parents[2] / "csrc/cuda"
RECORD = FOLDER / "resources.json"
SAMPLE = Path(__file__).with_name("sample_kernels.cu")
COMMAND = "python -P csrc/cuda/resources.py --record csrc/cuda/resources.json"
OPS = ("rms_norm", "swiglu", "rope", "attention", "decode", "logprob")
# What names a kernel of a backward pass: these may spill, as much as is recorded.
GRADIENTS = ("backward", "dweight", "_dq", "_dkdv", "_delta", "dlogits")
# (op, pattern of "kernel, sm_NN", what the code of its kernels must hold). Where an op is bound, a
# pattern that matches nothing fails too: a kernel that was renamed must not lose its check.
EXPECTED = [
    ("rms_norm", r"^rms_norm_(forward|backward)_kernel<(bf16|fp16), 8, \d+>", ["LDG.128"]),
    ("attention", r"^attention_(forward|dq|dkdv)_kernel<.*sm_80$", ["HMMA", "LDGSTS"]),
    ("decode_attention", r"^decode_attention_kernel<(bf16|fp16).*sm_80$", ["HMMA", "LDGSTS"]),
    ("attention_sm90", r"attention_\w*sm90_kernel<.*sm_90a$", ["HGMMA", "UTMALDG"]),
]


tool = load_script(FOLDER / "resources.py")


@pytest.fixture(scope="module")
def found(print_after_the_tests):
    _cuda = pytest.importorskip("llama2rt._cuda", reason="_cuda is not built")
    lacking = {"80-real", "90a-real"} - set(_cuda.ARCHITECTURES.split())
    if lacking:
        pytest.skip(f"_cuda is built for {_cuda.ARCHITECTURES}, without {', '.join(lacking)}")
    try:
        tool.find_cuobjdump()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    kernels = tool.read(Path(_cuda.__file__), tool.dynamic_bytes(_cuda.most_shared_bytes()))
    title = "CUDA kernels as compiled (csrc/cuda/resources.py)"
    print_after_the_tests(title, tool.table(kernels))
    return kernels


def test_every_kernel_is_there_for_both_architectures(found):
    names = {
        architecture: {key.partition(", sm_")[0] for key in found if key.endswith(architecture)}
        for architecture in ("sm_80", "sm_90a")
    }
    assert names["sm_80"] == names["sm_90a"] and names["sm_80"]
    assert all(any(op in name for op in OPS) for name in names["sm_80"])


def test_every_kernel_states_its_launch_bounds(found):
    """Without them the compiler assumes 1024 threads, and nobody knows what occupancy means."""
    assert not [name for name, used in found.items() if used.threads is None]


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        # Rows of 128 bf16: a tile of queries, and three of 64 keys or values.
        ("attention_forward_kernel<bf16, 128>", (128 + 3 * 64) * 128 * 2),
        # A group's queries; of each of four warps two stages of 16 keys and 16 values.
        ("decode_attention_kernel<bf16, 128>", (16 + 4 * 2 * 2 * 16) * 128 * 2),
        # Eight warps' sums of at most 256 columns, and their totals.
        ("decode_attention_combine_kernel<fp16>", 8 * (256 + 1) * 4),
        # Two tiles of 128 rows, four stages of two of 64; nine barriers of 8 bytes.
        ("sm90::attention_dq_sm90_kernel<bf16, 64>", (2 * 128 + 4 * 2 * 64) * 64 * 2 + 9 * 8),
        ("token_logprob_kernel<bf16, true>", 0),
    ],
)
def test_dynamic_shared_memory_worked_out_by_hand(found, kernel, expected):
    for architecture in ("sm_80", "sm_90a"):
        assert found[f"{kernel}, {architecture}"].dynamic_shared_bytes == expected


def test_a_block_fits_wherever_its_kernel_may_run(found):
    """On sm_80 the kernels for Hopper are a trap, and the caller does not choose them."""
    never = {name for name, used in found.items() if used.occupancy == 0}
    assert not {name for name in never if not re.search(r"sm90_kernel<.*sm_80$", name)}


def test_decode_attention_runs_as_many_blocks_at_once_as_its_splits_count_on(found):
    from llama2rt.ops.cuda_kernels.decode_attention import blocks_at_once

    kernels = {n: used for n, used in found.items() if n.startswith("decode_attention_kernel")}
    assert kernels
    for name, used in kernels.items():
        dim = int(name.partition(", ")[2].partition(">")[0])
        assert used.occupancy * 64 // (used.threads // 32) >= blocks_at_once(dim, 1), name


def test_no_forward_kernel_spills(found):
    forward = {name for name in found if not any(word in name for word in GRADIENTS)}
    assert forward and len(forward) < len(found)
    assert not {name for name in forward if found[name].stack_bytes}


@pytest.mark.parametrize(("op", "pattern", "instructions"), EXPECTED, ids=[e[0] for e in EXPECTED])
def test_kernels_hold_the_instructions_they_are_written_around(found, op, pattern, instructions):
    from llama2rt import _cuda

    chosen = {name: used.instructions for name, used in found.items() if re.search(pattern, name)}
    if op not in _cuda.KERNELS:
        pytest.skip(f"_cuda has no {op} yet")
    assert chosen, f"no kernel is called {pattern}"
    lacking = {
        name: [key for key in instructions if not counts[key]] for name, counts in chosen.items()
    }
    assert not {name: keys for name, keys in lacking.items() if keys}


def worse(name, used, recorded):
    """What `used` takes more of than `recorded`, or no longer does; one line each."""
    lines = [
        f"{name}: {key} {recorded[key]} -> {getattr(used, key)}"
        for key in ("registers", "stack_bytes", "static_shared_bytes", "dynamic_shared_bytes")
        if getattr(used, key) > recorded[key]
    ]
    if recorded["occupancy"] is not None and (used.occupancy or 0) < recorded["occupancy"]:
        lines.append(f"{name}: occupancy {recorded['occupancy']} -> {used.occupancy}")
    lines += [
        f"{name}: its {count} {key} are gone"
        for key, count in recorded["instructions"].items()
        if count and not used.instructions[key]
    ]
    return lines


def test_nothing_is_worse_than_recorded(found):
    from llama2rt import _cuda

    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert found.keys() == record["kernels"].keys(), f"after a change of kernels: {COMMAND}"
    if record["cuda"] != _cuda.CUDA_VERSION:
        pytest.skip(f"recorded with CUDA {record['cuda']}, this is {_cuda.CUDA_VERSION}")
    lines = [
        line for name, used in found.items() for line in worse(name, used, record["kernels"][name])
    ]
    assert not lines, "\n".join([*lines, f"if it is worth it: {COMMAND}"])


def test_the_page_of_attention_has_the_figures_of_the_record():
    """Its table for an A100: warps, registers, shared memory, and the blocks that these let run."""
    page = (FOLDER.parents[1] / "docs/kernels/attention.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (forward|dq|dkdv) \| (\d+) \| .* \| (\d+) \| (\d+) \| ([\d.]+) KB \| (\d+) \|$",
        page,
        re.MULTILINE,
    )
    assert len(rows) == 9
    record = json.loads(RECORD.read_text(encoding="utf-8"))["kernels"]
    for kernel, dim, warps, registers, shared_kb, blocks in rows:
        used = record[f"attention_{kernel}_kernel<bf16, {dim}>, sm_80"]
        assert (used["threads"], used["registers"]) == (32 * int(warps), int(registers))
        assert used["dynamic_shared_bytes"] == pytest.approx(float(shared_kb) * 1024)
        assert used["occupancy"] * 64 / int(warps) == int(blocks), f"{kernel} {dim}"


def test_each_way_of_being_worse_is_seen():
    recorded = {
        "registers": 32,
        "stack_bytes": 0,
        "static_shared_bytes": 64,
        "dynamic_shared_bytes": 512,
        "occupancy": 0.5,
        "instructions": {"HMMA": 4, "HGMMA": 0},
    }
    counts = {"HMMA": 9, "HGMMA": 0}
    assert worse("k", tool.Resources(31, 0, 0, 512, 128, 0.5, counts), recorded) == []
    wrong = tool.Resources(33, 8, 65, 513, 128, 0.25, {"HMMA": 0, "HGMMA": 0})
    assert len(worse("k", wrong, recorded)) == 6


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared_bytes", "expected"),
    [
        ("sm_80", 512, 32, 0, 1.0),  # four blocks of 16 warps
        ("sm_80", 512, 128, 0, 0.25),  # the register file holds one block
        ("sm_80", 512, 72, 0, 0.25),  # 2304 registers a warp: 28 warps, one block of 16
        ("sm_80", 32, 16, 0, 0.5),  # 32 blocks of one warp
        ("sm_80", 128, 32, 80 * 1024, 0.125),  # 81 KiB with the reserve: two blocks in 164
        ("sm_80", 128, 32, 82 * 1024, 0.0625),  # 83: one
        ("sm_90a", 384, 168, 227 * 1024, 0.1875),  # one block of three warp groups
        ("sm_80", 128, 32, 164 * 1024, 0.0),  # more than there is
    ],
)
def test_occupancy(architecture, threads, registers, shared_bytes, expected):
    limits = tool.MULTIPROCESSORS[architecture]
    assert tool.occupancy(limits, threads, registers, shared_bytes) == expected


def test_names_are_short():
    name = "void llama2rt::(anonymous namespace)::f<__half, (bool)1, g<4> >(long, h<__half>*)"
    assert tool.short(name) == "f<fp16, (bool)1, g<4> >"


def test_launches_are_counted_by_their_kernel():
    launches = [
        ("N8llama2rt5NamedIXadL_ZNS_12_GLOBAL__N_11gEPiEEEE", 7),
        ("N8llama2rt5NamedIXadL_ZNS_12_GLOBAL__N_11fI6__halfLi64ELb1EEEvPT_EEEE", 256),
        ("N8llama2rt5NamedIXadL_ZNS_12_GLOBAL__N_11fI6__halfLi64ELb1EEEvPT_EEEE", 16),
    ]
    assert tool.dynamic_bytes(launches) == {"g": 7, "f<fp16, 64, true>": 256}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_what_a_kernel_is_made_to_use_is_read(tmp_path):
    """Spills, static shared memory, launch bounds and instructions of kernels that have them."""
    try:
        tool.find_cuobjdump()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    subprocess.run(
        [
            *("nvcc", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-o", "sample.so", SAMPLE),
            *("-gencode", "arch=compute_80,code=[sm_80,compute_80]"),
            *("-gencode", "arch=compute_90a,code=sm_90a"),
        ],
        cwd=tmp_path,
        check=True,
    )
    dynamic = {"spilling_kernel": 0, "shared_kernel<256>": 0, "matrix_kernel": 82 * 1024}
    kernels = tool.read(tmp_path / "sample.so", dynamic)
    assert len(kernels) == 6
    for architecture, held in (("sm_80", ("HMMA", "LDGSTS")), ("sm_90a", ("HGMMA", "UTMALDG"))):
        spilling, shared, matrix = (
            kernels[f"{name}, {architecture}"]
            for name in ("spilling_kernel", "shared_kernel<256>", "matrix_kernel")
        )
        assert spilling.stack_bytes > 0 and spilling.threads == 1024
        assert shared.stack_bytes == 0 and shared.static_shared_bytes == 4096
        assert shared.threads is None and shared.occupancy is None
        assert shared.instructions["LDG.128"] == 1
        # One block of four warps in 164 KiB, two in 228.
        assert matrix.threads == 128 and matrix.dynamic_shared_bytes == 82 * 1024
        assert matrix.occupancy == {"sm_80": 0.0625, "sm_90a": 0.125}[architecture]
        assert {key for key, count in matrix.instructions.items() if count} == set(held)
    assert "spilling_kernel, sm_90a" in tool.table(kernels)
    del dynamic["matrix_kernel"]
    with pytest.raises(ValueError, match="matrix_kernel"):
        tool.read(tmp_path / "sample.so", dynamic)
    with pytest.raises(ValueError, match="another_kernel"):
        tool.read(tmp_path / "sample.so", {**dynamic, "matrix_kernel": 0, "another_kernel": 0})
