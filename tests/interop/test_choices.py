"""Multiple-choice scores are those that transformers gives the exported model.

Runs where the extra `parity` is installed (torch, transformers).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxstages.cli.main import main
from jaxstages.cli.resolve import resolve_recipe
from jaxstages.config import Recipe
from jaxstages.data.choices import open_choices, split_by_question
from jaxstages.generation.choices import make_row_scores
from jaxstages.training.handoff import read_parent
from jaxstages.training.setup import setup_stage
from tests.tiny import PEOPLE, THINGS, model_config, write_data
from tests.tiny import recipe as tiny_recipe

WHY = "the extra `parity` is not installed: pip install '.[parity]'"
pytest.importorskip("torch", reason=WHY)
pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

MOST = 2e-5
"""Bound for the log-likelihood of a choice, in nats; they are between -72 and -5."""

CONTEXT = 48


def get_recipe(home: Path) -> Recipe:
    recipe = tiny_recipe(home, steps=3)
    recipe.finetune = recipe.instruct = None
    recipe.prompts = ()
    recipe.model = model_config(context=CONTEXT)
    return recipe


def write_questions(file: Path) -> Path:
    """Choices of different lengths; a query with spaces at its end, an empty one, and one longer than the context."""
    lines: list[dict[str, Any]] = [
        {"query": f"{person} likes ", "choices": [thing, f"{thing} and red", "a person."], "gold": number % 3}
        for number, (person, thing) in enumerate(zip(PEOPLE * 2, THINGS * 2, strict=False))
    ]
    lines.append({"good": "Ann likes red. Red is a colour.", "bad": "Red likes Ann. Ann is a colour."})
    lines.append({"query": "Bob is a person. " * 30 + "Bob likes", "choices": ["blue", "grey, or green"], "gold": 0})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def reference(folder: Path, query: str, choice: str) -> float:
    """Log-likelihood of a choice by transformers, tokenized with the exported tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    query = query.rstrip()
    context = tokenizer(query)["input_ids"]
    whole = tokenizer(f"{query} {choice}" if query else choice)["input_ids"]
    scored = len(whole) - len(context)
    ids = whole[-(CONTEXT + 1) :]
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([ids[:-1]])).logits[0].double(), dim=-1)
    return float(sum(log_probs[slot, ids[slot + 1]] for slot in range(len(ids) - 1 - scored, len(ids) - 1)))


def test_choices_are_scored_as_by_transformers(tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "recipe.py").write_text(
        "from pathlib import Path\nfrom tests.interop.test_choices import get_recipe\n\n"
        "def get_config(variant=''):\n    return get_recipe(Path(__file__).parent)\n"
    )
    work, exported = tmp_path / "work", tmp_path / "exported"
    assert main(["jaxstages", "pretrain", f"--config={tmp_path}/recipe.py", f"--workdir={work}"]) == 0
    assert main(["jaxstages", "export", "--stage=pretrain", f"--workdir={work}", f"--to={exported}"]) == 0

    setup = setup_stage(resolve_recipe(None, work), "pretrain", work, with_data=False)
    params, _ = read_parent(setup.folder, setup.program, setup.contract)
    file = write_questions(tmp_path / "questions.jsonl")
    choices = open_choices(str(file), setup.data.tokenizer, CONTEXT, 0, tmp_path)
    ours = make_row_scores(setup.text_model, 8)(params, choices.rows).log_likelihoods

    lines = [json.loads(line) for line in file.read_text().splitlines()]
    pairs = [(line.get("query", ""), choice) for line in lines for choice in line.get("choices", [*line.values()])]
    theirs = np.array([reference(exported, query, choice) for query, choice in pairs])
    assert np.max(np.abs(ours - theirs)) < MOST, np.abs(ours - theirs)

    for values in ((ours, theirs), (ours / choices.lengths, theirs / choices.lengths)):  # plain, and per character
        predictions = [[int(np.argmax(each)) for each in split_by_question(entry, choices.counts)] for entry in values]
        assert predictions[0] == predictions[1]
