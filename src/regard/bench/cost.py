"""The cost model: FLOPs, bytes moved, bytes held and predicted seconds for any method, model and device.

    cost = decode_cost(MODELS["qwen3-8b"], regard.GroupedTopK(budget=2048), context=32768)
    cost.flops, cost.kv_bytes, cost.held_bytes, cost.seconds(DEVICES["h100"])

A `ModelShape` says how large a model is, a `Reach` what a query reads and what the cache keeps (`cost_methods.reaches` knows it for every
method of `regard.methods`), a `Device` how fast a machine is; `Device.measure()` measures this one. `regard bench cost` puts
predictions beside measurements. Costs count what has to be done; a time from them is what a machine needs that does nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .._checks import bad_value, require, require_int
from .cost_methods import Reach, reaches
from .timing import interleaved

__all__ = [
    "DEVICES",
    "MODELS",
    "Cost",
    "Device",
    "ModelShape",
    "Reach",
    "attention_prefill_cost",
    "decode_cost",
    "prefill_cost",
    "reaches",
]


@dataclass(frozen=True)
class ModelShape:
    """What of a language model decides its cost.

    Attributes:
        num_layers: attention layers. num_heads, num_kv_heads, head_dim: of one layer.
        params: parameters that every token is multiplied with (of mixtures of experts, the active ones).
        name: for tables.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    params: float
    name: str = "model"

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_heads", "num_kv_heads", "head_dim"):
            require_int(field, getattr(self, field), 1)
        need = f"a divisor of num_heads = {self.num_heads}"
        require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", self.num_kv_heads, need)
        require(self.params >= 0, "params", self.params, "a number >= 0")

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token adds to the dense cache, over all layers, in half precision."""
        return 2 * 2 * self.num_kv_heads * self.head_dim * self.num_layers

    @classmethod
    def from_config(cls, config: Any, params: float | None = None, name: str | None = None) -> ModelShape:
        """From a transformers configuration. `params`: counted from its sizes (gated MLP, output layer) when not given."""
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        sizes: dict[str, Any] = {}
        for field, names in _CONFIG_NAMES.items():
            found = next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)
            if found is None and field != "num_kv_heads":
                raise bad_value("config", type(config).__name__, f"a configuration with {' or '.join(names)}")
            sizes[field] = found
        heads = sizes["num_heads"]
        kv_heads = sizes["num_kv_heads"] or heads
        head_dim = getattr(config, "head_dim", None) or sizes["hidden"] // heads
        params = _matmul_params(config, sizes, kv_heads, head_dim) if params is None else params
        name = name or getattr(config, "_name_or_path", "") or getattr(config, "model_type", "model")
        return cls(sizes["num_layers"], heads, kv_heads, head_dim, float(params), str(name))

    @classmethod
    def from_model(cls, model: torch.nn.Module, name: str | None = None) -> ModelShape:
        """From a model: its configuration, and the weights of its linear layers as they are."""
        linear = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)}
        return cls.from_config(model.config, float(sum(linear.values())), name)


_CONFIG_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads",),
    "hidden": ("hidden_size", "n_embd", "d_model"),
}


def _matmul_params(config: Any, sizes: dict[str, Any], kv_heads: int, head_dim: int) -> float:
    hidden, heads = sizes["hidden"], sizes["num_heads"]
    projections = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        width = (getattr(config, "moe_intermediate_size", None) or width) * experts
    return sizes["num_layers"] * (projections + 3 * hidden * width) + hidden * getattr(config, "vocab_size", 0)


MODELS = {
    "smollm2-135m": ModelShape(30, 9, 3, 64, 134.5e6, "smollm2-135m"),
    "llama-3-8b": ModelShape(32, 32, 8, 128, 8.03e9, "llama-3-8b"),
    "llama-3-70b": ModelShape(80, 64, 8, 128, 70.6e9, "llama-3-70b"),
    "qwen3-0.6b": ModelShape(28, 16, 8, 128, 0.752e9, "qwen3-0.6b"),
    "qwen3-1.7b": ModelShape(28, 16, 8, 128, 2.03e9, "qwen3-1.7b"),
    "qwen3-4b": ModelShape(36, 32, 8, 128, 4.02e9, "qwen3-4b"),
    "qwen3-8b": ModelShape(36, 32, 8, 128, 8.19e9, "qwen3-8b"),
    "qwen3-14b": ModelShape(40, 40, 8, 128, 14.77e9, "qwen3-14b"),
    "qwen3-32b": ModelShape(64, 64, 8, 128, 32.76e9, "qwen3-32b"),
}
"""Shapes by name; the Qwen3 sizes are those of the Kinetics authors (parameters with both embedding tables)."""


@dataclass(frozen=True)
class Device:
    """How fast a machine is.

    Attributes:
        flops: matrix products, FLOP/s (two for a multiplication and an addition). bandwidth: memory, bytes/s.
        capacity: memory, bytes. link: to devices in other machines, bytes/s each way; near_link: to those of the same machine, which
            has `near` of them. exp_rate: exponentials a second
            (softmax; infinite: not a limit). overhead: seconds that any call of an op costs.
    """

    name: str
    flops: float
    bandwidth: float
    capacity: float = float("inf")
    link: float = float("inf")
    near_link: float = float("inf")
    near: int = 1
    exp_rate: float = float("inf")
    overhead: float = 0.0

    @property
    def intensity(self) -> float:
        """FLOPs in the time of moving one byte."""
        return self.flops / self.bandwidth

    def together(self, count: int) -> Device:
        """`count` devices that share every layer evenly (tensor parallelism) as one, what they say to each other left out."""
        require_int("count", count, 1)
        if count == 1:
            return self
        grown = {
            field: getattr(self, field) * count for field in ("flops", "bandwidth", "capacity", "link", "exp_rate")
        }
        return replace(self, name=f"{count} {self.name}", near=max(1, self.near // count), **grown)

    @classmethod
    def measure(cls, device: str = "cpu", dtype: torch.dtype = torch.float32, rounds: int = 5) -> Device:
        """Measure this machine in about a second: matrix products, a pass over memory, exponentials, an empty call.

        Each figure is the best of `rounds`. The link is not measured. Memory is read by matrix-vector products, as decoding does.
        """
        require_int("rounds", rounds, 1)
        on_gpu = device.startswith("cuda")
        n, rows = (8192, 65536) if on_gpu else (768, 16384)
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        stream, vector = torch.randn(rows, 1024, device=device).to(dtype), torch.randn(1024, device=device).to(dtype)
        scores = torch.rand(
            1 << (26 if on_gpu else 18), device=device
        )  # on a CPU within its caches, as in a tiled kernel
        weights = torch.empty_like(scores)
        tiny = torch.ones(1, device=device)
        runs: dict[str, Callable[[], Any]] = {
            "flops": lambda: a @ b,
            "bandwidth": lambda: stream @ vector,
            "exp_rate": lambda: torch.exp(scores, out=weights),
            "overhead": lambda: tiny + tiny,
        }
        with torch.no_grad():
            best = {key: min(times) for key, times in interleaved(runs, rounds, device=device, calls=100).items()}
        return cls(
            torch.cuda.get_device_name(device) if on_gpu else "this machine",
            2.0 * n**3 / best["flops"],
            stream.numel() * stream.element_size() / best["bandwidth"],
            _memory(device),
            exp_rate=scores.numel() / best["exp_rate"],
            overhead=best["overhead"],
        )


def _memory(device: str) -> float:
    if device.startswith("cuda"):
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


DEVICES = {
    "a100": Device("a100", 312e12, 2.04e12, 80e9, 25e9, 300e9, 8),
    "h100": Device("h100", 989e12, 3.35e12, 80e9, 50e9, 450e9, 8, 3.9e12),
    "h200": Device("h200", 989e12, 4.8e12, 141e9, 50e9, 450e9, 8, 3.9e12),
    "b200": Device("b200", 4.5e15, 8e12, 180e9, 50e9, 900e9, 8),
}
"""Data-sheet peaks: half-precision dense products (`b200`: 8-bit ones, which make the 562.5 FLOPs a byte of Kinetics), 200 or 400 Gbit/s
between machines for each device, NVLink one way within a machine of 8."""


@dataclass(frozen=True)
class Cost:
    """What has to be done. Additive, except `held_bytes`, of which the larger counts.

    Attributes:
        linear_flops: products with weights. attention_flops: q k^T and weights times v. search_flops: scoring summaries.
        exponentials: of the softmax. weight_bytes, kv_bytes, search_bytes, other_bytes: moved. held_bytes: the KV cache after it.
    """

    linear_flops: float = 0.0
    attention_flops: float = 0.0
    search_flops: float = 0.0
    exponentials: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    search_bytes: float = 0.0
    other_bytes: float = 0.0
    held_bytes: float = 0.0
    calls: float = 0.0

    @property
    def flops(self) -> float:
        return self.linear_flops + self.attention_flops + self.search_flops

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + self.search_bytes + self.other_bytes

    def __add__(self, other: Cost) -> Cost:
        fields = {name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__}
        return Cost(**fields | {"held_bytes": max(self.held_bytes, other.held_bytes)})

    def times(self, factor: float) -> Cost:
        fields = {name: getattr(self, name) * factor for name in self.__dataclass_fields__}
        return Cost(**fields | {"held_bytes": self.held_bytes})

    def seconds(self, device: Device) -> float:
        """The roofline: linear layers, attention and search one after another, each as long as its compute or its traffic takes."""
        linear = max(self.linear_flops / device.flops, self.weight_bytes / device.bandwidth)
        work = self.attention_flops / device.flops + self.exponentials / device.exp_rate
        attention = max(work, (self.kv_bytes + self.other_bytes) / device.bandwidth)
        search = max(self.search_flops / device.flops, self.search_bytes / device.bandwidth)
        return linear + attention + search + self.calls * device.overhead

    def eflops(self, intensity: float) -> float:
        """FLOPs, and bytes as the FLOPs that could have been done meanwhile (Kinetics)."""
        return self.flops + self.bytes * intensity

    def fits(self, device: Device, shape: ModelShape, element_bytes: int = 2) -> bool:
        """Whether weights and cache fit into the device's memory."""
        return shape.params * element_bytes + self.held_bytes <= device.capacity


