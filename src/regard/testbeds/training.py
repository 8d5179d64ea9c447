"""`train`: one loop for small models, on one device or several, that loses nothing when it is killed.

`regard.losses.fit` does the work (whole-file checkpoints, resumption to the same bits, a stop at the first loss that is no number, a
progress bar); here is what models trained from nothing need beside it: mixed precision, compilation, data parallelism, a log, evaluation.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import bad_type, bad_value, require, require_int, require_name
from .._files import require_writable, write_whole
from ..losses.masked_lm import weighted_lm_loss
from ..losses.runner import Fitted, Schedule, TrainingStopped, fit
from .tasks import IGNORE

__all__ = ["Fitted", "TrainingStopped", "masked_token_loss", "token_loss", "train", "vector_loss"]

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
Loss = Callable[[nn.Module, Any], Tensor]


def token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of logits `model(ids)` (B, N, V) at the labels (B, N) that are not -100, and 0.01 of the mixers' own losses."""
    ids, labels = batch
    made = model(ids, return_aux=True)
    logits, aux = made if isinstance(made, tuple) else (made, 0.0)
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE) + 0.01 * aux


def masked_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """`weighted_lm_loss` of logits `model(ids)` (B, N, V) on a batch of `regard.losses.MaskedCollator`."""
    return weighted_lm_loss(model(batch["input_ids"]), batch["labels"], batch["weights"])


def vector_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean square of `model(inputs)` (B, N, C) at the last place against targets (B, C)."""
    inputs, targets = batch
    return (model(inputs)[:, -1].float() - targets).square().mean()


def train(
    model: nn.Module,
    batches: Callable[[int], Any],
    *,
    steps: int,
    loss: Loss = token_loss,
    lr: float = 1e-3,
    schedule: Schedule = "cosine",
    warmup: int | None = None,
    weight_decay: float = 0.01,
    clip: float | None = 1.0,
    accumulate: int = 1,
    dtype: str = "float32",
    compile: bool | str = False,
    parallel: str = "ddp",
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    out: str | Path | None = None,
    log: str | Path | None = None,
    save_every: int = 100,
    resume: bool = True,
    seed: int = 0,
    progress: bool = True,
    label: str = "train",
) -> Fitted:
    """Train `model` on `batches`.

    Started by `torchrun`, it trains data-parallel (gloo on CPUs, nccl on GPUs, the model on GPU LOCAL_RANK): process r of R takes
    batches r, R + r, ...; losses are means over all; the first process alone writes files.

    Args:
        model: on its device; batches are brought there. batches: number -> batch (tensors in tuples, lists or mappings), the same batch
            for the same number; see `regard.testbeds.tasks.batches` and `ByteText.batches`.
        loss: (model, batch) -> scalar. Calls the model as it is given it (compiled, wrapped), once.
        steps, lr, schedule, weight_decay, clip, optimizer, save_every, resume, progress, label: as `regard.losses.fit`. warmup: steps,
            default a tenth. accumulate: batches a step, gradients averaged.
        dtype: "float32", or "bfloat16": the forward pass under autocast; weights, gradients and optimizer stay float32.
        compile: True, or the name of a backend of `torch.compile`.
        parallel: with several processes, "ddp": each holds the whole model; "fsdp": parameters, gradients and optimizer state are
            sharded over them (FSDP2, `fully_shard`: every module in a ModuleList of its own, and the rest), files hold them whole, and
            the model's parameters stay sharded (DTensors) afterwards.
        evaluate: model (in eval mode, no gradients) -> figures for the log; every `eval_every` steps (default: at the end only).
        out: file for the weights; `<out>.state` beside it is what a killed run goes on from.
        log: file that grows by a step at a time: ".jsonl", an object a step; ".csv", rows of step, name, value. A resumed run cuts off
            the steps that it will do again.
        seed: of the random numbers inside the model (dropout); every batch has its own, so that they do not depend on kills.

    Returns:
        `regard.losses.Fitted`; its losses are those of the whole training, kills or not.

    Raises:
        TrainingStopped: a loss or gradient is no number: the message says at which step and what is kept; the model holds the weights
            from before it. ValueError, TypeError: arguments. OSError: files.
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", model, "a torch.nn.Module")
    if not callable(batches):
        raise bad_type("batches", batches, "a function number -> batch")
    require_int("steps", steps, 1)
    require_int("accumulate", accumulate, 1)
    require_int("seed", seed, 0)
    require_name("dtype", dtype, DTYPES)
    require_name("parallel", parallel, ("ddp", "fsdp"))
    if eval_every is not None:
        require_int("eval_every", eval_every, 1)
        require(evaluate is not None, "eval_every", eval_every, "`evaluate` beside it")
    warmup = max(1, steps // 10) if warmup is None else require_int("warmup", warmup, 0)
    made: list[torch.optim.Optimizer] = []

    def new_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if optimizer is not None:
            made.append(optimizer(parameters))
        else:
            made.append(torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay))
        return made[0]

    with _processes(model) as (rank, world):
        run: Any = model
        sharded = world > 1 and parallel == "fsdp"
        if sharded:
            _shard(model, world)
        elif world > 1:
            device = next(model.parameters()).device
            run = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        wrapped = run
        if compile:
            options: dict[str, Any] = {"backend": compile} if isinstance(compile, str) else {}
            run = torch.compile(run, **options)
        device = next(model.parameters()).device
        half = DTYPES[dtype]

        def loss_of_batch(number: int) -> Tensor:
            torch.manual_seed((seed * 1_000_003 + number * world + rank) % 2**63)
            batch = _to(batches(number * world + rank), device)
            waiting = world > 1 and (number + 1) % accumulate != 0
            if sharded:
                wrapped.set_requires_gradient_sync(not waiting)  # type: ignore[operator]
            with wrapped.no_sync() if waiting and not sharded else nullcontext():  # type: ignore[operator]
                with torch.autocast(device.type, dtype=half) if half is not None else nullcontext():
                    value = loss(run, batch)
                if not isinstance(value, Tensor) or value.numel() != 1:
                    raise bad_value("loss", getattr(value, "shape", value), "a scalar tensor")
                mean = value.detach().float().reshape(())
                if world > 1:
                    dist.all_reduce(mean)
                    mean /= world
                if torch.isfinite(mean):  # else all processes stop here, none waits for another's gradient
                    value.backward()
            return mean

        first, began = rank == 0, time.perf_counter()
        written = _Log(log, resume) if log is not None and first else None

        def on_step(step: int, value: float) -> None:
            row = {"loss": value, "lr": made[0].param_groups[0]["lr"], "seconds": time.perf_counter() - began}
            due = step + 1 == steps or (eval_every is not None and (step + 1) % eval_every == 0)
            if evaluate is not None and due and (first or sharded):  # a sharded model runs on all processes or on none
                model.eval()
                with torch.no_grad(), torch.random.fork_rng():
                    row.update({name: float(found) for name, found in evaluate(model).items()})
                model.train()
            if written is not None:
                written.add(step, row)

        fitted = fit(
            model, loss_of_batch, lambda number: number, steps=steps, lr=lr, schedule=schedule, warmup=warmup, weight_decay=weight_decay,
            clip=clip, accumulate=accumulate, optimizer=new_optimizer, on_step=on_step, writes=first, out=out, save_every=save_every,
            resume=resume, seed=seed, progress=progress and first, label=label, started=None if written is None else written.start,
        )  # fmt: skip
        run = wrapped = model  # lets go of the reducer, whose threads must not outlive the process group
        if world > 1:
            gc.collect()
            dist.barrier()  # nobody leaves while another still waits for an answer
        return fitted


