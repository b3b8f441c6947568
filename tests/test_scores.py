"""Scores against their reference implementations, the verdict on curves of each kind, the unigram yardstick."""

import math

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import accuracy_score, f1_score

from jaxstages.generation.evaluate import sum_rows
from jaxstages.generation.metrics import from_sums, score_labels, score_text
from jaxstages.training.diagnosis import judge
from jaxstages.training.metric_writer import plain


def test_bleu_and_chrf_are_sacrebleus_with_its_signature() -> None:
    answers = ["le chat est sur le tapis .", "il ne dort pas du tout ici", "une maison"]
    references = ["le chat est assis sur le tapis .", "il ne dort pas ici", "une maison bleue"]
    scores, signatures = score_text(("bleu", "chrf", "exact_match"), answers, references)
    assert scores["bleu"] == sacrebleu.corpus_bleu(answers, [references]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(answers, [references]).score
    assert scores["exact_match"] == 0.0
    assert len(signatures) == 2 and "tok:13a" in signatures[0] and "nc:6" in signatures[1]


def test_exact_match_ignores_white_space_at_the_ends() -> None:
    assert score_text(("exact_match",), [" a ", "b", "c"], ["a", "B", "c"])[0]["exact_match"] == pytest.approx(200 / 3)


LABELS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1, max_size=40)


@hypothesis.given(LABELS)
def test_accuracy_and_macro_f1_are_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    predicted, true = zip(*pairs, strict=True)
    scores = score_labels(predicted, true)
    assert scores["accuracy"] == pytest.approx(100 * accuracy_score(true, predicted))
    assert scores["macro_f1"] == pytest.approx(100 * f1_score(true, predicted, average="macro", zero_division=0))


def test_the_standard_error_of_a_loss_is_that_of_a_ratio_over_rows() -> None:
    """By the formula over the rows themselves, and of resampled rows within a tenth."""
    rng = np.random.default_rng(0)
    weight = rng.integers(20, 60, 64).astype(np.float32)
    nll = weight * rng.normal(3.0, 0.5, 64).astype(np.float32)
    rows = {"nll": nll, "weight": weight, "correct": weight / 2, "bytes": 3 * weight}
    metrics = from_sums(sum_rows({name: jnp.asarray(values) for name, values in rows.items()}))
    rest = nll - metrics["loss"] * weight
    assert metrics["loss_se"] == pytest.approx(math.sqrt((rest**2).sum() * 64 / 63) / weight.sum(), rel=1e-2)
    drawn = rng.integers(0, 64, (2000, 64))
    assert metrics["loss_se"] == pytest.approx(np.std(nll[drawn].sum(1) / weight[drawn].sum(1)), rel=0.1)
    assert metrics["perplexity_se"] == pytest.approx(metrics["perplexity"] * metrics["loss_se"])
    assert metrics["bits_per_byte_se"] / metrics["bits_per_byte"] == pytest.approx(metrics["loss_se"] / metrics["loss"])
    assert metrics["token_accuracy_se"] == pytest.approx(0.0, abs=1e-3)
    row = {name: jnp.asarray(values[:1]) for name, values in rows.items()}
    assert "loss_se" not in from_sums(sum_rows(row)), "of one row there is no spread"


def test_each_score_of_answers_has_a_standard_error() -> None:
    answers, references = ["a b c d e"] * 30 + ["x y z v w"] * 10, ["a b c d e"] * 40
    scores, signatures = score_text(("bleu", "chrf", "exact_match"), answers, references)
    assert scores["exact_match"] == 75 and scores["exact_match_se"] == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 40))
    assert 4 < scores["bleu_se"] < 12 and 4 < scores["chrf_se"] < 12 and "bs:" not in "".join(signatures)
    labels = score_labels(answers, references)
    assert labels["accuracy_se"] == scores["exact_match_se"] and 0 < labels["macro_f1_se"] < 10


def test_from_sums() -> None:
    metrics = from_sums({"nll": 6.0, "weight": 3.0, "correct": 1.0, "bytes": 12.0})
    assert metrics["loss"] == 2.0 and metrics["perplexity"] == pytest.approx(math.e**2)
    assert metrics["bits_per_byte"] == pytest.approx(6.0 / math.log(2) / 12)
    with pytest.raises(ValueError, match="every loss weight is 0"):
        from_sums({"nll": 0.0, "weight": 0.0, "correct": 0.0})


