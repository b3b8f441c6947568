"""Scores against their reference implementations, the verdict on curves of each kind, the unigram yardstick."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import sacrebleu
from sklearn.metrics import accuracy_score, f1_score

from jaxstages.metrics import from_sums, plain, score_labels, score_text
from jaxstages.verdict import judge


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


def test_overfit_from_the_first_step_on() -> None:
    held_out = [(0, 1.0), (100, 1.3), (200, 1.45)]
    assert judge([(20, 1.8), (100, 0.8), (200, 0.1)], held_out, baseline=5.0).name == "overfit"
