"""Sweeps and comparisons: trials, shared parents, successive halving, p-values, tables."""

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from jaxstages import config as recipes
from jaxstages.cli import sweep as driver
from jaxstages.cli.main import main
from jaxstages.cli.sweep import PARENTS, Sweep, SweepOptions
from jaxstages.cli.sweep_flags import parse_sweep
from jaxstages.config import Metric, Recipe
from jaxstages.experiments.compare import compare, format_table, notes_of, row_curve, table_of
from jaxstages.experiments.runs import Run, find_runs, read_run
from jaxstages.experiments.sweep import (
    Trial,
    make_halving,
    make_trials,
    parent_trial,
    promotable,
    shared_stages,
    split_values,
)
from jaxstages.runtime.signals import Stop
from jaxstages.types import Interrupted
from tests.own_parts import first_letter
from tests.tiny import recipe as tiny_recipe

LR = "finetune.optim.schedule.peak_lr"


def length_gap(predictions: Sequence[str], references: Sequence[str]) -> float:
    return sum(abs(len(p) - len(r)) for p, r in zip(predictions, references, strict=True)) / len(references)


def write_run(folder: Path, recipe: Recipe, loss: float, **result: Any) -> Path:
    """A workdir as a finished fine-tuning leaves it, without parameters."""
    content = {"recipe": recipes.to_dict(recipe), "versions": {}}
    stage = folder / "finetune"
    stage.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(content))
    lines = [{"step": step, "kind": "eval", "loss": loss + 1 / step} for step in (2, 4)] + [
        {"step": 6, "kind": "eval", "loss": loss, "bleu": 10.0}
    ]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    best = {"loss": loss, "loss_se": 0.1, "perplexity": math.exp(loss), "bleu": 10.0, "watch/pretrain/loss": 2.0}
    values = {"status": "completed", "steps": 6, "best_step": 6, "params_sha256": "", "parent": None, "best": best}
    values |= {"tokens": 100, "seconds": 2.0, "verdict": {"name": "healthy", "evidence": "", "remedy": ""}} | result
    (stage / "result.json").write_text(json.dumps(values))
    return folder


def changed(recipe: Recipe, seed: int, rate: float) -> Recipe:
    recipe = copy.deepcopy(recipe)
    recipe.seed, recipe.finetune.optim.schedule.peak_lr = seed, rate
    recipe.name, recipe.cache = f"any{seed}", f"/any/{rate}"
    return recipe


LOSSES = {1e-3: [2.0, 2.1, 2.2], 2e-3: [1.5, 1.7, 1.65]}


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    recipe = tiny_recipe(tmp_path / "data")
    return [
        read_run(write_run(tmp_path / f"sweep/peak_lr={rate},seed={seed}", changed(recipe, seed, rate), loss))
        for rate, losses in LOSSES.items()
        for seed, loss in enumerate(losses)
    ]


# Compare ----------------------------------------------------------------------------------------------------------


def test_seeds_are_folded_and_only_fields_that_differ_are_shown(runs: list[Run]) -> None:
    comparison = compare(runs)
    assert (comparison.stage, comparison.metric, comparison.higher) == ("finetune", "loss", False)
    assert [row.fields for row in comparison.rows] == [{f"config.{LR}": 1e-3}, {f"config.{LR}": 2e-3}]
    for row, losses in zip(comparison.rows, LOSSES.values(), strict=True):
        assert row.values["loss"].mean == pytest.approx(sum(losses) / 3) and row.values["loss"].n == 3
        assert row.values["loss"].sd == pytest.approx(scipy.stats.tstd(losses))
    headings, cells = table_of(comparison)
    assert headings[:4] == ["run", LR, "n", "loss"] and "perplexity" not in headings
    assert cells[1][:4] == ["peak_lr=0.002", "0.002", "3", "1.617 ± 0.1"]


