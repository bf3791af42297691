"""A host whose energy counter is played: what is made of joules can be tested without a meter."""

from pathlib import Path

from llama2rt import energy


def tree(root: Path, watts: float, clock) -> energy.EnergyMeter:
    """A host whose one counter shows `watts` times the time that `clock` tells."""
    meter = energy.EnergyMeter(powercap=root, clock=clock)
    folder = root / "intel-rapl:0"
    folder.mkdir(exist_ok=True, parents=True)
    for name, text in [("name", "package-0"), ("max_energy_range_uj", "1000000000")]:
        (folder / name).write_text(text)

    def read() -> tuple[float, dict[str, float]]:
        (folder / "energy_uj").write_text(str(round(meter._clock() * watts * 1e6)))
        return type(meter)._read(meter)

    meter._read = read
    (folder / "energy_uj").write_text("0")
    return meter
