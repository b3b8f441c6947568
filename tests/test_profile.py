"""A trace of chosen steps, model FLOPs utilization, and peak memory in the metrics."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxstages.cli.main import main
from jaxstages.config import LoraConfig
from jaxstages.models.flops import flops_per_token
from jaxstages.runtime.chips import CHIPS, Chip, chip_of
from jaxstages.training import stage
from jaxstages.training.metric_writer import read_metrics
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data

CONFIG = """
from pathlib import Path
from tests.tiny import recipe

def get_config(variant=""):
    return recipe(Path(__file__).parent)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    write_data(tmp_path)
    (tmp_path / "recipe.py").write_text(CONFIG)
    return ["jaxstages", "pretrain", f"--config={tmp_path}/recipe.py", f"--workdir={tmp_path}/work"]


def test_a_trace_of_chosen_steps_can_be_read_back(command: list[str], tmp_path: Path) -> None:
    """As TensorBoard's profile plugin and xprof read it: a plane for each host, with the operations of these steps."""
    jax_profiler = pytest.importorskip("jax.profiler")
    assert main([*command, "--profile=3:4"]) == 0
    (file,) = (tmp_path / "work" / "pretrain" / "tensorboard" / "plugins" / "profile").rglob("*.xplane.pb")
    planes = list(jax_profiler.ProfileData.from_file(str(file)).planes)
    names = [event.name for plane in planes for line in plane.lines for event in line.events]
    assert any(plane.name.startswith("/host:CPU") for plane in planes)
    assert names.count("train") == 2


@pytest.mark.parametrize("steps", ["3", "4:3", "0:2", "a:b", "1:2:3"])
def test_steps_to_profile_are_checked(command: list[str], steps: str, capfd: pytest.CaptureFixture) -> None:
    assert main([*command, f"--profile={steps}"]) == 2
    assert f"--profile={steps}: write FIRST:LAST" in capfd.readouterr().err


def test_utilization_is_tokens_times_flops_over_the_peak(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a chip of 1 GFLOP/s, of which there are eight."""
    chip = Chip("slow", 1e9, 0.0, 0.0, 0.0)
    monkeypatch.setattr(stage, "chip_of", lambda device: chip)
    assert main(command) == 0
    lines = [line for line in read_metrics(tmp_path / "work" / "pretrain" / "metrics.jsonl") if line["kind"] == "train"]
    recipe = tiny_recipe(tmp_path)
    flops = flops_per_token(recipe.model, 300, LoraConfig()).causal
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 8e9)
    assert lines


def test_an_unknown_chip_has_no_utilization_and_memory_is_recorded(command: list[str], tmp_path: Path) -> None:
    assert main(command) == 0
    lines = read_metrics(tmp_path / "work" / "pretrain" / "metrics.jsonl")
    assert not any("mfu" in line for line in lines)
    peaks = [line for line in lines if line.get("event") == "peak memory"]
    assert [line["step"] for line in peaks] == [2, 3, 4, 6] and all(0.1 < line["host_gb"][0] < 100 for line in peaks)


def test_figures_of_chips() -> None:
    assert CHIPS["h100"].flops == 989e12 and CHIPS["v5e"].flops == 197e12


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("cpu", None)),
        *(("NVIDIA A100-SXM4-40GB", "a100_40gb"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H200", "h200")),
    ],
)
def test_a_chip_is_known_by_the_kind_of_its_device(kind: str, name: str | None) -> None:
    """As libtpu and CUDA name them: "TPU v5" is a v5p."""
    assert chip_of(SimpleNamespace(device_kind=kind)) == (CHIPS[name] if name else None)
