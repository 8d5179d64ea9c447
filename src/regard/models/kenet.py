"""KeNet: which of many labels a document has, from the document, knowledge about what it names, and the labels' own meaning (165).

Li, Chen, Zeng 2024, "KeNet: Knowledge-enhanced Doc-Label Attention Network for Multi-label Text Classification" (ICASSP, arXiv
2403.01767). No code is known. The six blocks are documented; their formulas are a reconstruction (see `nn/sequence/label_attention.py`), so
that no number is claimed to be the authors'. Knowledge is text that the caller brings: `local_knowledge` looks words up in a table of one's
own, where the paper links entities to Wikipedia.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import bad_type, require, require_int, require_tensor
from ..nn.sequence.label_attention import GatedFusion, LabelAttention, SelfAttentivePool
from ..ops.attention import attention
from .attention_classifier import RecurrentEncoder

__all__ = ["KeNet", "KeNetOutput", "label_vectors", "local_knowledge"]


@dataclass
class KeNetOutput:
    """logits: (B, L), a label is present where > 0. label_states: (B, L, dim), what each is decided from. shares: (3, B, L), how much of it
    came from the document, the knowledge, and the document read with the knowledge."""

    logits: Tensor
    label_states: Tensor
    shares: Tensor


def local_knowledge(words: Sequence[str], table: Mapping[str, Sequence[str]], most: int = 5) -> list[str]:
    """The texts (lists of words) that a table holds on words of a document, one behind another, of at most `most` different entries."""
    if not isinstance(table, Mapping):
        raise bad_type("table", table, "a mapping word -> words")
    require_int("most", most, 0)
    found = list(dict.fromkeys(word for word in words if word in table))[:most]
    return [word for entry in found for word in table[entry]]


def label_vectors(names: Sequence[str], vectors: Mapping[str, Tensor]) -> Tensor:
    """(L, width): each label the mean of the vectors of its words (split at anything but letters and digits); unknown words have none.

    A label without a known word gets small random numbers.
    """
    require(len(vectors) > 0, "vectors", "none", "at least one word vector")
    width = len(next(iter(vectors.values())))
    made = []
    for name in names:
        words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
        known = [vectors[word].float() for word in words if word in vectors]
        made.append(torch.stack(known).mean(0) if known else 0.1 * torch.randn(width))
    return torch.stack(made)


class KeNet(nn.Module):
    """Document and knowledge -> a logit for each label.

    Both texts: embeddings, then one BiLSTM (shared). Three readings, the document's, the knowledge's, and that of the document's tokens
    after they have attended to the knowledge, each give a vector a label: by label attention and by self-attention with a hop a label,
    joined by gates; the three are joined by gates too. Two linear layers shared by all labels give the logits.

    Args:
        encoder: contextual embeddings: a Hugging Face encoder (takes `input_ids`, `attention_mask`), or an int: the size of a vocabulary,
            for an embedding trained here. embed_dim: its width (default: the encoder's own hidden_size).
        num_labels: L. label_init: (L, width), as `LabelAttention` takes it (`label_vectors` makes it).
        hidden: of the BiLSTM, each direction (dim = 2 * hidden). use_knowledge: False leaves the second text out altogether.
        self_attention: False leaves the self-attention out (label attention alone).

    `forward(input_ids, attention_mask, knowledge_ids, knowledge_mask)`: masks 1 at real tokens (default: not 0). Rows without knowledge
    have no part of it, and no gradient reaches it from them; in place of ids, floating (B, T, embed_dim) are taken as embeddings.
    """

    def __init__(
        self,
        encoder: int | nn.Module,
        num_labels: int,
        embed_dim: int | None = None,
        hidden: int = 128,
        *,
        label_init: Tensor | None = None,
        use_knowledge: bool = True,
        self_attention: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(encoder, nn.Module):
            found = getattr(getattr(encoder, "config", None), "hidden_size", None)
            width = found if embed_dim is None else embed_dim
            require(width is not None, "embed_dim", None, "the encoder's width: it has no config.hidden_size")
            self.embed: nn.Module = encoder
        else:
            width = 128 if embed_dim is None else embed_dim
            self.embed = nn.Embedding(require_int("encoder", encoder, 1), width, padding_idx=0)
        self.encoder = RecurrentEncoder(int(width), hidden)  # type: ignore[arg-type]
        dim, self.use_knowledge = self.encoder.dim, use_knowledge
        self.label_attention = LabelAttention(dim, num_labels, label_init)
        readings = 3 if use_knowledge else 1
        self.self_attention = (
            nn.ModuleList(SelfAttentivePool(dim, num_labels) for _ in range(readings)) if self_attention else None
        )
        self.both = nn.ModuleList(GatedFusion(dim, 2) for _ in range(readings)) if self_attention else None
        self.fusion = GatedFusion(dim, readings)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        knowledge_ids: Tensor | None = None,
        knowledge_mask: Tensor | None = None,
    ) -> KeNetOutput:
        document, real = self._encode("input_ids", input_ids, attention_mask)
        readings, present = [(document, real)], [real.any(1)]
        batch = len(document)
        if self.use_knowledge and knowledge_ids is not None and knowledge_ids.shape[1] > 0:
            require(len(knowledge_ids) == batch, "knowledge_ids", f"batch {len(knowledge_ids)}", f"{batch}")
            known, known_real = self._encode("knowledge_ids", knowledge_ids, knowledge_mask)
            some = known_real.any(1)
            q, k = document[:, None], known[:, None]
            joined = attention(q, k, k, mask=known_real[:, None, None])[:, 0]
            readings += [(known, known_real), (joined, real & some[:, None])]
            present += [some, some & present[0]]
        parts = [self._read(number, *reading) for number, reading in enumerate(readings)]
        missing = self.fusion.n - len(parts)
        parts += [torch.zeros_like(parts[0])] * missing
        present += [torch.zeros_like(present[0])] * missing
        here = [p[:, None].expand(parts[0].shape[:2]) for p in present]
        shares = self.fusion.weights(parts, here)
        states = (shares * torch.stack(parts)).sum(0)
        shares = F.pad(shares[..., 0], (0, 0, 0, 0, 0, 3 - len(shares)))
        return KeNetOutput(self.out(self.dropout(states))[..., 0], states, shares)

    def _read(self, number: int, states: Tensor, mask: Tensor) -> Tensor:
        by_label = self.label_attention(states, mask)
        if self.self_attention is None or self.both is None:
            return by_label
        return self.both[number]([by_label, self.self_attention[number](states, mask)])

    def _encode(self, name: str, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if ids.is_floating_point():
            require_tensor(name, ids, dims=3)
            real = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
            embeds = ids
        else:
            require_tensor(name, ids, dims=2)
            real = ids != 0 if mask is None else mask.bool()
            if isinstance(self.embed, nn.Embedding):
                embeds = self.embed(ids)
            else:
                embeds = self.embed(input_ids=ids, attention_mask=real.long()).last_hidden_state
        require(
            real.shape == embeds.shape[:2], f"{name} mask", f"shape {tuple(real.shape)}", f"{tuple(embeds.shape[:2])}"
        )
        return self.encoder(self.dropout(embeds), real)[0], real
