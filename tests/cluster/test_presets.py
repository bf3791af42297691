"""NCCL's environment from a sysfs tree that the test writes."""

from pathlib import Path

import pytest

from llama2rt.cluster import presets
from llama2rt.cluster.host import adapters
from llama2rt.errors import InputError

MAPPED = "0000:0000:0000:0000:0000:ffff:0a00:000{}"
LOCAL = "fe80:0000:0000:0000:0000:0000:0000:0001"


def port(root: Path, adapter: str, link_layer: str, state: str = "4: ACTIVE", gids=()) -> None:
    folder = root / adapter / "ports" / "1"
    (folder / "gid_attrs" / "types").mkdir(parents=True)
    (folder / "gids").mkdir()
    for name, text in [
        ("link_layer", link_layer),
        ("state", state),
        ("rate", "200 Gb/sec (4X HDR)"),
    ]:
        (folder / name).write_text(text + "\n")
    for index, (kind, address) in enumerate(gids):
        (folder / "gid_attrs" / "types" / str(index)).write_text(kind + "\n")
        (folder / "gids" / str(index)).write_text(address + "\n")


ROCE_GIDS = [
    ("IB/RoCE v1", LOCAL),
    ("RoCE v2", LOCAL),
    ("IB/RoCE v1", MAPPED.format(1)),
    ("RoCE v2", MAPPED.format(1)),
    ("RoCE v2", LOCAL),  # not routed: the index before it is wanted
]


def test_infiniband_names_its_active_ports_only(tmp_path):
    port(tmp_path, "mlx5_0", "InfiniBand")
    port(tmp_path, "mlx5_1", "InfiniBand", "1: DOWN")
    port(tmp_path, "mlx5_2", "Ethernet", gids=ROCE_GIDS)
    port(tmp_path, "mlx5_3", "InfiniBand")
    environment: dict[str, str] = {}
    lines = presets.apply(presets.settings("ib", tmp_path), environment)
    assert environment == {
        "NCCL_IB_DISABLE": "0",
        "NCCL_NET": "IB",
        "NCCL_IB_HCA": "=mlx5_0:1,mlx5_3:1",
        "NCCL_IB_ADAPTIVE_ROUTING": "1",
    }
    assert all(any(line.startswith(f"{name}=") for line in lines) for name in environment)


def test_roce_finds_the_address_index_and_spreads_over_queue_pairs(tmp_path):
    port(tmp_path, "mlx5_0", "Ethernet", gids=ROCE_GIDS)
    port(tmp_path, "mlx5_1", "Ethernet", gids=ROCE_GIDS)
    environment: dict[str, str] = {}
    lines = presets.apply(presets.settings("roce", tmp_path), environment)
    assert environment == {
        "NCCL_IB_DISABLE": "0",
        "NCCL_NET": "IB",
        "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
        "NCCL_IB_GID_INDEX": "3",
        "NCCL_IB_QPS_PER_CONNECTION": "4",
        "NCCL_IB_SPLIT_DATA_ON_QPS": "1",
    }
    assert any(line.startswith("NCCL_IB_TC not set") for line in lines)


@pytest.mark.parametrize("other", [ROCE_GIDS[1:], ROCE_GIDS[:2]])
def test_ports_that_disagree_on_the_index_leave_it_to_nccl(tmp_path, other):
    port(tmp_path, "mlx5_0", "Ethernet", gids=ROCE_GIDS)
    port(tmp_path, "mlx5_1", "Ethernet", gids=other)
    environment: dict[str, str] = {}
    lines = presets.apply(presets.settings("roce", tmp_path), environment)
    assert "NCCL_IB_GID_INDEX" not in environment
    assert any(line.startswith("NCCL_IB_GID_INDEX not set (no one") for line in lines)


def test_tcp_turns_rdma_off():
    environment: dict[str, str] = {}
    presets.apply(presets.settings("tcp"), environment)
    assert environment == {"NCCL_IB_DISABLE": "1", "NCCL_NET": "Socket"}


def test_without_adapters_it_says_so_and_never_falls_back_to_tcp(tmp_path):
    environment: dict[str, str] = {}
    lines = presets.apply(presets.settings("ib", tmp_path), environment)
    assert environment["NCCL_NET"] == "IB" and "NCCL_IB_HCA" not in environment
    assert any("no active InfiniBand port" in line for line in lines)


def test_what_is_exported_stays_and_is_shown(tmp_path):
    port(tmp_path, "mlx5_0", "Ethernet", gids=ROCE_GIDS)
    environment = {"NCCL_IB_TC": "106", "NCCL_IB_QPS_PER_CONNECTION": "16", "NCCL_NET": "IB"}
    lines = presets.apply(presets.settings("roce", tmp_path), environment)
    assert environment["NCCL_IB_QPS_PER_CONNECTION"] == "16"
    assert "NCCL_IB_QPS_PER_CONNECTION=16 (exported; the preset: 4)" in lines
    assert any(line.startswith("NCCL_IB_TC=106 (exported") for line in lines)


@pytest.mark.parametrize(
    ("fabric", "exported"),
    [("tcp", {"NCCL_NET": "IB"}), ("ib", {"NCCL_IB_DISABLE": "1"}), ("roce", {"NCCL_NET": "OFI"})],
)
def test_an_environment_of_another_fabric_is_bad_input(tmp_path, fabric, exported):
    with pytest.raises(InputError, match="is exported, the preset needs"):
        presets.apply(presets.settings(fabric, tmp_path), dict(exported))


def test_adapters_of_the_footer(tmp_path):
    port(tmp_path / "rdma", "mlx5_0", "InfiniBand")
    port(tmp_path / "rdma", "mlx5_1", "InfiniBand", "1: DOWN")
    for name, state, speed, real in [
        ("eth0", "up", "25000", True),
        ("eth1", "down", "25000", True),
        ("ens3", "up", "-1", True),
        ("docker0", "up", "10000", False),
    ]:
        folder = tmp_path / "net" / name
        (folder / "device").mkdir(parents=True) if real else folder.mkdir(parents=True)
        (folder / "operstate").write_text(state)
        (folder / "speed").write_text(speed)
    assert adapters(tmp_path / "rdma", tmp_path / "net") == [
        "mlx5_0:1 InfiniBand 200 Gb/sec (4X HDR)",
        "ens3",
        "eth0 25 Gb/s",
    ]
