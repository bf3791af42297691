"""The roofline page says what its formulas say, and these count the operands that ops have."""

import json
from pathlib import Path

import pytest
import torch
import work
from processes import load_script

from llama2rt.ops.backend import OPS

ROOT = Path(__file__).resolve().parents[2]
ROWS, COLUMNS = 6, 256


roofline = load_script(ROOT / "benchmarks/roofline.py")
A100, H200 = roofline.HARDWARE


def test_the_page_is_up_to_date():
    written = roofline.PAGE.read_text(encoding="utf-8")
    assert written == roofline.page(roofline.records()), "python -P benchmarks/roofline.py"


def test_the_figure_is_drawn_and_names_every_op(tmp_path):
    roofline.draw(tmp_path / "roofline.svg", [])
    drawn = (tmp_path / "roofline.svg").read_text(encoding="utf-8")
    assert all(op in drawn for op in OPS)
    assert roofline.FIGURE.read_text(encoding="utf-8").count("<svg") == 1


def test_every_op_is_there_forward_and_backward():
    found = {(todo.op, todo.direction) for todo in roofline.all_work()}
    assert {op for op, _ in found} == set(OPS)
    for op in OPS:
        assert (op, "forward") in found
        assert (op, "backward") in found or op == "decode_attention"


@pytest.mark.parametrize(
    ("op", "direction", "tensors"),
    [
        ("rms_norm", "forward", 1 + 1),  # x; y
        ("rms_norm", "backward", 2 + 1),  # dy, x; dx
        ("add_rms_norm", "forward", 2 + 2),  # x, residual; y, their sum
        ("add_rms_norm", "backward", 3 + 1),  # dy, dsum, sum; one gradient for both
        ("swiglu", "forward", 2 + 1),  # gate, up; y
        ("swiglu", "backward", 3 + 2),  # dy, gate, up; dgate, dup
        ("rope", "forward", 1 + 1),  # q and k; turned
        ("rope", "backward", 1 + 1),
    ],
)
def test_elementwise_bytes_are_those_of_the_operands(op, direction, tensors):
    todo = work.elementwise(op, direction, ROWS, COLUMNS)
    one = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    assert todo.bytes == tensors * one.nbytes
    assert todo.useful == todo.bytes and todo.flops % one.numel() == 0


def nbytes(*tensors):
    return sum(x.nbytes for x in tensors)


def test_attention_counts_its_operands_and_the_pairs_that_a_mask_leaves():
    lengths, heads, kv_heads, dim = (5, 1, 0, 7), 4, 2, 16
    tokens = sum(lengths)
    q, dout, out = torch.empty(3, tokens, heads, dim, dtype=torch.bfloat16).unbind()
    k, v = torch.empty(2, tokens, kv_heads, dim, dtype=torch.bfloat16).unbind()
    lse = torch.empty(heads, tokens)
    pairs = sum(int(torch.ones(n, n).tril().sum()) for n in lengths)
    forward, backward, both = (
        work.attention(direction, "four", lengths, heads, kv_heads, dim)
        for direction in ("forward", "backward", "forward + backward")
    )
    assert forward.bytes == nbytes(q, k, v, out, lse)
    assert backward.bytes == nbytes(q, k, v, out, dout, lse) + nbytes(q, k, v)
    assert forward.flops == 2 * (2 * pairs * heads * dim)
    assert backward.flops == 5 * (2 * pairs * heads * dim)
    assert both.bytes == forward.bytes + backward.bytes
    assert both.flops == both.useful == forward.flops + backward.flops


def test_decode_attention_counts_the_cache():
    sequences, context, heads, kv_heads, dim = 3, 10, 4, 2, 16
    todo = work.decode_attention(sequences, context, heads, kv_heads, dim)
    caches = torch.empty(2, sequences, context, kv_heads, dim, dtype=torch.bfloat16)
    assert todo.useful == todo.bytes == caches.nbytes
    assert todo.flops == sequences * heads * context * dim * 2 * 2


def launches(text):
    """Shape -> (blocks, share of the multiprocessors busy) on the A100 and on the H200."""
    section = text.partition("## decode_attention")[2].partition("## token_logprob")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if "%" in line]
    return {row[0]: [(int(row[i + 1]), row[i + 2]) for i in (1, 5)] for row in rows}


