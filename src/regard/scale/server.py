"""An attention server: a process that does attention tasks for whoever has its key, and keeps nothing.

    REGARD_SERVER_KEY=... python -m regard.scale.server --count 2        # ports on standard output, as JSON

It listens on loopback only, unless told another host.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading

import torch
from torch import Tensor

from .execute import attend
from .wire import WireError, greet, receive, send


def do(kind: str, tensors: list[Tensor], scale: float | None) -> list[Tensor]:
    """One request: "forward" q, k, v -> out; "backward" q, k, v, grad of out -> grads of q, k, v (the forward is done again)."""
    if kind == "forward":
        q, k, v = tensors
        with torch.no_grad():
            return [attend(q, k, v, scale)]
    if kind == "backward":
        q, k, v, grad = tensors
        q, k, v = (leaf.detach().requires_grad_() for leaf in (q, k, v))
        with torch.enable_grad():
            return list(torch.autograd.grad(attend(q, k, v, scale), (q, k, v), grad))
    raise ValueError(f"kind: got {kind!r}, need 'forward' or 'backward'")


def serve(listener: socket.socket, key: bytes) -> None:
    """Serve one client after the other until the parent process is gone. A task that fails is answered with its error."""
    parent = os.getppid()
    small = torch.zeros(1, 1, 2, 8)
    do("backward", [small] * 4, None)  # whatever is loaded on first use is loaded before anyone waits for an answer
    listener.settimeout(1.0)
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        with connection, contextlib.suppress(WireError, OSError):
            connection.settimeout(10.0)
            greet(connection, key)
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            requests: queue.SimpleQueue = queue.SimpleQueue()
            reader = threading.Thread(target=_read, args=(connection, requests), daemon=True)
            reader.start()
            while (request := requests.get()) is not None:
                header, tensors = request
                try:
                    answer = do(header.get("kind", ""), tensors, header.get("scale"))
                except (ValueError, TypeError, RuntimeError) as error:
                    send(connection, {"id": header.get("id"), "error": f"{type(error).__name__}: {error}"})
                else:
                    send(connection, {"id": header.get("id")}, answer)


def _read(connection: socket.socket, requests: queue.SimpleQueue) -> None:
    """Take in requests while others are computed: the next one travels meanwhile, and a client that is still sending is never left waiting
    for this side to finish an answer that it does not yet read."""
    with contextlib.suppress(WireError, OSError):
        while True:
            requests.put(receive(connection))
    requests.put(None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention servers of regard.scale.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: loopback only")
    parser.add_argument("--port", type=int, default=0, help="first port; default: free ones")
    parser.add_argument("--count", type=int, default=1, help="processes, each with a port of its own")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    options = parser.parse_args()
    key = os.environ.pop("REGARD_SERVER_KEY", "").encode()
    if len(key) < 16:
        sys.exit("error: REGARD_SERVER_KEY: need a key of at least 16 characters in the environment")
    if not hasattr(os, "fork"):
        sys.exit("error: attention servers need a system that can fork processes")
    torch.set_num_threads(options.threads)
    listeners, children = [], []
    for number in range(options.count):
        listener = socket.create_server((options.host, options.port + number if options.port else 0))
        listeners.append(listener)
    for listener in listeners:  # torch is imported once, and forked before it has started any thread
        child = os.fork()
        if child == 0:
            for other in listeners:
                if other is not listener:
                    other.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.stdin.close()
            try:
                serve(listener, key)
            finally:
                os._exit(0)
        children.append(child)
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    print(json.dumps({"ports": ports, "pids": children}), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.read()  # until whoever started this closes it, or is gone
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
