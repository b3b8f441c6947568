"""The report of a run: one sound, accessible HTML file that loads nothing, whatever the run and its data are."""

import copy
import importlib.resources
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxstages.cli.train
from jaxstages import config as recipes
from jaxstages.cli.main import main
from jaxstages.cli.train import run_stages
from jaxstages.config import DataConfig, DatasetConfig, EvaluationConfig, Recipe, StageConfig
from jaxstages.experiments.confusion import Confusion, count_confusions
from jaxstages.experiments.figures import Line, decimate, line_chart, tick_label
from jaxstages.experiments.markup import escape, number, tag
from jaxstages.experiments.report import write_report
from jaxstages.experiments.report_stage import describe_stage
from jaxstages.experiments.report_tables import changed_fields
from jaxstages.experiments.runs import read_run
from jaxstages.experiments.training_rows import read_training_rows
from jaxstages.runtime.files import read_json, write_json
from tests import own_parts, tiny

ATTACK = "<script>alert(1)</script>&amp;<img src=x onerror=alert(2)>"
VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """A parsed report: its elements, its text, and how they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.raw = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"elements that are not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((tag, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            name, text = self.headings[-1]
            self.headings[-1] = (name, text + data)

    def attributes(self, name: str) -> list[str]:
        return [value or "" for _, attrs in self.elements for key, value in attrs.items() if key == name]

    @property
    def sections(self) -> list[str]:
        return [text for name, text in self.headings if name == "h2"]

    @property
    def svgs(self) -> list[str]:
        return re.findall(r"<svg .*?</svg>", self.raw, flags=re.DOTALL)


def report(workdir: Path, recipe: Recipe | None = None) -> Page:
    return Page(write_report(workdir, recipe).read_text(encoding="utf-8"))


# Two runs: one that was trained, and one whose files are written by hand -------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """Three stages, the second of which classifies, on data with markup in them."""
    root = tmp_path_factory.mktemp("report")
    tiny.write_data(root / "data")
    chats = root / "data" / "chats.jsonl"
    chats.write_text(chats.read_text().replace("say red", f"say {ATTACK}"))
    labels = [{"prompt": f"{p} likes {t}", "target": f"{t[0]}<b>"} for p in tiny.PEOPLE for t in tiny.THINGS]
    (root / "data" / "labels.jsonl").write_text("".join(json.dumps(record) + "\n" for record in labels))

    recipe = tiny.recipe(root / "data", steps=4)
    recipe.prompts = (ATTACK, "say red")
    recipe.cache = str(root / "cache")
    assert recipe.finetune is not None and recipe.instruct is not None
    data = DataConfig(task="classify", train=(str(root / "data" / "labels.jsonl"),), holdout=0.3)
    evaluation = EvaluationConfig(batch_size=8, max_new_tokens=8, metrics=("accuracy", "macro_f1"))
    recipe.finetune = StageConfig(data=data, loop=recipe.finetune.loop, evaluation=evaluation)
    recipe.instruct.replay = (("pretrain", 0.2),)
    run_stages(recipe, root / "work")
    return recipe, root / "work"


@pytest.fixture
def work(trained: tuple[Recipe, Path], tmp_path: Path) -> Path:
    """A copy of the trained run."""
    shutil.copytree(trained[1], tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="module")
def page(trained: tuple[Recipe, Path]) -> Page:
    return report(trained[1])


def train_line(step: int, loss: float | None = 1.0, **values: Any) -> dict[str, Any]:
    line = {"grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 100 * step, "tokens_per_second": 1000.0}
    return {"step": step, "kind": "train", "loss": loss} | line | values


def eval_line(step: int, loss: float | None = 1.0, **values: Any) -> dict[str, Any]:
    return {"step": step, "kind": "eval", "loss": loss, "perplexity": 2.7} | values


def write_stage(work: Path, name: str, lines: list[dict[str, Any]], best_step: int | None) -> None:
    """Write a stage's files; without a best step it is not finished, and has a folder for a checkpoint."""
    (work / name / "checkpoints" / "10").mkdir(parents=True)
    (work / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if best_step is None:
        return
    best = next((line for line in lines if line["kind"] == "eval" and line["step"] == best_step), {})
    result = {
        "stage": name,
        "status": "completed",
        "steps": lines[-1]["step"],
        "best_step": best_step,
        "best": {key: value for key, value in best.items() if key not in ("step", "kind")},
        "tokens": 1000,
        "seconds": 2.0,
        "params_sha256": "ab" * 32,
        "parent": None,
        "verdict": {"name": "healthy", "evidence": "held-out loss settled", "remedy": "Nothing to mend"},
    }
    write_json(work / name / "result.json", result)


def write_run(work: Path, recipe: Recipe, lines: list[dict[str, Any]], best_step: int | None = None) -> Path:
    """Write a run that has done its first stage."""
    write_json(work / "recipe.json", {"recipe": recipes.to_dict(recipe), "versions": {"jax": "0.10.2"}})
    write_stage(work, next(iter(recipes.stages(recipe))), lines, best_step)
    return work


CURVE = [
    eval_line(0, 3.0),
    *(train_line(step, 3.0 - step / 5) for step in range(1, 11)),
    eval_line(5, 1.2),
    eval_line(10, 1.5),
]


# The page ----------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_its_links_lead_somewhere(page: Page) -> None:
    assert page.raw.startswith("<!DOCTYPE html>")
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    references = [value[1:] for value in page.attributes("href")]
    references += re.findall(r"url\(#([^)]+)\)", page.raw)
    assert references and set(references) <= set(ids)
    for svg in page.svgs:
        ElementTree.fromstring(svg)


def test_the_page_loads_nothing_and_runs_nothing(page: Page) -> None:
    assert not page.attributes("src") and not page.attributes("srcset") and not page.attributes("action")
    assert all(value.startswith("#") for value in page.attributes("href"))
    assert not {name for name, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "img", "form"}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert "@import" not in page.raw and not re.findall(r"url\((?!#)", page.raw)
    assert not re.findall(r"https?:", page.raw)
    policies = [attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_figure_has_a_text_alternative(page: Page) -> None:
    svgs = [attrs for name, attrs in page.elements if name == "svg"]
    assert len(svgs) > 12
    assert all(attrs["role"] == "img" and len(attrs["aria-label"] or "") > 20 for attrs in svgs)
    assert any("training: " in (attrs["aria-label"] or "") and "at step 4" in attrs["aria-label"] for attrs in svgs)


def test_headings_are_in_order_and_tables_have_headings_and_captions(page: Page) -> None:
    levels = [int(name[1]) for name, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(text.strip() for _, text in page.headings)
    names = [name for name, _ in page.elements]
    assert names.count("caption") == names.count("table") > 8
    assert all(attrs.get("scope") in ("col", "row") for name, attrs in page.elements if name == "th")
    assert [attrs.get("lang") for name, attrs in page.elements if name == "html"] == ["en"]


def test_text_of_data_recipes_and_models_is_escaped(page: Page) -> None:
    assert "<script" not in page.raw and "<img" not in page.raw and "<b>" not in page.raw
    assert page.text.count(ATTACK) >= 2  # a prompt, and rows of chats
    assert "r<b>" in page.text  # a label


def test_two_reports_of_a_run_are_the_same_bytes(trained: tuple[Recipe, Path], page: Page) -> None:
    assert report(trained[1]).raw == page.raw


def test_a_report_shows_what_the_run_did(page: Page, trained: tuple[Recipe, Path]) -> None:
    stages = ["pretrain", "finetune", "instruct"]
    ends = ["Cost", "Recipe", "Lineage", "Versions"]
    assert page.sections == ["Stages", "Stage matrix", "Samples", *stages, *ends]
    digest = read_json(trained[1] / "pretrain" / "result.json")["params_sha256"]
    assert f"from pretrain, step 4, {digest[:12]}" in page.text
    assert "mixed in: 20% pretrain" in page.text
    verdict = read_json(trained[1] / "instruct" / "result.json")["verdict"]
    assert verdict["evidence"] in page.text and verdict["remedy"] in page.text
    assert "exact_match at step" in page.text and "best step, handed on: " in page.text
    assert "tokenizer_sha256" in page.text and "jaxlib" in page.text


# Training rows, confusion matrix -----------------------------------------------------------------------------------


def test_a_row_is_divided_where_training_begins_and_ends(trained: tuple[Recipe, Path]) -> None:
    """
    | text    | ¦<|endoftext|> say red ... <|assistant|> | red <|end|> | <|user|> and Ann ... | Ann <|end|> |
    | trained |                  no                      |     yes     |          no          |     yes     |
    """
    recipe, work = trained
    rows = read_training_rows(recipe, work, "instruct").rows
    spans = next(spans for spans in rows if "<|user|>" in "".join(span.text for span in spans))
    trained_texts = [span.text for span in spans if span.trained]
    assert all(text.endswith("<|end|>") and "<|user|>" not in text for text in trained_texts[:-1])
    assert spans[0].begins and spans[0].tokens == 1 and not spans[0].trained
    assert all("<|assistant|>" not in text for text in trained_texts)


def test_training_rows_need_no_source_and_their_absence_is_explained(
    trained: tuple[Recipe, Path], work: Path, tmp_path: Path
) -> None:
    content = read_json(work / "recipe.json")
    content["recipe"]["cache"] = str(tmp_path / "cache")
    shutil.copytree(trained[0].cache, tmp_path / "cache")
    content["recipe"]["instruct"]["data"]["train"] = ["moved.jsonl"]
    write_json(work / "recipe.json", content)
    assert ATTACK in report(work).text.rpartition("What it was trained on")[2]

    shutil.rmtree(tmp_path / "cache")
    text = report(work).text
    assert text.count("The training rows are missing: the prepared rows of") == 3
    assert "The confusion matrix is missing: the prepared rows of finetune" in text

    shutil.rmtree(work / "pretrain" / "checkpoints")
    assert "pretrain has no checkpoint" in report(work).text


def test_the_confusion_matrix_is_that_of_the_accuracy(trained: tuple[Recipe, Path], page: Page) -> None:
    best = read_json(trained[1] / "finetune" / "result.json")["best"]
    match = re.search(r"(\d+) of (\d+) held-out records of finetune are classified", page.text)
    assert match is not None
    assert 100 * int(match[1]) / int(match[2]) == pytest.approx(best["accuracy"])


def test_confusions_are_counted_by_true_and_predicted_label() -> None:
    """
    | true      | a a a b |
    | predicted | a b b b |
    """
    labels, counts = count_confusions(["a", "a", "a", "b"], ["a", "b", "b", "b"])
    assert labels == ["a", "b"]
    assert counts.tolist() == [[1, 2], [0, 1]]


def test_a_confusion_matrix_of_many_labels_is_drawn_and_lists_what_is_confused(tmp_path: Path) -> None:
    recipe = Recipe(name="many", pretrain=StageConfig())
    run = read_run(write_run(tmp_path / "work", recipe, CURVE, best_step=5))
    counts = 5 * np.eye(77, dtype=np.int64)
    counts[3, 4] = 2
    confusion = Confusion([f"label <{number}>" for number in range(77)], counts)
    page = Page("".join(describe_stage(run, recipe, "pretrain", "no rows", confusion)))
    assert "385 of 387 held-out records" in page.text
    row = page.text[page.text.index("Labels that are confused most often") :]
    assert "label <3>label <4>2" in row
    assert any("77 labels" in (attrs.get("aria-label") or "") for name, attrs in page.elements if name == "svg")
    assert len(page.raw) < 200_000


# Runs that lack something ------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_reported(tmp_path: Path) -> None:
    recipe = Recipe(name="begun", pretrain=StageConfig(), finetune=StageConfig())
    page = report(write_run(tmp_path / "work", recipe, CURVE))
    assert page.sections == ["Stages", "pretrain", "Cost", "Recipe", "Lineage", "Versions"]
    assert "0 of 2 stages finished" in page.text and "not begun" in page.text
    assert "not finished, at step 10 of 1,000" in page.text.lower()
    assert "best step so far: 5 (loss 1.200)" in page.text
    assert "The training rows are missing" in page.text


def test_early_stopping_and_its_best_step_are_marked(tmp_path: Path) -> None:
    event = {"step": 10, "kind": "event", "event": "early_stopping", "reason": "loss has not improved"}
    recipe = Recipe(name="stopped", pretrain=StageConfig())
    page = report(write_run(tmp_path / "work", recipe, [*CURVE, event], best_step=5))
    assert "Early stopping at step 10: loss has not improved." in page.text
    (loss,) = [svg for svg in page.svgs if "Loss of pretrain" in svg]
    assert "Best step 5." in loss and loss.count("stroke: var(--ink)") >= 2  # a line and a ring
    assert "best step, handed on: 5 (loss 1.200)" in page.text


def test_lines_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    skipped = {"step": 3, "kind": "event", "event": "step skipped", "why": "a spike", "loss": None, "grad_norm": None}
    lines = [
        eval_line(0, None),
        train_line(1, None),
        train_line(2, 2.0),
        skipped,
        eval_line(3, 1.9),
        train_line(4, None),
    ]
    page = report(write_run(tmp_path / "work", Recipe(name="nan", pretrain=StageConfig()), lines, best_step=3))
    assert "3 lines without a finite loss are left out, the first at step 0." in page.text
    assert "skipped steps: 1" in page.text and "a spike" in page.text
    nothing = [eval_line(0, None), train_line(1, None)]
    page = report(write_run(tmp_path / "nothing", Recipe(name="nan", pretrain=StageConfig()), nothing))
    assert "No finite loss was logged yet." in page.text


def test_a_run_without_a_matrix_has_no_section_about_it(work: Path) -> None:
    (work / "stage_matrix.json").unlink()
    assert not {"Stage matrix", "Samples"} & set(report(work).sections)


def test_the_last_checkpoint_is_compared_with_the_best_of_each_column(tmp_path: Path) -> None:
    recipe = Recipe(
        name="forgets",
        pretrain=StageConfig(),
        finetune=StageConfig(data=DataConfig(task="seq2seq"), evaluation=EvaluationConfig(metrics=("bleu",))),
    )
    work = write_run(tmp_path / "work", recipe, CURVE, best_step=5)
    matrix = {
        "checkpoints": ["pretrain", "finetune"],
        "columns": ["pretrain/perplexity", "finetune/perplexity", "finetune/bleu"],
        "values": [[3.0, 2.0, 10.0], [4.0, 2.1, 30.0]],
        "prompts": [],
        "signatures": [],
    }
    write_json(work / "stage_matrix.json", matrix)
    page = report(work)
    lines = page.text[page.text.index("pretrain: perplexity") :]
    assert lines.startswith("pretrain: perplexity● 3.000▼ 4.000▼ 1.000 worse than pretrain, by 0.29 nats: forgotten")
    assert "finetune: perplexity● 2.000▼ 2.100▼ 0.100 worse than pretrain, by 0.05 natsfinetune" in lines
    assert "finetune: bleu10.00● 30.00● best" in lines
    assert "Samples" not in page.sections


def test_own_metrics_mixtures_and_further_stages_are_shown(tmp_path: Path) -> None:
    mixture = {"pairs": DatasetConfig(data=DataConfig(task="seq2seq"), evaluation=EvaluationConfig(metrics=("bleu",)))}
    evaluation = EvaluationConfig(metrics=(own_parts.first_letter,))
    polish = StageConfig(data=DataConfig(task="chat"), evaluation=evaluation, mixture=mixture)
    recipe = Recipe(name="own", extra_stages={"polish & shine": polish})
    values = {"first_letter": 40.0, "first_letter_se": 2.0, "pairs/loss": 2.0, "pairs/bleu": 17.0, "loss/a.jsonl": 1.1}
    work = write_run(tmp_path / "work", recipe, [eval_line(0), eval_line(10, 0.5, **values)], best_step=10)
    page = report(work)
    assert "polish & shine" in page.sections
    assert "first_letter–40.002.000" in page.text and "pairs: bleu–17.00" in page.text
    assert "first_letter of held-out data" in page.text and "loss at step 10, by source" in page.text
    assert "mixed in: 10% pairs" in page.text
    assert "own_parts:first_letter" in page.text and "mixture.pairs.data.task" in page.text


def test_cost_adds_up_what_the_stages_took(tmp_path: Path) -> None:
    memory = {"step": 10, "kind": "event", "event": "peak memory", "host_gb": [1.5, 2.5], "device_gb": [7.0]}
    lines = [train_line(1, mfu=0.2), train_line(3, mfu=0.5), memory]
    recipe = Recipe(name="cost", pretrain=StageConfig(), finetune=StageConfig())
    work = write_run(tmp_path / "work", recipe, lines, best_step=1)
    write_stage(work, "finetune", [train_line(10)], None)
    text = report(work).text
    cost = text[text.index("device memory") :]
    assert "pretrain101,0002s50040.0 %2.50 GB7.00 GB" in cost  # a third of the time at 20 %, two thirds at 50 %
    assert "finetune101,0001s1,000–––" in cost
    assert "all2,0003s667" in cost


def test_a_long_run_makes_a_small_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    losses = 2 + generator.random(200_000)
    lines = [train_line(step, loss) for step, loss in enumerate(losses.tolist(), start=1)]
    lines += [eval_line(step, 2.5, **{"watch/x/loss": 1.0}) for step in range(0, 200_000, 10)]
    page = report(write_run(tmp_path / "work", Recipe(name="long", pretrain=StageConfig()), lines, best_step=10))
    assert len(page.raw) < 300_000
    assert "a point is the mean of up to 667" in page.text


def test_a_workdir_is_required(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipe.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


# Commands ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_report(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "report.html").unlink()
    assert main(["jaxstages", "report", f"--workdir={work}"]) == 0
    assert capsys.readouterr().out == f"report: {work / 'report.html'}\n"
    assert (work / "report.html").exists()


def test_a_run_ends_with_its_report(
    trained: tuple[Recipe, Path], work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "report.html").unlink()
    monkeypatch.setattr(jaxstages.cli.train, "stage_matrix", lambda recipe, workdir: None)
    run_stages(copy.deepcopy(trained[0]), work)
    assert capsys.readouterr().out.endswith(f"report: {work / 'report.html'}\n")
    assert (work / "report.html").exists()


@pytest.mark.parametrize("error", [OSError("the disk is full"), ValueError("a file is damaged")])
def test_a_report_that_fails_does_not_fail_the_run(
    error: Exception,
    trained: tuple[Recipe, Path],
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(workdir: Path, recipe: Recipe) -> Path:
        raise error

    monkeypatch.setattr(jaxstages.cli.train, "write_report", fail)
    monkeypatch.setattr(jaxstages.cli.train, "stage_matrix", lambda recipe, workdir: None)
    run_stages(copy.deepcopy(trained[0]), work)
    assert f"no report was written: {error}" in capsys.readouterr().out


# Parts -------------------------------------------------------------------------------------------------------------


def test_a_curve_is_averaged_in_buckets() -> None:
    curve = decimate([(1, 4.0), (2, 2.0), (3, 9.0)], limit=2)
    assert curve.steps.tolist() == [1.5, 3.0] and curve.mean.tolist() == [3.0, 9.0]
    assert curve.low.tolist() == [2.0, 9.0] and curve.high.tolist() == [4.0, 9.0]
    points = [(step, float(step)) for step in range(1000)]
    assert len(decimate(points, limit=300).steps) == 250
    assert decimate(points[:300], limit=300).mean.tolist() == [value for _, value in points[:300]]


def test_a_chart_refers_to_colors_of_the_page_and_has_ids_of_its_own() -> None:
    lines = [Line([(0, 5.0), (10, 0.1)], "held-out", marked=True), Line([(5, 1.0)], "train")]
    first, second = (line_chart(name, lines, "a", may_be_log=True, best=(10, 0.1)) for name in ("one", "two"))
    assert "#" not in re.sub(r"#one-\w+", "", first), "a fixed color"
    assert first.replace("one-", "two-") == second
    assert all(identifier.startswith("one-") for identifier in re.findall(r' id="([^"]+)"', first))
    assert "var(--held-out)" in first and "var(--train)" in first
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", first)
    assert "step" in texts and "10" in texts and "0.1" in texts


def test_ticks_are_short() -> None:
    values = [0.0, 0.003, 0.5, 25.0, 1200.0, 40_000.0, 1.5e6, 2e-5, 7.5e-4]
    assert [*map(tick_label, values)] == ["0", "0.003", "0.5", "25", "1,200", "40k", "1.5M", "2e-5", "7.5e-4"]


def test_numbers_have_the_digits_that_a_reader_needs() -> None:
    values = [3, 12_345, 0.5, 47.642, 1234.56, 3e-5, 0.0, None, float("nan")]
    assert [*map(number, values)] == ["3", "12,345", "0.500", "47.64", "1,234.6", "3.0e-05", "0.000", "–", "–"]


def test_text_is_escaped_once_and_has_no_character_that_html_forbids() -> None:
    assert tag("p", "a < b", tag("b", "&"), title='"') == '<p title="&quot;">a &lt; b<b>&amp;</b></p>'
    assert escape("\x00\x1b[0m\ud800\n") == "\u2400\u241b[0m?\n"


def test_fields_that_differ_from_their_defaults_are_listed(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    changes = changed_fields(recipe)
    assert changes.run["tokenizer.vocab_size"] == (300, 1024) and "name" not in changes.run
    assert {name: setting.value for name, setting in changes.stages["data.task"].items()} == {
        "pretrain": "lm",
        "finetune": "seq2seq",
        "instruct": "chat",
    }
    assert "optim.clip_norm" not in changes.stages


def luminance(color: tuple[float, ...]) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(left: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((luminance(left), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_both_color_schemes_are_complete_and_have_enough_contrast() -> None:
    css = importlib.resources.files("jaxstages.experiments").joinpath("report.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): ([^;]+);", part)) for part in re.findall(r":root \{(.*?)\}", css, re.S)
    )
    assert light.keys() == dark.keys() and "prefers-color-scheme: dark" in css
    used = set(re.findall(r"var\(--([\w-]+)\)", css)) - {"heat"}
    assert used <= light.keys()
    for scheme in (light, dark):
        colors = {
            name: tuple(int(value[i : i + 2], 16) / 255 for i in (1, 3, 5))
            for name, value in scheme.items()
            if value.startswith("#")
        }
        strongest = [int(value) / 255 for value in scheme["heat-rgb"].split(",")]
        colors["heat"] = tuple(0.5 * a + 0.5 * b for a, b in zip(strongest, colors["paper"], strict=True))
        texts = [(text, ground) for text in ("ink", "muted", "link", "bad") for ground in ("paper", "panel")]
        for text, ground in [*texts, ("ink", "heat"), ("ink", "mark")]:
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
        for graphic in ("train", "held-out", "watch-1", "watch-2", "watch-3"):
            assert contrast(colors[graphic], colors["paper"]) >= 3, graphic