@contextmanager
def _processes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """(rank, processes) of a training started by torchrun, or (0, 1). The process group is ended where it was begun here."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or not dist.is_available():
        yield 0, 1
        return
    ours = not dist.is_initialized()
    if ours:
        gpu = torch.cuda.is_available() and next(model.parameters()).is_cuda
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            model.to(torch.device("cuda", torch.cuda.current_device()))
        dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        if ours:
            dist.destroy_process_group()


def _shard(model: nn.Module, world: int) -> None:
    """FSDP2: one unit for each module of a ModuleList, gathered when its forward comes, and one for what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (world,))
    for parts in reversed(
        [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    ):  # the inner first
        for part in parts:
            if any(p.requires_grad for p in part.parameters()) and type(part).forward is not nn.Module.forward:
                fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to(value, device) for value in batch)
    return batch


class _Log:
    """Rows of a training on disk, each written when it is known."""

    def __init__(self, path: str | Path, resume: bool) -> None:
        self.path, self.resume = require_writable(path), resume
        require(self.path.suffix in (".csv", ".jsonl"), "log", str(path), "a name ending in .csv or .jsonl")

    def start(self, done: int) -> None:
        """Keep the rows of the first `done` steps, drop the rest."""
        old = self.path.read_text(encoding="utf-8").splitlines() if self.resume and done and self.path.is_file() else []
        kept = [line for line in old if self._step_of(line) < done]
        header = ["step,name,value"] if self.path.suffix == ".csv" else []
        write_whole(self.path, "".join(line + "\n" for line in header + kept))

    def _step_of(self, line: str) -> float:
        try:
            return int(line.split(",")[0]) if self.path.suffix == ".csv" else json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            return math.inf  # the header, or half a line that a kill has left

    def add(self, step: int, row: Mapping[str, float]) -> None:
        if self.path.suffix == ".csv":
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows((step, name, f"{value:.8g}") for name, value in row.items())
            line = text.getvalue()
        else:
            line = json.dumps({"step": step, **row}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
