"""What client and attention server say to each other: frames of a JSON header and raw tensors over TCP. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_HEADER = 1 << 16
MAX_TENSOR = 1 << 36
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_NONCE = 32


class WireError(ConnectionError):
    """The other side said something that is no frame, or is gone."""


def send(connection: socket.socket, header: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
    """Send a frame. Tensors travel as they lie in the CPU's memory (little-endian machines on both sides)."""
    plain = [tensor.detach().to("cpu").contiguous() for tensor in tensors]
    shapes = [{"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for t in plain]
    head = json.dumps({**header, "tensors": shapes}).encode()
    connection.sendall(struct.pack("<I", len(head)) + head)
    for tensor in plain:
        if tensor.numel():
            connection.sendall(tensor.reshape(-1).view(torch.uint8).numpy().data)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[Tensor]]:
    """Receive a frame. Raises `WireError` when the other side is gone or what comes is no frame, `TimeoutError` when nothing comes."""
    (size,) = struct.unpack("<I", _exactly(connection, 4))
    if size > MAX_HEADER:
        raise WireError(f"a header of {size} bytes, more than {MAX_HEADER}")
    try:
        header = json.loads(bytes(_exactly(connection, size)))
        described = [(_DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]]) for entry in header["tensors"]]
    except (ValueError, KeyError, TypeError) as error:
        raise WireError(f"a header that is none ({error!r})") from None
    tensors = []
    for dtype, shape in described:
        count = 1
        for n in shape:
            count *= n
        if min(shape, default=1) < 0 or count * dtype.itemsize > MAX_TENSOR:
            raise WireError(f"a tensor of shape {shape}")
        raw = _exactly(connection, count * dtype.itemsize)
        tensors.append(torch.frombuffer(raw, dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype))
    return header, tensors


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        got = connection.recv_into(view[at:], size - at)
        if got == 0:
            raise WireError("the connection was closed")
        at += got
    return data


def greet(connection: socket.socket, key: bytes) -> None:
    """The server's side: whoever cannot sign a fresh number with the key gets a `WireError`, and nothing else."""
    nonce = secrets.token_bytes(_NONCE)
    connection.sendall(nonce)
    answer = bytes(_exactly(connection, 32))
    if not hmac.compare_digest(answer, hmac.new(key, nonce, hashlib.sha256).digest()):
        raise WireError("a client without the key")
    connection.sendall(b"welcome!")


def introduce(connection: socket.socket, key: bytes) -> None:
    """The client's side."""
    nonce = bytes(_exactly(connection, _NONCE))
    connection.sendall(hmac.new(key, nonce, hashlib.sha256).digest())
    if bytes(_exactly(connection, 8)) != b"welcome!":
        raise WireError("no attention server")
