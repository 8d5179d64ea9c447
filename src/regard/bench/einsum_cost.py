"""What a cascade of Einsums costs on a spatial accelerator: operations, traffic to DRAM and latency, after FuseMax.

FuseMax (Nayak et al., 2024, arXiv 2406.10491). Code read for numbers: FPSG-UIUC/micro24-fusemax-artifact at f543beb (MIT),
`workspace/src/accel/*.py` and its pregenerated results. Latency, traffic and utilization of its three FuseMax variants ("fusemax",
"fusemax, not pipelined", "cascade on flat") come out here as they do there; so do those of the unfused baseline and the latency of FLAT
up to 64k tokens. Beyond, and for the traffic of FLAT, theirs depend on a search of mappings and ours are plain formulas.
A device for GPUs and CPUs is `bench.cost.Device`; this one has two arrays of processing elements and one buffer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .._checks import bad_value, require, require_int, require_name
from ..ops.cascades import CASCADES
from ..ops.einsum_cascade import Cascade, count_passes

__all__ = ["SCHEDULES", "AttentionShape", "EinsumCost", "SpatialArray", "einsum_cost", "operation_counts"]


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of attention: P queries by M keys of E and F dims, for each of `batch` x `heads`."""

    p: int
    m: int
    e: int = 64
    f: int = 64
    batch: int = 1
    heads: int = 1

    def __post_init__(self) -> None:
        for name in ("p", "m", "e", "f", "batch", "heads"):
            require_int(name, getattr(self, name), 1)

    @property
    def copies(self) -> int:
        return self.batch * self.heads

    def bytes_of(self, element: int) -> dict[str, int]:
        """Sizes of the tensors at the two ends, and of the matrix between them."""
        sizes = {
            "Q": self.p * self.e,
            "K": self.m * self.e,
            "V": self.m * self.f,
            "AV": self.p * self.f,
            "QK": self.p * self.m,
        }
        return {name: size * self.copies * element for name, size in sizes.items()}


@dataclass(frozen=True)
class SpatialArray:
    """An accelerator: `side` x `side` processing elements, a row of `side` more, one buffer, DRAM. Defaults: FuseMax's cloud setting.

    Attributes:
        frequency: 1/s. bandwidth: of DRAM, bytes/s. buffer: bytes. element: bytes a number. exp_macs: what an exponential costs where
        there is no unit for it (a Taylor series).
    """

    side: int = 256
    frequency: float = 940e6
    bandwidth: float = 400 * 2.0**30
    buffer: int = 16 * 2**20
    element: int = 2
    exp_macs: int = 6

    def __post_init__(self) -> None:
        for name in ("side", "buffer", "element", "exp_macs"):
            require_int(name, getattr(self, name), 1)
        require(self.frequency > 0, "frequency", self.frequency, "a number > 0")
        require(self.bandwidth > 0, "bandwidth", self.bandwidth, "a number > 0")


@dataclass(frozen=True)
class EinsumCost:
    """What a cascade costs under a schedule.

    Attributes:
        operations: by Einsum, by kind. traffic: bytes to and from DRAM, by tensor. seconds: of each Einsum alone on its array. compute,
        memory: seconds. latency: the larger of them (unfused: phase by phase). array, row: share of the latency that the two arrays work.
    """

    cascade: str
    schedule: str
    passes: int
    operations: dict[str, Counter[str]]
    traffic: dict[str, float]
    seconds: dict[str, float]
    compute: float
    memory: float
    latency: float
    array: float
    row: float

    @property
    def bytes_moved(self) -> float:
        return sum(self.traffic.values())


_ON_ARRAY = {
    "fusemax": ("QK", "LM", "SLN", "SLD", "SLNV"),
    "fusemax, not pipelined": ("QK", "LM", "SLN", "SLD", "SLNV"),
    "cascade on flat": ("QK", "SLNV"),
    "flat": ("QK", "AV"),
    "unfused": ("QK", "AV"),
}
_CASCADE_OF = {
    "fusemax": "1-pass",
    "fusemax, not pipelined": "1-pass",
    "cascade on flat": "1-pass",
    "flat": "3-pass",
    "unfused": "3-pass",
}
SCHEDULES = tuple(_ON_ARRAY)
"""Names for `schedule=`."""


