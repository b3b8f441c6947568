"""Near-duplicate removal at scale: what it finds, what it misses, how fast it is, and how much memory it takes.

    python benchmarks/near_duplicates.py --documents=1000000

Makes JSON lines of random documents (words by Zipf's law, lengths log-normal), of which a tenth are near-duplicates of
an earlier one: a share of their words, drawn anew for each from 0 to 8 %, is replaced. Then it does what `prepare`
does, and compares with what is known of how they were made, and with the exact Jaccard similarity. Prints JSON.

* removed: share of all documents
* missed: near-duplicates whose exact similarity to their original is at least the threshold, and that stayed
* false: removed documents without an earlier one that is as similar, among all that were made from one text; an
  unrelated one that went counts too
* near_threshold: how many of the false, and of the missed, are within 0.1 of the threshold, where the estimate errs
* documents_per_second, seconds, most_memory_gb: of reading, signing and comparing, in this process
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxstages.config import DataConfig
from jaxstages.config.data import DuplicatesConfig
from jaxstages.data.prepare import find_near_duplicates
from jaxstages.data.shards import read_dropped
from jaxstages.data.sources import open_source

VOCABULARY, MOST_WORDS = 100_000, 2000
NEAR, MOST_CHANGED = 0.1, 0.08


def words_of(number: int, seed: int, length: float) -> np.ndarray:
    """A text as numbers of its words: the same for the same number."""
    draw = np.random.default_rng((seed, number))
    count = int(np.clip(draw.lognormal(length, 0.6), 8, MOST_WORDS))
    return draw.zipf(1.2, count) % VOCABULARY


def change(words: np.ndarray, number: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng((seed, 1, number))
    share = draw.uniform(0, MOST_CHANGED)
    fresh = draw.integers(0, VOCABULARY, len(words))
    return np.where(draw.random(len(words)) < share, fresh, words)


def originals(documents: int, seed: int) -> np.ndarray:
    """int32 [n]: for each document the earlier one that it is made from, or -1."""
    draw = np.random.default_rng(seed)
    of = np.full(documents, -1, np.int32)
    near = np.flatnonzero(draw.random(documents) < NEAR)
    near = near[near > 0]
    picked = (draw.random(len(near)) * near).astype(np.int32)
    # One that is made from another near-duplicate would be a chain: take that one's original.
    fresh = np.setdiff1d(np.arange(documents), near)
    of[near] = fresh[np.searchsorted(fresh, picked, side="right") - 1]
    return of


def text_of(number: int, of: np.ndarray, seed: int, length: float) -> np.ndarray:
    if of[number] < 0:
        return words_of(number, seed, length)
    return change(words_of(int(of[number]), seed, length), number, seed)


def write(path: Path, of: np.ndarray, seed: int, length: float) -> None:
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    vocabulary = ["".join(draw.choice(letters, n)) for n in draw.integers(2, 10, VOCABULARY)]
    with path.open("w") as file:
        for number in range(len(of)):
            text = " ".join([vocabulary[word] for word in text_of(number, of, seed, length).tolist()])
            file.write(json.dumps({"text": text}) + "\n")


def jaccard(left: np.ndarray, other: np.ndarray, size: int) -> float:
    sets = []
    for words in (left, other):
        run = min(size, len(words))
        sets.append(set(map(tuple, np.lib.stride_tricks.sliding_window_view(words, run).tolist())))
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def judge(of: np.ndarray, gone: np.ndarray, config: DuplicatesConfig, seed: int, length: float) -> dict[str, object]:
    """What was missed, and what was removed without need, by exact similarity among those made from one text."""
    threshold, earlier = config.threshold, {}
    false, missed, near, meant = 0, 0, {"false": 0, "missed": 0}, 0
    unrelated = int(np.sum(gone & (of < 0)))
    for number in np.flatnonzero(of >= 0).tolist():
        own = text_of(number, of, seed, length)
        family = earlier.setdefault(int(of[number]), [int(of[number])])
        best = max(jaccard(own, text_of(other, of, seed, length), config.shingle_size) for other in family)
        family.append(number)
        meant += best >= threshold
        wrong = "missed" if best >= threshold and not gone[number] else "false"
        if (best >= threshold) != gone[number]:
            near[wrong] += abs(best - threshold) < 0.1
            missed, false = missed + (wrong == "missed"), false + (wrong == "false")
    return {
        "removed": int(gone.sum()),
        "removed_share": round(float(gone.mean()), 4),
        "near_duplicates_made": int(np.sum(of >= 0)),
        "of_them_similar_enough": meant,
        "missed": missed,
        "missed_share": round(missed / max(meant, 1), 5),
        "false": false + unrelated,
        "false_unrelated": unrelated,
        "false_share_of_all": round((false + unrelated) / len(of), 6),
        "near_threshold": near,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--words", type=float, default=100.0, help="median of a document's words")
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    config, length = DuplicatesConfig(threshold=flags.threshold), float(np.log(flags.words))
    of = originals(flags.documents, flags.seed)
    folder = Path(tempfile.mkdtemp(prefix="near-duplicates-"))
    try:
        start = time.perf_counter()
        write(folder / "documents.jsonl", of, flags.seed, length)
        making = time.perf_counter() - start
        source = open_source(str(folder / "documents.jsonl"), folder)
        start = time.perf_counter()
        measured = find_near_duplicates(source, DataConfig(duplicates=config), folder / "cache")
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        places = read_dropped(measured, 0)
        gone = np.array([number in places for number in range(flags.documents)])
        start = time.perf_counter()
        said = judge(of, gone, config, flags.seed, length)
        result = {
            "documents": flags.documents,
            "megabytes": round((folder / "documents.jsonl").stat().st_size / 1e6, 1),
            "threshold": flags.threshold,
            **said,
            "seconds": round(seconds, 1),
            "documents_per_second": round(flags.documents / seconds),
            "most_memory_gb": round(memory, 2),
            "seconds_to_make_them": round(making, 1),
            "seconds_to_judge": round(time.perf_counter() - start, 1),
        }
        print(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
