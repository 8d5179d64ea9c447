"""Atomic files there and back and when they are broken; cores and splits; metrics against their definitions; worlds against their truth."""

import math

import pytest
import torch

from regard.testbeds import recommendation as rec
from regard.testbeds.recommendation.metrics import ranks

HEAD = "user_id:token\titem_id:token\ttimestamp:float\n"


def test_atomic_files_come_back_as_they_were_written(tmp_path):
    types = {"item_id": "token", "price": "float", "genres": "token_seq", "place": "float_seq"}
    columns = {"item_id": ["a b", "ü"], "price": [1.5, None], "genres": [["x", "y"], []], "place": [(1.0, -2.25), ()]}
    table = rec.read_atomic(rec.write_atomic(tmp_path / "x.item", columns, types))
    assert table.types == types and len(table) == 2
    assert (
        table["item_id"] == ["a b", "ü"]
        and table["genres"] == [("x", "y"), ()]
        and table["place"] == [(1.0, -2.25), ()]
    )
    assert table["price"][0] == 1.5 and math.isnan(table["price"][1])
    assert rec.read_atomic(table.path, ["price"]).types == {"price": "float"}


def test_a_file_of_windows_is_read_too(tmp_path):
    (tmp_path / "w.inter").write_bytes(b"\xef\xbb\xbf" + (HEAD + "u\ti\t3\n").replace("\n", "\r\n").encode())
    table = rec.read_atomic(tmp_path / "w.inter")
    assert table["timestamp"] == [3.0] and table["user_id"] == ["u"]


def test_malformed_lines_are_counted_and_told(tmp_path):
    path = tmp_path / "x.inter"
    path.write_bytes(
        (HEAD + "u1\ti1\t1\nu1\ti2\nu1\ti2\tsoon\n\ti2\t4\nu1\ti3\tnan\nu1\ti9\t5\n").encode() + b"\xff\ta\t1\n"
    )
    with pytest.raises(ValueError, match=r"5 of 7 lines are malformed .*line 3, 'u1\\ti2'.*user_id:token"):
        rec.load_interactions(path)
    met = rec.load_interactions(path, malformed="skip")
    assert len(met) == 2 and met.item_names == ["i1", "i9"]
    assert met.malformed == {
        "2 values for 3 columns": 1, "no number in timestamp": 2, "no user_id": 1, "no UTF-8": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line like"), ("user_id\titem_id\n", "column 'user_id'"), ("user_id:int\n", "type 'int'"),
        ("a:token\ta:float\n", "comes twice"), ("user_id:token\titem_id:token\n", "unknown name 'timestamp'"),
        ("user_id:token\titem_id:float\ttimestamp:float\nu\t1\t1\n", "item_id: got 'type float'"), (HEAD, "with interactions"),
    ],
)  # fmt: skip
def test_broken_headers_and_columns(tmp_path, text, message):
    path = tmp_path / "x.inter"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        rec.load_interactions(path)


def test_wrong_calls(tmp_path):
    with pytest.raises(FileNotFoundError, match="path"):
        rec.read_atomic(tmp_path / "no.inter")
    with pytest.raises(ValueError, match="0 files"):
        rec.load_interactions(tmp_path)
    with pytest.raises(ValueError, match="without tabs"):
        rec.write_atomic(tmp_path / "a.item", {"a": ["x\ty"]}, {"a": "token"})
    with pytest.raises(ValueError, match="equal lengths"):
        rec.write_atomic(tmp_path / "a.item", {"a": ["x"], "b": []}, {"a": "token", "b": "token"})
    assert not list(tmp_path.iterdir())


