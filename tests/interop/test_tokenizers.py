"""An export's tokenizer, loaded by transformers, encodes as the stages did; and a folder's begins a text here as there.

Runs where the extra `parity` is installed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxstages.config import TokenizerConfig
from jaxstages.data.chat import make_chat
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.data.train_tokenizer import make_tokenizer
from jaxstages.interop import hf_export

pytest.importorskip("transformers", reason="the extra `parity` is not installed: pip install '.[parity]'")
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = "Ann likes red. Bob likes blue, and grey is a colour."


def exported(tokenizer: Tokenizer, workdir: Path, stage: str, new_tokens: Sequence[str] = ()) -> Any:
    """As transformers loads it.

    Args:
        new_tokens: tokens that the import has added.
    """
    from transformers import AutoTokenizer

    folder = workdir / "out"
    folder.mkdir()
    (workdir / "import").mkdir(exist_ok=True)
    (workdir / "import" / "result.json").write_text(json.dumps({"source": {"new_tokens": [*new_tokens]}}))
    program = SimpleNamespace(abstract_params={"embedding": np.zeros((tokenizer.vocab_size, 1))})
    data = SimpleNamespace(tokenizer=tokenizer)
    setup: Any = SimpleNamespace(workdir=workdir, folder=workdir / "import", data=data, program=program)
    hf_export.write_tokenizer(setup, stage, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_our_own_tokenizer_begins_a_text_as_training_did_and_can_pad(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    ours = make_tokenizer(TokenizerConfig(kind=kind, vocab_size=300), iter([TEXT]), path)
    theirs = exported(ours, tmp_path, "pretrain")
    assert ours.begin == (ours.specials.end_of_text,)
    assert theirs(TEXT).input_ids == [*ours.begin, *ours.encode(TEXT).tolist()]
    assert theirs.bos_token == theirs.pad_token == "<|endoftext|>"
    padded = theirs([TEXT, "Ann"], padding=True).input_ids
    assert len(padded[0]) == len(padded[1])
    again = make_tokenizer(
        TokenizerConfig(kind="file", path=str(tmp_path / "out" / "tokenizer.json")), iter(()), tmp_path / "x.json"
    )
    assert again.begin == ours.begin and again.encode(TEXT).tolist() == ours.encode(TEXT).tolist()


def foreign(folder: Path, puts_bos: bool, says: bool | None, trims: bool = False) -> Path:
    """A byte-level BPE with a chat template."""
    vocab = {name: i for i, name in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if trims:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if puts_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    beside: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    beside["chat_template"] = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(beside | ({} if says is None else {"add_bos_token": says}))
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("says", [None, False, True])
@pytest.mark.parametrize(("puts_bos", "trims"), [(False, False), (True, False), (False, True)])
def test_a_post_processor_counts_and_not_add_bos_token(
    puts_bos: bool, trims: bool, says: bool | None, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    file = foreign(tmp_path / "theirs", puts_bos, says, trims)
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    ours = make_tokenizer(TokenizerConfig(kind="file", path=str(file)), iter(()), path)
    theirs = AutoTokenizer.from_pretrained(file.parent)
    assert [*ours.begin, *ours.encode(TEXT).tolist()] == theirs(TEXT).input_ids
    for stage in ("import", "instruct"):
        again = exported(ours, tmp_path, stage)
        assert again(TEXT).input_ids == theirs(TEXT).input_ids
        assert (again.bos_token, again.eos_token) == ("<s>", "</s>")
        for left in (tmp_path / "out").iterdir():
            left.unlink()
        (tmp_path / "out").rmdir()


@pytest.mark.parametrize("eos", ["</s>", '<"end">'])
def test_the_exported_template_is_that_of_training(tmp_path: Path, eos: str) -> None:
    """A chat begins with the tokenizer's own end of a text, whatever that is called."""
    file, path = foreign(tmp_path / "theirs", False, None), tmp_path / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (file.parent / name).read_text()
        (file.parent / name).write_text(content.replace("</s>", eos.replace('"', '\\"')))
    beside = json.loads((file.parent / "tokenizer_config.json").read_text())
    del beside["chat_template"]
    (file.parent / "tokenizer_config.json").write_text(json.dumps(beside))
    ours = make_tokenizer(TokenizerConfig(kind="file", path=str(file)), iter(()), path, {"chat"})
    assert ours.eos == eos
    theirs = exported(ours, tmp_path, "instruct")
    messages = [{"role": role, "content": f"hi {role}"} for role in ("developer", "user")]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    trained = make_chat(ours).prompt(messages, None)
    assert [i for i in ids if i in ours.specials] == [i for i in trained if i in ours.specials]
    assert ids[:2] == [ours.specials.end_of_text, ours.specials.system]
    with pytest.raises(Exception, match="no role tool"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])


def test_an_import_is_exported_without_the_tokens_of_later_stages(tmp_path: Path) -> None:
    """Its embedding has no rows for them."""
    file, path = foreign(tmp_path / "theirs", False, None), tmp_path / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    ours = make_tokenizer(TokenizerConfig(kind="file", path=str(file)), iter(()), path, {"seq2seq"})
    size = len(json.loads(file.read_text())["model"]["vocab"])
    new_tokens = [text for text in ours.backend.get_vocab() if ours.backend.token_to_id(text) >= size]
    assert new_tokens
    assert len(exported(ours, tmp_path, "import", new_tokens)) == size