TILE = 128
"""Query rows that share one pass over keys and values in a tiled prefill."""


def attention_prefill_cost(
    shape: ModelShape, reach: Reach, context: int, *, batch: int = 1, element_bytes: int = 2, causal: bool = True
) -> Cost:
    """The attention of one layer over a whole prompt, every head reaching as `reach` says; no linear layers."""
    require_int("context", context, 1)
    seen = np.arange(1, context + 1, dtype=np.float64) if causal else np.full(context, float(context))
    pairs = float(reach.read(seen).sum()) * batch
    moved = float(reach.bytes_of(seen).sum()) * batch
    scored = float(reach.scored(seen).sum()) / reach.search_rows * batch
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    passes = moved / min(TILE, context)
    return Cost(
        attention_flops=4.0 * pairs * heads * dim,
        search_flops=2.0 * scored * heads * dim,
        exponentials=pairs * heads,
        kv_bytes=2.0 * passes * kv_heads * dim * element_bytes,
        search_bytes=scored / min(TILE, context) * kv_heads * dim * element_bytes,
        other_bytes=2.0 * batch * context * (heads + kv_heads) * dim * element_bytes,
        held_bytes=float(reach.kept(seen[-1:])[0]) * batch * 2 * kv_heads * dim * element_bytes,
        calls=1,
    )


