"""Multiple-choice questions: how they are read, scored, and measured by a stage."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstages.cli.main import main
from jaxstages.config import MeshConfig, TokenizerConfig
from jaxstages.data.batches import to_batch
from jaxstages.data.choices import ChoiceQuestion, ChoiceSet, open_choices, parse_question, to_examples
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.data.train_tokenizer import make_tokenizer
from jaxstages.generation.choices import make_row_scores, score_choices
from jaxstages.generation.evaluate import TextModel
from jaxstages.models.sharding import make_mesh
from jaxstages.models.transformer import make_model
from jaxstages.runtime.files import read_json
from jaxstages.training.metric_writer import read_metrics
from tests.tiny import model_config, write_data


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(
        TokenizerConfig(vocab_size=300), iter(["who likes red and blue and grey"]), tmp_path / "t.json"
    )


def write_questions(file: Path, count: int = 6) -> Path:
    lines = [{"query": f"who likes {n}?", "choices": ["red", "blue and grey"], "gold": n % 2} for n in range(count)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"query": "q", "choices": ["a", "b"], "gold": 1}, ChoiceQuestion("q", ["a", "b"], 1)),
        ({"question": "q", "choices": ["a", "b"], "answer": "A"}, ChoiceQuestion("q", ["a", "b"], 0)),
        ({"good": "g", "bad": "b", "uid": "x"}, ChoiceQuestion("", ["g", "b"], 0)),
    ],
)
def test_questions_are_read(record: dict, question: ChoiceQuestion) -> None:
    assert parse_question(record) == question


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"query": "q", "gold": 0}, '"choices", a list of two'),
        ({"query": "q", "choices": ["a"], "gold": 0}, '"choices", a list of two'),
        ({"query": "q", "choices": ["a", ""], "gold": 0}, "not empty"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "is 2; the number of a choice"),
        ({"query": "q", "choices": ["a", "b"]}, "is None; the number of a choice"),
        ({"query": "q", "choices": ["a", "b"], "gold": True}, "is True"),
        ({"query": "q", "choices": ["a", "b"], "answer": "C"}, "is 2; the number"),
    ],
)
def test_what_is_no_question_is_refused_by_its_line(
    record: dict, words: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = write_questions(tmp_path / "q.jsonl", 1)
    file.write_text(file.read_text() + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=f"q.jsonl:2: .*{words}"):
        open_choices(str(file), tokenizer, 64, 0, tmp_path)


def test_the_choice_is_scored_and_a_long_question_loses_its_beginning(tokenizer: Tokenizer) -> None:
    """| text    | who likes red? | blue and grey |
    | weights | 0 ...            | 1 ...         |"""
    question = ChoiceQuestion("who likes red? ", ["blue and grey", "red"], 0)
    for example, choice in zip(to_examples(question, tokenizer, 64, "q"), question.choices, strict=True):
        scored = example.ids[example.weights > 0]
        assert tokenizer.decode(scored.tolist()) == f" {choice}"
        assert example.ids[0] == tokenizer.begin[0] and example.weights[0] == 0
    short = to_examples(question, tokenizer, 5, "q")[0]
    assert len(short.ids) == 6 and tokenizer.decode(short.ids[short.weights > 0].tolist()) == " blue and grey"
    with pytest.raises(ValueError, match="q: a choice of .* tokens does not fit config.model.context=2"):
        to_examples(question, tokenizer, 2, "q")


def test_log_likelihoods_are_those_of_the_formula(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Summed by hand over the log-softmax of each row, whatever the batch size."""
    choices = open_choices(str(write_questions(tmp_path / "q.jsonl", 5)), tokenizer, 64, 0, tmp_path)
    model = make_model(model_config(context=64), tokenizer.vocab_size)
    params = model.init(jax.random.key(0))
    mesh = make_mesh(MeshConfig())
    sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    actual = make_row_scores(TextModel(model, tokenizer, 64, sharding), 8)(params, choices.rows)

    batch = to_batch(list(choices.rows))
    log_probs = np.asarray(jax.nn.log_softmax(model.apply(params, jax.tree.map(jnp.asarray, batch), None)))
    per_token = np.take_along_axis(log_probs, np.asarray(batch.targets_BL)[..., None], axis=-1)[..., 0]
    expected = np.sum(per_token * batch.weights_BL, axis=1)
    np.testing.assert_allclose(actual.log_likelihoods, expected, rtol=2e-5)