def test_interactions_are_ordered_by_user_and_time_and_written_back(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    lines = ["b\tx\t5", "a\ty\t2", "b\tz\t1", "a\tx\t1", "b\ty\t5"]
    (folder / "shop.inter").write_text(HEAD + "\n".join(lines) + "\n")
    met = rec.load_interactions(folder)
    assert met.user_names == ["b", "a"]
    assert [[met.item_names[i] for i in row] for row in met.sequences()] == [["z", "x", "y"], ["x", "y"]]
    again = rec.load_interactions(met.write(tmp_path / "again.inter"))
    assert [[again.item_names[i] for i in row] for row in again.sequences()] == [["z", "x", "y"], ["x", "y"]]
    unordered = rec.load_interactions(folder, time=None)
    assert [unordered.item_names[i] for i in unordered.sequences()[0]] == ["x", "z", "y"]
    item = rec.write_atomic(
        folder / "shop.item", {"item_id": ["y", "x"], "kind": ["red", ""]}, {"item_id": "token", "kind": "token"}
    )
    codes, names = met.item_codes(rec.read_atomic(item), "kind")
    assert names == ["red"] and [met.item_names[i] for i in (codes == 0).nonzero()[:, 0]] == ["y"]


def test_a_core_holds_what_it_promises_and_is_the_largest():
    pairs = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("c", "x"), ("c", "z"), ("d", "z")]
    users, items = ["a", "b", "c", "d"], ["x", "y", "z"]
    met = rec.Interactions(
        torch.tensor([users.index(u) for u, _ in pairs]), torch.tensor([items.index(i) for _, i in pairs]),
        torch.arange(7).double(), users, items,
    )  # fmt: skip
    core = met.k_core(2, 2)  # d goes, then z has one left and goes, then c
    assert core.user_names == ["a", "b"] and core.item_names == ["x", "y"] and len(core) == 4
    assert len(met.k_core(1, 1)) == 7
    with pytest.raises(ValueError, match="leave none"):
        met.k_core(9, 1)


def test_the_last_two_are_left_out():
    met, _ = rec.TransitionWorld(20, 2).interactions(6, 5)
    split = met.leave_one_out()
    for row, train, valid, test in zip(met.sequences(), split.train, split.valid, split.test):
        assert row.tolist() == [*train.tolist(), int(valid), int(test)]
    short = rec.Interactions(
        torch.tensor([0, 0]), torch.tensor([0, 1]), torch.zeros(2).double(), ["u"], ["i", "j"]
    ).leave_one_out()
    assert short.test.tolist() == [-1] and short.train[0].tolist() == [0, 1]


def test_batches_pad_left_shift_by_one_and_meet_everyone_once_an_epoch():
    rows = [torch.arange(n) + 10 * n for n in range(1, 8)]
    make = rec.next_item_batches(rows, 99, 4, 4)
    met = torch.cat([make(0)[0], make(1)[0]])
    assert sorted(met[:, -1].tolist()) == sorted(int(row[-2]) for row in rows[1:])
    inputs, targets = make(0)
    assert torch.equal(inputs[:, 1:][inputs[:, :-1] != 99], targets[:, :-1][inputs[:, :-1] != 99])
    assert torch.equal(inputs == 99, targets == 99)
    assert torch.equal(make(0)[0], make(0)[0])
    assert rec.pad_left([torch.tensor([1, 2, 3]), torch.tensor([], dtype=torch.int64)], 2, 9).tolist() == [
        [2, 3],
        [9, 9],
    ]


def test_ranks_by_counting_and_their_means():
    torch.manual_seed(0)
    scores = torch.randn(50, 12).round(decimals=1)
    target = torch.randint(12, (50,))
    seen = torch.rand(50, 12) < 0.3
    seen[torch.arange(50), target] = False
    found = ranks(scores, target, seen)
    for row in range(50):
        others = [float(s) for j, s in enumerate(scores[row]) if not seen[row, j] and j != target[row]]
        own = float(scores[row, target[row]])
        assert found[row] == sum(s > own for s in others) + sum(s == own for s in others) / 2
    made = rec.rank_metrics(scores, target, seen, (1, 5))
    assert made["hr@5"] == pytest.approx((found < 5).double().mean().item())
    assert made["ndcg@5"] == pytest.approx(((found + 2).log2().reciprocal() * (found < 5)).mean().item())
    assert made["mrr"] == pytest.approx((found + 1).reciprocal().mean().item())
    assert (
        rec.rank_metrics(torch.ones(4, 100), torch.arange(4))["hr@20"] == 0.0
    )  # a model that says nothing finds nothing


def test_several_targets_a_row():
    scores = torch.tensor([[5.0, 4, 3, 2, 1], [5.0, 4, 3, 2, 1]])
    made = rec.rank_metrics(scores, torch.tensor([[0, 2, 4], [3, -1, -1]]), k=(3,))
    assert made["recall@3"] == pytest.approx((2 / 3 + 0) / 2) and made["hr@3"] == 0.5 and made["mrr"] == (1 + 1 / 4) / 2
    assert made["ndcg@3"] == pytest.approx((1 + 0.5) / (1 + 1 / math.log2(3) + 0.5) / 2)