def prefill_cost(
    shape: ModelShape, method: Any = None, context: int = 4096, *, batch: int = 1, element_bytes: int = 2
) -> Cost:
    """Reading a prompt of `context` tokens with `method` (a `regard.Method`; None: dense) attached.

    Args:
        batch: prompts of that length. element_bytes: of weights and cache.
    """
    require_int("batch", batch, 1)
    total = Cost(
        linear_flops=2.0 * shape.params * context * batch,
        weight_bytes=shape.params * element_bytes,
        calls=7.0 * shape.num_layers,
    )
    held = 0.0
    for share, reach in reaches(method, shape, context, "prefill"):
        part = attention_prefill_cost(shape, reach, context, batch=batch, element_bytes=element_bytes)
        total = total + part.times(share * shape.num_layers)
        held += part.held_bytes * share * shape.num_layers
    return replace(total, held_bytes=held)


def decode_cost(
    shape: ModelShape,
    method: Any = None,
    context: int = 4096,
    *,
    tokens: int = 1,
    batch: int = 1,
    element_bytes: int = 2,
) -> Cost:
    """Generating `tokens` tokens after `context` ones for each of `batch` sequences, with `method` attached.

    Every step reads the weights once for the whole batch, and each sequence's own keys and values.
    """
    for name, value in (("context", context), ("tokens", tokens), ("batch", batch)):
        require_int(name, value, 0 if name == "context" else 1)
    seen = np.arange(context + 1, context + tokens + 1, dtype=np.float64)
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    total = Cost(
        linear_flops=2.0 * shape.params * tokens * batch,
        weight_bytes=shape.params * element_bytes * tokens,
        calls=8.0 * shape.num_layers * tokens,
    )
    held = 0.0
    for share, reach in reaches(method, shape, context + tokens, "decode"):
        layers = share * shape.num_layers * batch
        read, scored = float(reach.read(seen).sum()) * layers, float(reach.scored(seen).sum()) * layers
        moved = float(reach.bytes_of(seen).sum()) * layers
        total = total + Cost(
            attention_flops=4.0 * read * heads * dim,
            search_flops=2.0 * scored * (kv_heads if reach.grouped_search else heads) * dim,
            exponentials=read * heads,
            kv_bytes=2.0 * moved * kv_heads * dim * element_bytes,
            search_bytes=scored * kv_heads * dim * element_bytes,
        )
        held += float(reach.kept(seen[-1:])[0]) * layers * 2 * kv_heads * dim * element_bytes
    return replace(total, held_bytes=held)