def test_the_p_value_is_scipys(runs: list[Run]) -> None:
    first, second = LOSSES.values()
    difference = compare(runs).rows[1].difference
    assert difference is not None and difference.test == "paired t-test, 3 seeds"
    assert difference.p == pytest.approx(scipy.stats.ttest_rel(first, second).pvalue)
    # Other seeds: no pairs.
    others = [run._replace(recipe=run.recipe | {"seed": run.recipe["seed"] + 10}) for run in runs[3:]]
    difference = compare([*runs[:3], *others]).rows[1].difference
    assert difference is not None and difference.test == "Welch's t-test"
    assert difference.p == pytest.approx(scipy.stats.ttest_ind(first, second, equal_var=False).pvalue)


def test_one_seed_has_no_p_value_and_says_so(runs: list[Run]) -> None:
    comparison = compare([runs[0], runs[3]])
    assert comparison.rows[1].difference is not None and math.isnan(comparison.rows[1].difference.p)
    assert any("one seed: the difference may be chance" in note for note in notes_of(comparison))


def test_an_unfinished_run_is_compared_by_its_best_evaluation_so_far(runs: list[Run]) -> None:
    unfinished = runs[3]._replace(results={})
    comparison = compare([runs[0], unfinished])
    assert comparison.rows[1].values["loss"].mean == 1.5 and comparison.rows[1].status == ["unfinished"]
    assert math.isnan(comparison.rows[1].tokens.mean)

    # By its own early stopping, and not by the parameters that it began with.
    lines = [{"step": 0, "kind": "eval", "loss": 0.5}, *unfinished.metrics["finetune"]]
    lines[-1] = lines[-1] | {"bleu": 10.0}
    lines[-2] = lines[-2] | {"bleu": 40.0}
    unfinished = unfinished._replace(metrics=unfinished.metrics | {"finetune": lines})
    values = compare([runs[0], unfinished], metric="bleu").rows[1].values
    assert values["loss"].mean == 1.5 and values["bleu"].mean == 10.0


def test_a_run_that_has_not_measured_the_metric_is_left_out_by_name(runs: list[Run]) -> None:
    lines = [{"step": 0, "kind": "eval", "loss": 9.0}]
    begun = runs[5]._replace(results={}, metrics=runs[5].metrics | {"finetune": lines})
    comparison = compare([*runs[:5], begun], metric="bleu")
    assert [len(row.runs) for row in comparison.rows] == [3, 2] and comparison.unmeasured == [begun]
    assert f"left out: {begun.folder} has not measured bleu yet" in notes_of(comparison)
    with pytest.raises(ValueError, match="no run has measured rouge; name one of loss, perplexity, bleu"):
        compare(runs, metric="rouge")


def test_a_seed_counts_once_and_a_shared_path_too(runs: list[Run]) -> None:
    copies = [run._replace(folder=run.folder.with_name("again")) for run in runs[:3]]
    comparison = compare([*runs[:3], *copies])
    assert [len(row.runs) for row in comparison.rows] == [3, 3], "not six samples of one recipe"
    assert comparison.rows[1].difference is not None and comparison.rows[1].difference.test == "equal in 3 seeds"
    folder = runs[0].folder
    assert find_runs([str(folder), str(folder.parent / ".." / folder.parent.name / folder.name)]) == [folder]


def test_fields_that_no_result_depends_on_are_not_compared(runs: list[Run]) -> None:
    stopped = copy.deepcopy(runs[1])
    stopped.recipe["finetune"]["loop"] |= {"stop_after": 100, "keep": 7}
    assert [len(row.runs) for row in compare([runs[0], stopped, runs[2]]).rows] == [3]


def test_a_mean_curve_ends_where_a_seed_ends(runs: list[Run]) -> None:
    shorter = runs[1]._replace(metrics={"finetune": runs[1].metrics["finetune"][:2]})
    (row,) = compare([runs[0], shorter, runs[2]]).rows
    assert {step: len(values) for step, values in row_curve(row, "finetune", "eval", "loss").items()} == {2: 3, 4: 3}


