"""`chat` through a pipe, and `generate`'s answers that outlive a kill, on a model of a few steps."""

import io
import json
from pathlib import Path

import pytest

from jaxstages.cli import generate as generating
from jaxstages.cli.loaded_model import load_model
from jaxstages.cli.main import main
from jaxstages.cli.resolve import resolve_recipe
from jaxstages.cli.sampling_flags import SamplingFlags
from jaxstages.data.chat import Chat, make_chat
from jaxstages.data.conversation import Messages, Tools, read_conversation
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.generation.session import Session
from tests.tiny import write_data

CONFIG = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.tiny import recipe

def get_config(variant=""):
    found = recipe(Path({data!r}), steps=2)
    found.pretrain, found.finetune, found.prompts = None, None, ()
    found.instruct.init_from, found.instruct.evaluation.metrics = "scratch", ()
    return found
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    write_data(root / "data")
    names = {"root": str(Path(__file__).parents[1]), "data": str(root / "data")}
    (root / "tiny.py").write_text(CONFIG.format(**names))
    assert main(["jaxstages", "instruct", f"--config={root}/tiny.py", f"--workdir={root}/work"]) == 0
    return root


def talk(home: Path, lines: list[str], *flags: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return main(["jaxstages", "chat", f"--workdir={home}/work", *flags])


def test_a_piped_session(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "kept" / "talk.jsonl"
    lines = ["/help", "/save", "/system be brief", "say red", "and Ann", f"/save {saved}", "/nonsense", "/reset"]
    lines += ["say red", f"/save {saved}", "/quit", "never read"]
    assert talk(home, lines) == 0
    out = capsys.readouterr().out
    for said in ("/reset  ", "/save needs a FILE", "unknown: /nonsense", "saved, 5 messages", "is forgotten"):
        assert said in out, out
    records = [json.loads(line) for line in saved.read_text().splitlines()]
    for record in records:
        read_conversation(record)
    roles = [[message["role"] for message in record["messages"]] for record in records]
    assert roles == [["system", "user", "assistant", "user", "assistant"], ["system", "user", "assistant"]]
    first, again = records[0]["messages"][2], records[1]["messages"][2]
    assert first == again, "greedy, the same question after /reset"
    assert first["content"] in out
    assert talk(home, [*lines[:5], f"/save {tmp_path}/other.jsonl"]) == 0, "the end of the input ends it"
    assert json.loads((tmp_path / "other.jsonl").read_text()) == records[0]


def test_a_full_context_forgets_whole_turns_and_says_so(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "talk.jsonl"
    assert talk(home, ["/system be brief", *["say red and blue"] * 6, f"/save {saved}", "x" * 300], "--seed=3") == 0
    out = capsys.readouterr().out
    assert "the context is full: the first 2 messages are forgotten" in out and "too long" in out
    messages = read_conversation(json.loads(saved.read_text())).messages
    assert messages[0]["role"] == "system" and len(messages) < 13 and messages[1]["role"] == "user"


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import signal

    stream = Session.stream

    def stopped(self: Session, prompt: list[int], turn: int = 0):
        for n, piece in enumerate(stream(self, prompt, turn)):
            if turn == 0 and n == 2:
                signal.raise_signal(signal.SIGINT)
            yield piece

    monkeypatch.setattr(Session, "stream", stopped)
    assert talk(home, ["say red", f"/save {tmp_path}/cut.jsonl", "say red"]) == 0
    assert capsys.readouterr().out.count("(stopped)") == 1
    assert len(json.loads((tmp_path / "cut.jsonl").read_text())["messages"]) == 2


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--top_k=3",), "--top_k needs a temperature above 0"),
        (("--top_p=2", "--temperature=1"), "--top_p=2.0 must be"),
        (("--stop=",), "--stop='' must be a text"),
        (("--max_new_tokens=64",), "--max_new_tokens=64 must be less than the context, 64"),
        (("--prompt=x",), "--prompt does not apply to chat"),
    ],
)
def test_mistakes_are_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], complaint: str
) -> None:
    assert talk(home, ["say red"], *flags) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1


def test_a_file_goes_on_where_it_was_killed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(20)))
    words = ["jaxstages", "generate", f"--workdir={home}/work", f"--prompts={prompts}", f"--out={out}"]
    words += ["--temperature=1", "--top_p=0.9", "--repetition_penalty=1.2", '--stop=["zzz"]', "--stop=qqq"]
    assert main(words) == 0
    whole = out.read_text()
    assert whole.count("\n") == 20 and not (tmp_path / "out.jsonl.part").exists()
    answers, calls = generating._answers, []

    def killed(answering, seed, prompts, ids, done):
        calls.append(done)
        for n, line in enumerate(answers(answering, seed, prompts, ids, done)):
            if len(calls) == 1 and n == 11:
                raise OSError("killed")
            yield line

    monkeypatch.setattr(generating, "_answers", killed)
    out.unlink()
    part = tmp_path / "out.jsonl.part"
    assert main(words) == 74 and not out.exists()
    with part.open("a") as file:
        file.write('{"prompt": "say 11", "te')
    assert main(words) == 0 and out.read_text() == whole
    out.unlink()
    assert main([*words, "--seed=5"]) == 0 and out.read_text() != whole
    assert calls == [0, 11, 0]


def test_what_the_template_refuses_costs_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxstages.cli import chat as command

    def choosy(tokenizer: Tokenizer) -> Chat:
        chat = make_chat(tokenizer)

        def prompt(messages: Messages, tools: Tools) -> list[int]:
            if "forbidden" in messages[-1]["content"]:
                raise ValueError("the chat template refuses this conversation: not so")
            return chat.prompt(messages, tools)

        return chat._replace(prompt=prompt)

    monkeypatch.setattr(command, "make_chat", choosy)
    saved = tmp_path / "talk.jsonl"
    assert talk(home, ["say red", "a forbidden word", "say red", f"/save {saved}"]) == 0
    assert "not said: the chat template refuses" in capsys.readouterr().out
    said = [message["content"] for message in json.loads(saved.read_text())["messages"]]
    assert len(said) == 4 and not any("forbidden" in text for text in said)


def test_a_control_token_as_a_stop_is_an_id(home: Path) -> None:
    """No decoding shows it: as a text it would never be found."""
    manner = SamplingFlags(4, 0.0, 0, 1.0, 0.0, 1.0, ["<|user|>", "a text"], 0)
    answering = load_model(resolve_recipe(None, home / "work"), home / "work", None, manner)
    special = answering.setup.data.tokenizer.specials
    assert answering.sampling.stop == (special.end_of_text, special.end_of_turn, special.user)
    assert answering.stops == ("a text",)
