"""Pointer networks: a recurrent model whose outputs are positions of its input.

Pointer Networks (Vinyals et al. 2015, NeurIPS, arXiv 1506.03134). No code of the authors is known; the equations are the paper's.
What it leaves open, decided here: the end of an output is place 0 of what can be pointed to, a learned encoder state; the go symbol is a
learned input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_int, require_name, require_tensor
from ..ops.additive import additive_scores

__all__ = ["PointerHead", "PointerNetwork"]

NOTHING = -1
CONSTRAINTS = ("none", "distinct", "tour")


class PointerHead(nn.Module):
    """u_ij = v . tanh(W1 e_j + W2 d_i): scores of each place j for each step i, which are the output itself.

    dim: of states. Weights start uniform in +-0.08, as the paper has them.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        require_int("dim", dim, 1)
        self.w1, self.w2 = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.v = nn.Parameter(torch.empty(dim))
        for weight in self.parameters():
            nn.init.uniform_(weight, -0.08, 0.08)

    def forward(self, states: Tensor, places: Tensor, mask: Tensor | None = None) -> Tensor:
        """states (B, M, dim), places (B, N, dim) -> scores (B, M, N); mask, broadcastable to that: where False, -inf."""
        for name, tensor in (("states", states), ("places", places)):
            require_tensor(name, tensor, dims=3, floating=True)
            need = f"(B, n, {len(self.v)})"
            require(tensor.shape[2] == len(self.v), name, f"shape {tuple(tensor.shape)}", need)
        scores = additive_scores(self.w2(states), self.w1(places), self.v)
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


