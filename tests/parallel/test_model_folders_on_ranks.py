"""Model folders and ranks: each reads and draws its own parts, rank 0 writes the whole."""

import pytest
from model_folders import make
from parallel_world import CONFIG
from spread_folders import draw_parts, load_parts, save_in_the_way, save_parts, start_parts

from llama2rt.checkpoint import hf, meta, native
from llama2rt.parallel import ParallelOptions

MESHES = {
    "shard": ParallelOptions(),
    "tensor": ParallelOptions(tensor=2),
    "hybrid": ParallelOptions(data=2),
    "pipeline": ParallelOptions(pipeline=2),
}
SHAPE = {"kv_heads": 4, "vocab_size": 402, "ffn_hidden": 98}  # not all a multiple of 4


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("layout", ["native", "hf", "meta"])
def test_each_rank_reads_its_own_parts(on_ranks, tmp_path, mesh, layout):
    model = make(**SHAPE)
    if layout == "meta":
        meta.save(model, None, tmp_path, shards=2)
    elif layout == "hf":
        hf.save(model, None, tmp_path, shard_bytes=60_000)
    else:
        native.save(model, None, tmp_path)
    parts = on_ranks(4, load_parts, tmp_path, MESHES[mesh])
    # A fourth each, where nothing is held twice; hybrid ranks hold a half; norms are held by all
    # ranks of a tensor group, and a pipeline's first and last stage hold one end each.
    least, most = {"hybrid": (0.49, 0.51), "pipeline": (0.2, 0.3)}.get(mesh, (0.24, 0.27))
    assert all(least < part < most for part in parts), parts


def test_a_tied_model_is_read_once(on_ranks, tmp_path):
    native.save(make(**SHAPE, tied=True), None, tmp_path)
    parts = on_ranks(4, load_parts, tmp_path, MESHES["tensor"])
    assert all(0.24 < part < 0.27 for part in parts), parts


@pytest.mark.parametrize(("mesh", "adapter"), [("tensor", False), ("shard", True)])
def test_a_new_head_and_an_adapter_stand_beside_what_is_read(on_ranks, tmp_path, mesh, adapter):
    if adapter:
        pytest.importorskip("peft")
    native.save(make(**SHAPE), None, tmp_path)
    assert all(on_ranks(4, start_parts, tmp_path, adapter, MESHES[mesh]))


@pytest.mark.parametrize("mesh", MESHES)
def test_fresh_weights_are_those_of_one_process(on_ranks, mesh):
    assert all(on_ranks(4, draw_parts, CONFIG, False, MESHES[mesh]))


def test_a_scalar_models_fresh_weights_are_those_of_one_process(on_ranks):
    assert all(on_ranks(4, draw_parts, CONFIG, True, MESHES["tensor"]))


@pytest.mark.parametrize("mesh", ["tensor", "pipeline"])
@pytest.mark.parametrize("layout", ["native", "hf"])
def test_rank_0_writes_the_same_bytes_as_one_process(on_ranks, tmp_path, mesh, layout):
    model = make(**SHAPE)
    native.save(model, None, tmp_path / "source")
    on_ranks(4, save_parts, tmp_path / "source", tmp_path / "out", MESHES[mesh], layout)
    (hf if layout == "hf" else native).save(model, None, tmp_path / "expected")
    for path in (tmp_path / "expected").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_is_in_the_way_is_said_by_all(on_ranks, tmp_path):
    native.save(make(**SHAPE), None, tmp_path / "m")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    results = on_ranks(4, save_in_the_way, tmp_path / "m", tmp_path / "notes")
    assert len(set(results)) == 1
    said, everywhere = results[0]
    assert everywhere and said == (
        f"{tmp_path}/notes: exists and is not a model folder; choose another name"
    )
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["text"]
