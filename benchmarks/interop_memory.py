"""How much memory an import and an export take, as a multiple of the parameters' bytes (float32).

    python benchmarks/interop_memory.py --folder=/tmp/random            (1.5 billion parameters: 3 GB there, 6 GB here)
    python benchmarks/interop_memory.py --folder=/tmp/random --small    (90 million)

A folder of random bfloat16 weights in the shape of Qwen 2.5 is written first, without torch. Each command runs in a
process of its own: figures are the most that it ever held (VmHWM) less what it held before it began.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

LARGE = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
LARGE |= {"num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768}
SMALL = LARGE | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8}
SMALL |= {"vocab_size": 64_000}
BOUND = 1.25


def held() -> tuple[int, int]:
    """Bytes that this process holds now, and the most that it ever did."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # pyright: ignore[reportReturnType]


def write_random(folder: Path, config: dict[str, object]) -> int:
    """The folder; how many parameters it has."""
    import jax

    from jaxstages.checkpoint.fingerprint import named_leaves
    from jaxstages.config import TokenizerConfig
    from jaxstages.data.train_tokenizer import make_tokenizer
    from jaxstages.interop.config_json import read_config
    from jaxstages.interop.layout import shape_of, tensor_slots
    from jaxstages.interop.tensors import Entry, write_shards
    from jaxstages.models.transformer import make_model
    from jaxstages.runtime.files import write_json

    result = read_config(config, "config.json")
    model = make_model(result.model, result.model.vocab_size)
    tree = jax.eval_shape(model.init, jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in named_leaves(tree).items()}
    rng = np.random.default_rng(0)

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        def pieces() -> Iterator[np.ndarray]:
            rows = max(2**22 // int(np.prod(shape[1:])), 1)
            for start in range(0, shape[0], rows):
                yield 0.02 * rng.standard_normal((min(rows, shape[0] - start), *shape[1:]), dtype=np.float32)

        return Entry(name, shape, pieces)

    folder.mkdir(parents=True)
    entries = [entry(place.name, shape_of(place, shapes)) for place in tensor_slots(result.family, shapes)]
    write_shards(folder, entries, "BF16", 2 * 10**9, lambda done: None)
    text = iter(["Text for a small tokenizer."])
    make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), text, folder / "tokenizer.json")
    write_json(folder / "config.json", config)
    return sum(int(np.prod(shape)) for shape in shapes.values())


def child(words: list[str]) -> None:
    import jax
    import jax.numpy as jnp

    from jaxstages.cli.main import main

    jax.block_until_ready(jnp.ones(8) + 1)
    before, _ = held()
    start = time.monotonic()
    code = main(["jaxstages", *words])
    print(json.dumps({"code": code, "seconds": time.monotonic() - start, "bytes": held()[1] - before}))


def measure(words: list[str]) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--child", *words], stdout=subprocess.PIPE, text=True, check=True)
    *said, last = done.stdout.strip().splitlines()
    print("\n".join(said))
    return json.loads(last)


def main_() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where everything is written; removed at the end")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    folder: Path = options.folder
    config = {"model_type": "qwen2", "tie_word_embeddings": True} | (SMALL if options.small else LARGE)
    count = write_random(folder / "theirs", config)
    try:
        commands = {
            "import": ["import", f"--from={folder}/theirs", f"--workdir={folder}/work"],
            "export": ["export", f"--workdir={folder}/work", f"--to={folder}/ours"],
        }
        print(f"{count / 1e6:.0f}M parameters, {4 * count / 1e9:.2f} GB in float32; bound {BOUND}")
        for name, words in commands.items():
            result = measure(words)
            ratio = result["bytes"] / (4 * count)
            print(f"{name}: {result['bytes'] / 1e9:.2f} GB, {ratio:.3f} of the parameters, {result['seconds']:.0f} s")
            assert result["code"] == 0
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main_()
