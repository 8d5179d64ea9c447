"""What `fit` keeps on disk: the weights under plain names, and beside them all that is needed to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_value
from .._files import write_whole


def whole(tensor: Tensor) -> Tensor:
    """A tensor that lies in pieces on several processes (a DTensor) put together, which all of them must ask for; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` in the pieces that `other` lies in."""
    if not hasattr(other, "full_tensor") or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)  # type: ignore[attr-defined]


class Checkpoint:
    """`<out>`: the modules' state dict (safetensors). `<out>.state`: that, the optimizer's, torch's random state and the losses, in
    one file, so that no two of them can come from different steps.

    Args:
        path: `<out>`. modules: prefix -> module. optimizer: theirs.
        made_by: what the run was asked to do; a state made by something else is refused.
        writes: False: read, but write nothing. sharded: the parameters lie in pieces on several processes; then all of them must call
            `save`, to put the pieces together, and one writes.
    """

    def __init__(
        self,
        path: Path,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        made_by: dict[str, Any],
        writes: bool = True,
    ) -> None:
        self.path, self.modules, self.optimizer, self.made_by, self.writes = path, modules, optimizer, made_by, writes
        self.sharded = any(hasattr(p, "full_tensor") for module in modules.values() for p in module.parameters())
        self.state_path = path.with_name(path.name + ".state")
        self.last: int | None = None

    def weights(self) -> dict[str, Tensor]:
        """The modules' state dict under plain names."""
        return {
            f"{prefix}.{name}" if prefix else name: tensor
            for prefix, module in self.modules.items()
            for name, tensor in module.state_dict().items()
        }

    def save(self, step: int, losses: list[float]) -> None:
        """Write `<out>.state`."""
        if not (self.writes or self.sharded):
            return
        tensors = {f"weights/{name}": tensor for name, tensor in self.weights().items()}
        state = self.optimizer.state_dict()
        numbers: dict[str, dict[str, Any]] = {}
        for index, entry in state["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{index}/{key}"] = value
                else:
                    numbers.setdefault(str(index), {})[key] = value
        tensors["random/cpu"] = torch.get_rng_state()
        for device in range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ():
            tensors[f"random/cuda{device}"] = torch.cuda.get_rng_state(device)
        kept = {
            "step": step,
            "losses": losses,
            "made_by": self.made_by,
            "optimizer": numbers,
            "groups": state["param_groups"],
        }
        self._write(self.state_path, tensors, {"regard": json.dumps(kept)}, step)
        self.last = step

    def save_weights(self, step: int, metadata: Mapping[str, str] | None = None) -> None:
        """Write `<out>`."""
        if not (self.writes or self.sharded):
            return
        self._write(self.path, self.weights(), {"steps": str(step), **(metadata or {})}, step)

    def _write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], step: int) -> None:
        from safetensors.torch import save

        plain = {name: whole(tensor.detach()).cpu().contiguous().clone() for name, tensor in tensors.items()}
        if not self.writes:
            return
        try:
            write_whole(path, save(plain, metadata))
        except OSError as error:
            kept = (
                "there is no earlier one"
                if self.last is None
                else f"the one of step {self.last} is whole: {self.state_path}"
            )
            raise OSError(f"{error}: the checkpoint of step {step} is lost; {kept}") from error

    def load(self) -> tuple[int, list[float]]:
        """Put modules, optimizer and random state back to what `<out>.state` holds; (0, []) when there is none.

        Raises:
            ValueError: it is no such file, was made by another run, or for other modules. Nothing has been changed then.
        """
        if not self.state_path.exists():
            return 0, []
        kept, tensors = self._read()
        theirs = kept["made_by"]
        other = [f"{key} = {theirs.get(key)!r}" for key, value in self.made_by.items() if theirs.get(key) != value]
        if other:
            raise bad_value(
                "out", f"{self.state_path}, of a run with {', '.join(other)}", "another path, or resume=False"
            )
        weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
        ours = self.weights()
        odd = sorted(set(ours) ^ set(weights)) or [n for n in ours if ours[n].shape != weights[n].shape]
        if odd:
            raise bad_value(
                "out", f"{self.state_path}, of other modules ({', '.join(odd[:4])})", "another path, or resume=False"
            )
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(_like(weights[name], tensor))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in kept["optimizer"].items()}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                index, key = rest.split("/")
                state.setdefault(int(index), {})[key] = _like(tensor, parameters[int(index)])
        self.optimizer.load_state_dict({"state": state, "param_groups": kept["groups"]})
        torch.set_rng_state(tensors["random/cpu"])
        for name, tensor in tensors.items():
            if name.startswith("random/cuda") and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensor, int(name.removeprefix("random/cuda")))
        self.last = kept["step"]
        return kept["step"], kept["losses"]

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.state_path), framework="pt") as file:
                kept = json.loads((file.metadata() or {})["regard"])
                return kept, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            need = "a state that `fit` wrote, another path, or resume=False"
            raise bad_value("out", f"{self.state_path} ({type(error).__name__}: {error})", need) from error
