"""The three stages end to end on a tiny recipe: hand-over, resume, contract, early stopping, what is written."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxstages import config as recipes
from jaxstages.checkpoint.fingerprint import fingerprint, params_sha256
from jaxstages.cli.resolve import resolve_recipe
from jaxstages.cli.train import run_stages, train
from jaxstages.config import AnchorConfig, EarlyStoppingConfig, MeshConfig, Recipe, ScheduleConfig
from jaxstages.config.checks import validate
from jaxstages.generation.evaluate import Evaluate
from jaxstages.models.sharding import make_mesh
from jaxstages.runtime.files import read_json, write_json
from jaxstages.training import loop, stage
from jaxstages.training.handoff import read_parent
from jaxstages.training.metric_writer import MetricsWriter, read_metrics
from jaxstages.training.setup import setup_stage
from jaxstages.types import Diverged, Params, Report
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A run of all three stages, made once; tests that change it work on a copy."""
    root = tmp_path_factory.mktemp("run")
    write_data(root / "data")
    recipe = tiny_recipe(root / "data")
    recipe.cache = str(root / "cache")
    run_stages(recipe, root / "work")
    return recipe, root / "work"


@pytest.fixture
def run(finished: tuple[Recipe, Path], tmp_path: Path) -> tuple[Recipe, Path]:
    shutil.copytree(finished[1], tmp_path / "work")
    return copy.deepcopy(finished[0]), tmp_path / "work"


def losses(workdir: Path, stage: str) -> dict[int, float]:
    return {
        line["step"]: line["loss"]
        for line in read_metrics(workdir / stage / "metrics.jsonl")
        if line["kind"] == "train"
    }


def events(workdir: Path, stage: str) -> list[dict[str, Any]]:
    """The events of a stage, without the memory that each log line reports."""
    lines = read_metrics(workdir / stage / "metrics.jsonl")
    return [line for line in lines if line["kind"] == "event" and line["event"] != "peak memory"]


def test_each_stage_names_its_parent_as_it_was_read(finished: tuple[Recipe, Path]) -> None:
    _, work = finished
    results = {name: read_json(work / name / "result.json") for name in recipes.STAGES}
    assert results["pretrain"]["parent"] is None
    for child, parent in (("finetune", "pretrain"), ("instruct", "finetune")):
        assert results[child]["parent"] == {
            "path": str(work / parent),
            "step": results[parent]["best_step"],
            "params_sha256": results[parent]["params_sha256"],
        }
    assert all(result["status"] == "completed" and result["steps"] == 6 for result in results.values())


def test_loss_falls_and_lines_are_complete(finished: tuple[Recipe, Path]) -> None:
    _, work = finished
    lines = read_metrics(work / "pretrain" / "metrics.jsonl")
    train_lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == [2, 4, 6]
    assert train_lines[-1]["loss"] < train_lines[0]["loss"]
    assert set(train_lines[0]) == {
        *("step", "kind", "loss", "token_accuracy", "grad_norm", "learning_rate", "tokens", "tokens_per_second")
    }
    evals = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evals] == [0, 3, 6]
    assert all(line["perplexity"] == pytest.approx(math.exp(line["loss"]), rel=1e-5) for line in evals)
    assert list((work / "pretrain" / "tensorboard").iterdir())


def test_matrix_has_the_form_of_the_design(finished: tuple[Recipe, Path]) -> None:
    matrix = read_json(finished[1] / "stage_matrix.json")
    assert matrix["checkpoints"] == list(recipes.STAGES)
    assert matrix["columns"][:2] == ["pretrain/perplexity", "finetune/perplexity"]
    assert "finetune/bleu" in matrix["columns"] and "instruct/exact_match" in matrix["columns"]
    assert np.asarray(matrix["values"], float).shape == (3, len(matrix["columns"]))
    assert set(matrix["prompts"][0]["answers"]) == set(recipes.STAGES)
    assert any(signature.startswith("nrefs:1|case:mixed") for signature in matrix["signatures"])


