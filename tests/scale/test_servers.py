"""Attention servers as processes: exact forward and backward, also when one is killed or stopped in the middle; who may talk to them."""

import os
import signal
import socket
import threading
import time

import pytest
import torch

from regard.scale import AttentionServers, ServersLost, plan_tasks, run_plan
from regard.scale.wire import WireError, introduce, receive, send

SIZES = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
DOCS = [300, 20, 140, 60, 64, 31]


def tensors(seed=0):
    torch.manual_seed(seed)
    return [torch.randn(1, heads, sum(DOCS), 8, requires_grad=True) for heads in (2, 1, 1)]


def both(plan, q, k, v, **options):
    out = run_plan(plan, q, k, v, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.fixture
def plan():
    return plan_tasks(DOCS, 6, tolerance=0.0, **SIZES)


@pytest.fixture(scope="module")
def pair():
    with AttentionServers(2, timeout=20.0, ahead=4) as pool:
        yield pool


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "Z"


def test_deaths_and_stalls_change_no_bit(plan):
    """The whole life of a pool: undisturbed, one killed between runs, one stopped in the middle of one, then all gone."""
    qkv = tensors()
    wanted = both(plan, *qkv)
    with AttentionServers(4, timeout=30.0) as pool:
        first = both(plan, *qkv, servers=pool)
        for ours, theirs in zip(first, wanted):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert pool.alive == [0, 1, 2, 3] and all(server.done for server in pool.servers)

        os.kill(pool.servers[1].pid, signal.SIGKILL)
        again = both(plan, *qkv, servers=pool)
        assert all(torch.equal(a, b) for a, b in zip(again, first))
        assert pool.alive == [0, 2, 3] and pool.losses == 1

        pool.timeout = 3.0
        os.kill(pool.servers[2].pid, signal.SIGSTOP)  # takes what is sent, and never answers
        began = time.monotonic()
        again = both(plan, *qkv, servers=pool)
        assert all(torch.equal(a, b) for a, b in zip(again, first))
        assert pool.alive == [0, 3] and pool.losses == 2 and time.monotonic() - began >= 3.0
        pool.timeout = 30.0
        assert all(torch.equal(a, b) for a, b in zip(both(plan, *qkv, servers=pool), first))

        pids = [server.pid for server in pool.servers]
        os.kill(pids[0], signal.SIGKILL)
        os.kill(pids[3], signal.SIGKILL)
        with pytest.raises(ServersLost, match="all attention servers are gone, with .* tasks to do"):
            run_plan(plan, *qkv, servers=pool)
    deadline = time.monotonic() + 5
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, pids))


def test_frames():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(2.0)
        theirs.settimeout(2.0)
        sent = [torch.randn(2, 3), torch.zeros(0, 4, dtype=torch.float64), torch.randn(5).bfloat16()]
        send(ours, {"kind": "x", "id": 3}, sent)
        header, got = receive(theirs)
        assert header["kind"] == "x" and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, sent))
        for bad in (b"\xff\xff\xff\xff", b"\x02\0\0\0{}", b"\x03\0\0\0xyz"):
            ours.sendall(bad)
            with pytest.raises(WireError):
                receive(theirs)
        big = b'{"tensors": [{"dtype": "float32", "shape": [99999999, 999999]}]}'
        ours.sendall(len(big).to_bytes(4, "little") + big)
        with pytest.raises(WireError, match="a tensor of shape"):
            receive(theirs)
        ours.close()
        with pytest.raises(WireError, match="closed"):
            receive(theirs)


def test_a_client_needs_the_key():
    from regard.scale.wire import greet

    for key, welcome in ((b"k" * 16, True), (b"x" * 16, False)):
        ours, theirs = socket.socketpair()
        heard = []

        def server(connection, heard=heard):
            with connection:
                try:
                    greet(connection, b"k" * 16)
                except WireError as error:
                    heard.append(str(error))

        thread = threading.Thread(target=server, args=(theirs,))
        thread.start()
        with ours:
            if welcome:
                introduce(ours, key)
            else:
                with pytest.raises(WireError):
                    introduce(ours, key)
        thread.join()
        assert heard == ([] if welcome else ["a client without the key"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count: got 0"),
        ({"timeout": 0}, "timeout: got 0"),
        ({"ahead": 0}, "ahead: got 0"),
        ({"key": "short"}, "key: got '5 characters'"),
        ({"addresses": [("127.0.0.1", 9)]}, "key: got None"),
        ({"addresses": [], "key": "k" * 16}, "addresses: got"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        AttentionServers(**options)


def test_nobody_at_the_address():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(OSError, match="addresses: no attention server with this key"):
        AttentionServers(addresses=[("127.0.0.1", port)], key="k" * 16, timeout=1.0)


def test_large_frames_both_ways(pair):
    """Requests and answers far beyond the sockets' buffers, several on their way: neither side waits for the other."""
    plan = plan_tasks([256] * 6, 1, num_heads=64, num_kv_heads=64, head_dim=64)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 64, 6 * 256, 64)
    out = run_plan(plan, q, k, v, servers=pair)
    assert pair.losses == 0
    torch.testing.assert_close(out, run_plan(plan, q, k, v), rtol=1e-5, atol=1e-6)


def test_killed_in_the_middle_of_a_batch(pair, monkeypatch):
    """A server dies after it has answered some of its tasks: the rest is done by the other."""
    docs = [64] * 40
    plan = plan_tasks(docs, 2, **SIZES)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(docs), 8) for heads in (2, 1, 1))
    pool, before = pair, [server.done for server in pair.servers]
    wanted = run_plan(plan, q, k, v, servers=pool)
    assert [server.done - old for server, old in zip(pool.servers, before)] == [20, 20]
    victim = pool.servers[1]

    real, sent = send, []

    def dies_at_its_tenth(connection, *frame):
        if connection is victim.connection:
            sent.append(victim.done - before[1] - 20)
            if len(sent) == 10:
                os.kill(victim.pid, signal.SIGKILL)
        real(connection, *frame)

    monkeypatch.setattr("regard.scale.servers.send", dies_at_its_tenth)
    out = run_plan(plan, q, k, v, servers=pool)
    assert torch.equal(out, wanted) and pool.alive == [0] and pool.losses == 1
    assert sent[9] >= 6  # with at most 4 ahead, it had answered so many
    assert 6 <= victim.done - before[1] - 20 < 20 and sum(server.done for server in pool.servers) - sum(before) == 80

    # it listens on loopback only, and a task that cannot be done is an error, not a death
    monkeypatch.setattr("regard.scale.servers.send", real)
    host = pool.servers[0].connection.getpeername()[0]
    assert host == "127.0.0.1"
    assert torch.equal(run_plan(plan, q, k, v, servers=pool), wanted)
    with pytest.raises(RuntimeError, match="could not do a task: ValueError: kind: got 'undo'"):
        pool._do(plan, "undo", [(q, k, v)] * len(plan.tasks), None)
    assert torch.equal(run_plan(plan, q, k, v, servers=pool), wanted)
