"""transformers: GPT2LMHeadModel in a plain loop, or in the Trainer as shipped.

python benchmarks/contender_transformers.py --loop=trainer --row=C1 --weights=FILE --tokens=FILE --steps=300

The model has no biases: those of the norms are taken out, those of the linear maps are 0 and not trained. The Trainer
keeps its defaults; set are only the row's optimizer constants, the order of the rows, and that it saves nothing.
"""

import argparse
import tempfile
from typing import Any

import torch
from contender import Recorder, contender_flags, print_check
from rows import Row
from safetensors.torch import load_file
from tokens import Batches
from torch import nn
from torch.utils.data import Dataset
from torch_loop import MODES, count_trained, grad_norm, print_torch_result, synchronize, torch_device, train
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D


def make_gpt2(row: Row, weights: dict[str, torch.Tensor]) -> GPT2LMHeadModel:
    """The row's model, with these weights."""
    config = GPT2Config(
        vocab_size=row.vocab,
        n_positions=row.context,
        n_embd=row.width,
        n_layer=row.layers,
        n_head=row.heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=row.norm_eps,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    linear = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    turned = {
        name: tensor.T if name.removesuffix(".weight") in linear else tensor for name, tensor in weights.items()
    }  # Conv1D keeps [inputs, outputs]
    missing, unexpected = model.load_state_dict(turned, strict=False)
    if any(not name.endswith(".bias") and name != "lm_head.weight" for name in missing) or unexpected:
        raise SystemExit(f"weights do not fit GPT2LMHeadModel: missing {missing}, unexpected {unexpected}")
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.bias = None
        elif isinstance(module, Conv1D):
            module.bias.requires_grad_(False).zero_()
    return model


class Rows(Dataset):
    """The rows of the first steps, one after the other; the targets are the labels, already shifted."""

    def __init__(self, batches: Batches, row: Row, steps: int) -> None:
        self._batches, self._row, self._steps = batches, row, steps

    def __len__(self) -> int:
        return self._steps * self._row.batch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step, place = divmod(index, self._row.batch)
        inputs, targets = (torch.from_numpy(part[place].astype("int64")) for part in self._batches[step])
        return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


class Timed(TrainerCallback):
    """Tells the recorder of each step that the Trainer has done."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.loss: Any = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self.recorder.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.recorder.step_done(self.loss)


class LossKeepingTrainer(Trainer):
    """The Trainer, with each step's loss handed to the callback, unread; with `check`, also the gradient's norm."""

    timed: Timed
    check: bool
    grad_norm: float

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        self.timed.loss = super().training_step(model, inputs, num_items_in_batch)
        if self.check:
            self.grad_norm = grad_norm(model)
        return self.timed.loss


def run_trainer(model: nn.Module, flags: argparse.Namespace) -> None:
    """Train with the Trainer's defaults."""
    row: Row = flags.row
    recorder = Recorder(flags.warmup, flags.steps, lambda: synchronize(row))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=1 if flags.check else recorder.total,
            per_device_train_batch_size=row.batch,
            learning_rate=row.learning_rate,
            adam_beta1=row.beta1,
            adam_beta2=row.beta2,
            weight_decay=row.weight_decay,
            max_grad_norm=row.clip_norm,
            lr_scheduler_type="constant",
            bf16=row.dtype == "bfloat16",
            use_cpu=row.device == "cpu",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
        )
        rows = Rows(Batches(flags.tokens, row), row, recorder.total)
        timed = Timed(recorder)
        trainer = LossKeepingTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[timed])
        trainer.timed, trainer.check = timed, flags.check
        trainer.train()
    if flags.check:
        print_check(count_trained(model), timed.loss.item(), trainer.grad_norm)
    else:
        print_torch_result(recorder, model, flags)


def run_plain(model: nn.Module, flags: argparse.Namespace) -> None:
    """Train in the plain loop, with fused AdamW."""
    row: Row = flags.row
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": row.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=row.learning_rate, betas=(row.beta1, row.beta2), fused=True)

    def loss_of(called: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return called(input_ids=inputs, labels=targets, shift_labels=targets).loss

    train(model, optimizer, loss_of, flags.mode, flags)


def loop_flags(description: str | None) -> argparse.ArgumentParser:
    parser = contender_flags(description)
    parser.add_argument("--loop", choices=("plain", "trainer"), default="plain")
    parser.add_argument("--mode", choices=MODES, default="eager", help="of the plain loop")
    return parser


def run_loop(model: nn.Module, flags: argparse.Namespace) -> None:
    """Train in the loop that the flags name."""
    model = model.to(torch_device(flags.row))
    if flags.loop == "trainer":
        run_trainer(model, flags)
    else:
        run_plain(model, flags)


def main() -> None:
    flags = loop_flags(__doc__).parse_args()
    torch.set_num_threads(flags.threads)
    run_loop(make_gpt2(flags.row, load_file(flags.weights)), flags)


if __name__ == "__main__":
    main()
