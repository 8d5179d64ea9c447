"""`AttentionServers`: a supervised pool of attention servers. When one dies or stalls, others do its tasks, and the result is the same."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_int
from .execute import task_tensors
from .plan import Plan
from .wire import introduce, receive, send

_START = 60.0  # seconds that a server may take to be ready


class ServersLost(RuntimeError):
    """No attention server is left to do the tasks that remain."""


@dataclass
class _Job:
    """A task on its way: its number, what is sent, and how much work it is."""

    number: int
    kind: str
    tensors: tuple[Tensor, ...]
    pairs: int
    scale: float | None


@dataclass
class _Server:
    number: int
    connection: socket.socket
    pid: int | None
    alive: bool = True
    waiting: list[_Job] = field(default_factory=list)  # not yet sent; the run's lock guards it
    done: int = 0


class AttentionServers:
    """Processes that compute attention tasks, each over its own TCP connection.

    Args:
        count: server processes to start on this machine, on loopback. addresses: (host, port) of servers that run already (`python -m
            regard.scale.server` on other machines) in their place; they need `key`.
        timeout: seconds without an answer from a server that has work, after which it counts as stalled: it is given up (and killed, if
            started here), and others do its tasks. Longer than the longest task.
        ahead: tasks that a server has been sent before it answers the first: 2 lets the next one travel while one is computed
            (ping-pong), 1 does not.
        threads: CPU threads of each started server. key: shared secret of at least 16 characters; a fresh one by default.

    A context manager: leaving it ends the processes. `losses` counts servers given up since the start. Tensors on a GPU are copied to the
    CPU and back. Raises `ServersLost` from a run when no server is left; the pool is then of no further use.
    """

    def __init__(
        self,
        count: int = 2,
        *,
        addresses: Sequence[tuple[str, int]] | None = None,
        timeout: float = 60.0,
        ahead: int = 2,
        threads: int = 1,
        key: str | None = None,
    ) -> None:
        require(timeout > 0, "timeout", timeout, "seconds > 0")
        self.timeout, self.ahead = float(timeout), require_int("ahead", ahead, 1)
        require_int("count", count, 1)
        if key is None:
            require(addresses is None, "key", None, "the key that the servers at `addresses` were started with")
            key = secrets.token_hex(32)
        require(len(key) >= 16, "key", f"{len(key)} characters", "at least 16 characters")
        self._launcher: subprocess.Popen[str] | None = None
        self._busy = threading.Lock()
        self.servers: list[_Server] = []
        self.losses = 0
        pids: list[int | None]
        if addresses is None:
            ports, pids = self._launch(count, require_int("threads", threads, 1), key)
            addresses = [("127.0.0.1", port) for port in ports]
        else:
            require(len(addresses) > 0, "addresses", addresses, "at least one (host, port)")
            pids = [None] * len(addresses)
        self._finalizer = weakref.finalize(self, _end, self._launcher, self.servers)
        try:
            for number, (address, pid) in enumerate(zip(addresses, pids)):
                connection = socket.create_connection((address[0], address[1]), timeout=max(_START, self.timeout))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.servers.append(_Server(number, connection, pid))
                introduce(connection, key.encode())
        except OSError as error:
            self.close()
            raise OSError(f"addresses: no attention server with this key at {address} ({error})") from error

    def _launch(self, count: int, threads: int, key: str) -> tuple[list[int], list[int | None]]:
        command = [sys.executable, "-m", "regard.scale.server", "--count", str(count), "--threads", str(threads)]
        package = str(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "REGARD_SERVER_KEY": key, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        self._launcher = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._launcher.stdout is not None
        line = self._launcher.stdout.readline()
        try:
            said = json.loads(line)
            return said["ports"], said["pids"]
        except (ValueError, KeyError) as error:
            _end(self._launcher, [])
            raise ServersLost(f"the attention servers did not start (they said {line!r})") from error

    @property
    def alive(self) -> list[int]:
        """Numbers of the servers that answer."""
        return [server.number for server in self.servers if server.alive]

    def close(self) -> None:
        """End the connections, and the processes started here."""
        for server in self.servers:
            server.alive = False
        self._finalizer()

    def __enter__(self) -> AttentionServers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """`run_plan` with these servers: (B, H, T, Dv), differentiable; tasks of plan server s go to worker s modulo their number."""
        return _Run.apply(self, plan, scale, q, k, v)

    def _do(self, plan: Plan, kind: str, tensors: list[tuple[Tensor, ...]], scale: float | None) -> list[list[Tensor]]:
        """Answers for all tasks of a plan, in their order, whoever gives them."""
        jobs = [
            _Job(number, kind, given, task.pairs, scale)
            for number, (task, given) in enumerate(zip(plan.tasks, tensors))
        ]
        with self._busy:  # one run at a time: the connections are shared
            answers = _Supervisor(self, jobs, [task.server for task in plan.tasks]).answers()
        return [answers[number] for number in range(len(jobs))]

    def _lose(self, server: _Server) -> None:
        """Give a server up: nothing it may still say will be heard."""
        if not server.alive:
            return
        server.alive = False
        self.losses += 1
        with contextlib.suppress(OSError):
            server.connection.close()
        if server.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(server.pid, signal.SIGKILL)


class _Supervisor:
    """One run of jobs over the pool: a thread for each server sends and receives, this one redistributes what a lost server leaves."""

    def __init__(self, pool: AttentionServers, jobs: list[_Job], wanted: list[int]) -> None:
        self.pool, self.jobs = pool, jobs
        self.lock = threading.Condition()
        self.events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.open = True
        self.found: dict[int, list[Tensor]] = {}
        self.servers = [server for server in pool.servers if server.alive]
        for server in self.servers:
            server.waiting = []
        if self.servers:
            for job, number in zip(jobs, wanted):
                server = pool.servers[number % len(pool.servers)]
                (server if server.alive else self._least_loaded()).waiting.append(job)

    def answers(self) -> dict[int, list[Tensor]]:
        threads = [threading.Thread(target=self._serve, args=(server,), daemon=True) for server in self.servers]
        for thread in threads:
            thread.start()
        try:
            while len(self.found) < len(self.jobs):
                if not any(server.alive for server in self.servers):
                    left = len(self.jobs) - len(self.found)
                    raise ServersLost(f"all attention servers are gone, with {left} of {len(self.jobs)} tasks to do")
                what, value = self.events.get()
                if what == "answer":
                    number, tensors = value
                    self.found[number] = tensors
                elif what == "error":
                    raise RuntimeError(f"an attention server could not do a task: {value}")
                else:
                    self._redistribute(value)
        finally:
            with self.lock:
                self.open = False
                self.lock.notify_all()
            for thread in threads:
                thread.join()
        return self.found

    def _least_loaded(self) -> _Server:
        living = [server for server in self.servers if server.alive]
        return min(living, key=lambda server: sum(job.pairs for job in server.waiting))

    def _redistribute(self, jobs: list[_Job]) -> None:
        """The heaviest first, each to whoever has least to do."""
        if not any(server.alive for server in self.servers):
            return
        with self.lock:
            for job in sorted(jobs, key=lambda job: -job.pairs):
                self._least_loaded().waiting.append(job)
            self.lock.notify_all()

    def _serve(self, server: _Server) -> None:
        """Keep `ahead` jobs with a server until the run is over; a server that breaks off or says nothing in time is lost."""
        sent: list[_Job] = []
        try:
            server.connection.settimeout(self.pool.timeout)
            while True:
                job = self._next(server, idle=not sent) if len(sent) < self.pool.ahead else None
                if job is not None:
                    sent.append(job)
                    send(server.connection, {"kind": job.kind, "id": job.number, "scale": job.scale}, job.tensors)
                    continue
                if not sent:
                    return
                header, tensors = receive(server.connection)
                job = sent.pop(0)
                if header.get("id") != job.number:
                    sent.insert(0, job)
                    raise ConnectionError(f"an answer to task {header.get('id')!r}, not {job.number}")
                if "error" in header:
                    self.events.put(("error", header["error"]))
                else:
                    server.done += 1
                    self.events.put(("answer", (job.number, tensors)))
        except OSError:  # gone, or silent for too long (TimeoutError)
            self.pool._lose(server)
            with self.lock:
                left, server.waiting = sent + server.waiting, []
            self.events.put(("lost", left))
        except Exception as error:  # nothing of ours may leave the run waiting
            self.pool._lose(server)
            self.events.put(("error", repr(error)))

    def _next(self, server: _Server, idle: bool) -> _Job | None:
        """The next job for a server. One with nothing to do waits for what others may leave; None: the run is over, or nothing now."""
        with self.lock:
            while True:
                if not self.open:
                    return None
                if server.waiting:
                    return server.waiting.pop(0)
                if not idle:
                    return None
                self.lock.wait()


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pool: AttentionServers, plan: Plan, scale: float | None, *qkv: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*qkv)
        ctx.pool, ctx.plan, ctx.scale = pool, plan, scale
        answers = pool._do(plan, "forward", [task_tensors(plan, task, *qkv) for task in plan.tasks], scale)
        return torch.cat([out.to(qkv[0].device) for (out,) in answers], dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        qkv, plan = ctx.saved_tensors, ctx.plan
        given = [
            (*task_tensors(plan, task, *qkv), part)
            for task, part in zip(plan.tasks, grad.split([task.q_len for task in plan.tasks], dim=2))
        ]
        answers = ctx.pool._do(plan, "backward", given, ctx.scale)
        grads = [torch.zeros_like(x) for x in qkv]
        for task, parts in zip(plan.tasks, answers):  # in the order of the tasks, whoever did them: the same bits
            for whole, part in zip(task_tensors(plan, task, *grads), parts):
                whole += part.to(whole.device)
        return (None, None, None, *grads)


def _end(launcher: subprocess.Popen[str] | None, servers: list[_Server]) -> None:
    for server in servers:
        with contextlib.suppress(OSError):
            server.connection.close()
    if launcher is None:
        return
    for stream in (launcher.stdin, launcher.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    try:
        launcher.wait(timeout=5)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.wait()
