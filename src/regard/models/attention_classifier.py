"""A text classifier that shows what it attends to: a recurrent encoder, attention pooling, a linear layer.

The network of Jain and Wallace 2019 (arXiv 1902.10186) that Attention AT (003, arXiv 2009.12064) and VAT (028) train. Code read for
numbers: shunk031/attention-meets-perturbation @ d40a5ca (MIT), `amep/models/bc/at_advt.py`, `amep/models/qa/at_advt.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._checks import bad_value, require, require_int, require_name
from ..nn.sequence.additive_attention import AdditiveAttention, AttentionPooling, ScaledDotPooling

__all__ = ["AttentionClassifier", "Classified", "RecurrentEncoder"]

RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU}


@dataclass
class Classified:
    """Output of a classifier with attention; what the losses of 003, 028 and 166 and `regard.lens.saliency` read.

    Attributes:
        logits: (B, classes), or (B, 1): one logit for class 1 against class 0.
        attention_logits: (B, T), before the softmax, -inf at masked places. attention: (B, T), after it.
        states: (B, T, dim), what is attended to. context: (B, dim), what is classified.
    """

    logits: Tensor
    attention_logits: Tensor
    attention: Tensor
    states: Tensor
    context: Tensor


class RecurrentEncoder(nn.Module):
    """A one-layer LSTM or GRU over padded rows: embeddings (B, T, in_dim), mask -> states (B, T, dim) and the last state (B, dim).

    `dim` is 2 * hidden where it reads both ways. Padding may lie on either side and changes nothing; masked places inside a row are
    read as zero vectors. States of masked places outside the row are zero.
    """

    def __init__(self, in_dim: int, hidden: int, kind: str = "lstm", bidirectional: bool = True) -> None:
        super().__init__()
        require_name("kind", kind, RECURRENT)
        self.rnn = RECURRENT[kind](in_dim, hidden, batch_first=True, bidirectional=bidirectional)
        self.dim = hidden * (2 if bidirectional else 1)

    def forward(self, embeds: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, length = embeds.shape[:2]
        mask = torch.ones(batch, length, dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
        place = torch.arange(length, device=embeds.device)
        first = torch.where(mask, place, length - 1).amin(1)
        last = torch.where(mask, place, 0).amax(1)
        lengths = (last - first + 1).clamp(min=1)
        moved = (place + first[:, None]).clamp(max=length - 1)[..., None]
        rows = (embeds * mask[..., None]).gather(1, moved.expand(-1, -1, embeds.shape[2]))
        packed = nn.utils.rnn.pack_padded_sequence(rows, lengths.cpu(), batch_first=True, enforce_sorted=False)
        read, state = self.rnn(packed)
        states = nn.utils.rnn.pad_packed_sequence(read, batch_first=True, total_length=length)[0]
        back = (place - first[:, None]).clamp(min=0)[..., None]
        states = states.gather(1, back.expand(-1, -1, self.dim))
        inside = (place >= first[:, None]) & (place <= last[:, None])
        h = state[0] if isinstance(state, tuple) else state
        return states * inside[..., None], h.transpose(0, 1).flatten(1)


class AttentionClassifier(nn.Module):
    """Embedding -> encoder -> attention pooling -> linear: token ids to a class, with the attention that led there.

    Args:
        vocab_size: None where `inputs_embeds` will always be given. num_classes: 1 means one logit (binary).
        embed_dim, hidden: of embeddings, and of the recurrent encoder in each direction (the paper: 300 and 128).
        encoder: "lstm", "gru", or "none": attention over the embeddings themselves.
        attention: "additive" or "dot", or an `AttentionPooling` of your own (of the encoder's width).
        pair: whether a second text (a question) is the query: `question_ids`, read by an encoder of its own, whose last state is the query
            and has a part in the output, as in the paper's question answering.
        dropout: on embeddings and on what is classified. bidirectional: of the encoder.

    Input names are those of Hugging Face models. `attention_mask` (B, T) is 1 at real tokens; without it, tokens other than `pad_id`
    (default 0) are real. `logits_delta` (B, T) is added to the attention logits. Rows without a token give the output of an
    empty context.

    Loads the authors' state dicts, of one text (BCAttentionATModel) and of pairs (QAVanillaModel).

    Raises:
        ValueError, TypeError: sizes and names; both or neither of `input_ids` and `inputs_embeds`; a question where there is no `pair`.
    """

    def __init__(
        self,
        vocab_size: int | None,
        num_classes: int = 2,
        embed_dim: int = 300,
        hidden: int = 128,
        *,
        encoder: str = "lstm",
        attention: str | AttentionPooling = "additive",
        pair: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = True,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        require_int("num_classes", num_classes, 1)
        require_int("embed_dim", embed_dim, 1)
        require_name("encoder", encoder, (*RECURRENT, "none"))
        self.num_classes, self.pad_id = num_classes, pad_id
        self.embedding = None
        if vocab_size is not None:
            self.embedding = nn.Embedding(require_int("vocab_size", vocab_size, 1), embed_dim, padding_idx=pad_id)
        one = encoder == "none"
        self.encoder = None if one else RecurrentEncoder(embed_dim, hidden, encoder, bidirectional)
        self.question_encoder = (
            RecurrentEncoder(embed_dim, hidden, encoder, bidirectional) if pair and not one else None
        )
        dim = embed_dim if self.encoder is None else self.encoder.dim
        if isinstance(attention, str):
            require_name("attention", attention, ("additive", "dot"))
            if attention == "additive":
                attention = AdditiveAttention(dim, query_dim=dim if pair else None)
            else:
                attention = ScaledDotPooling(dim, query=pair)
        require(attention.dim == dim, "attention", f"dim {attention.dim}", f"dim {dim}, that of the encoder")
        self.pooling, self.pair = attention, pair
        inner = max(1, dim // 2) if pair else dim
        self.question_proj = nn.Linear(dim, inner) if pair else None
        self.context_proj = nn.Linear(dim, inner) if pair else None
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(inner, num_classes)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        logits_delta: Tensor | None = None,
    ) -> Classified:
        embeds, mask = self._embed("input_ids", input_ids, attention_mask, inputs_embeds)
        states = embeds if self.encoder is None else self.encoder(embeds, mask)[0]
        query = None
        if self.pair:
            asked, asked_mask = self._embed("question_ids", question_ids, question_mask, None)
            if self.question_encoder is None:
                count = asked_mask.sum(1, keepdim=True).clamp(min=1)
                query = (asked * asked_mask[..., None]).sum(1) / count
            else:
                query = self.question_encoder(asked, asked_mask)[1]
        elif question_ids is not None:
            raise bad_value("question_ids", "a tensor", "None: the classifier was built without pair=True")
        pooled = self.pooling(states, mask, query, logits_delta)
        seen = pooled.context
        if self.pair:
            assert self.context_proj is not None and self.question_proj is not None and query is not None
            seen = torch.tanh(self.context_proj(seen) + self.question_proj(query))
        logits = self.output(self.dropout(seen))
        return Classified(logits, pooled.logits, pooled.weights, states, pooled.context)

    def _embed(
        self, name: str, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if (ids is None) == (embeds is None):
            got = "both" if ids is not None else "neither"
            raise bad_value(f"{name}, inputs_embeds", got, "exactly one of them")
        if embeds is None:
            assert ids is not None
            require(self.embedding is not None, name, "ids", "inputs_embeds: the classifier has no vocabulary")
            require(ids.dim() == 2, name, f"shape {tuple(ids.shape)}", "(B, T)")
            assert self.embedding is not None
            embeds = self.embedding(ids)
        if mask is None:
            mask = torch.ones(embeds.shape[:2], device=embeds.device) if ids is None else ids != self.pad_id
        require(mask.shape == embeds.shape[:2], "mask", f"shape {tuple(mask.shape)}", f"{tuple(embeds.shape[:2])}")
        return self.dropout(embeds), mask.bool()

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under our names."""
        rooms = {
            "_word_embed.token_embedder_tokens.": "embedding.",
            "_encoder._module.": "encoder.rnn.",
            "_paragraph_encoder._module.": "encoder.rnn.",
            "_question_encoder._module.": "question_encoder.rnn.",
            "_p_out.": "context_proj.",
            "_q_out.": "question_proj.",
            "_output.": "output.",
        }
        made, pooling = {}, {}
        for key, value in state.items():
            if key.startswith("_attention_layer."):
                pooling[key.removeprefix("_attention_layer.")] = value
                continue
            room = next((room for room in rooms if key.startswith(room)), None)
            made[key if room is None else rooms[room] + key.removeprefix(room)] = value
        kind = ScaledDotPooling if "attn1.weight" in pooling else AdditiveAttention
        return made | {f"pooling.{key}": value for key, value in kind.official_keys(pooling).items()}
