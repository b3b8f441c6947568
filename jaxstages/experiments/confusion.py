"""The confusion matrix of a stage of task `classify`."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxstages.config import Recipe
from jaxstages.data.stage_data import open_recorded
from jaxstages.experiments.training_rows import checkpoint_meta
from jaxstages.generation.evaluate import held_out_questions, labels_of, make_classify
from jaxstages.training.handoff import read_parent
from jaxstages.training.setup import setup_stage


class Confusion(NamedTuple):
    """How often each label was predicted for each true label.

    counts: int [true label, predicted label].
    """

    labels: list[str]
    counts: np.ndarray


def count_confusions(true: list[str], predicted: list[str]) -> Confusion:
    """Count the pairs of labels. Labels that occur on neither side are left out."""
    labels = sorted({*true, *predicted})
    index = {label: number for number, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(counts, ([index[label] for label in true], [index[label] for label in predicted]), 1)
    return Confusion(labels, counts)


def measure_confusion(recipe: Recipe, workdir: Path, name: str) -> Confusion:
    """Classify the held-out records of a finished stage with its best checkpoint, those that its accuracy is of.

    Evaluation during training keeps no predictions, so this computes them again.

    Raises:
        ValueError: the checkpoint or the prepared rows are no longer there, or do not fit this machine.
    """
    setup = setup_stage(recipe, name, workdir, with_data=False)
    config = setup.config.evaluation
    datasets, held_out = open_recorded(recipe, name, setup.config, checkpoint_meta(workdir, name)["data"], workdir)
    questions = held_out_questions(held_out, config.max_examples)
    if not questions:
        raise ValueError(f"the held-out data of {name} have no question")
    labels = labels_of([*datasets[0].train, *held_out])
    params, _ = read_parent(setup.folder, setup.program, setup.contract)
    classify = make_classify(setup.text_model, labels, config.batch_size)
    predicted = classify(params, [question.prompt for question in questions])
    return count_confusions([question.reference for question in questions], predicted)
