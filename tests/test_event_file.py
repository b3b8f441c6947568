"""What TensorBoard shows beside scalars: the recipe, hyperparameters, answers, and the stage matrix."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from jaxstages.cli.train import run_stages
from jaxstages.training.event_file import EventFile, markdown_table
from jaxstages.training.metric_writer import read_metrics
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data


def values_of(folder: Path) -> list[tuple[int, Any]]:
    """Read (step, summary value) of all events in a folder."""
    values = []
    for file in sorted(folder.glob("events*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            event = Event.FromString(content[at + 12 : at + 12 + length])
            values += [(event.step, value) for value in event.summary.value]
            at += 16 + length
    return values


def texts_of(folder: Path, tag: str) -> dict[int, str]:
    values = [(step, value) for step, value in values_of(folder) if value.tag == f"{tag}/text_summary"]
    return {step: value.tensor.string_val[0].decode() for step, value in values}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("events")
    write_data(home / "data")
    recipe = tiny_recipe(home / "data")
    recipe.instruct = None
    run_stages(recipe, home / "work")
    return home / "work"


def test_each_evaluation_shows_answers(work: Path) -> None:
    lines = [line for line in read_metrics(work / "finetune" / "metrics.jsonl") if line["kind"] == "samples"]
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        assert len(line["samples"]) == 3
        for sample in line["samples"]:
            person, colour = re.search(r"(\w+) likes (\w+)", sample["prompt"]).groups()
            assert sample["reference"] == f"{colour} {person}" and sample["dataset"] == ""

    texts = texts_of(work / "finetune" / "tensorboard", "samples")
    assert sorted(texts) == [3, 6]
    assert all(sample["reference"] in texts[6] for sample in lines[1]["samples"])
    assert not texts_of(work / "pretrain" / "tensorboard", "samples")  # it has no metrics of answers


def test_the_recipe_and_its_hyperparameters_are_shown(work: Path) -> None:
    folder = work / "finetune" / "tensorboard"
    whole = texts_of(folder, "recipe")[0].strip("`\n")
    assert json.loads(whole) == json.loads((work / "recipe.json").read_text())["recipe"]
    assert "| optim.schedule.peak_lr | 0.003 |" in texts_of(folder, "recipe/changed")[0]

    plugins = [value.metadata.plugin_data for _, value in values_of(folder) if value.tag.startswith("_hparams_/")]
    contents = [HParamsPluginData.FromString(plugin.content) for plugin in plugins]
    (start,) = [each.session_start_info for each in contents if each.HasField("session_start_info")]
    assert start.hparams["optim.schedule.peak_lr"].number_value == 0.003
    assert start.hparams["model.width"].number_value == 16
    assert "loop.accumulate" not in start.hparams  # as by default
    (experiment,) = [each.experiment for each in contents if each.HasField("experiment")]
    tags = {value.tag for _, value in values_of(folder)}
    assert {info.name.tag for info in experiment.metric_infos} == {"eval/loss"} <= tags


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_held_out_rows_are_shown_with_what_is_scored(work: Path, stage: str) -> None:
    rows = texts_of(work / stage / "tensorboard", "held-out rows")[0].splitlines()[2:]
    assert 1 <= len(rows) <= 3
    text, scored = rows[0].strip("| ").split(" | ")
    assert " likes " in text
    assert (" likes " in scored) == (stage == "pretrain")  # fine-tuning scores the target alone


def test_the_stage_matrix_is_shown(work: Path) -> None:
    matrix = json.loads((work / "stage_matrix.json").read_text())
    table = texts_of(work / "tensorboard", "stage matrix")[0].splitlines()
    assert table[0] == f"| checkpoint | {' | '.join(matrix['columns'])} |"
    assert table[2] == f"| pretrain | {' | '.join(map(str, matrix['values'][0]))} |"
    assert "say red" in texts_of(work / "tensorboard", "prompts")[0]


def test_text_can_not_break_a_table(tmp_path: Path) -> None:
    table = markdown_table(["a"], [["one | two\n<three>"]])
    assert table.splitlines()[2] == "| one &#124; two<br>&lt;three> |"
    events = EventFile(tmp_path)
    events.write_text(2, "t", table)
    events.close()
    assert texts_of(tmp_path, "t") == {2: table}
