"""The token file that all contenders train on, and its batches, the same and in the same order for each of them.

python benchmarks/tokens.py --row=C1 --steps=100 --out=benchmarks/work/C1.bin
"""

import argparse
from pathlib import Path

import numpy as np
from rows import ROWS, Row


def write_tokens(path: Path, row: Row, steps: int, seed: int = 0) -> None:
    """Write tokens for `steps` steps as uint16: a Markov chain whose increments follow Zipf's law, so that there is
    something to learn."""
    increments = np.random.default_rng(seed).zipf(1.5, steps * row.tokens_per_step + 1) % row.vocab
    path.write_bytes((np.cumsum(increments) % row.vocab).astype(np.uint16).tobytes())


class Batches:
    """`batches[k]` is the inputs and targets of step k, each of shape [batch, context]."""

    def __init__(self, path: Path, row: Row) -> None:
        self._stream = np.memmap(path, np.uint16, "r")
        self._row = row

    def __len__(self) -> int:
        return (len(self._stream) - 1) // self._row.tokens_per_step

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        size, shape = self._row.tokens_per_step, (self._row.batch, self._row.context)
        piece = self._stream[step * size : (step + 1) * size + 1]
        return piece[:-1].reshape(shape), piece[1:].reshape(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    write_tokens(flags.out, ROWS[flags.row], flags.steps)


if __name__ == "__main__":
    main()
