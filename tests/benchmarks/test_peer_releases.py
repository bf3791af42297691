"""The runner of other releases counts what happened; its record is whole."""

import json
from pathlib import Path

import pytest
from processes import load_script

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks/results/peers.json"
peers = load_script(ROOT / "benchmarks/peer_releases.py")


def test_a_report_is_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure message="x"/></testcase>'
        '<testcase classname="b" name="three"><error message="x"/></testcase>'
        '<testcase classname="b" name="four"><skipped message="absent"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert peers.outcome(report) == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": ["a::two", "b::three"],
        "skips": {"absent": 1},
    }


def test_every_release_that_is_called_tested_is_run():
    tested = pytest.importorskip(
        "llama2rt.integrations.transformers", reason="transformers is not installed"
    ).TESTED
    assert {release.rpartition(".")[0] for release in peers.RELEASES} == {"4.57", *tested}


def test_the_record_names_versions_and_has_no_failure():
    """Made by `make peers`; absent until it has been run."""
    if not RECORD.is_file():
        pytest.skip("benchmarks/results/peers.json is absent: make peers writes it")
    for run in json.loads(RECORD.read_text(encoding="utf-8"))["runs"]:
        assert run["versions"]["transformers"] == run["release"]
        assert run["passed"] and not run["failed"] and run["commit"]
