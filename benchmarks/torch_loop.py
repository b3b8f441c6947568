"""A plain PyTorch training loop, for the contenders that bring a torch module."""

import argparse
import contextlib
import sys
from collections.abc import Callable

import torch
from contender import Recorder, print_check, print_result
from rows import Row
from tokens import Batches
from torch import nn

MODES = {"eager": None, "compile": "default", "max-autotune": "max-autotune"}
LossOf = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def torch_device(row: Row) -> torch.device:
    return torch.device("cuda" if row.device == "gpu" else "cpu")


def synchronize(row: Row) -> None:
    """Wait for the device; on the CPU torch has nothing in flight."""
    if row.device == "gpu":
        torch.cuda.synchronize()


def grad_norm(module: nn.Module) -> float:
    """The global norm of the gradient, summed in float64."""
    grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return sum(torch.linalg.vector_norm(grad, dtype=torch.float64).item() ** 2 for grad in grads) ** 0.5


def count_trained(module: nn.Module) -> int:
    """Number of parameters that are trained, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def print_torch_result(recorder: Recorder, module: nn.Module, flags: argparse.Namespace) -> None:
    """The line of JSON of a contender in torch."""
    print_result(
        flags.row,
        recorder,
        framework="torch",
        parameters=count_trained(module),
        packages=tuple(
            name for name in ("torch", "numpy", "transformers", "accelerate", "peft") if name in sys.modules
        ),
        peak_device_bytes=torch.cuda.max_memory_allocated() if flags.row.device == "gpu" else None,
    )


def train(
    module: nn.Module, optimizer: torch.optim.Optimizer, loss_of: LossOf, mode: str, flags: argparse.Namespace
) -> None:
    """Train for the warm-up and the timed steps, and print the line of JSON; nothing in the loop waits for a number."""
    row: Row = flags.row
    device = torch_device(row)
    low = row.dtype == "bfloat16"
    cast = torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()
    called = torch.compile(module, mode=MODES[mode]) if MODES[mode] else module
    batches = Batches(flags.tokens, row)
    module.train()

    def backward(k: int) -> torch.Tensor:
        inputs, targets = (torch.from_numpy(part.astype("int64")).to(device) for part in batches[k])
        with cast:
            loss = loss_of(called, inputs, targets)
        loss.backward()
        return loss.detach()

    if flags.check:
        loss = backward(0)
        print_check(count_trained(module), loss.item(), grad_norm(module))
        return
    recorder = Recorder(flags.warmup, flags.steps, lambda: synchronize(row))
    recorder.begin()
    for k in range(recorder.total):
        loss = backward(k)
        nn.utils.clip_grad_norm_(module.parameters(), row.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recorder.step_done(loss)
    print_torch_result(recorder, module, flags)
