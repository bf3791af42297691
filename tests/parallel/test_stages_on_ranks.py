"""Whole stages on processes give what one process gives: metrics, held-out numbers, the model."""

import json
from dataclasses import replace

import pytest
import torch
from parallel_stages import agree, metrics, run_stage, write_data

from llama2rt.checkpoint import load, native
from llama2rt.model import Llama
from llama2rt.parallel import ParallelOptions

EPOCHS = 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages") / "data"
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def base(data):
    """One process's pretraining run."""
    torch.set_num_threads(1)
    run_stage("pretrain", data, data, data.parent / "pretrain", ParallelOptions(), 0, EPOCHS)
    return data.parent / "pretrain"


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_pretraining(parallel, on_ranks, data, base, tmp_path):
    parallel = ParallelOptions(**parallel)
    out = tmp_path / "run"
    folders = on_ranks(2, run_stage, "pretrain", data, data, out, parallel, 0, EPOCHS)
    assert folders == [str(tmp_path / "run" / "model")] * 2
    agree(tmp_path / "run", base)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_stages_from_a_model(stage, on_ranks, data, base, tmp_path):
    init = base / "model"
    run_stage(stage, data, init, tmp_path / "alone", ParallelOptions(), 0, EPOCHS)
    parallel = ParallelOptions(data=2)
    on_ranks(4, run_stage, stage, data, init, tmp_path / "run", parallel, 0, EPOCHS)
    agree(tmp_path / "run", tmp_path / "alone")


def test_a_preference_model_on_pipelines(on_ranks, data, base, tmp_path):
    """Held-out pairs too: a pipeline reads whole documents, one process shares their beginnings."""
    model, tokenizer = load(base / "model")
    init = tmp_path / "init"
    native.save(Llama(replace(model.config, context=320)).initialize(0), tokenizer, init)
    run_stage("preference", data, init, tmp_path / "alone", ParallelOptions(), 0, EPOCHS)
    parallel = ParallelOptions(data=2, pipeline=2)
    on_ranks(4, run_stage, "preference", data, init, tmp_path / "run", parallel, 0, EPOCHS)
    agree(tmp_path / "run", tmp_path / "alone")
    reports = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("run", "alone")
    ]
    first, second = (report["position_bias"]["first"] for report in reports)
    assert first == pytest.approx(second, abs=1e-4)


def test_a_run_goes_on_on_another_mesh(on_ranks, data, base, tmp_path):
    out = tmp_path / "run"
    meshes = [
        (4, ParallelOptions(context=2, tensor=2)),
        (4, ParallelOptions(pipeline=2)),
        (2, ParallelOptions()),
    ]
    for turn, (ranks, parallel) in enumerate(meshes, start=1):
        on_ranks(ranks, run_stage, "pretrain", data, data, out, parallel, 2, EPOCHS)
        assert metrics(out)[-1]["step"] == 2 * turn
    run_stage("pretrain", data, data, out, ParallelOptions(), 0, EPOCHS)
    agree(out, base)