def operation_counts(cascade: Cascade, shape: AttentionShape, tile: int, rank: str = "m") -> dict[str, Counter[str]]:
    """Operations of each Einsum, by kind, for keys in tiles of `tile`; the last one may be short. Equal to what `run_cascade` counts."""
    outer, inner = cascade.family(rank)[0], cascade.family(rank)[-1]
    extents = {"p": shape.p, "e": shape.e, "f": shape.f, rank: shape.m}
    tiles = -(-extents[rank] // require_int("tile", tile, 1))
    found: dict[str, Counter[str]] = {}
    for einsum in cascade.einsums:
        volume = shape.copies * math.prod(extents[r] for r in einsum.ranks if r not in (outer, inner))
        if inner in einsum.ranks:
            volume *= extents[rank]
        elif outer in einsum.ranks:
            volume *= tiles
        counts = found.setdefault(einsum.name, Counter())
        for kind, count in einsum.operations.items():
            counts[kind] += count * volume
    return found


def einsum_cost(
    shape: AttentionShape,
    schedule: str = "fusemax",
    hardware: SpatialArray | None = None,
    *,
    cascade: Cascade | None = None,
    exp_unit: bool | None = None,
) -> EinsumCost:
    """Cost of attention by a cascade.

    Args:
        schedule: how Einsums share the accelerator. "fusemax": the 1-pass cascade, its exponentials on the array, epochs overlapped so that
            both arrays stay busy. "fusemax, not pipelined": the same, waiting for the running maximum at every tile. "cascade on flat":
            the 1-pass cascade with only the matrix products on the array. "flat": the 3-pass cascade, fused by blocks of rows,
            softmax on the row of elements. "unfused": its three phases one after the other through DRAM.
        cascade: another with the Einsums that the schedule places; default: the schedule's own.
        exp_unit: whether exponentials take one operation. Default: only where they run on the row of elements (all but "fusemax*").

    Keys come in tiles as wide as the array; lengths are those of one head.
    """
    hardware = hardware or SpatialArray()
    on_array = _ON_ARRAY[require_name("schedule", schedule, SCHEDULES)]
    cascade = cascade or CASCADES[_CASCADE_OF[schedule]]
    names = {einsum.name for einsum in cascade.einsums}
    missing = [name for name in on_array if name not in names]
    if missing:
        raise bad_value("cascade", cascade.name, f"Einsums {', '.join(missing)}, which {schedule!r} places")
    exp_unit = not schedule.startswith("fusemax") if exp_unit is None else exp_unit
    operations = operation_counts(cascade, shape, hardware.side)
    cost = {"exp": 1 if exp_unit else hardware.exp_macs}
    seconds = {}
    for name, counts in operations.items():
        if schedule in ("flat", "unfused"):  # their elements pipeline an Einsum's operations: one point a cycle
            cycles = max(counts.values(), default=0)
        else:
            cycles = sum(cost.get(kind, 1) * count for kind, count in counts.items())
        elements = hardware.side**2 if name in on_array else hardware.side
        seconds[name] = cycles / elements / hardware.frequency
    traffic = _traffic(schedule, cascade, shape, hardware)
    memory = sum(traffic.values()) / hardware.bandwidth
    array = sum(value for name, value in seconds.items() if name in on_array)
    row = sum(value for name, value in seconds.items() if name not in on_array)
    if schedule == "unfused":
        size = shape.bytes_of(hardware.element)
        phases = (
            ((size["Q"] + size["K"] + size["QK"]) / hardware.bandwidth, seconds["QK"]),
            ((traffic["softmax"]) / hardware.bandwidth, row),
            ((size["QK"] + size["V"] + size["AV"]) / hardware.bandwidth, seconds["AV"]),
        )
        compute = array + row
        latency = sum(max(phase) for phase in phases)
    else:
        compute = _overlapped(schedule, seconds, array, row, hardware)
        latency = max(compute, memory)
    passes = count_passes(cascade, "m")
    return EinsumCost(
        cascade.name,
        schedule,
        passes,
        operations,
        traffic,
        seconds,
        compute,
        memory,
        latency,
        array / latency,
        row / latency,
    )


def _overlapped(schedule: str, seconds: Mapping[str, float], array: float, row: float, hardware: SpatialArray) -> float:
    """Time to compute when the two arrays work side by side, epoch by epoch."""
    if not schedule.startswith("fusemax"):
        return max(array, row)
    s = seconds
    first = s["QK"] + s["LM"]
    exponentials = max(s["SLN"] + s["SLD"], s["PRM"] + s["SPD"])
    if schedule == "fusemax":
        return max(first, s["RD"] + s["RNV"] + s["AV"]) + s["RM"] + exponentials + max(s["SLNV"], s["SPNV"])
    stall = s["LM"] * hardware.side  # the array waits until the running maximum has come down its columns
    return max(first, s["RD"] + s["AV"]) + stall + s["RM"] + exponentials + max(s["SLNV"], s["SPNV"] + s["RNV"])


def _traffic(schedule: str, cascade: Cascade, shape: AttentionShape, hardware: SpatialArray) -> dict[str, float]:
    """Bytes to and from DRAM, by tensor."""
    size = shape.bytes_of(hardware.element)
    ends = {"Q": float(size["Q"]), "AV": float(size["AV"])}
    if schedule == "unfused":
        # a row of scores must fit into the buffer for the softmax to read it once; the baseline's buffer is twice as large
        fits = min(1.0, 2 * hardware.buffer / (shape.m * hardware.element))
        again = 1 + (1 - fits) * (count_passes(cascade, "m") - 1)
        softmax = 2 * size["QK"] * again
        return ends | {"K": float(size["K"]), "V": float(size["V"]), "QK": 2.0 * size["QK"], "softmax": float(softmax)}
    side, element = hardware.side, hardware.element
    if schedule == "flat":
        # rows of all M scores wait in the buffer for the next pass; what does not fit goes to DRAM and back between passes
        rows = hardware.buffer // ((shape.e + shape.f + shape.m) * element)
        block = max(1, min(rows, shape.p))
        spilled = max(0.0, 1 - rows / side) if rows < side else 0.0
        block = max(block, min(side, shape.p))
        again = -(-shape.p // block)
        between = 2.0 * size["QK"] * spilled * (count_passes(cascade, "m") - 1)
        return ends | {"K": float(size["K"] * again), "V": float(size["V"] * again), "QK": between}
    more = 2 * side if schedule == "cascade on flat" else 0  # there QK and SLN of a tile pass through the buffer
    keys = side * (shape.e + shape.f) * element
    per_query = (shape.e + shape.f + 2 + more) * element
    blocks = (hardware.buffer - keys) // (per_query * side)
    require(blocks > 0, "hardware", f"buffer of {hardware.buffer} bytes", "room for a tile of keys and one of queries")
    tiles = max(1, shape.p // side)
    blocks = max(factor for factor in range(1, tiles + 1) if tiles % factor == 0 and factor <= blocks)
    again = tiles // blocks  # queries come in whole multiples of blocks that divide their number
    return ends | {"K": float(size["K"] * again), "V": float(size["V"] * again)}