def test_a_batch_of_one_and_one_of_256_fill_a_gpu():
    found = launches(roofline.page([]))
    assert {shape.split()[0] for shape in found} == {"1", "64", "256"}
    for shape, gpus in found.items():
        for blocks, busy in gpus:
            assert blocks > 0 and int(busy.rstrip("%")) >= 95, f"{shape}: {gpus}"


@pytest.mark.parametrize(
    ("gpu", "sequences", "context", "expected"),
    [
        # 216 places by 8 key heads: 27 splits of 152, in whole tiles of 64 keys 192, in 22 of them.
        (A100, 1, 4096, "22 | 176 | 100% | 0.81"),
        (H200, 1, 100, "2 | 16 | 12% | 0.06"),  # 64 keys and 36
        (H200, 256, 4096, "1 | 2048 | 100% | 7.76"),
    ],
)
def test_a_launch_of_decode_attention_worked_out_by_hand(gpu, sequences, context, expected):
    assert roofline.decode_launch(sequences, context, 8, 128, gpu) == expected


def test_token_logprob_counts_three_products():
    tokens, dim, vocabulary = 6, 8, 50
    hidden = torch.empty(tokens, dim, dtype=torch.bfloat16)
    weight = torch.empty(vocabulary, dim, dtype=torch.bfloat16)
    vectors = nbytes(torch.empty(tokens), torch.empty(tokens))
    forward, backward, both = (
        work.token_logprob(direction, tokens, dim, vocabulary)
        for direction in ("forward", "backward", "forward + backward")
    )
    assert forward.bytes == nbytes(hidden, weight) + vectors
    assert backward.bytes == 2 * nbytes(hidden, weight) + vectors
    assert forward.flops == 2 * tokens * dim * vocabulary
    assert both.flops == both.useful == 6 * tokens * dim * vocabulary


def test_floors_worked_out_by_hand():
    """On an H200, 2 x 512 MiB at 4.8 TB/s, and 2 x 2 x 8192 x 8193 / 2 x 32 x 128 products per
    document at 989 TFLOP/s, two documents; on an A100 the same by 2.039 TB/s and 312 TFLOP/s."""
    norm = work.elementwise("rms_norm", "forward", 32768, 8192)
    assert H200.floor_s(norm) == pytest.approx(223.7e-6, rel=1e-3)
    assert A100.floor_s(norm) == pytest.approx(526.6e-6, rel=1e-3)
    assert H200.bound(norm) == A100.bound(norm) == "memory"
    attention = work.attention("forward", "2 x 8192", (8192, 8192), 32, 32, 128)
    assert H200.floor_s(attention) == pytest.approx(1112e-6, rel=1e-3)
    assert A100.floor_s(attention) == pytest.approx(3524e-6, rel=1e-3)
    assert H200.bound(attention) == A100.bound(attention) == "arithmetic"
    decode = work.decode_attention(64, 4096, 32, 8, 128)
    assert H200.bound(decode) == "memory"


def test_the_measured_fraction_is_that_of_the_same_op_shape_and_gpu(tmp_path):
    todo = work.elementwise("rms_norm", "forward", 32768, 8192)
    rows = {"cuda": {"seconds": 2 * H200.floor_s(todo)}, "eager": {"seconds": 1.0}}
    row = {"direction": "forward", "size": todo.size, "ours": ["cuda"], "rows": rows}
    record = {"what": "benchmarks/ops: rms_norm", "gpu": "NVIDIA H200", "rows": [row]}
    (tmp_path / "nvidia-h200").mkdir()
    path = tmp_path / "nvidia-h200/rms_norm-cuda.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    found = roofline.records(tmp_path)
    assert roofline.measured(todo, H200, found) == {"cuda": pytest.approx(0.5)}
    assert roofline.measured(todo, A100, found) == {}
    for other in (
        work.elementwise("rms_norm", "backward", 32768, 8192),
        work.elementwise("rms_norm", "forward", 2048, 8192),
        work.elementwise("rope", "forward", 32768, 8192),
    ):
        assert roofline.measured(other, H200, found) == {}
    text = roofline.page(found)
    assert "| 526.6, memory | 223.7, memory | H200 cuda 50% |" in text
    assert text.count("H200 cuda") == 1
    assert text.count(roofline.NOT_RUN) == len(roofline.all_work()) - 1
