"""Tokens that an import adds are trained, or the stage is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxstages.config import DataConfig, LoraConfig, OptimConfig, StageConfig, TokenizerConfig
from jaxstages.data.train_tokenizer import make_tokenizer
from jaxstages.interop.peft import _base_of
from jaxstages.runtime.files import make_folder, write_json
from jaxstages.training.new_tokens import check_new_tokens, untrained_rows
from tests.test_chat import make_foreign

ROWS = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)


def grown(rows: int) -> np.ndarray:
    return np.concatenate([ROWS, np.repeat(ROWS.mean(axis=0, keepdims=True), rows, axis=0)])


def test_untrained_rows() -> None:
    assert [int(untrained_rows(grown(rows))) for rows in (0, 1, 4)] == [0, 1, 4]
    assert int(untrained_rows(np.concatenate([ROWS, ROWS[-1:]]))) == 0, "equal, but not the mean"


@pytest.mark.parametrize(
    ("task", "stage", "tied", "complaint"),
    [
        ("chat", {"lora": LoraConfig(rank=2)}, True, r"<\|system\|> <\|user\|> .* add 'embedding' to .*lora.targets"),
        ("chat", {"lora": LoraConfig(rank=2)}, False, "add 'embedding', 'head' to"),
        ("chat", {"lora": LoraConfig(rank=2, targets=("kernel", "embedding"))}, False, "add 'head' to"),
        ("chat", {"lora": LoraConfig(rank=2, targets=("kernel", "embedding", "head"))}, False, ""),
        ("chat", {"optim": OptimConfig(freeze=("embedding",))}, True, "take embedding out of .*optim.freeze"),
        ("chat", {"optim": OptimConfig(freeze=("layers",))}, True, ""),
        ("chat", {}, True, ""),
        ("seq2seq", {"lora": LoraConfig(rank=2)}, True, r"needs <\|sep\|>, new to this model"),
        ("lm", {"lora": LoraConfig(rank=2)}, True, ""),
    ],
)
def test_stages_that_would_not_learn_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    stage: dict[str, Any],
    tied: bool,
    complaint: str,
) -> None:
    monkeypatch.setattr("tests.test_chat.SPECIAL", ("<s>", "</s>", "<eos>"))
    make_foreign(tmp_path, "", eos="<eos>")  # a base model: no chat template, an end of text of its own
    kind = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"))
    before = make_tokenizer(kind, iter(()), tmp_path / "a" / "tokenizer.json", ["lm"]).vocab_size
    tokenizer = make_tokenizer(kind, iter(()), tmp_path / "b" / "tokenizer.json", [task])
    rows = np.random.default_rng(0).normal(size=(before, 8)).astype(np.float32)
    table = np.concatenate([rows, np.repeat(rows.mean(axis=0, keepdims=True), tokenizer.vocab_size - before, axis=0)])
    params = {"embedding": table, "layers": {}} | ({} if tied else {"head": table})
    config = StageConfig(data=DataConfig(task=task), **stage)
    if not complaint:
        check_new_tokens("instruct", config, tokenizer, params)
        return
    with pytest.raises(ValueError, match=complaint):
        check_new_tokens("instruct", config, tokenizer, params)
    trained = table + np.random.default_rng(1).normal(size=table.shape).astype(np.float32)
    check_new_tokens(
        "instruct", config, tokenizer, {name: trained if name in ("embedding", "head") else {} for name in params}
    )


def test_adapters_beside_a_grown_vocabulary_have_no_base_elsewhere(tmp_path: Path) -> None:
    meta = {"parent": {"params_sha256": "1", "path": "parent"}}
    source: dict[str, Any] = {"folder": "theirs", "new_tokens": []}
    file = tmp_path / "import" / "result.json"
    make_folder(file.parent)
    for tokens, sha256, base in (([], "1", "theirs"), (["<|sep|>"], "1", None), (["<|sep|>"], "2", "parent")):
        write_json(file, {"source": source | {"new_tokens": tokens}, "params_sha256": sha256})
        if base is None:
            with pytest.raises(ValueError, match=r"no rows for <\|sep\|>, .* without --adapter"):
                _base_of(tmp_path, meta)
        else:
            assert _base_of(tmp_path, meta) == base
