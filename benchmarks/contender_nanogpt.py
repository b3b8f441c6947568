"""nanoGPT: its model and its AdamW, from a checkout of it.

python benchmarks/contender_nanogpt.py --nanogpt=DIR --mode=compile --row=C1 --weights=FILE --tokens=FILE --steps=300

--optimizer=shipped is what nanoGPT's configure_optimizers gives on this device (on a CPU it is not fused); fused asks
it for the fused one on any.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from contender import contender_flags
from rows import Row
from safetensors.torch import load_file
from torch_loop import MODES, torch_device, train


def load_nanogpt(checkout: Path) -> ModuleType:
    """nanoGPT's model.py as a module."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"--nanogpt={checkout}: no model.py there")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = contender_flags(__doc__)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--mode", choices=MODES, default="eager")
    parser.add_argument("--optimizer", choices=("shipped", "fused"), default="shipped")
    flags = parser.parse_args()
    row: Row = flags.row
    torch.set_num_threads(flags.threads)
    nanogpt = load_nanogpt(flags.nanogpt)
    config = nanogpt.GPTConfig(
        block_size=row.context,
        vocab_size=row.vocab,
        n_layer=row.layers,
        n_head=row.heads,
        n_embd=row.width,
        dropout=0.0,
        bias=False,
    )
    model = nanogpt.GPT(config)
    missing, unexpected = model.load_state_dict(load_file(flags.weights), strict=False)
    if missing != ["lm_head.weight"] or unexpected:  # the head is the embedding
        raise SystemExit(f"weights do not fit nanoGPT: missing {missing}, unexpected {unexpected}")
    model.to(torch_device(row))
    kind = "cuda" if flags.optimizer == "fused" or row.device == "gpu" else "cpu"  # nanoGPT fuses where it hears "cuda"
    optimizer = model.configure_optimizers(row.weight_decay, row.learning_rate, (row.beta1, row.beta2), kind)
    train(model, optimizer, lambda called, x, y: called(x, y)[1], flags.mode, flags)


if __name__ == "__main__":
    main()