class PointerNetwork(nn.Module):
    """Points (B, N, in_dim) -> a sequence of their indices. One set of weights for every N.

    An LSTM reads the points; a second one, begun from its last state and a learned go symbol, is given the point last pointed to, and its
    state points to the next (`PointerHead`).

    Args:
        in_dim: numbers of a point. dim: of both LSTMs (the paper: 256 or 512).
        end: whether an output may end before a fixed number of steps (then the end is one more place to point to, place 0).

    Indices count from 0 to N - 1; -1 stands behind the end of a shorter output, and in `targets` likewise.
    """

    def __init__(self, in_dim: int = 2, dim: int = 256, *, end: bool = True) -> None:
        super().__init__()
        self.in_dim, self.dim = require_int("in_dim", in_dim, 1), require_int("dim", dim, 1)
        self.encoder, self.decoder = (nn.LSTM(in_dim, dim, batch_first=True) for _ in range(2))
        self.head = PointerHead(dim)
        self.go = nn.Parameter(torch.empty(in_dim))
        self.end = nn.Parameter(torch.empty(dim)) if end else None
        for weight in self.parameters():
            nn.init.uniform_(weight, -0.08, 0.08)

    def encode(self, points: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(places (B, [1 +] N, dim), which are real (B, [1 +] N), last state); lengths (B,): points of each row, the rest is padding."""
        require_tensor("points", points, dims=3, floating=True)
        batch, count = points.shape[:2]
        require(
            points.shape[2] == self.in_dim and count > 0,
            "points",
            f"shape {tuple(points.shape)}",
            f"(B, N >= 1, {self.in_dim})",
        )
        if lengths is None:
            lengths = torch.full((batch,), count)
        require(lengths.shape == (batch,), "lengths", f"shape {tuple(lengths.shape)}", f"({batch},)")
        fits = bool(((lengths >= 1) & (lengths <= count)).all())
        require(fits, "lengths", lengths.tolist(), f"numbers from 1 to {count}")
        packed = nn.utils.rnn.pack_padded_sequence(points, lengths.cpu(), batch_first=True, enforce_sorted=False)
        read, last = self.encoder(packed)
        places = nn.utils.rnn.pad_packed_sequence(read, batch_first=True, total_length=count)[0]
        real = torch.arange(count, device=points.device) < lengths.to(points.device)[:, None]
        if self.end is not None:
            places = torch.cat((self.end.expand(batch, 1, -1), places), dim=1)
            real = F.pad(real, (1, 0), value=True)
        return places, real, last

    def forward(self, points: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, M [+ 1], [1 +] N) of the next index given the true ones so far; targets (B, M) int64, -1 behind the end.

        With an end there is one step more, and column 0 is the end; the points are the columns behind it.
        """
        places, real, last = self.encode(points, lengths)
        self._check_targets(points, targets, lengths)
        chosen = points.gather(1, targets.clamp(min=0)[..., None].expand(-1, -1, self.in_dim))
        given = torch.cat((self.go.expand(len(points), 1, -1), chosen), dim=1)
        states = self.decoder(given if self.end is not None else given[:, :-1], last)[0]
        return self.head(states, places, real[:, None]).log_softmax(-1)

    def loss(self, points: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """-log p(targets | points), its end included, mean over the batch."""
        found = self(points, targets, lengths)
        if self.end is None:
            wanted, counts = targets, targets != NOTHING
        else:
            wanted = F.pad(targets + 1, (0, 1))  # an index is one column on, -1 becomes the end
            counts = F.pad(targets != NOTHING, (1, 0), value=True)  # up to the first end
        picked = found.gather(2, wanted.clamp(min=0)[..., None])[..., 0]
        return -picked.masked_fill(~counts, 0.0).sum(1).mean()

    def _check_targets(self, points: Tensor, targets: Tensor, lengths: Tensor | None) -> None:
        require_tensor("targets", targets, dims=2)
        require(targets.dtype == torch.int64, "targets", targets.dtype, "int64")
        require(len(targets) == len(points), "targets", f"batch {len(targets)}", f"{len(points)} as points")
        count = torch.full((len(points),), points.shape[1]) if lengths is None else lengths
        fits = bool(((targets >= NOTHING) & (targets < count.to(targets.device)[:, None])).all())
        require(fits, "targets", "an index that is no point's", "indices of points, -1 behind the end")
        gone = targets == NOTHING
        require(
            not bool((gone[:, :-1] & ~gone[:, 1:]).any()), "targets", "-1 before an index", "-1 only behind the end"
        )

    @torch.no_grad()
    def decode(
        self,
        points: Tensor,
        beam: int = 1,
        constraint: str = "none",
        lengths: Tensor | None = None,
        max_steps: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The likeliest output that a beam search finds: (indices (B, M), -1 behind the end; its log-probability (B,)).

        Args:
            beam: outputs kept at a time. constraint: "distinct": no index twice; "tour": the same, and no end before all have been
                named, so that every output is a permutation; impossible places count as probability 0, the others as they are.
            max_steps: indices at most; default as many as a row has points (always so with "tour"). Without an end, outputs have that many.
        """
        require_int("beam", beam, 1)
        require_name("constraint", constraint, CONSTRAINTS)
        places, real, (h, c) = self.encode(points, lengths)
        batch, count, shift = len(points), points.shape[1], int(self.end is not None)
        steps = count if max_steps is None else require_int("max_steps", max_steps, 0)
        need = f"at most N ({count}), or constraint='none'"
        require(constraint == "none" or steps <= count, "max_steps", steps, need)
        require(constraint != "tour" or max_steps is None, "max_steps", max_steps, "None for a tour")
        uneven = lengths is not None and bool((lengths < count).any())
        require(
            shift == 1 or constraint == "none" or not uneven, "lengths", "rows of several lengths", "equal ones, or end"
        )
        rows = torch.arange(batch, device=points.device)[:, None]
        limit = real[:, shift:].sum(1) if max_steps is None else torch.full_like(rows[:, 0], steps)
        score = points.new_full((batch, beam), -torch.inf)
        score[:, 0] = 0.0
        done = torch.zeros(batch, beam, dtype=torch.bool, device=points.device)
        free = real[:, None].expand(-1, beam, -1).clone()
        made = torch.empty(batch, beam, 0, dtype=torch.int64, device=points.device)
        given = self.go.expand(batch, beam, -1)
        h, c = (t[0][:, None].expand(-1, beam, -1) for t in (h, c))
        for step in range(steps + shift):
            flat = (given.flatten(0, 1)[:, None], tuple(t.flatten(0, 1)[None].contiguous() for t in (h, c)))
            states, (h, c) = self.decoder(*flat)
            h, c = (t[0].unflatten(0, (batch, beam)) for t in (h, c))
            found = self.head(states[:, 0].unflatten(0, (batch, beam)), places, real[:, None]).log_softmax(-1)
            allowed = real[:, None].expand_as(free) if constraint == "none" else free
            if shift:
                allowed = allowed.clone()
                allowed[..., 0] = ~free[..., 1:].any(-1) if constraint == "tour" else True
                over = limit <= step
                allowed[..., 1:] &= ~over[:, None, None]
                allowed[..., 0] |= over[:, None]
            found = found.masked_fill(~allowed, -torch.inf)
            if shift:  # what has ended stays as it is
                stay = torch.full_like(found, -torch.inf)
                stay[..., 0] = 0.0
                found = torch.where(done[..., None], stay, found)
            width = found.shape[2]
            score, best = (score[..., None] + found).flatten(1).topk(beam, dim=1)
            parent, place = best // width, best % width
            made = torch.cat((made[rows, parent], place[..., None] - shift), dim=2)
            free = free[rows, parent].scatter(2, place[..., None], False)
            done = done[rows, parent] | ((place == 0) if shift else False)
            h, c = h[rows, parent], c[rows, parent]
            given = points[rows, (place - shift).clamp(min=0)]
            if bool(done.all()):
                break
        top = made[:, 0]
        while shift and top.shape[1] and bool((top[:, -1] == NOTHING).all()):
            top = top[:, :-1]
        return top, score[:, 0]

    def extra_repr(self) -> str:
        return f"in_dim={self.in_dim}, dim={self.dim}, end={self.end is not None}"
