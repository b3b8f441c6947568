"""peft: LoRA on transformers' GPT2LMHeadModel, in a plain loop, or in the Trainer as shipped.

python benchmarks/contender_peft.py --loop=trainer --row=C5 --weights=FILE --tokens=FILE --steps=5

PEFT keeps its defaults; set are only the row's rank and maps, and that the adapters begin as everyone's.
"""

import torch
from contender_transformers import loop_flags, make_gpt2, run_loop
from peft import LoraConfig, PeftModel, get_peft_model
from rows import Row
from safetensors.torch import load_file
from torch import nn


def make_adapted(row: Row, weights: dict[str, torch.Tensor]) -> PeftModel:
    """The row's model with these weights, and adapters beside its maps."""
    base = make_gpt2(row, {name: tensor for name, tensor in weights.items() if not name.startswith("lora.")})
    config = LoraConfig(
        r=row.rank, lora_alpha=row.rank, target_modules=["c_proj", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    ours = {name: tensor for name, tensor in weights.items() if name.startswith("lora.")}
    theirs = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "default"}
    for name, module in theirs.items():
        if isinstance(module, nn.Linear):
            place = name.removeprefix("base_model.model.transformer.").removesuffix(".default")
            with torch.no_grad():
                module.weight.copy_(ours.pop(f"lora.{place}.weight"))
    if ours:
        raise SystemExit(f"adapters that PEFT has no place for: {[*ours]}")
    return model


def main() -> None:
    flags = loop_flags(__doc__).parse_args()
    if not flags.row.rank:
        raise SystemExit(f"row {flags.row.name} has no rank; peft is for those that have")
    torch.set_num_threads(flags.threads)
    run_loop(make_adapted(flags.row, load_file(flags.weights)), flags)


if __name__ == "__main__":
    main()
