"""`fit`: train small modules (gates, predictors, per-head scalars) beside a frozen model, so that nothing is lost on the way.

One runner for every method that is learned by distillation or calibration: it streams batches, checkpoints whole files, goes on
where it was killed and comes to the same result, stops at the first loss that is no number, and holds the base model to its bits.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, bad_value, require, require_int, require_name
from .._console import console
from .._files import require_writable
from .checkpoint import Checkpoint, whole

SCHEDULES = ("constant", "linear", "cosine")
Schedule = str | Callable[[int, int], float]


class TrainingStopped(RuntimeError):
    """Training cannot go on: a loss or gradient is no number. `step` is where; the last checkpoint is from before it."""

    def __init__(self, step: int, what: str, kept: str) -> None:
        super().__init__(f"step {step}: {what}; {kept}")
        self.step = step


@dataclass
class Fitted:
    """What `fit` gives back.

    Attributes:
        modules: what was trained, the very objects given. steps: optimizer steps behind them in all.
        losses: mean loss of each step, those before a resumption included. resumed_at: steps that an earlier run had done.
        seconds: of this run. path: the weights, or None.
    """

    modules: Any
    steps: int
    losses: list[float] = field(default_factory=list)
    resumed_at: int = 0
    seconds: float = 0.0
    path: Path | None = None


def fit(
    modules: nn.Module | Mapping[str, nn.Module],
    loss_of_batch: Callable[[Any], Tensor],
    batches: Sequence[Any] | Callable[[int], Any] | Iterable[Any],
    *,
    steps: int | None = None,
    lr: float = 1e-3,
    schedule: Schedule = "constant",
    warmup: int = 0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    accumulate: int = 1,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    after_step: Callable[[], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    started: Callable[[int], None] | None = None,
    writes: bool = True,
    frozen: nn.Module | Sequence[nn.Module] = (),
    out: str | Path | None = None,
    save_every: int = 100,
    resume: bool = True,
    seed: int = 0,
    progress: bool = True,
    label: str = "fit",
    metadata: Mapping[str, str] | None = None,
) -> Fitted:
    """Train `modules` on a stream of batches.

    Args:
        modules: what is trained: a module, or name -> module (names become prefixes in the file). Parameters that do not require a
            gradient stay as they are.
        loss_of_batch: batch -> scalar loss. It may call `backward` itself, part by part (`layer_loss` does, so that the graphs of
            all layers never lie in memory together), and return the loss without a graph.
        batches: a sequence (taken round and round), a function `number -> batch` (from 0), or any other iterable. Of an iterable
            that is read once, a resumed run skips what the first one had read.
        steps: optimizer steps; None: once through `batches`, which then needs a length.
        lr: peak learning rate. schedule: "constant", "linear" or "cosine" (to 0 at the end), or `(step, steps) -> factor`.
        warmup: steps over which the rate rises linearly from 0 (with a schedule by name).
        weight_decay: of AdamW. clip: the gradient's largest norm; None: no clipping.
        accumulate: batches a step; their gradients are averaged.
        optimizer: parameters -> optimizer, in place of AdamW(lr, betas (0.9, 0.95), weight_decay); the schedule scales its rates.
        after_step: called after every optimizer step (to clamp gates, say). on_step: told each step's number and mean loss after that.
        started: told once, before the first step, how many steps an earlier run had done.
        writes: False: read `<out>.state` but write nothing; for all but the first process of a distributed training (whose parameters
            may lie in pieces on all processes, as DTensors: then the files hold them whole).
        frozen: modules that must not change: they are put in eval mode without gradients while this runs, put back afterwards,
            and every parameter and buffer must be bit-identical at the end. What `modules` holds is left out.
        out: file for the weights (safetensors). Beside it `<out>.state` holds all that is needed to go on. None: nothing is kept.
        save_every: steps between checkpoints; each is written whole or not at all.
        resume: go on from `<out>.state` if it is there; False starts again.
        seed: of torch's random numbers in here (the caller's are left as they were).
        metadata: of the file `out`, beside the number of steps.
        progress: a progress bar, where standard error is a terminal. label: what it is called.

    Returns:
        `Fitted`. A run that was killed and started again with the same arguments gives the same bits as one that was not,
        as far as `loss_of_batch` takes its random numbers from torch.

    Raises:
        TrainingStopped: a loss or gradient was not finite; the weights are those before that step.
        OSError: `out` cannot be written (a full disk, say); the checkpoint before stays whole.
        ValueError, TypeError: arguments that do not fit, `<out>.state` made by other arguments or other modules, or a loss
            that no parameter has a part in.
        RuntimeError: `frozen` changed.
    """
    trained = _trained(modules)
    if not callable(loss_of_batch):
        raise bad_type("loss_of_batch", loss_of_batch, "a callable batch -> scalar loss")
    for name, value, least in (("warmup", warmup, 0), ("accumulate", accumulate, 1), ("save_every", save_every, 1)):
        require_int(name, value, least)
    require(lr > 0, "lr", lr, "a number > 0")
    stream = _Stream(batches)
    steps = stream.once(accumulate) if steps is None else require_int("steps", steps, 1)
    factor = _schedule(schedule, warmup, steps)
    parameters = [p for p in chain.from_iterable(m.parameters() for m in trained.values()) if p.requires_grad]
    require(bool(parameters), "modules", "no parameter that requires a gradient", "something to train")
    optim = optimizer(parameters) if optimizer else _adamw(parameters, lr, weight_decay)
    peaks = [group["lr"] for group in optim.param_groups]
    made_by = {
        "steps": steps, "lr": lr, "schedule": schedule if isinstance(schedule, str) else "own", "warmup": warmup,
        "weight_decay": weight_decay, "clip": clip, "accumulate": accumulate, "seed": seed, "optimizer": type(optim).__name__,
    }  # fmt: skip
    checkpoint = (
        None
        if out is None
        else Checkpoint(require_writable(out) if writes else Path(out), trained, optim, made_by, writes)
    )
    result = Fitted(modules, 0, path=None if out is None else Path(out))
    bases = [frozen] if isinstance(frozen, nn.Module) else list(frozen)
    began = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(seed)
        stack.enter_context(_held(bases, trained.values()))
        if checkpoint is not None and resume:
            result.steps, result.losses = checkpoint.load()
            result.resumed_at = result.steps
        if started is not None:
            started(result.steps)
        batch_of = stream.start(result.steps * accumulate)
        bar = stack.enter_context(_bar(progress, label, steps, result.steps))
        for step in range(result.steps, steps):
            for group, peak in zip(optim.param_groups, peaks):
                group["lr"] = peak * factor(step)
            loss = _one_step(loss_of_batch, batch_of, step, accumulate, parameters, clip, result)
            optim.step()
            if after_step is not None:
                after_step()
            result.steps = step + 1
            result.losses.append(loss)
            bar(loss)
            if on_step is not None:
                on_step(step, loss)
            if checkpoint is not None and result.steps % save_every == 0 and result.steps < steps:
                checkpoint.save(result.steps, result.losses)
        optim.zero_grad(set_to_none=True)
        if checkpoint is not None:
            if result.resumed_at < steps:
                checkpoint.save(steps, result.losses)
            checkpoint.save_weights(steps, metadata)
    result.seconds = time.perf_counter() - began
    return result


def _one_step(
    loss_of_batch: Callable[[Any], Tensor],
    batch_of: Callable[[int], Any],
    step: int,
    accumulate: int,
    parameters: list[nn.Parameter],
    clip: float | None,
    result: Fitted,
) -> float:
    """Gradients of one optimizer step; the mean loss. Nothing that is not finite gets past here."""
    kept = (
        "nothing was saved" if result.path is None else f"the last checkpoint in {result.path}.state is from before it"
    )
    for parameter in parameters:
        parameter.grad = None
    total = 0.0
    for part in range(accumulate):
        loss = torch.as_tensor(loss_of_batch(batch_of(step * accumulate + part)))
        require(loss.numel() == 1, "loss_of_batch", f"a result of shape {tuple(loss.shape)}", "a scalar loss")
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingStopped(step, f"the loss is {value}", kept)
        if loss.requires_grad:
            loss.backward()
        total += value
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise ValueError("loss_of_batch: got a loss that no parameter of `modules` has a part in, need one to train by")
    if accumulate > 1:
        torch._foreach_div_(gradients, float(accumulate))
    norm = float(whole(torch.nn.utils.get_total_norm(gradients)))
    if not math.isfinite(norm):
        raise TrainingStopped(step, f"the gradient's norm is {norm} (loss {total / accumulate:.6g})", kept)
    if clip is not None and norm > clip:
        torch._foreach_mul_(gradients, clip / norm)
    return total / accumulate


def _trained(modules: Any) -> dict[str, nn.Module]:
    if isinstance(modules, nn.Module):
        return {"": modules}
    if isinstance(modules, Mapping) and modules and all(isinstance(m, nn.Module) for m in modules.values()):
        return {str(name): module for name, module in modules.items()}
    raise bad_type("modules", modules, "a torch.nn.Module, or a non-empty mapping of names to modules")


def _adamw(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def _schedule(schedule: Schedule, warmup: int, steps: int) -> Callable[[int], float]:
    if not isinstance(schedule, str):
        if not callable(schedule):
            raise bad_type("schedule", schedule, f"one of {', '.join(SCHEDULES)}, or (step, steps) -> factor")
        return lambda step: float(schedule(step, steps))
    require_name("schedule", schedule, SCHEDULES)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[schedule]

    return factor


class _Stream:
    """`batches` in whichever form they come, by number."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.indexed = isinstance(batches, Sequence) or (
            hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
        )
        if not self.indexed and not callable(batches) and not isinstance(batches, Iterable):
            raise bad_type("batches", batches, "a sequence, a function number -> batch, or an iterable")
        if self.indexed:
            require(len(batches) > 0, "batches", "an empty sequence", "at least one batch")

    def once(self, accumulate: int) -> int:
        if not hasattr(self.batches, "__len__"):
            raise bad_value("steps", None, "a number of steps, as `batches` has no length")
        return max(1, len(self.batches) // accumulate)

    def start(self, first: int) -> Callable[[int], Any]:
        if self.indexed:
            return lambda number: self.batches[number % len(self.batches)]
        if callable(self.batches):
            return self.batches
        stream = self._endless()
        for _ in range(first):
            next(stream)
        return lambda number: next(stream)

    def _endless(self) -> Iterator[Any]:
        while True:
            empty = True
            for batch in self.batches:
                empty = False
                yield batch
            if empty:
                raise bad_value("batches", "an iterable at its end", "as many batches as steps (times accumulate)")


@contextmanager
def _held(bases: list[nn.Module], trained: Iterable[nn.Module]) -> Iterator[None]:
    """The base models in eval mode without gradients, `trained` in train mode; put back and compared afterwards."""
    trained = list(trained)
    own = {id(t) for module in trained for t in chain(module.parameters(), module.buffers())}
    modes = [(module, module.training) for base in (*bases, *trained) for module in base.modules()]
    wanted = [p for base in bases for p in base.parameters() if p.requires_grad and id(p) not in own]
    before = [fingerprint(base, own) for base in bases]
    for base in bases:
        base.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    for module in trained:
        module.train()
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
    for base, mark in zip(bases, before):
        changed = [name for name, value in fingerprint(base, own).items() if mark.get(name) != value]
        if changed:
            raise RuntimeError(f"frozen: {type(base).__name__} changed while training, in {', '.join(changed[:4])}")


def fingerprint(module: nn.Module, without: Iterable[int] = ()) -> dict[str, str]:
    """A hash of the bits of every parameter and buffer, by name; `without` holds the `id`s of tensors to leave out."""
    without = set(without)
    marks = {}
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if id(tensor) not in without:
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            marks[name] = hashlib.blake2b(raw.data, digest_size=16).hexdigest() if raw.size else ""
    return marks


@contextmanager
def _bar(progress: bool, label: str, steps: int, done: int) -> Iterator[Callable[[float], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar_console = console(stderr=True)
    if not progress or not bar_console.is_terminal:
        yield lambda loss: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=bar_console) as bar:
        task = bar.add_task(label, total=steps, completed=done, loss="")
        yield lambda loss: bar.update(task, advance=1, loss=f"{loss:.4g}")


def layer_loss(
    model: nn.Module,
    loss_of_call: Callable[[Any], Tensor | None],
    forward: Callable[[Any], Any] | None = None,
    setup: Callable[[Any], None] | None = None,
) -> Callable[[Any], Tensor]:
    """A `loss_of_batch` that runs the frozen `model` densely and takes a loss at each of its attention calls.

    The model runs without a graph; `loss_of_call(call)` runs with one, and its gradients are taken at once, so that only one layer's
    graph is alive at a time.

    Args:
        model: a transformers model (anything `regard.attach` takes).
        loss_of_call: `AttentionCall` -> scalar loss, or None for a layer that has none. q, k and v of the call are what the model
            computed, after the rotary embedding; the call's module and layer number say whose they are.
        setup: called with the `Session` before each batch (to capture what `loss_of_call` wants to read).
        forward: batch -> anything, runs the model on it; None: `model(**batch)` for a mapping, `model(batch)` else, without a cache.
    Returns:
        batch -> the sum of the layers' losses, without a graph: `backward` has been called.
    """
    from ..integrations.transformers import attach

    def loss_of_batch(batch: Any) -> Tensor:
        total: list[Tensor] = []

        def observe(call: Any) -> None:
            with torch.enable_grad():
                loss = loss_of_call(call)
                if loss is not None:
                    loss.backward()
                    total.append(loss.detach())

        with attach(model) as session, torch.no_grad():
            session.observers.append(observe)
            if setup is not None:
                setup(session)
            if forward is not None:
                forward(batch)
            elif isinstance(batch, Mapping):
                model(**{"use_cache": False, **batch})
            else:
                model(batch, use_cache=False)
        return torch.stack([x.float() for x in total]).sum() if total else torch.zeros(())

    return loss_of_batch


__all__: Sequence[str] = ("Fitted", "TrainingStopped", "fingerprint", "fit", "layer_loss")
