"""Indexes of keys: exact search is the oracle, the graph reads little and finds much, growing and shrinking keep them right."""

import builtins

import pytest
import torch

from regard.ops.index import IVF, ExactIP, QueryGraph, found_mass, make_index


def data(n=600, m=200, batch=2, heads=4, kv_heads=2, dim=16, seed=0):
    """Clustered keys, and queries from a few directions of their own, far from the keys."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, kv_heads, 20, dim, generator=g)
    pick = torch.randint(20, (batch, kv_heads, n, 1), generator=g).expand(-1, -1, -1, dim)
    keys = centres.gather(2, pick) + 0.5 * torch.randn(batch, kv_heads, n, dim, generator=g)
    basis = torch.randn(batch, heads, 4, dim, generator=g)
    queries = torch.randn(batch, heads, m, 4, generator=g) @ basis + 2 * torch.randn(1, 1, 1, dim, generator=g)
    return keys, queries


def naive(keys, q, k, first=(0, 0)):
    k_all = keys.repeat_interleave(q.shape[1] // keys.shape[1], 1)
    scores = q @ k_all.transpose(-1, -2)
    for row, begin in enumerate(first):
        scores[row, ..., :begin] = -torch.inf
    return scores.topk(k, -1)


INDEXES = {
    "exact": lambda: ExactIP(),
    "graph": lambda: QueryGraph(ef=10_000, backend="torch"),
    "graph-faiss": lambda: QueryGraph(ef=10_000, backend="faiss"),
    "ivf": lambda: IVF(probes=10_000),
}


@pytest.mark.parametrize("name", INDEXES)
@pytest.mark.parametrize("n", [400, 30, 1])
def test_reading_everything_is_exact(name, n):
    """With all cells probed, or a list as long as the keys, nothing is missed."""
    keys, queries = data(n)
    k = min(20, n)
    for first in (None, torch.tensor([0, n // 3])):
        index = INDEXES[name]().build(keys, queries[:, :, :-5], first)
        found = index.search(queries[:, :, -5:], k)
        want = naive(keys, queries[:, :, -5:], min(k, n - n // 3), (0, 0) if first is None else first.tolist())
        count = want.values.shape[-1]
        torch.testing.assert_close(found.scores[..., :count], want.values, rtol=1e-4, atol=1e-4)
        assert (found.indices[0, 0, 0, :count] == want.indices[0, 0, 0]).all()


@pytest.mark.parametrize("name", INDEXES)
def test_insert_and_drop_last(name):
    keys, queries = data(500)
    index = INDEXES[name]().build(keys[:, :, :400], queries[:, :, :150])
    for begin, end in ((400, 401), (401, 450), (450, 500)):
        index.insert(keys[:, :, begin:end], queries[:, :, 150:156])
    want = naive(keys, queries[:, :, -5:], 10)
    torch.testing.assert_close(index.search(queries[:, :, -5:], 10).scores, want.values, rtol=1e-4, atol=1e-4)
    index.drop_last(150)
    assert len(index) == 350 and index.keys.shape[2] == 350
    found = index.search(queries[:, :, -5:], 10)
    want = naive(keys[:, :, :350], queries[:, :, -5:], 10)
    torch.testing.assert_close(found.scores, want.values, rtol=1e-4, atol=1e-4)
    index.insert(keys[:, :, 350:360])
    want = naive(keys[:, :, :360], queries[:, :, -5:], 10)
    torch.testing.assert_close(index.search(queries[:, :, -5:], 10).scores, want.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", INDEXES)
def test_rows_can_be_chosen_and_then_grow_apart(name):
    keys, queries = data(400)
    index = INDEXES[name]().build(keys, queries, torch.tensor([0, 100]))
    rows = torch.tensor([1, 1, 0])
    index.map_rows(lambda t: t.index_select(0, rows))
    more = torch.randn(3, 2, 40, 16)
    index.insert(more)
    whole = torch.cat([keys[rows], more], 2)
    want = naive(whole, queries[rows][:, :, -5:], 10, (100, 100, 0))
    torch.testing.assert_close(index.search(queries[rows][:, :, -5:], 10).scores, want.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_graph_made_from_queries_reads_little_and_finds_much(backend):
    keys, queries = data(4000, 800, batch=1)
    test = queries[:, :, -50:]
    best = ExactIP().build(keys).search(test, 20)
    graph = QueryGraph(backend=backend).build(keys, queries[:, :, :-50])
    found = graph.search(test, 20)
    blind = QueryGraph(backend=backend).build(keys).search(test, 20)
    cells = IVF().build(keys).search(test, 20)
    mass = {n: float(found_mass(f, best, 0.25).mean()) for n, f in (("graph", found), ("blind", blind), ("ivf", cells))}
    assert float(found.scanned.float().mean()) <= 1.1 * 0.05 * 4000
    assert mass["graph"] > 0.9 and mass["graph"] > mass["blind"] + 0.1 and mass["graph"] > mass["ivf"]
    assert float(best.scanned[0, 0, 0]) == 4000


def test_reads_is_a_strict_limit_in_torch_and_more_reading_finds_more():
    keys, queries = data(1500, 300, batch=1)
    test = queries[:, :, -20:]
    best, last = ExactIP().build(keys).search(test, 10), 0.0
    for reads in (150, 0.3, 1.0):
        found = QueryGraph(reads=reads, backend="torch").build(keys, queries[:, :, :-20]).search(test, 10)
        assert int(found.scanned.max()) <= (reads if isinstance(reads, int) else reads * 1500)
        mass = float(found_mass(found, best, 0.25).mean())
        assert mass >= last - 1e-6
        last = mass
    assert last > 0.999


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_padding_of_a_row_changes_nothing(backend):
    keys, queries = data(700)
    alone = QueryGraph(backend=backend).build(keys[1:, :, 200:], queries[1:, :, 60:])
    both = QueryGraph(backend=backend).build(keys, queries, torch.tensor([0, 200]), torch.tensor([0, 60]))
    test = torch.randn(2, 4, 3, 16)
    one, two = alone.search(test[1:], 10), both.search(test, 10)
    assert torch.equal(one.indices[0] + 200, two.indices[1])


def test_fewer_keys_than_wanted_and_none_at_all():
    keys, queries = data(5)
    found = ExactIP().build(keys, first=torch.tensor([5, 3])).search(queries[:, :, :2], 8)
    assert (found.indices[0] == -1).all() and (found.scores[0] == -torch.inf).all()
    assert ((found.indices[1] >= 3).sum(-1) == 2).all() and found.indices.shape[-1] == 8
    assert (found_mass(found, found, 1.0) == 1).all()
    graph = QueryGraph().build(data(400)[0], queries, first=torch.tensor([400, 0]))
    assert (graph.search(queries, 3).indices[0] == -1).all()


def test_float64_stays():
    keys, queries = data()
    found = QueryGraph(reads=1.0).build(keys.double(), queries.double()).search(queries[:, :, :2].double(), 3)
    assert found.scores.dtype == torch.float64


def test_bad_input():
    keys, queries = data(50)
    with pytest.raises(ValueError, match=r"kind: unknown name 'hnsw'"):
        make_index("hnsw")
    with pytest.raises(ValueError, match=r"reads: got 1\.5"):
        QueryGraph(reads=1.5)
    with pytest.raises(RuntimeError, match="build"):
        ExactIP().search(queries, 3)
    with pytest.raises(ValueError, match=r"q: got .*H a multiple of 2"):
        ExactIP().build(keys).search(queries[:, :3], 3)
    with pytest.raises(ValueError, match=r"first: got 'shape \(3,\)'"):
        ExactIP().build(keys, first=torch.zeros(3))
    with pytest.raises(ValueError, match="keys: got 'shape"):
        ExactIP().build(keys).insert(keys[:, :1])
    with pytest.raises(ValueError, match="count: got 51, need at most 50"):
        ExactIP().build(keys).drop_last(51)


def test_without_faiss(monkeypatch):
    real = builtins.__import__

    def no_faiss(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_faiss)
    with pytest.raises(ImportError, match=r"regard\[retrieval\]"):
        IVF()
    with pytest.raises(ImportError, match=r"regard\[retrieval\]"):
        QueryGraph(backend="faiss")
    keys, queries = data()
    assert QueryGraph().build(keys, queries).search(queries[:, :, -1:], 5).indices.min() >= 0