def test_auc_is_the_share_of_pairs_in_order():
    torch.manual_seed(1)
    scores, labels = torch.rand(80).round(decimals=1), (torch.rand(80) < 0.4).float()
    pairs = [(float(a > b) + 0.5 * float(a == b)) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert rec.auc(scores, labels) == pytest.approx(sum(pairs) / len(pairs))
    perfect = torch.tensor([0.9, 0.8, 0.2, 0.1]), torch.tensor([1.0, 1, 0, 0])
    assert rec.auc(*perfect) == 1.0 and rec.auc(*perfect, variant="released") == 0.75
    groups = torch.arange(80) % 3
    groups[labels == 0] = groups[labels == 0].clamp(min=1)  # group 0 has clicks alone and is left out
    sizes = [(groups == g).sum().item() for g in (1, 2)]
    each = [rec.auc(scores[groups == g], labels[groups == g]) for g in (1, 2)]
    assert rec.grouped_auc(scores, labels, groups) == pytest.approx(
        sum(s * a for s, a in zip(sizes, each)) / sum(sizes)
    )
    with pytest.raises(ValueError, match="labels"):
        rec.auc(scores, torch.ones(80))
    with pytest.raises(ValueError, match="scores"):
        rec.rank_metrics(torch.full((1, 3), torch.nan), torch.tensor([0]))


def test_a_world_of_transitions_does_what_it_says():
    world = rec.TransitionWorld(12, 3, 2, 0.6, seed=1)
    met, kind = world.interactions(400, 30, seed=2)
    items = met.items.reshape(400, 30)
    counts = torch.zeros(12, 12)
    counts.index_put_((items[:, :-1].flatten(), items[:, 1:].flatten()), torch.ones(400 * 29), accumulate=True)
    expected = torch.zeros(12, 12)
    chances = world.chances(items[:, :-1].flatten(), kind.repeat_interleave(29))
    assert torch.allclose(chances.sum(1), torch.ones(400 * 29), atol=1e-5)
    expected.index_add_(0, items[:, :-1].flatten(), chances)
    assert (counts - expected).abs().max() < 4 * expected.sqrt().max()
    assert torch.equal(world.interactions(5, 5, seed=3)[0].items, world.interactions(5, 5, seed=3)[0].items)


def test_a_world_of_clicks_does_what_it_says():
    world = rec.ClickWorld(60, 6, strength=3.0, seed=1)
    rows = world.rows(4000, 20, seed=2)
    truth = world.chances(rows)
    assert abs(rows.label.mean() - truth.mean()) < 0.03
    assert rec.auc(truth, rows.label) > 0.85
    assert (world.weights(rows)[rows.history_items == 0] == 0).all()
    assert torch.equal(rows.history_categories, world.categories[rows.history_items])
    first = rows.batches(64, seed=3)(0)
    assert (
        set(first) == {"item", "category", "history_items", "history_categories", "label"} and len(first["item"]) == 64
    )


def test_rows_from_interactions_without_labels():
    met, _ = rec.TransitionWorld(30, 2, 2, 0.5).interactions(8, 12, seed=1)
    categories = torch.arange(30) % 4
    rows = rec.click_rows(met, categories, length=5, places=range(1, 4), least=10, negatives=2)
    assert len(rows) == 8 * 3 * 3 and rows.label.reshape(-1, 3).tolist() == [[1.0, 0.0, 0.0]] * 24
    assert torch.equal(rows.category, categories[rows.item - 1] + 1)
    sequence = met.sequences()[0]
    assert rows.item[0] == sequence[-1] + 1 and rows.history_items[0].tolist() == (sequence[-6:-1] + 1).tolist()
    for user, row in enumerate(met.sequences()):
        drawn = rows.item[9 * user : 9 * user + 9].reshape(3, 3)[:, 1:]
        assert not set(drawn.flatten().tolist()) & set((row + 1).tolist())
    with pytest.raises(ValueError, match="least"):
        rec.click_rows(met, categories, least=1000)
