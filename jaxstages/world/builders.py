"""The three data sets of the world as tensorflow-datasets builders, and `open_world`, which opens one of them.

They are built once into a folder, as array_record files, and then read at random places. Neither needs TensorFlow.
"""

import contextlib
import fcntl
import io
import json
import operator
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import tensorflow_datasets as tfds

from jaxstages.world.chats import chats
from jaxstages.world.clauses import pairs
from jaxstages.world.split import SPLITS, check_split
from jaxstages.world.text import documents

PAIR_COUNTS: dict[str, int] = {"train": 12_000, "validation": 400}
FILE_FORMAT = "array_record"


class _World(tfds.core.GeneratorBasedBuilder):
    """What the three builders share: both splits, and examples numbered in the order they are made."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {"1.0.0": "First version.", "1.1.0": "Small talk, the unknown, and longer conversations."}
    FIELDS: tuple[str, ...] = ()
    ABOUT = ""

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({field: tfds.features.Text() for field in self.FIELDS})
        return tfds.core.DatasetInfo(builder=self, description=self.ABOUT, features=features)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # There is nothing to download.
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        return enumerate(self._records(split))

    def _records(self, split: str) -> Iterator[dict[str, str]]:
        raise NotImplementedError


class WorldText(_World):
    """Raw text documents, `{"text"}`."""

    FIELDS = ("text",)
    ABOUT = "Short English and French documents that tell the facts of a small world, for pretraining."

    def _records(self, split: str) -> Iterator[dict[str, str]]:
        return documents(split)


class WorldPairs(_World):
    """English sentences with their French, `{"prompt", "target"}`."""

    FIELDS = ("prompt", "target")
    ABOUT = "English sentences and their French translation, from one grammar, for finetuning."

    def _records(self, split: str) -> Iterator[dict[str, str]]:
        return pairs(split, PAIR_COUNTS[split])


class WorldChats(_World):
    """Chats, `{"messages", "kind"}`; the messages are stored as JSON, because a sequence of dicts is read back as a
    dict of arrays."""

    FIELDS = ("messages", "kind")
    ABOUT = "Short chats of many kinds, each with one right answer, for instruction tuning."

    def _records(self, split: str) -> Iterator[dict[str, str]]:
        for chat in chats(split):
            yield {"messages": json.dumps(chat["messages"], ensure_ascii=False), "kind": str(chat["kind"])}


BUILDERS: dict[str, type[_World]] = {"text": WorldText, "pairs": WorldPairs, "chats": WorldChats}
"""The name of each data set for `open_world`."""


class WorldSource:
    """One split, read at random places: `len(source)` and `source[index]`, a dict of str, or lists for messages."""

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        place = operator.index(index)  # A sampler may hand over a NumPy integer.
        if not 0 <= place < len(self):
            raise IndexError(f"no record {place}: there are {len(self)}")
        record = {field: bytes(value).decode() for field, value in self._records[place].items()}
        return record | {"messages": json.loads(record["messages"])} if "messages" in record else record

    def __repr__(self) -> str:
        return f"WorldSource({len(self)} records)"


def open_world(name: str, split: str, data_dir: str) -> WorldSource:
    """One split of the data set `name`, a key of BUILDERS, out of the folder `data_dir`, built there on first use.

    Raises ValueError for an unknown name or split.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown data set {name!r}: known are {', '.join(BUILDERS)}")
    check_split(split)
    folder = Path(data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet(), _locked(folder / f".{name}.lock"):
        builder = BUILDERS[name](data_dir=data_dir, file_format=FILE_FORMAT)
        # TFDS writes into a folder named "incomplete..." and renames it when all is written, so a build that was
        # killed half way is never taken for a data set. Under the lock nobody else writes: such a folder is rubbish.
        for rubbish in (folder / builder.name).glob("incomplete.*"):
            shutil.rmtree(rubbish)
        builder.download_and_prepare()
        # Its decorator hides the signature.
        return WorldSource(builder.as_data_source(split=split))  # pyright: ignore[reportCallIssue]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that TFDS prints inside gets out; its progress bars, a switch without a way back, stay off."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time is inside, on this path; the lock ends with its process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