def test_json_never_holds_a_nan() -> None:
    assert [plain(value) for value in (math.nan, math.inf, 1.5, 3, "x")] == [None, None, 1.5, 3, "x"]


def curve(*losses: float) -> list[tuple[int, float]]:
    return [(100 * (i + 1), float(loss)) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("name", "train", "held_out"),
    [
        ("healthy", curve(3, 2, 1.5, 1.4, 1.4, 1.4, 1.4, 1.4), curve(3, 2, 1.6, 1.5, 1.5, 1.5, 1.5, 1.5)),
        ("overfit", curve(3, 2, 1.5, 1.0, 0.6, 0.3, 0.2, 0.1), curve(3, 2, 1.6, 1.7, 1.9, 2.2, 2.5, 2.8)),
        ("underfit", curve(8, 7, 6, 5, 4, 3.5, 3, 2.5), curve(8, 7, 6, 5, 4, 3.5, 3, 2.5)),
        ("underfit", curve(6, 6, 6, 6, 6, 6, 6, 6), curve(6, 6, 6, 6, 6, 6, 6, 6)),
        ("diverging", curve(3, 2, 4, 9, 20, 40, 80, 99), curve(3, 2, 4, 9, 20, 40, 80, 99)),
        ("diverging", curve(3, 2, 1.5), curve(3, 2, math.nan)),
        ("diverging", curve(3, math.nan, 1.5), curve(3, 2, 1.5)),
    ],
)
def test_verdicts(name: str, train: list[tuple[int, float]], held_out: list[tuple[int, float]]) -> None:
    verdict = judge(train, held_out, baseline=5.5)
    assert verdict.name == name, verdict
    assert verdict.evidence and verdict.remedy


def test_a_gap_to_the_training_loss_is_overfitting() -> None:
    train, held_out = curve(6, 5, 4.4, 4, 3.8, 3.7, 3.67, 3.67), curve(6, 5.9, 5.82, 5.8, 5.79, 5.79, 5.79, 5.79)
    verdict = judge(train, held_out, baseline=7.0)
    assert verdict.name == "overfit" and "5.790 is 2.120 above the training loss, 3.670" in verdict.evidence
    assert judge(train, held_out, baseline=5.5).name == "overfit", "not that it could not learn"
    assert judge(train, held_out, baseline=7.0, comparable=False).name == "healthy", (
        "other data are replayed in training"
    )
    near = curve(6, 5, 4.4, 4, 3.8, 3.7, 3.72, 3.72)
    assert judge(train, near, baseline=7.0).name == "healthy"


def test_two_evaluations_decide_nothing() -> None:
    train = [(20 * i, 5.0 - 0.02 * i) for i in range(1, 51)]
    verdict = judge(train, [(0, 6.0), (1000, 4.0)], baseline=7.0)
    assert verdict.name == "undecided" and "last measured at step 0" in verdict.evidence
    assert "loop.eval_every" in verdict.remedy


def test_how_long_the_loss_was_falling_is_said_as_it_was_measured() -> None:
    """Where the evaluations before the end are at half of the stage, it is no quarter."""
    train = [(100 * i, 5.0 - 0.2 * i) for i in range(1, 11)]
    verdict = judge(train, [(0, 6.0), (500, 4.0), (1000, 3.0)], baseline=7.0)
    assert verdict.name == "underfit" and "by 25.0 % from step 500 to 1000" in verdict.evidence
    assert "--lengthen" in verdict.remedy
    slow = [(0, 6.0), (500, 4.0), (1000, 3.95)]  # 1.25 % in a half is 0.6 % in a quarter
    assert judge(train, slow, baseline=7.0, comparable=False).name == "healthy"


def test_overfit_from_the_first_step_on() -> None:
    held_out = [(0, 1.0), (100, 1.3), (200, 1.45)]
    assert judge([(20, 1.8), (100, 0.8), (200, 0.1)], held_out, baseline=5.0).name == "overfit"
