"""`KeyIndex`: what every index of keys does, and the keys it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import bad_value, require, require_int, require_tensor
from .growing import Growing

__all__ = ["Found", "KeyIndex"]


class Found(NamedTuple):
    """What a search gives.

    Attributes:
        indices: int64 (B, H, N, k), numbers of keys by falling score; -1 where there are no more.
        scores: their inner products with the query, float32 (float64 stays), not scaled; -inf where there is no key.
        scanned: int64 (B, H, N), keys (and cell centroids) whose inner product was computed. Searches that run in faiss report the
            mean over the queries of a kv head.
    """

    indices: Tensor
    scores: Tensor
    scanned: Tensor


class KeyIndex:
    """Base of the indexes. Keys are numbered in the order they came, 0 first, in all rows of the batch alike.

    A subclass overrides `_build`, `_search`, and where it keeps more than keys `_insert`, `_drop` and `_map`.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._store = Growing()
        self.first: Tensor | None = None

    def __len__(self) -> int:
        return self.size

    @property
    def size(self) -> int:
        """Keys held, those that do not count included."""
        return self._store.size

    @property
    def keys(self) -> Tensor:
        """The keys, (B, Hkv, n, D)."""
        self._require_built()
        return self._store.view()

    # Public

    def build(
        self,
        keys: Tensor,
        queries: Tensor | None = None,
        first: Tensor | None = None,
        first_query: Tensor | None = None,
    ) -> KeyIndex:
        """Start over with these keys.

        Args:
            keys: (B, Hkv, n, D), any float type; held as float32 (float64 stays).
            queries: (B, H, m, D), queries such as will be asked, for indexes that learn from them; H a multiple of Hkv.
            first: int64 (B,), number of leading keys of each row that do not count and are never found (left padding). None: 0.
            first_query: int64 (B,), number of leading queries of each row that do not count. None: 0.
        Returns:
            the index itself.
        """
        require_tensor("keys", keys, dims=4, floating=True)
        if queries is not None:
            self._check_queries("queries", queries, keys)
        self._forget()
        self.first = _row_numbers("first", first, keys.shape[0])
        self._append(keys)
        self._build(
            None if queries is None else self._as_held(queries), _row_numbers("first_query", first_query, keys.shape[0])
        )
        return self

    def insert(self, keys: Tensor, queries: Tensor | None = None) -> None:
        """Add keys (B, Hkv, c, D) at the end. `queries` (B, H, m, D): recent ones, for indexes that learn from them."""
        old = self.keys
        require_tensor("keys", keys, dims=4, floating=True)
        fits = keys.shape[:2] == old.shape[:2] and keys.shape[3] == old.shape[3]
        need = f"(B, Hkv, c, D) with {tuple(old.shape[:2])} in front and {old.shape[3]} at the end"
        require(fits, "keys", f"shape {tuple(keys.shape)}", need)
        if queries is not None:
            self._check_queries("queries", queries, old)
        before = self.size
        self._append(keys)
        self._insert(before, None if queries is None else self._as_held(queries))

    def search(self, q: Tensor, k: int) -> Found:
        """The `k` keys with the largest inner products, for each query of (B, H, N, D), as well as the index can find them."""
        keys = self.keys
        require_int("k", k, 1)
        self._check_queries("q", q, keys)
        batch, heads, rows, dim = q.shape
        kv_heads = keys.shape[1]
        grouped = self._as_held(q).reshape(batch, kv_heads, heads // kv_heads * rows, dim)
        k_now = min(k, self.size)
        if k_now == 0 or q.numel() == 0:
            found = _nothing((batch, kv_heads, heads // kv_heads * rows), keys)
        else:
            found = self._search(grouped, k_now)
        shape = (batch, heads, rows)
        indices, scores = (
            torch.nn.functional.pad(part, (0, k - part.shape[-1]), value=fill).reshape(*shape, k)
            for part, fill in ((found.indices, -1), (found.scores, -torch.inf))
        )
        return Found(indices, scores, found.scanned.reshape(shape))

    def drop_last(self, count: int) -> None:
        """Forget the last `count` keys."""
        require_int("count", count, 0)
        require(count <= self.size, "count", count, f"at most {self.size}, which the index holds")
        self._store.drop_last(count)
        if count:
            self._drop()

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, batch dimension first, by `fn` of it: rows chosen, repeated or put in another order, other devices."""
        if self._store.empty:
            return
        assert self.first is not None
        rows = fn(torch.arange(len(self.first))).tolist()
        self._store.map(fn)
        self.first = self.first[rows]
        self._map(fn, rows)

    # For the subclass

    def _build(self, queries: Tensor | None, first_query: Tensor) -> None:
        """The keys are in `self.keys`."""

    def _insert(self, before: int, queries: Tensor | None) -> None:
        """The keys from number `before` on are new."""

    def _search(self, q: Tensor, k: int) -> Found:
        """q (B, Hkv, R, D), 1 <= k <= size; the result has the same leading axes (B, Hkv, R)."""
        raise NotImplementedError

    def _drop(self) -> None:
        """Keys from number `self.size` on are gone."""

    def _map(self, fn: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        """Row i of the new batch is row `rows[i]` of the old one."""

    def _counts(self) -> Tensor:
        """Which keys count, bool (B, 1, 1, n), or None where all do."""
        assert self.first is not None
        return (torch.arange(self.size) >= self.first[:, None])[:, None, None].to(self.keys.device)

    def _exact(self, q: Tensor, k: int) -> Found:
        """Search by reading every key, in pieces of bounded size."""
        assert self.first is not None
        keys, padded = self.keys, bool(self.first.any())
        rows_at_once = max(1, (1 << 24) // max(1, keys.shape[0] * keys.shape[1] * self.size))
        parts = []
        for rows in q.split(rows_at_once, dim=2):
            scores = rows @ keys.transpose(-1, -2)
            if padded:
                scores = scores.masked_fill(~self._counts(), -torch.inf)
            parts.append(scores.topk(k, dim=-1))
        scores = torch.cat([part.values for part in parts], 2)
        indices = torch.cat([part.indices for part in parts], 2).masked_fill(scores == -torch.inf, -1)
        scanned = (self.size - self.first.to(q.device)).clamp(min=0)[:, None, None].expand(q.shape[:3])
        return Found(indices, scores, scanned)

    def _append(self, keys: Tensor) -> None:
        self._store.append(self._as_held(keys))

    def _as_held(self, x: Tensor) -> Tensor:
        x = x.detach()
        x = x if x.dtype == torch.float64 else x.float()
        return x if self._store.empty else x.to(self._store.view())

    def _require_built(self) -> None:
        if self._store.empty:
            raise RuntimeError(f"{type(self).__name__}: nothing is in it yet, call build(keys) first")

    def _check_queries(self, name: str, q: Tensor, keys: Tensor) -> None:
        require_tensor(name, q, dims=4, floating=True)
        fits = q.shape[0] == keys.shape[0] and q.shape[3] == keys.shape[3] and q.shape[1] % max(1, keys.shape[1]) == 0
        need = f"(B, H, N, D) with B {keys.shape[0]}, D {keys.shape[3]} and H a multiple of {keys.shape[1]}"
        require(fits, name, f"shape {tuple(q.shape)}", need)


def _row_numbers(name: str, numbers: Tensor | None, rows: int) -> Tensor:
    if numbers is None:
        return torch.zeros(rows, dtype=torch.long)
    require(tuple(numbers.shape) == (rows,), name, f"shape {tuple(numbers.shape)}", f"({rows},), one number a row")
    return numbers.detach().long().cpu()


def _nothing(shape: tuple[int, ...], like: Tensor) -> Found:
    none = torch.zeros(*shape, 0, dtype=torch.long, device=like.device)
    return Found(none, like.new_zeros(*shape, 0), torch.zeros(shape, dtype=torch.long, device=like.device))


def import_faiss(what: str) -> Any:
    """The faiss module, or an `ImportError` that says how to get it."""
    try:
        import faiss
    except ImportError:
        raise ImportError(f"{what} needs faiss: pip install 'regard[retrieval]' (or faiss-cpu)") from None
    return faiss


def reads_of(reads: int | float, count: int) -> int:
    """Keys that a search may read out of `count`."""
    return max(1, reads if isinstance(reads, int) else round(reads * count))


def require_reads(reads: Any) -> None:
    ok = not isinstance(reads, bool) and (
        (isinstance(reads, int) and reads >= 1) or (isinstance(reads, float) and 0.0 < reads <= 1.0)
    )
    if not ok:
        raise bad_value("reads", reads, "keys (int >= 1) or a share of them (float in (0, 1])")