def test_a_pattern_leaves_the_parents_of_a_sweep_out(runs: list[Run], tmp_path: Path) -> None:
    write_run(tmp_path / "sweep/parents/all", tiny_recipe(tmp_path / "data"), 9.0)
    (tmp_path / "sweep/sweep.json").write_text("{}")
    assert (
        find_runs([f"{tmp_path}/swe*"])
        == find_runs([f"{tmp_path}/sweep/*"])
        == [run.folder for run in sorted(runs, key=lambda run: run.folder)]
    )


def test_custom_metrics_have_their_own_direction(tmp_path: Path) -> None:
    runs = []
    for seed, loss in enumerate(LOSSES[1e-3]):
        recipe = changed(tiny_recipe(tmp_path / "data"), seed, 1e-3)
        recipe.finetune.evaluation.metrics = (first_letter, Metric(length_gap, better="min"))
        scores = {"loss": loss, "first_letter": 3.0, "length_gap": 1.0, "watch/finetune/first_letter": 2.0}
        runs.append(read_run(write_run(tmp_path / str(seed), recipe, loss, best=scores)))
    assert compare(runs, metric="first_letter").higher and compare(runs, metric="watch/finetune/first_letter").higher
    assert not compare(runs, metric="length_gap").higher


def test_what_can_t_be_compared_is_one_line(runs: list[Run], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="has not begun instruct; it has finetune"):
        compare(runs, stage="instruct")
    with pytest.raises(ValueError, match="no run has measured chrf; name one of loss, perplexity, bleu"):
        compare(runs, metric="chrf")
    for words, line in (
        (["compare"], "needs two runs or more"),
        (["compare", str(tmp_path / "none")], "names no workdir"),
        (["compare", str(runs[0].folder), str(runs[1].folder), "--to=a.xls"], "end its name with .md"),
        (["compare", str(runs[0].folder), str(runs[1].folder), "--plot=a.txt"], ".svg, .png or .pdf"),
    ):
        assert main(["jaxstages", *words]) == 2
        assert line in capfd.readouterr().err


@pytest.mark.parametrize(
    ("suffix", "start"), [(".md", "| run"), (".csv", "run,"), (".tex", r"\begin{tabular}"), (".html", "<table>")]
)
def test_a_sweeps_folder_becomes_a_table_and_curves(
    runs: list[Run], tmp_path: Path, suffix: str, start: str, capfd: pytest.CaptureFixture
) -> None:
    assert find_runs([str(tmp_path / "sweep")]) == find_runs([str(tmp_path / "sweep" / "*")])
    table, plot = tmp_path / f"table{suffix}", tmp_path / "curves.svg"
    assert main(["jaxstages", "compare", str(tmp_path / "sweep"), f"--to={table}", f"--plot={plot}"]) == 0
    assert table.read_text().startswith(start) and "paired t-test" in capfd.readouterr().out
    assert "<svg" in plot.read_text()
    headings, cells = table_of(compare(runs))
    assert format_table(headings, cells, suffix) == table.read_text()


def test_a_field_that_is_younger_than_a_run_has_its_default(runs: list[Run]) -> None:
    file = runs[3].folder / "recipe.json"
    content = json.loads(file.read_text())
    del content["recipe"]["pretrain"]["optim"]["average"]
    file.write_text(json.dumps(content))
    assert compare([*runs[:3], read_run(runs[3].folder)]).rows[1].fields.keys() == {f"config.{LR}"}


# Trials -----------------------------------------------------------------------------------------------------------


