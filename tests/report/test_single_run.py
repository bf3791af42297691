"""The page of a run directory, whatever state the run was left in."""

import json
import re

import json_lines
import pytest

from llama2rt import report
from llama2rt.errors import InputError
from llama2rt.report import html
from llama2rt.report.single_run import read_metrics, training_again
from llama2rt.run import Recipe, Run

ROW = {"rating": "better", "mean": 0.75, "low": 0.6, "high": 0.9, "pairs": 40, "ties": 0}


def _run(folder, rows, *, complete=True, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    json_lines.write(folder / "metrics.jsonl", rows)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(tail)
    (folder / "recipe.toml").write_text('[train]\nlr = 1e-4 # <b>"quoted"</b>\n')
    manifest = {
        "seed": 7,
        "versions": {"torch": "2.13.0"},
        "inputs": {"data": {"path": "corpus.txt", "sha256": "ab" * 32}},
        "parents": [{"path": "runs/base"}],
        "complete": complete,
        "summary": {"loss": 1.25, "accuracy": {"better": 0.75}, "intervals": [ROW]},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_page_and_numbers_of_a_finished_run(tmp_path):
    folder = _run(tmp_path / "sft", [{"step": i, "loss": 2.0 / i} for i in range(1, 40)])
    page = report.of_run(
        folder, sections=[report.Section("Extra", [])], numbers={"bits_per_byte": 2.1}
    )
    text = page.read_text()
    assert page == folder / "report.html"
    for expected in (
        "Run: sft",
        "Complete, 39 steps",
        "ab" * 32,
        "runs/base",
        "Extra",
        "Reward models",
    ):
        assert expected in text
    assert "&lt;b&gt;" in text and "summary.intervals" not in text
    numbers = json.loads((folder / "report.json").read_text())
    assert numbers["complete"] is True and numbers["steps"] == 39
    assert numbers["bits_per_byte"] == 2.1
    assert numbers["accuracy"] == {"better": 0.75}


def test_figures_of_a_runs_page_stand_in_another_as_they_are(tmp_path, monkeypatch):
    rows = [{"step": i, "loss": 2.0 / i, "kl_k1": 0.1 * i, "reward": i} for i in range(1, 40)]
    folders = [_run(tmp_path / name, rows) for name in ("a", "b")]
    expected = [section for f in folders for section in training_again(f)]
    assert [len(section.blocks) for section in expected] == [2, 2]
    once = html.page("Both", expected)
    for folder in folders:
        report.of_run(folder)

    def refuse(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(report.Plot, "svg", refuse)
    again = html.page("Both", [section for f in folders for section in training_again(f)])
    ids = re.findall(r' id="([^"]*)"', again)
    assert len(ids) == len({*ids}) > 10
    assert {*re.findall(r'(?:href="#|url\(#)([^")]+)', again)} <= {*ids}
    # But for their ids, the drawings are those that the page would have made itself.
    nameless = [re.sub(r'( id="|href="#|url\(#)[^")]+', r"\1", page) for page in (once, again)]
    assert nameless[0] == nameless[1]
    # A run that trains nothing says so on its own page; another page leaves it out.
    untrained = _run(tmp_path / "evaluate", [])
    monkeypatch.undo()
    assert "no metrics logged" in report.of_run(untrained).read_text()
    assert training_again(untrained) == []


def test_every_run_has_its_carbon_line(tmp_path):
    folder = _run(tmp_path / "run", [{"step": 1, "loss": 2.0}])
    assert "not measured" in report.of_run(folder).read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["summary"] |= {"gpu_hours": 12.0, "gpu_watts": 400.0, "energy_kwh": 3.0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    metered = [{"step": step, "joules_per_step": 1.8e6} for step in (10, 20)]
    assert (
        "4.24 kg CO2eq measured" in report.of_run(_run(tmp_path / "metered", metered)).read_text()
    )
    text = report.of_run(folder).read_text()
    assert "1.27 kg CO2eq measured" in text and "2.03 kg CO2eq by the paper" in text


def test_stages_get_their_own_figure(tmp_path):
    ppo = _run(tmp_path / "ppo", [{"step": i, "kl_k1": 0.1, "reward": 1.0} for i in (1, 2)])
    assert "PPO: reward against KL" in report.of_run(ppo).read_text()
    rows = [{"step": i, "chosen_logprob": -1.0, "rejected_logprob": -2.0} for i in (1, 2)]
    assert "DPO: log-probabilities" in report.of_run(_run(tmp_path / "dpo", rows)).read_text()


def test_a_killed_run_and_an_empty_one_have_a_page(tmp_path):
    killed = _run(
        tmp_path / "killed", [{"step": 1, "loss": 1.0}], complete=False, tail='{"step": 2, "lo'
    )
    assert "Not complete, 1 steps" in report.of_run(killed).read_text()
    empty = _run(tmp_path / "empty", [], complete=False)
    assert "no metrics logged" in report.of_run(empty).read_text()
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="no run directory"):
        report.of_run(tmp_path / "other")


def test_lines_of_one_step_become_one_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1}\n{"step": 1, "loss": 2}\n{"step": 2, "accuracy": 3}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 2}, {"step": 2, "loss": 1, "accuracy": 3}]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}', '{"step": null}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)


def test_a_damaged_manifest_is_named(tmp_path):
    for content in ("{", "[]"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(InputError, match=r"manifest\.json: "):
            report.of_run(tmp_path)


def test_a_run_killed_before_its_page_is_there_is_not_complete(tmp_path, monkeypatch):
    class Nothing(Recipe):
        pass

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    run = Run.open(tmp_path, Nothing())
    with monkeypatch.context() as patch:
        patch.setattr(html, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            report.finish(run, {"loss": 1.0})
    assert not json.loads((tmp_path / "manifest.json").read_text())["complete"]
    report.finish(run, {"loss": 1.0})
    assert run.manifest["complete"] and run.manifest["summary"] == {"loss": 1.0}
    assert json.loads((tmp_path / "report.json").read_text())["complete"]
    text = (tmp_path / "report.html").read_text()
    assert "Not complete" not in text and "finished" in text
