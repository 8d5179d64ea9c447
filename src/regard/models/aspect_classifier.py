"""Sentiment towards an aspect, the networks of PSSAttention (166): `AspectAttention` on any encoder, and a memory network.

Su et al. 2021 (arXiv 2103.03446), DeepLearnXMU/PSSAttention @ 7e23d8d (no licence): `Bert(+AS)/bert_model.py` read for numbers;
`MN(+AS)/models/FINAL_BL_MN.py` (TensorFlow 1, not run) read for its formulas. What differs: the memory network's mean over the aspect
leaves padding out, where theirs counts it. Their third network, TNet-ATT (Theano), is not here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import bad_value, require, require_int, require_name
from ..nn.sequence.aspect_attention import AspectAttention
from ..ops.reference import softmax_with_lse
from .attention_classifier import RECURRENT, Classified, RecurrentEncoder

__all__ = ["AspectClassifier", "AspectMemoryNetwork", "aspect_position_weight"]


def aspect_position_weight(distance: Tensor, max_distance: int = 40) -> Tensor:
    """1 - distance / max_distance of each token's distance to the aspect; 0 beyond it and at padding (distance -1). float32."""
    require_int("max_distance", max_distance, 1)
    near = (distance >= 0) & (distance <= max_distance)
    return torch.where(near, 1.0 - distance.double() / max_distance, 0.0).float()


class AspectClassifier(nn.Module):
    """Token ids and where the aspect is -> its sentiment, with the attention that led there (`Classified`).

    Args:
        encoder: "lstm", "gru", "none", or a Hugging Face encoder (takes `inputs_embeds`, `attention_mask`, gives `last_hidden_state`),
            whose width is `dim`. vocab_size, embed_dim, hidden: of an encoder made here.
        num_classes: default 3 (negative, positive, neutral: the authors' order). dropout: before the last layer; the authors take 0.1.

    `forward(input_ids, attention_mask, aspect_mask, context_mask=, inputs_embeds=, logits_delta=)`: masks (B, T); aspect_mask: the
    aspect's tokens; context_mask: what may be attended to (default `attention_mask`; leave special tokens out here); the aspect never is.

    Loads `affine.*`, `classifier.*` and the encoder `bert.*` of the authors' MyBert (its unused `dense1`, `dense2` are dropped).
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        num_classes: int = 3,
        embed_dim: int = 300,
        hidden: int = 64,
        *,
        encoder: str | nn.Module = "lstm",
        dim: int | None = None,
        dropout: float = 0.1,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        require_int("num_classes", num_classes, 2)
        self.pad_id, self.embedding = pad_id, None
        self.encoder: nn.Module | None = None
        if isinstance(encoder, str):
            require_name("encoder", encoder, (*RECURRENT, "none"))
            if vocab_size is not None:
                self.embedding = nn.Embedding(require_int("vocab_size", vocab_size, 1), embed_dim, padding_idx=pad_id)
            made = None if encoder == "none" else RecurrentEncoder(embed_dim, hidden, encoder)
            self.encoder, self.dim = made, embed_dim if made is None else made.dim
        else:
            self.encoder = encoder
            width = getattr(getattr(encoder, "config", None), "hidden_size", None) if dim is None else dim
            require(width is not None, "dim", dim, "the encoder's width: it has no config.hidden_size")
            self.dim = int(width)  # type: ignore[arg-type]
        self.attention = AspectAttention(self.dim)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.dim, num_classes)

    def get_input_embeddings(self) -> nn.Module | None:
        if self.embedding is None and hasattr(self.encoder, "get_input_embeddings"):
            return self.encoder.get_input_embeddings()  # type: ignore[union-attr, operator]
        return self.embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        aspect_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        logits_delta: Tensor | None = None,
    ) -> Classified:
        if (input_ids is None) == (inputs_embeds is None):
            got = "both" if input_ids is not None else "neither"
            raise bad_value("input_ids, inputs_embeds", got, "exactly one of them")
        if aspect_mask is None:
            raise bad_value("aspect_mask", None, "a mask (B, T) of the aspect's tokens")
        if attention_mask is None:
            attention_mask = torch.ones_like(aspect_mask) if input_ids is None else input_ids != self.pad_id
        if inputs_embeds is None:
            table = self.get_input_embeddings()
            require(table is not None, "input_ids", "ids", "inputs_embeds: the classifier has no vocabulary")
            inputs_embeds = table(input_ids)  # type: ignore[misc]
        states = self._encode(inputs_embeds, attention_mask)
        return self.classify(
            states, attention_mask if context_mask is None else context_mask, aspect_mask, logits_delta
        )

    def classify(
        self, states: Tensor, context_mask: Tensor, aspect_mask: Tensor, logits_delta: Tensor | None = None
    ) -> Classified:
        """What follows the encoder, from its states (B, T, dim)."""
        pooled = self.attention(states, context_mask, aspect_mask, logits_delta)
        return Classified(
            self.classifier(self.dropout(pooled.context)), pooled.logits, pooled.weights, states, pooled.context
        )

    def _encode(self, embeds: Tensor, mask: Tensor) -> Tensor:
        if self.encoder is None:
            return embeds
        if isinstance(self.encoder, RecurrentEncoder):
            return self.encoder(embeds, mask)[0]
        return self.encoder(inputs_embeds=embeds, attention_mask=mask.long()).last_hidden_state

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under our names."""
        rooms = {"affine": "attention.aspect_proj", "bert": "encoder", "classifier": "classifier"}
        made = {}
        for key, value in state.items():
            room, _, rest = key.partition(".")
            if room not in ("dense1", "dense2"):
                made[f"{rooms.get(room, room)}.{rest}"] = value
        return made


class AspectMemoryNetwork(nn.Module):
    """A memory network: u = mean of the aspect's words; weights = softmax(A(x) . M u); u becomes sum of weights C(x) + H u; classes W u.

    Args: vocab_size, dim (300 in the paper), num_classes; hops: times the memory is read, default 1 with the same weights each time.

    `forward(input_ids, attention_mask, aspect_ids)`: aspect_ids (B, A), 0 = padding. Gives `Classified`: attention of the last hop;
    `logits_delta` (B, T) is added in every hop.
    """

    def __init__(self, vocab_size: int, dim: int = 300, num_classes: int = 3, hops: int = 1, pad_id: int = 0) -> None:
        super().__init__()
        require_int("hops", hops, 1)
        self.hops, self.pad_id = hops, pad_id
        self.A, self.B, self.C = (nn.Embedding(vocab_size, dim) for _ in range(3))
        self.M, self.H = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.W = nn.Linear(dim, num_classes, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        aspect_ids: Tensor | None = None,
        *,
        logits_delta: Tensor | None = None,
    ) -> Classified:
        if aspect_ids is None:
            raise bad_value("aspect_ids", None, "the aspect's tokens (B, A)")
        mask = (input_ids != self.pad_id) if attention_mask is None else attention_mask.bool()
        real = (aspect_ids != self.pad_id)[..., None]
        u = (self.B(aspect_ids) * real).sum(1) / real.sum(1).clamp(min=1)
        keys, values = self.A(input_ids), self.C(input_ids)
        for _ in range(self.hops):
            logits = (keys @ self.M(u)[..., None])[..., 0].masked_fill(~mask, -torch.inf)
            weights = softmax_with_lse(logits if logits_delta is None else logits + logits_delta)[0]
            context = (weights[:, None] @ values)[:, 0]
            u = context + self.H(u)
        return Classified(self.W(u), logits, weights, values, context)
