"""lm-evaluation-harness gives a workdir's checkpoint the scores that it gives the exported one by its `hf` model.

Runs where the extras `lm-eval` and `parity` are installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxstages.cli.main import main
from tests import compiled
from tests.interop.test_choices import WHY, write_questions
from tests.tiny import PEOPLE, THINGS, write_data

pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed: pip install '.[lm-eval]'")
pytest.importorskip("torch", reason=WHY)
pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "eval"

CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""

ANSWERS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: target
generation_kwargs: {{until: ["."], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""

TEXTS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A workdir, its export, and tasks on files of its own."""
    home = tmp_path_factory.mktemp("lm_eval")
    write_data(home)
    (home / "recipe.py").write_text(
        "from pathlib import Path\nfrom tests.interop.test_choices import get_recipe\n\n"
        "def get_config(variant=''):\n    recipe = get_recipe(Path(__file__).parent)\n"
        "    recipe.pretrain.loop.steps, recipe.pretrain.optim.schedule.peak_lr = 60, 1e-2\n    return recipe\n"
    )
    work, exported, tasks = home / "work", home / "exported", home / "tasks"
    assert main(["jaxstages", "pretrain", f"--config={home}/recipe.py", f"--workdir={work}"]) == 0
    assert main(["jaxstages", "export", "--stage=pretrain", f"--workdir={work}", f"--to={exported}"]) == 0

    tasks.mkdir()
    lines = [json.loads(line) for line in write_questions(home / "q.jsonl").read_text().splitlines()]
    questions = [line for line in lines if "query" in line]
    (home / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    prompts = [{"prompt": f"{person} likes", "target": f" {thing}"} for person in PEOPLE for thing in THINGS[:2]]
    (home / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    texts = [{"text": f"{person} likes {thing}. " * 9} for person, thing in zip(PEOPLE, THINGS, strict=False)]
    (home / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    for name, (template, file) in {"own_q": (CHOICES, "q"), "own_p": (ANSWERS, "p"), "own_t": (TEXTS, "t")}.items():
        (tasks / f"{name}.yaml").write_text(template.format(name=name, file=home / f"{file}.jsonl"))
    return SimpleNamespace(home=home, work=work, exported=exported, tasks=tasks)


def run_lm_eval(folders: SimpleNamespace, model: str, arguments: str, tasks: str) -> dict[str, Any]:
    """Return results and answers of `lm_eval` for these tasks, by the command line."""
    out = folders.home / f"out-{model}"
    module = "jaxstages.cli.lm_eval" if model == "jaxstages" else "lm_eval"
    command = [sys.executable, "-m", module, "run", "--model", model, "--model_args", arguments]
    command += [
        "--include_path",
        str(folders.tasks),
        "--tasks",
        tasks,
        "--output_path",
        str(out),
        "--log_samples",
        "--device",
        "cpu",
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folders.home / "hf")}
    env = os.environ | {"PYTHONPATH": str(ROOT)} | offline | compiled.environment()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (file,) = out.rglob("results_*.json")
    samples = {}
    for path in out.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        samples[path.name.removeprefix("samples_").rpartition("_")[0]] = [row["filtered_resps"] for row in rows]
    return {"results": json.loads(file.read_text())["results"], "samples": samples}


def test_scores_are_those_of_the_exported_model(folders: SimpleNamespace) -> None:
    names = "own_q,own_p,own_t"
    ours = run_lm_eval(folders, "jaxstages", f"workdir={folders.work},stage=pretrain", names)
    theirs = run_lm_eval(folders, "hf", f"pretrained={folders.exported},dtype=float32", names)
    for name in names.split(","):
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, abs=1e-6), (name, metric)

    assert ours["samples"]["own_p"] == theirs["samples"]["own_p"]  # the same answers, letter by letter
    assert any(answer.strip() for (answer,) in ours["samples"]["own_p"])
    pairs = zip(ours["samples"]["own_q"], theirs["samples"]["own_q"], strict=True)
    for own, other in pairs:
        for (score, greedy), (hf_score, hf_greedy) in zip(own, other, strict=True):
            assert float(score) == pytest.approx(float(hf_score), abs=5e-5) and greedy == hf_greedy


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of evaluation data is not there")
def test_scores_of_real_questions_are_those_of_the_exported_model(folders: SimpleNamespace) -> None:
    for name in ("piqa", "copa"):
        records = map(json.loads, (SHARED / f"{name}.jsonl").read_text().splitlines())
        fitting = [record for record in records if max(map(len, record["choices"])) < 40]  # all of the context
        file = folders.home / f"{name}_local.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in fitting))
        (folders.tasks / f"{name}_local.yaml").write_text(CHOICES.format(name=f"{name}_local", file=file))
    names = "piqa_local,copa_local"
    ours = run_lm_eval(folders, "jaxstages", f"workdir={folders.work}", names)["results"]
    theirs = run_lm_eval(folders, "hf", f"pretrained={folders.exported},dtype=float32", names)["results"]
    for name in names.split(","):
        print(name, ours[name])
        for metric, value in theirs[name].items():
            if isinstance(value, float):
                assert ours[name][metric] == pytest.approx(value, abs=1e-9), (name, metric)