def test_a_stage_on_two_devices_comes_to_the_same(
    finished: tuple[Recipe, Path], run: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hand-over, training with an anchor, answers and the matrix on a mesh. More meshes: `test_sharding.py`."""
    recipe, work = again(run, "instruct")
    monkeypatch.setattr("jaxstages.training.setup.make_mesh", lambda config, _: make_mesh(config, jax.devices()[:2]))
    assert recipe.instruct
    recipe.mesh = MeshConfig(data=1, fsdp=2)
    recipe.instruct.anchor = AnchorConfig(weight=1e-6, batch_size=8, texts=2)  # its penalty is lost in rounding
    run_stages(recipe, work)

    expected = [*losses(finished[1], "instruct").values()]
    np.testing.assert_allclose([*losses(work, "instruct").values()], expected, rtol=1e-4)
    here, there = (read_json(folder / "stage_matrix.json") for folder in (work, finished[1]))
    perplexities = [column for column, name in enumerate(there["columns"]) if name.endswith("perplexity")]
    values = (np.asarray(matrix["values"], float)[:, perplexities] for matrix in (here, there))
    np.testing.assert_allclose(*values, rtol=1e-4)


def test_a_finished_stage_is_not_trained_again(run: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe, work = run
    before = (work / "finetune" / "result.json").stat().st_mtime_ns
    train(recipe, work, "finetune")
    assert "already completed at step 6" in capsys.readouterr().out
    assert (work / "finetune" / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(finished: tuple[Recipe, Path], tmp_path: Path, stop: int) -> None:
    """Stopped between two log lines, at an evaluation, and just before the end."""
    recipe, work = copy.deepcopy(finished[0]), tmp_path / "work"
    shutil.copytree(finished[1] / "tokenizer", work / "tokenizer")
    recipe.pretrain.loop.stop_after = stop
    assert train(recipe, work, "pretrain") is False
    assert not (work / "pretrain" / "result.json").exists()
    recipe.pretrain.loop.stop_after = 0
    assert train(recipe, work, "pretrain") is True
    whole, again = (read_json(w / "pretrain" / "result.json") for w in (finished[1], work))
    for name in ("params_sha256", "last_params_sha256", "best", "best_step", "tokens"):
        assert again[name] == whole[name], name
    assert losses(work, "pretrain") == losses(finished[1], "pretrain")


def test_resume_drops_lines_that_it_will_write_again(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    """A kill after a line and before its checkpoint leaves a line too many; and may cut the last one short."""
    recipe, work = copy.deepcopy(finished[0]), tmp_path / "work"
    shutil.copytree(finished[1] / "tokenizer", work / "tokenizer")
    recipe.pretrain.loop.stop_after = 2
    train(recipe, work, "pretrain")
    with (work / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "kind": "train", "loss": 9.0}) + "\n" + '{"step": 6, "ki')
    recipe.pretrain.loop.stop_after = 0
    train(recipe, work, "pretrain")
    assert losses(work, "pretrain") == losses(finished[1], "pretrain")


@pytest.mark.parametrize(
    ("tiny", "read_at"),
    [(stage.SMALL_STEP_FLOPS, [9] * 8 + [11] * 2 + [19] * 8 + [20] * 2), (0.0, [*range(2, 21), 20])],
    ids=["tiny", "not_tiny"],
)
def test_sums_of_tiny_steps_are_read_by_eights_and_lines_in_time(
    finished: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: float, read_at: list[int]
) -> None:
    recipe, work = copy.deepcopy(finished[0]), tmp_path / "work"
    shutil.copytree(finished[1] / "tokenizer", work / "tokenizer")
    config = recipe.pretrain.loop
    config.steps = config.eval_every = config.save_every = 20
    config.log_every = 10
    compile_step, read = stage.compile_step, loop.Loop._read_sums
    dispatched, actual = [0], []

    def compile_counted(*arguments: Any) -> tuple[Any, Any]:
        function, jitted = compile_step(*arguments)

        def step(*state_and_batch: Any) -> Any:
            dispatched[0] += 1
            return jitted(*state_and_batch)

        return function, step

    def noted(run: Any, step: int, sums: Any) -> None:
        actual.append((step, dispatched[0]))
        read(run, step, sums)

    monkeypatch.setattr(stage, "SMALL_STEP_FLOPS", tiny)
    monkeypatch.setattr(stage, "compile_step", compile_counted)
    monkeypatch.setattr(loop.Loop, "_read_sums", noted)
    train(recipe, work, "pretrain")
    assert actual == list(zip(range(1, 21), read_at, strict=True))
    assert list(losses(work, "pretrain")) == [10, 20]


def test_a_line_of_the_step_that_a_run_goes_on_from_is_not_written_twice(tmp_path: Path) -> None:
    for values in ({"loss": 2.0}, {"loss": math.nan}, {"loss": np.float32(0.5)}):
        for _ in range(2):
            with MetricsWriter(tmp_path, 3) as writer:
                writer.write(3, "eval", values)
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2.0, None, 0.5]


def test_early_stopping_stops_keeps_the_best_and_hands_it_on(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, work = copy.deepcopy(finished[0]), tmp_path / "work"
    shutil.copytree(finished[1] / "tokenizer", work / "tokenizer")
    # No evaluation after the first can improve by so much: the first stays the best.
    recipe.pretrain.early_stopping = EarlyStoppingConfig(metric="loss", patience=2, min_delta=1e6)
    recipe.pretrain.loop.eval_every, recipe.pretrain.loop.steps, recipe.pretrain.loop.keep = 1, 12, 1
    train(recipe, work, "pretrain")
    result = read_json(work / "pretrain" / "result.json")
    assert (result["status"], result["best_step"], result["steps"]) == ("early_stopped", 1, 3)
    assert sorted(int(p.name) for p in (work / "pretrain" / "checkpoints").iterdir() if p.name.isdecimal()) == [1, 3]
    assert not (work / "pretrain" / "checkpoints" / "trash").exists(), "what is deleted takes no room"
    assert [event["event"] for event in events(work, "pretrain")] == ["early_stopping"]
    train(recipe, work, "finetune")
    assert read_json(work / "finetune" / "result.json")["parent"]["step"] == 1
    assert read_json(work / "finetune" / "result.json")["parent"]["params_sha256"] == result["params_sha256"]


def test_missing_and_unfinished_parents_are_refused(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, work = copy.deepcopy(finished[0]), tmp_path / "work"
    shutil.copytree(finished[1] / "tokenizer", work / "tokenizer")
    with pytest.raises(ValueError, match=r"pretrain was not trained; run `jaxstages pretrain`"):
        train(recipe, work, "finetune")
    recipe.pretrain.loop.stop_after = 2
    train(recipe, work, "pretrain")
    with pytest.raises(ValueError, match=r"pretrain is not finished"):
        train(recipe, work, "finetune")


def again(run: tuple[Recipe, Path], stage: str = "finetune") -> tuple[Recipe, Path]:
    shutil.rmtree(run[1] / stage)
    return run


def test_a_parent_with_another_architecture_is_refused_with_both_values(run: tuple[Recipe, Path]) -> None:
    recipe, work = again(run)
    recipe.model.width = 32
    with pytest.raises(ValueError, match=r"pretrain does not fit this recipe: model differs: width 16 there, 32 here"):
        train(recipe, work, "finetune")


def test_a_parent_with_another_tokenizer_is_refused(run: tuple[Recipe, Path]) -> None:
    recipe, work = again(run)
    file = work / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match=r"tokenizer_sha256 is .* there, .* here"):
        train(recipe, work, "finetune")


def test_a_flipped_bit_in_the_parent_is_noticed(run: tuple[Recipe, Path]) -> None:
    recipe, work = again(run)
    step = read_json(work / "pretrain" / "result.json")["best_step"]
    for file in (work / "pretrain" / "checkpoints" / str(step) / "params").rglob("ocdbt.process_0/d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        train(recipe, work, "finetune")
    assert not (work / "finetune" / "result.json").exists()


def test_a_parent_of_another_run(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, work = run
    other = tmp_path / "other"
    shutil.copytree(work / "tokenizer", other / "tokenizer")
    recipe.pretrain = None
    recipe.finetune.init_from = str(work / "pretrain")
    train(recipe, other, "finetune")
    first, second = (read_json(w / "finetune" / "result.json") for w in (work, other))
    assert first["params_sha256"] == second["params_sha256"]
    recipe.finetune.init_from = "parent"
    shutil.rmtree(other / "finetune")
    with pytest.raises(ValueError, match="first stage and has no parent; set config.finetune.init_from"):
        train(recipe, other, "finetune")


def test_what_is_restored_is_said_for_each_parameter(
    run: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, work = again(run)
    train(recipe, work, "finetune")
    out = capsys.readouterr().out
    assert "restored embedding  float32[300, 16]" in out
    assert out.count("  restored ") == 11 and "inherited: tokenizer" in out


def test_a_child_of_a_parent_that_was_trained_anew_is_refused(run: tuple[Recipe, Path]) -> None:
    recipe, work = again(run, "pretrain")
    result = read_json(work / "finetune" / "result.json")
    result["parent"]["path"] = str(work / "pretrain")  # the run was copied here
    write_json(work / "finetune" / "result.json", result)
    recipe.seed = 1
    train(recipe, work, "pretrain")
    with pytest.raises(ValueError, match=r"finetune began from .*pretrain .* remove .*finetune to train it from"):
        train(recipe, work, "finetune")


def test_a_kill_before_the_first_checkpoint_leaves_no_line_twice(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, work = copy.deepcopy(finished[0]), tmp_path / "work"
    shutil.copytree(finished[1] / "tokenizer", work / "tokenizer")
    (work / "pretrain").mkdir()
    (work / "pretrain" / "metrics.jsonl").write_text(json.dumps({"step": 0, "kind": "eval", "loss": 1.0}) + "\n")
    recipe.pretrain.loop.stop_after = 1
    train(recipe, work, "pretrain")
    steps = [line["step"] for line in read_metrics(work / "pretrain" / "metrics.jsonl") if line["kind"] == "eval"]
    assert steps == [0]


def test_numbers_that_are_not_finite_end_the_run_with_the_last_checkpoint_in_place(
    finished: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, work = copy.deepcopy(finished[0]), tmp_path / "work"
    shutil.copytree(finished[1] / "tokenizer", work / "tokenizer")
    recipe.pretrain.optim.name, recipe.pretrain.optim.clip_norm, recipe.pretrain.optim.max_bad_steps = "sgd", 0.0, 3
    recipe.pretrain.optim.schedule = ScheduleConfig(name="linear", peak_lr=1e30, warmup_steps=0)
    with pytest.raises(
        Diverged,
        match=r"3 steps in a row, up to step 3, are not finite .*; the checkpoint at step 2 stands",
    ):
        train(recipe, work, "pretrain")
    assert not (work / "pretrain" / "result.json").exists()
    skipped = events(work, "pretrain")
    assert [event["event"] for event in skipped] == ["step skipped"] * 3
    assert all(".jsonl:" in record for record in skipped[-1]["records"])


def test_two_runs_in_one_workdir_are_refused(run: tuple[Recipe, Path]) -> None:
    from jaxstages.runtime.workdir import lock

    with lock(run[1]), pytest.raises(ValueError, match=r"is in use by .* pid \d+"):
        train(run[0], run[1], "pretrain")


def test_classification_is_scored_by_label(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, work = copy.deepcopy(finished[0]), tmp_path / "work"
    records = [
        {"text": f"{word} {i}", "label": label} for i in range(40) for word, label in (("good", "up"), ("bad", "down"))
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe.pretrain = recipe.instruct = None
    stage = recipe.finetune
    stage.init_from = "scratch"
    stage.data.task, stage.data.train = "classify", (str(tmp_path / "labels.jsonl"),)
    stage.data.prompt, stage.data.target = "text", "label"
    stage.evaluation.metrics = ("accuracy", "macro_f1")
    stage.early_stopping = EarlyStoppingConfig(metric="accuracy", mode="max")
    stage.loop.steps, stage.loop.eval_every, stage.optim.schedule.peak_lr = 40, 40, 1e-2
    validate(recipe)
    train(recipe, work, "finetune")
    best = read_json(work / "finetune" / "result.json")["best"]
    assert best["accuracy"] == 100.0 and best["macro_f1"] == 100.0


def test_fingerprint_is_the_same_on_any_mesh_and_sees_a_bit() -> None:
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    mesh = Mesh(np.asarray(jax.devices()), ("d",))
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    assert fingerprint({"a": split}) == fingerprint({"a": jax.device_put(x)})
    assert not fingerprint({"a": split}).not_finite and fingerprint({"a": split / 0}).not_finite == ["a"]
    assert params_sha256({"a": split}) == params_sha256({"a": jax.device_put(x)})
    flipped = x.copy()
    flipped.view(np.uint32)[3, 3] ^= 1
    swapped = x.copy()
    swapped[0, 0], swapped[5, 5] = x[5, 5], x[0, 0]
    prints = {fingerprint({"a": jax.device_put(value)}).digests["a"] for value in (x, flipped, swapped)}
    assert len(prints) == 3


def test_a_finished_stage_is_lengthened_on_purpose(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    """It goes on from its last step, under the schedule of the new length; its first result stays beside the new."""
    recipe, work = copy.deepcopy(finished[0]), tmp_path / "work"
    assert recipe.pretrain
    shutil.copytree(finished[1], work)
    recipe.pretrain.loop.steps = 10
    with pytest.raises(ValueError, match=r"loop.steps: 6 -> 10; set it back \(or add --lengthen"):
        resolve_recipe(recipe, work)
    longer = resolve_recipe(recipe, work, lengthen="pretrain")
    with pytest.raises(ValueError, match="finetune has begun from pretrain; remove"):
        train(longer, work, "pretrain", lengthen=True)
    shutil.rmtree(work / "finetune")
    shutil.rmtree(work / "instruct")
    assert train(longer, work, "pretrain", lengthen=True)
    result = read_json(work / "pretrain" / "result.json")
    assert (result["status"], result["steps"]) == ("completed", 10)
    assert read_json(work / "pretrain" / "result-6.json") == read_json(finished[1] / "pretrain" / "result.json")
    before, after = losses(finished[1], "pretrain"), losses(work, "pretrain")
    assert list(after) == [2, 4, 6, 8, 10] and all(after[step] == before[step] for step in before)
    recipe.pretrain.loop.steps = 8
    with pytest.raises(ValueError, match="has made 10 steps; set --config.pretrain.loop.steps to more"):
        train(recipe, work, "pretrain", lengthen=True)
    assert (work / "pretrain" / "result.json").exists()


def test_conditions_on_the_best_step(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    """What is worse than allowed is never the best; where nothing is left, the stage has nothing to hand on."""
    recipe = copy.deepcopy(finished[0])
    assert recipe.finetune
    for most in (100.0, -100.0):
        work = tmp_path / str(most)
        shutil.copytree(finished[1], work)
        shutil.rmtree(work / "finetune")
        shutil.rmtree(work / "instruct")
        recipe.finetune.early_stopping.within = (("watch/pretrain/loss", most),)
        validate(recipe)
        if most > 0:
            assert train(recipe, work, "finetune")
            continue
        with pytest.raises(ValueError, match=r"no evaluation was within .*watch/pretrain/loss.* raise replay"):
            train(recipe, work, "finetune")
    recipe.finetune.early_stopping.within = (("watch/pretain/loss", 1.0),)
    shutil.rmtree(work / "finetune")
    with pytest.raises(ValueError, match=r"'watch/pretain/loss' is not measured here; known: .*watch/pretrain/loss"):
        train(recipe, work, "finetune")


def test_a_condition_on_a_score_of_the_stage_itself(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    """The score is measured at the start, too, else no evaluation could be compared with it."""
    recipe, work = copy.deepcopy(finished[0]), tmp_path / "work"
    shutil.copytree(finished[1], work)
    shutil.rmtree(work / "finetune")
    shutil.rmtree(work / "instruct")
    recipe.finetune.evaluation.metrics = ("exact_match",)
    recipe.finetune.early_stopping.within = (("exact_match", 100.0),)
    assert train(recipe, work, "finetune")
    assert read_json(work / "finetune" / "result.json")["best_step"] > 0


def test_the_average_is_handed_on_where_it_is_better(
    finished: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, work = copy.deepcopy(finished[0]), tmp_path / "work"
    assert recipe.pretrain and recipe.finetune
    recipe.pretrain.optim.average, recipe.pretrain.early_stopping.metric = 0.5, "perplexity"
    make_evaluate = stage.make_stage_evaluate
    perplexities = iter([3.0, 2.0, 2.5, 4.0])  # parameters and average at step 3, then at step 6

    def make_judged(*args: Any, **named: Any) -> Evaluate:
        evaluate = make_evaluate(*args, **named)

        def judged(params: Params, scores: bool) -> Report:
            report = evaluate(params, scores)
            if scores:
                report.metrics["perplexity"] = next(perplexities)
            return report

        return judged

    monkeypatch.setattr(stage, "make_stage_evaluate", make_judged)
    assert train(recipe, work, "pretrain")
    result = read_json(work / "pretrain" / "result.json")
    assert (result["handed_on"], result["best_step"]) == ("average", 3)
    assert result["params_sha256"] != result["last_params_sha256"]
    monkeypatch.undo()
    setup = setup_stage(recipe, "finetune", work)
    params, _ = read_parent(work / "pretrain", setup.program, setup.contract)
    line = next(x for x in read_metrics(work / "pretrain" / "metrics.jsonl") if (x["kind"], x["step"]) == ("eval", 3))
    assert line["average/loss"] != line["loss"]
    assert train(recipe, work, "finetune")
    start = next(x for x in read_metrics(work / "finetune" / "metrics.jsonl") if x["kind"] == "eval")
    assert start["watch/pretrain/loss"] == pytest.approx(line["average/loss"], rel=1e-5)
    assert params_sha256(params) == result["params_sha256"]
