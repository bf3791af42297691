"""The doctor tells what is usable from what merely is installed."""

import sys
from types import ModuleType

import pytest

from llama2rt import doctor, ops


def module(monkeypatch, name, **members):
    made = ModuleType(name)
    made.__path__ = []
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)


def test_another_apex_is_not_taken_for_nvidias(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda distribution: "0.1")
    module(monkeypatch, "apex")
    monkeypatch.delitem(sys.modules, "apex.normalization", raising=False)
    assert "does not import" in doctor._optional("apex", "", "")["reason"]
    module(monkeypatch, "apex.normalization")
    assert "has no FusedRMSNorm" in doctor._optional("apex", "", "")["reason"]
    module(monkeypatch, "apex.normalization", FusedRMSNorm=object)
    assert doctor._optional("apex", "", "") == {"for": "", "get": "", "version": "0.1"}


def test_triton_is_listed_with_its_kernels_or_a_reason(monkeypatch):
    found = doctor.examine()
    assert found["ops"] == {device: ops.backends(device) for device in ("cpu", "cuda")}
    with ops.use("reference"):
        reference = doctor.examine()["decoding"]
    assert reference["reason"] == "ops run on the backend 'reference'"
    assert found["decoding"]["runs_on"] in ("packed weights", reference["runs_on"])
    if "reason" not in found["triton"]:
        assert {"rms_norm", "swiglu", "rope"} <= set(found["triton"]["kernels"])
    monkeypatch.setitem(sys.modules, "llama2rt.ops.triton", None)
    assert "reason" in doctor._triton()


@pytest.mark.parametrize("json", [False, True])
def test_it_prints(json, capsys):
    doctor.doctor(json=json)
    printed = capsys.readouterr().out
    assert "triton" in printed and "flash_attn" in printed