def test_trials_are_all_combinations_with_short_names() -> None:
    trials = make_trials({LR: ["1e-3", "3e-3"], "seed": ["0", "1"]}, [])
    assert [trial.name for trial in trials] == [
        f"peak_lr={rate},seed={seed}" for rate in ("1e-3", "3e-3") for seed in "01"
    ]
    assert trials[3].flags == [f"--config.{LR}=3e-3", "--config.seed=1"]
    names = [trial.name for trial in make_trials({LR: ["1"], "instruct.optim.schedule.peak_lr": ["2"]}, [])]
    assert names == ["finetune.peak_lr=1,instruct.peak_lr=2"]
    listed = make_trials({"seed": ["0", "1"]}, [{"model.layers": 2}, {"model.layers": 3}])
    assert [trial.name for trial in listed] == [f"layers={n},seed={s}" for n in (2, 3) for s in (0, 1)]
    assert split_values("(1,2);(3,4)") == ["(1,2)", "(3,4)"]
    odd = make_trials({"pretrain.data.train": ["('a/b.txt',)", "('c.txt',)"]}, [])
    assert all("/" not in trial.name and "'" not in trial.name for trial in odd) and odd[0].name != odd[1].name


@pytest.mark.parametrize(
    ("product", "listed", "words"),
    [
        ({}, [], "nothing is swept"),
        ({"seed": ["0"]}, [{"seed": 1}], "sets this field too"),
        ({}, [{"seed": 1}, {"seed": 1}], "the same values"),
    ],
)
def test_wrong_trials(product: dict[str, list[str]], listed: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_trials(product, listed)


@pytest.mark.parametrize(("text", "words"), [("1,,2", "empty value"), ("1,1", "value twice")])
def test_wrong_values(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_values(text)


def test_stages_before_the_swept_one_are_shared_by_trials_with_equal_seeds(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    trials = make_trials({LR: ["1e-3", "3e-3"], "seed": ["0", "1"]}, [])
    assert shared_stages(trials, recipe) == ["pretrain"]
    assert [parent_trial(trial, recipe).name for trial in trials] == ["seed=0", "seed=1", "seed=0", "seed=1"]
    assert parent_trial(make_trials({LR: ["1"]}, [])[0], recipe) == Trial("all", {})
    assert shared_stages(make_trials({"pretrain.loop.steps": ["1"]}, []), recipe) == []
    assert shared_stages(make_trials({"seed": ["0", "1"]}, []), recipe) == []
    late = make_trials({"instruct.optim.schedule.peak_lr": ["1"]}, [])
    assert shared_stages(late, recipe) == ["pretrain", "finetune"]


CONFIG = """
from pathlib import Path
from tests.tiny import recipe

def get_config(variant=""):
    return recipe(Path(__file__).parent)
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "recipe.py").write_text(CONFIG)
    return f"--config={tmp_path}/recipe.py"


def test_the_recipe_of_every_trial_is_checked_before_any_is_run(config: str, tmp_path: Path) -> None:
    argv = ["jaxstages", "sweep", config, f"--workdir={tmp_path}/sweep"]
    line = parse_sweep([*argv, f"--sweep.{LR}=1e-3,2e-3", "--config.seed=3"])
    assert len(line.trials) == 2 and line.config_flags == [config, "--config.seed=3"] and line.recipe.seed == 3
    for words, message in (
        ([f"--sweep.{LR}=1e-3,-1"], r"trial peak_lr=-1: .*peak_lr"),
        (["--sweep.finetune.optim.schedule.peak=1"], r"trial peak=1: .*unknown field.*did you mean"),
        (["--sweep.seed"], "has no values"),
        (["--sweep.seed=1", "--sweep.seed=2"], "given twice"),
        ([], "nothing is swept"),
        ([f"--sweep.{LR}=1e-3,0.001"], "trials peak_lr=1e-3 and peak_lr=0.001 have the same recipe"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_sweep([*argv, *words])
    (tmp_path / "recipe.py").write_text(CONFIG + '\n\ndef sweep():\n    return [{"seed": 5}, {"seed": 6}]\n')
    assert [trial.name for trial in parse_sweep(argv).trials] == ["seed=5", "seed=6"]
    flags = ["jaxstages", "sweep", "--config", f"{tmp_path}/recipe.py", "--config.name", "mine"]
    assert parse_sweep([*flags, f"--sweep.{LR}=1,2"]).config_flags == [config, "--config.name=mine"]
    future = f"from __future__ import annotations\nimport dataclasses\n{CONFIG}"
    own = "\n@dataclasses.dataclass\nclass Own:\n    field: int = 1\n"
    baseline = '\ndef sweep():\n    return [{}, {"seed": 6}]\n'
    (tmp_path / "recipe.py").write_text(future + own + baseline)
    assert [trial.name for trial in parse_sweep(argv).trials] == ["base", "seed=6"]
    (tmp_path / "recipe.py").write_text(CONFIG + "\n\ndef sweep():\n    return 5\n")
    with pytest.raises(ValueError, match="must return a list of dicts"):
        parse_sweep(argv)


# The driver -------------------------------------------------------------------------------------------------------

FAKE = """
import json, sys, time
from pathlib import Path
flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
work, rate = Path(flags["workdir"]), float(flags.get("config.finetune.optim.schedule.peak_lr", 0))
stop = int(flags.get("config.finetune.loop.stop_after", 0)) or 81
time.sleep({seconds})
if rate == 1300 and not (work / "retry").exists():
    work.mkdir(parents=True, exist_ok=True)
    (work / "retry").write_text("")
    sys.exit(70)
stages = ["pretrain"] if sys.argv[1] == "pretrain" else ["pretrain", "finetune", "instruct"]
(work / "LOCK").parent.mkdir(parents=True, exist_ok=True)
(work / "recipe.json").write_text({recipe!r})
for stage in stages:
    (work / stage).mkdir(exist_ok=True)
    if stage == "pretrain" and (work / stage / "result.json").exists():
        continue
    with (work / stage / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({{"step": stop, "kind": "eval", "loss": abs(rate - 5) + 1 / stop}}) + "\\n")
    (work / stage / "log").write_text(str(time.time()))
    (work / stage / "checkpoints" / str(stop)).mkdir(parents=True)
    if stop == 81:
        result = {{"status": "completed", "steps": stop, "best_step": stop, "params_sha256": "", "parent": None}}
        (work / stage / "result.json").write_text(json.dumps(result))
with (work.parent / "calls").open("a") as file:
    file.write(work.name + " " + str(stop) + "\\n")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a maker of sweeps whose trials are a small script: its loss is the distance of the rate from 5."""
    monkeypatch.setattr(driver, "POLL_SECONDS", 0.01)
    recipe = tiny_recipe(tmp_path)
    recipe.finetune.loop.steps = 81

    def make(values: list[str], seconds: float = 0.0, **options: Any) -> Sweep:
        script = tmp_path / "fake.py"
        content = json.dumps({"recipe": recipes.to_dict(recipe)})
        script.write_text(FAKE.format(seconds=seconds, recipe=content))
        (tmp_path / "sweep").mkdir(exist_ok=True)
        sweep = Sweep(tmp_path / "sweep", recipe, make_trials({LR: values}, []), [], SweepOptions(**options))

        def command(workdir: Path, trial: Trial, words: Any, more: Any = ()) -> list[str]:
            return [sys.executable, str(script), *words, f"--workdir={workdir}", *trial.flags, *more]

        monkeypatch.setattr(sweep, "_command", command)
        return sweep

    return make


def calls(sweep: Sweep) -> list[str]:
    return (sweep.folder / "calls").read_text().splitlines()


def test_a_sweep_trains_the_parent_once_and_skips_what_is_done(fake: Any) -> None:
    sweep = fake(["1", "2", "3"], parallel=2)
    sweep.run_all()
    assert sorted(calls(sweep)) == ["peak_lr=1 81", "peak_lr=2 81", "peak_lr=3 81"]
    assert (sweep.folder / "parents" / "calls").read_text() == "all 81\n"
    times = {(sweep.folder / f"peak_lr={rate}" / "pretrain" / "log").read_text() for rate in (1, 2, 3)}
    assert len(times) == 1, "a copy of the parent's"
    again = fake(["1", "2", "3", "4"])
    again.run_all()
    assert calls(again)[3:] == ["peak_lr=4 81"]


def test_a_failed_trial_is_named_and_the_others_go_on(fake: Any) -> None:
    sweep = fake(["1", "1300", "3"])
    with pytest.raises(ValueError, match=r"1 of 3 trials failed; see \S+peak_lr=1300.log, and start the sweep again"):
        sweep.run_all()
    assert [sweep.is_done(trial) for trial in sweep.trials] == [True, False, True]
    fake(["1", "1300", "3"]).run_all()
    assert all(sweep.is_done(trial) for trial in sweep.trials)


def test_a_signal_or_the_end_of_the_time_ends_trials_and_the_sweep_goes_on(fake: Any) -> None:
    sweep = fake(["1", "2"], seconds=0.4, hours=1e-6)
    with pytest.raises(Interrupted, match="are over; its trials have saved, start it again"):
        sweep.run_all()
    sweep = fake(["1", "2"], seconds=0.4)
    timer = subprocess.Popen([sys.executable, "-c", f"import time, os; time.sleep(0.8); os.kill({os.getpid()}, 15)"])
    with pytest.raises(Interrupted, match="a signal asked to stop"):
        sweep.run_all()
    timer.wait()
    fake(["1", "2"]).run_all()
    assert all(sweep.is_done(trial) for trial in sweep.trials)


def test_each_trial_has_a_device_that_no_other_has(fake: Any) -> None:
    running = driver._Driver(fake(["1", "2", "3"], parallel=2), Stop())
    running._devices = [{"DEVICE": "0"}, {"DEVICE": "1"}]
    process = subprocess.Popen(["true"])
    process.wait()
    assert running._free_slot() == 0
    running._running = {"b": driver._Running(process, 0.0, 1)}
    assert running._free_slot() == 0, "the other trial has ended first"
    running._running["c"] = driver._Running(process, 0.0, 0)
    running._running["d"] = driver._Running(process, 0.0, 0)
    assert running._free_slot() == 1


def test_a_signal_reaches_the_trial_of_an_index(fake: Any) -> None:
    sweep = fake(["1", "2"], seconds=60)
    timer = subprocess.Popen([sys.executable, "-c", f"import time, os; time.sleep(1); os.kill({os.getpid()}, 15)"])
    began = time.monotonic()
    assert sweep.run_one(0) == -signal.SIGTERM, "the fake has no handler"
    timer.wait()
    assert time.monotonic() - began < 30


def test_a_trial_that_another_process_trains_is_waited_for(fake: Any, capfd: pytest.CaptureFixture) -> None:
    from jaxstages.runtime.workdir import lock

    sweep = fake(["1", "2"], hours=1e-4)
    with lock(sweep.folder / "peak_lr=1"), pytest.raises(Interrupted, match="are over"):
        sweep.run_all()
    assert "peak_lr=1: waits for the process that trains it" in capfd.readouterr().out
    fake(["1", "2"]).run_all()
    assert all(sweep.is_done(trial) for trial in sweep.trials)


def test_a_parent_that_fails_is_named_by_its_log(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = fake(["1", "2"])
    command = sweep._command
    failing = [sys.executable, "-c", "raise SystemExit(70)", "pretrain"]
    monkeypatch.setattr(
        sweep, "_command", lambda work, *rest: failing if PARENTS in work.parts else command(work, *rest)
    )
    with pytest.raises(ValueError, match=r"2 of 2 trials failed; see [^ ,]+parents/all.log, and start"):
        sweep.run_all()


def test_a_sweep_needs_a_folder_on_a_disk(config: str, capfd: pytest.CaptureFixture) -> None:
    assert main(["jaxstages", "sweep", config, "--workdir=gs://bucket/sweep", "--sweep.seed=0,1"]) == 2
    assert "--workdir=gs://bucket/sweep: a local path is wanted" in capfd.readouterr().err


def test_one_trial_by_its_index(fake: Any) -> None:
    sweep = fake(["1", "2"])
    assert sweep.run_one(1) == 0 and calls(sweep) == ["peak_lr=2 81"]
    with pytest.raises(ValueError, match=r"--index=2: the sweep has 2 trials, 0 to 1"):
        sweep.run_one(2)


def test_halving_ends_with_the_best_at_a_part_of_the_cost(fake: Any) -> None:
    """27 trials, and the loss at a rung tells which is best: the best is trained to its end."""
    rates = [str(rate) for rate in random.Random(0).sample(range(-30, 30), 27)]
    sweep = fake(rates, halving=3, first_rung=3, parallel=2)
    sweep.run_all()
    best = min(rates, key=lambda rate: abs(int(rate) - 5))
    done = [trial.changes[LR] for trial in sweep.trials if sweep.is_done(trial)]
    assert best in done
    steps = {
        name: [int(line.split()[1]) for line in calls(sweep) if line.split()[0] == name]
        for name in {line.split()[0] for line in calls(sweep)}
    }
    cost = sum(max(values) for values in steps.values())
    assert all(values == sorted(values) for values in steps.values()) and len(steps) == 27
    assert cost <= 0.45 * 27 * 81


def test_a_halving_sweep_goes_on_as_if_it_had_not_ended(fake: Any) -> None:
    rates = [str(rate) for rate in range(6, 15)]
    fake(rates, halving=3, first_rung=9).run_all()
    sweep = fake(rates, halving=3, first_rung=9)
    before = calls(sweep)
    sweep.run_all()
    assert calls(sweep) == before, "nothing is promoted that was not"
    assert driver._Driver(sweep, Stop())._rung == {
        f"peak_lr={rate}": {"6": 2, "7": 1, "8": 1}.get(rate, 0) for rate in rates
    }


def test_a_trial_that_does_not_reach_its_rung_is_not_sent_there_again(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = fake(["6", "7", "8"], halving=3, first_rung=9)
    monkeypatch.setattr(sweep, "rungs", lambda trial: {0: 1.0} if (sweep.folder / trial.name).is_dir() else {})
    sweep.run_all()
    assert calls(sweep) == ["peak_lr=6 9", "peak_lr=7 9", "peak_lr=8 9", "peak_lr=6 27"]


def test_halving_needs_an_evaluation_at_a_rung(fake: Any) -> None:
    with pytest.raises(ValueError, match=r"--first_rung=4: .* a multiple of the stage's loop.eval_every=3, or change"):
        fake(["1", "2"], halving=3, first_rung=4)
    with pytest.raises(ValueError, match=r"--first_rung=3 has no effect without --halving=FACTOR"):
        fake(["1", "2"], first_rung=3)


def test_what_was_trained_by_another_recipe_is_refused(fake: Any) -> None:
    """Else its trials would be skipped as done, or start from a parent of another sweep."""
    sweep = fake(["1", "2"])
    sweep.run_all()
    same = {trial.name: sweep.recipe for trial in sweep.trials}
    sweep.check_begun(same)
    other = copy.deepcopy(sweep.recipe)
    other.instruct.optim.beta1 = 0.5
    with pytest.raises(ValueError, match=r"sweep/peak_lr=2 was begun with another recipe: config.instruct.optim.beta1"):
        sweep.check_begun(same | {"peak_lr=2": other})
    (sweep.folder / "peak_lr=3").mkdir()
    other = copy.deepcopy(sweep.recipe)
    other.pretrain.optim.beta1 = 0.5
    sweep = fake(["3"])
    sweep.check_begun({"peak_lr=3": same["peak_lr=1"]})
    with pytest.raises(ValueError, match=r"parents/all was begun with another recipe: config.pretrain.optim.beta1"):
        sweep.check_begun({"peak_lr=3": other})


def test_rungs_and_promotions() -> None:
    assert make_halving(3, 3, 81).rungs == [3, 9, 27, 81] and make_halving(4, 10, 100).rungs == [10, 40, 100]
    for factor, first in ((1, 3), (3, 0), (3, 81)):
        with pytest.raises(ValueError, match="--halving"):
            make_halving(factor, first, 81)
    halving = make_halving(2, 1, 4)
    scores = {"a": {0: 1.0}, "b": {0: 2.0}, "c": {0: math.nan}}
    assert promotable(halving, {"a": 0, "b": 0, "c": 0}, scores) == "a"
    assert promotable(halving, {"a": 1, "b": 0, "c": 0}, scores) is None, "one of three is the best half so far"
    assert promotable(halving, {"c": 0, "d": 0}, {"c": {0: math.nan}, "d": {0: math.nan}}) is None
    scores |= {"d": {0: 0.5}}
    assert promotable(halving, {"a": 1, "b": 0, "c": 0, "d": 0}, scores) == "d"


def test_two_sweeps_in_one_folder_are_refused(config: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    from jaxstages.runtime.workdir import lock

    with lock(tmp_path / "sweep"):
        assert main(["jaxstages", "sweep", config, f"--workdir={tmp_path}/sweep", "--sweep.seed=0,1"]) == 2
    assert "is in use by" in capfd.readouterr().err


def test_a_trial_ends_when_its_sweep_is_killed(fake: Any, tmp_path: Path) -> None:
    """The kernel tells it; else it would train on beside the next sweep."""
    child = tmp_path / "child"
    code = f"""
import os, subprocess, sys, time
code = "from jaxstages.runtime.signals import end_with_parent; end_with_parent(); import time; time.sleep(60)"
environment = os.environ | {{"JAXSTAGES_END_WITH_PARENT": str(os.getpid())}}
process = subprocess.Popen([sys.executable, "-c", code], env=environment)
time.sleep(2)
open({str(child)!r}, "w").write(str(process.pid))
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not child.exists() or not child.read_text():
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{child.read_text()}").exists() and time.monotonic() < end:
        state = Path(f"/proc/{child.read_text()}/stat").read_text().split()[2]
        if state == "Z":
            break
        time.sleep(0.02)
    assert time.monotonic() < end


# The report of several runs.


def test_a_report_of_several_runs_has_their_curves_and_the_table(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["jaxstages", "report", "sweep"]) == 0
    page = (tmp_path / "report.html").read_text()
    root = ElementTree.fromstring(f"<body>{page.partition('<body>')[2].removesuffix('</html>' + chr(10))}")
    headings, cells = table_of(compare(runs))
    assert [cell.text or "" for cell in root.iter("td")][: len(cells[0]) - 1] == cells[0][1:]
    assert all(heading in page for heading in headings)
    for figure in root.iter("figure"):
        labels = ["".join(item.itertext()) for item in figure.iter("li")]
        assert labels == ["peak_lr=0.001", "peak_lr=0.002"]
        (svg,) = figure.iter("svg")
        assert "peak_lr=0.002: 2.117 at step 2, 1.617 at step 6" in svg.attrib["aria-label"]
        assert len([path for path in svg.iter("path") if "stroke" in path.attrib.get("style", "")]) >= 2
    assert len(list(root.iter("figure"))) == 1  # the loss decides, and these runs have no training lines
    assert all(str(run.folder.relative_to(tmp_path)) in page for run in runs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report"], "report needs --workdir=DIR for a single run, or DIR DIR"),
        (["report", "sweep", "--workdir=a"], "report needs --workdir=DIR for a single run, or DIR DIR"),
        (["report", "sweep", "--to=a.pdf"], "end its name with .html"),
        (["report", "sweep/peak_lr=0.001,seed=0"], "is a single run; use jaxstages report --workdir="),
        (["report", "sweep", "--metric=chrf"], "no run has measured chrf; name one of"),
        (["report", "sweep", "--stage=instruct"], "has not begun instruct"),
        (
            ["report", "--workdir=sweep/peak_lr=0.001,seed=0", "--metric=loss"],
            "--metric applies to a report of several",
        ),
    ],
)
def test_a_report_of_several_runs_that_makes_no_sense_is_refused(
    words: list[str],
    message: str,
    runs: list[Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["jaxstages", *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "report.html").exists()
