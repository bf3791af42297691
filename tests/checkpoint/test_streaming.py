"""Folders larger than the memory: written as safetensors would, a tensor at a time."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from model_folders import make
from processes import run_python
from safetensors.torch import save_file

from llama2rt.checkpoint import convert, files, hf, meta, native
from llama2rt.checkpoint.load import read
from llama2rt.checkpoint.weight import Weight, of_tensor
from llama2rt.errors import InputError

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory by /proc")
def test_a_conversion_of_40_files_takes_less_memory_than_two_of_them(tmp_path):
    path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    done = run_python(HELPERS / "convert_memory.py", tmp_path, env={"PYTHONPATH": path})
    found = json.loads(done.stdout)
    print(found)
    assert found["files"] >= 39 and found["meta files"] == 40
    for conversion in ("hf to native", "native to meta", "meta to hf"):
        assert found[conversion] < 2 * found["largest"], conversion


@pytest.mark.parametrize("seed", range(3))
def test_the_bytes_are_those_of_safetensors_own_writer(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    tensors = {
        f"{'ab'[i % 2]}.{i}": torch.randn(i % 3, 5 - i % 4, generator=generator).to(dtypes[i % 4])
        for i in range(12)
    }
    tensors |= {
        "scalar": torch.tensor(2.5),
        "a\u00e9": torch.ones(3),
        "turned": torch.ones(3, 2).t(),
    }
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, tmp_path / "theirs", metadata={"format": "pt"})
    weights = {name: of_tensor(tensor) for name, tensor in tensors.items()}
    files.write_safetensors(tmp_path / "ours", weights)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def areas(shape: torch.Size) -> list[tuple[slice, ...]]:
    """Parts that begin and end inside what heads and model-parallel ranks share."""
    rows = shape[0]
    rest = [slice(0, n) for n in shape[1:]]
    found = [(slice(3, rows - 5), *rest), (slice(rows // 2, rows // 2 + 1), *rest)]
    if len(shape) > 1:
        found.append((slice(1, rows), slice(7, shape[1] - 3)))
    return found


@pytest.mark.parametrize("layout", ["native", "hf", "meta"])
def test_part_of_a_weight_is_that_part_of_the_whole(tmp_path, layout):
    model = make()
    if layout == "meta":
        meta.save(model, None, tmp_path / "m", shards=4)
    elif layout == "hf":
        hf.save(model, None, tmp_path / "m", shard_bytes=30_000)
    else:
        native.save(model, None, tmp_path / "m")
    _, _, weights = read(tmp_path / "m")
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name].read(), parameter)
        for area in areas(parameter.shape):
            assert torch.equal(weights[name].read(area), parameter[area]), (name, area)


def test_a_source_that_cannot_be_read_to_its_end_leaves_nothing(tmp_path):
    """Its headers were right: what is wrong shows when the values are read."""
    native.save(make(), None, tmp_path / "m")
    model, _, weights = read(tmp_path / "m")

    def damaged(area):
        raise InputError("model.safetensors: damaged or not safetensors")

    last = list(weights)[-1]
    weights[last] = Weight(weights[last].shape, weights[last].dtype, damaged)
    for save in (hf.save, native.save, meta.save):
        with pytest.raises(InputError, match="damaged"):
            save(model, None, tmp_path / "out", weights=weights)
        assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_short_shard_is_damaged(tmp_path):
    """A zip file is read from its end, where the table of what is in it may well be whole."""
    meta.save(make(), None, tmp_path / "m")
    _, _, weights = read(tmp_path / "m")
    (tmp_path / "m" / "consolidated.00.pth").write_bytes(b"short")
    with pytest.raises(InputError, match=r"consolidated\.00\.pth: damaged .* too short"):
        weights["output.weight"].read()


def test_a_conversion_keeps_what_is_there_until_all_is_checked(tmp_path):
    native.save(make(), None, tmp_path / "m")
    shape = json.loads((tmp_path / "m" / "config.json").read_text())
    shape["config"]["layers"] = 3
    (tmp_path / "m" / "config.json").write_text(json.dumps(shape))
    with pytest.raises(InputError, match="missing"):
        convert(tmp_path / "m", tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