def test_a_row_is_greedy_if_each_scored_token_is_the_likeliest(tokenizer: Tokenizer, tmp_path: Path) -> None:
    choices = open_choices(str(write_questions(tmp_path / "q.jsonl", 4)), tokenizer, 64, 0, tmp_path)
    model = make_model(model_config(context=64), tokenizer.vocab_size)
    params = model.init(jax.random.key(0))
    batch = to_batch(list(choices.rows))
    likeliest_BL = np.argmax(model.apply(params, jax.tree.map(jnp.asarray, batch), None), axis=-1)

    rows = choices.rows.copy()
    targets_BL = rows[:, 1]  # the model does not see them
    targets_BL[0], targets_BL[1, 1:], targets_BL[3] = likeliest_BL[0], likeliest_BL[1, 1:], likeliest_BL[3]
    last = np.flatnonzero(batch.weights_BL[3])[-1]
    targets_BL[3, last] = (likeliest_BL[3, last] + 1) % tokenizer.vocab_size
    mesh = make_mesh(MeshConfig())
    sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    scores = make_row_scores(TextModel(model, tokenizer, 64, sharding), 8)(params, rows)
    assert scores.greedy.tolist()[:4] == [True, True, False, False]


def test_accuracies_by_likelihood_and_per_character() -> None:
    choices = ChoiceSet("q", np.zeros((5, 5, 4), np.int32), np.array([1.0, 10.0, 1.0, 1.0, 1.0]), [2, 3], [0, 2])
    metrics = score_choices(choices, np.array([-1.0, -2.0, -3.0, -3.0, -1.0]))
    assert metrics["choice/q/accuracy"] == 100.0 and metrics["choice/q/accuracy_se"] == 0.0
    assert metrics["choice/q/accuracy_norm"] == 50.0
    assert metrics["choice/q/accuracy_norm_se"] == pytest.approx(100 * 0.25**0.5 / 2**0.5)


CONFIG = """
from pathlib import Path
from tests.tiny import recipe

def get_config(variant=""):
    made = recipe(Path(__file__).parent, steps=3)
    made.finetune = made.instruct = None
    made.prompts = ()
    made.pretrain.evaluation.choice = (str(Path(__file__).parent / "q.jsonl"),)
    made.pretrain.early_stopping.metric, made.pretrain.early_stopping.mode = "choice/q/accuracy", "max"
    return made
"""


def test_a_stage_is_measured_before_and_after(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    write_data(tmp_path)
    write_questions(tmp_path / "q.jsonl")
    (tmp_path / "recipe.py").write_text(CONFIG)
    words = [f"--config={tmp_path}/recipe.py", f"--workdir={tmp_path}/work"]
    assert main(["jaxstages", "pretrain", *words]) == 0
    lines = read_metrics(tmp_path / "work" / "pretrain" / "metrics.jsonl")
    measured = [line["step"] for line in lines if "choice/q/accuracy" in line]
    assert measured == [0, 3]
    best = read_json(tmp_path / "work" / "pretrain" / "result.json")["best"]
    assert {"choice/q/accuracy", "choice/q/accuracy_norm"} < best.keys()
    assert "choice accuracy: q 50" in capfd.readouterr().out
    # Later questions are no change of what was trained.
    write_questions(tmp_path / "other.jsonl", 4)
    more = f"--config.pretrain.evaluation.choice=('{tmp_path}/other.jsonl',)"
    assert main(["jaxstages", "evaluate", "--stage=pretrain", f"--workdir={tmp_path}/work", more]) == 0
    assert main(["jaxstages", "evaluate", "--stage=pretrain", *words]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["choice/q/accuracy"] == best["choice/q/accuracy"]
