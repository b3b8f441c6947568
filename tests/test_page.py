"""The page of the server: its files are served safely, load nothing from elsewhere, and fit together."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from jaxstages.generation.serving.app import PAGE, PAGE_POLICY, make_app
from jaxstages.generation.serving.scheduler import Scheduler

FILES = sorted(path.name for path in PAGE.iterdir())
TYPES = {".html": {"text/html"}, ".css": {"text/css"}, ".js": {"text/javascript"}, ".svg": {"image/svg+xml"}}
NAMESPACES = ("http://www.w3.org/2000/svg",)
VOID = {"br", "img", "input", "link", "meta"}


def get(path: str) -> tuple[int, dict[str, str], bytes]:
    """Request a path from an application without models: status, headers, body."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return await asyncio.Future()  # the client stays, and sends nothing more

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }
    asyncio.run(make_app({}, Scheduler({}, 1))(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


class Elements(HTMLParser):
    """The elements of a page, each with its attributes. Fails for elements that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self._open and data.strip():
            self.texts.append((self._open[-1], data))

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


@pytest.fixture(scope="module")
def html() -> Elements:
    return Elements((PAGE / "index.html").read_text())


def scripts() -> Iterator[str]:
    for path in PAGE.glob("*.js"):
        yield path.read_text()


@pytest.mark.parametrize("name", ["", *FILES])
def test_a_file_is_served_with_its_type_and_the_headers_of_the_page(name: str) -> None:
    status, headers, body = get(f"/{name}")

    name = name or "index.html"
    assert status == 200
    assert body == (PAGE / name).read_bytes()
    assert headers["content-type"].partition(";")[0] in TYPES[Path(name).suffix]
    assert headers["content-security-policy"] == PAGE_POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/app.py", "/../app.py", "/%2e%2e/app.py", "/page/index.html"])
def test_no_other_file_is_served(path: str) -> None:
    status, _, body = get(path)

    assert status == 404
    assert json.loads(body)["error"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_names_no_other_server(name: str) -> None:
    text = (PAGE / name).read_text()

    for namespace in NAMESPACES:
        text = text.replace(namespace, "")
    assert not re.findall(r"""https?://|["'(]//\w|@import""", text)


def test_the_html_has_no_inline_script_or_style(html: Elements) -> None:
    """The content security policy forbids them."""
    tags = [tag for tag, _ in html.elements]
    assert "style" not in tags
    assert "script" not in [tag for tag, _ in html.texts]
    assert not [name for _, attributes in html.elements for name in attributes if name.startswith("on")]
    assert not html.values("style")


def test_scripts_set_text_and_never_html() -> None:
    text = "\n".join(scripts())
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function", text
    )
    assert not re.findall(r"""setAttribute\(["'](?:style|on\w+)""", text)
    assert "localStorage" not in text
    assert "document.cookie" not in text


def test_files_that_are_named_exist(html: Elements) -> None:
    linked = {*html.values("src"), *html.values("href")}
    imported = {name for text in scripts() for name in re.findall(r'from "\./([^"]+)"', text)}

    assert linked | imported <= set(FILES)
    assert linked | imported | {"index.html"} == set(FILES)


def test_elements_that_scripts_use_exist(html: Elements) -> None:
    ids = html.values("id")
    assert len(ids) == len(set(ids))

    text = "\n".join(scripts())
    assert set(re.findall(r'(?:byId|clone|moveFocus)\("([^"]+)"\)', text)) <= set(ids)
    assert set(re.findall(r'\bpart\([^,()]+, "([^"]+)"\)', text)) <= set(html.values("data-part"))
    assert set(re.findall(r'\baction\([^,()]+, "([^"]+)"\)', text)) <= set(html.values("data-action"))
    for attribute in ("for", "aria-describedby", "aria-labelledby", "aria-controls"):
        assert set(html.values(attribute)) <= set(ids), attribute


def test_fields_have_labels(html: Elements) -> None:
    labelled = set(html.values("for"))
    for tag, attributes in html.elements:
        if tag == "textarea":
            assert "aria-label" in attributes or attributes["id"] in labelled
        if tag == "input" and attributes["type"] == "number":
            assert attributes["id"] in labelled
            assert attributes["name"] == attributes["id"]


def run_script(tmp_path: Path, name: str, expression: str) -> Any:
    """Evaluate an expression with the exports of a script that imports nothing."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    shutil.copy(PAGE / name, tmp_path / "script.mjs")
    (tmp_path / "main.mjs").write_text(
        f'import * as script from "./script.mjs";\nconsole.log(JSON.stringify({expression}));\n'
    )
    done = subprocess.run([node, tmp_path / "main.mjs"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("text", "tokens", "spans"),
    [
        pytest.param("Anna lives.", ["A", "nna", " lives", "."], ["A", "nna", " lives", "."], id="parts"),
        pytest.param("Paris is", [" Paris", " is"], ["Paris", " is"], id="a first space that decoding takes away"),
        pytest.param("é!", ["\\xc3", "\\xa9", "!"], ["é", "!"], id="parts of a character"),
        pytest.param("a 好", ["a", " ", "\\xe5", "\\xa5", "\\xbd"], ["a", " ", "好"], id="a character at the end"),
        pytest.param("ab", ["a", "<pad>", "b"], ["a", "", "b"], id="a control token"),
        pytest.param("a a a", ["a", " a", " a"], ["a", " a", " a"], id="repetition"),
        pytest.param("", ["<pad>"], [""], id="only a control token"),
        pytest.param("", [], [], id="nothing"),
    ],
)
def test_tokens_are_aligned_with_their_text(text: str, tokens: list[str], spans: list[str], tmp_path: Path) -> None:
    entries = [{"text": token} for token in tokens]
    call = f"script.alignTokens({json.dumps(text)}, {json.dumps(entries)})"

    aligned = run_script(tmp_path, "tokens.js", call)

    assert [span["text"] for span in aligned] == spans
    assert "".join(span["text"] for span in aligned) == text
    assert [token["text"] for span in aligned for token in span["tokens"]] == tokens


def test_a_conversation_is_sent_and_exported_without_what_was_dropped_or_not_answered(tmp_path: Path) -> None:
    steps = """
    (() => {
      const conversation = new script.Conversation();
      const answer = (question, text) => {
        const turn = conversation.add(question);
        turn.answers = [new script.Answer({ id: "instruct" })];
        turn.answers[0].add({ text, tokens: [], finishReason: "stop", usage: null });
        turn.answers[0].isRunning = false;
        return turn;
      };
      answer("one", "1");
      answer("two", "2");
      answer("nothing", " ");
      const last = answer("three", "3");
      conversation.forgetOldest(last);
      return [conversation.messagesTo(last, " Be brief. "), conversation.toRecord("")];
    })()
    """

    sent, record = run_script(tmp_path, "conversation.js", steps)

    texts = [(message["role"], message["content"]) for message in sent]
    assert texts == [("system", "Be brief."), ("user", "two"), ("assistant", "2"), ("user", "three")]
    assert [message["content"] for message in record["messages"]] == ["two", "2", "three", "3"]
