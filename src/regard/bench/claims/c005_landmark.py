"""005 Landmark attention: trained on short texts, a model reads long ones by fetching a few blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models import LandmarkGPT
from ...ops import insert_landmarks
from ..small_training import ByteText, train
from .claim import Outcome, Scale

PAPER, SLUG = "005", "landmark"
SAYS = (
    "Landmark attention: a model trained on texts of 512 tokens reads much longer ones at the perplexity of a model that attends to "
    "everything it remembers, while each token fetches 2 to 4 blocks of 50; one that remembers nothing is worse."
)
NLL, READ = "negative log-likelihood of a byte", "remembered tokens read"
_VOCAB = 257


def measure(scale: Scale) -> Outcome:
    trained, length, piece, block, steps = scale.pick((256, 1024, 64, 16, 300), (48, 96, 16, 4, 3))
    out = Outcome(
        f"a model of bytes trained here on texts of {trained}, read to {length} bytes in pieces of {piece}", "text"
    )
    model = _trained(trained, block, steps, scale)
    texts = ByteText().held_out(scale.pick(4, 2), length)
    nothing = "nothing fetched (the piece and the begun block)"
    ways: dict[str, int] = {nothing: 0} | {f"{k} blocks fetched": k for k in scale.pick((1, 2, 4, 8), (1, 2))}
    for label, topk in ways.items():
        values = _read(model, texts, piece, block, topk)
        out.add(label, NLL, "nats", values, against=None if topk == 0 else nothing)
        out.add(label, READ, "tokens", float(topk * (block + 1)))
    plain = [
        _nll(model(insert_landmarks(text[None, -trained:], _VOCAB - 1, block)), text, trained, block) for text in texts
    ]
    out.add("the last bytes alone, as in training", NLL, "nats", plain)
    none, two = out.row(nothing, NLL).mean, out.row("2 blocks fetched", NLL).mean
    most = max(ways.values())
    out.check("2 blocks fetched, nats a byte below nothing fetched", none - two, at_least=0.0, digits=3)
    last = out.row(f"{most} blocks fetched", NLL).mean
    out.check(f"2 blocks above {most} blocks, nats a byte", two - last, at_most=0.05, digits=3)
    return out


def _trained(length: int, block: int, steps: int, scale: Scale) -> LandmarkGPT:
    torch.manual_seed(0)
    model = LandmarkGPT(_VOCAB, scale.pick(128, 32), scale.pick(3, 2), 4)
    text, generator = ByteText(), torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        ids = insert_landmarks(text.batch(scale.pick(8, 4), length, generator), _VOCAB - 1, block)
        logits, wanted = model(ids)[:, :-1], ids[:, 1:]
        real = wanted != _VOCAB - 1  # where landmarks stand is known, not told
        return torch.nn.functional.cross_entropy(logits[real], wanted[real])

    train(model.parameters(), loss, steps)
    return model.eval()


@torch.no_grad()
def _read(model: LandmarkGPT, texts: Tensor, piece: int, block: int, topk: int) -> list[float]:
    """Nats a byte of the second half of each text, read piece by piece."""
    cache = model.new_cache(block=block, topk=topk, variant="paper")
    logits = torch.cat([model(part, cache=cache) for part in texts.split(piece, dim=1)], 1)
    half = texts.shape[1] // 2
    losses = torch.nn.functional.cross_entropy(
        logits[:, half - 1 : -1].transpose(1, 2), texts[:, half:], reduction="none"
    )
    return losses.mean(1).tolist()


@torch.no_grad()
def _nll(logits: Tensor, text: Tensor, length: int, block: int) -> float:
    """Of the second half of a text with landmarks, as long as those of the training."""
    ids = insert_landmarks(text[-length:], _VOCAB - 1, block)
    wanted, half = ids[1:], len(ids) // 2
    real = (wanted != _VOCAB - 1) & (torch.arange(len(wanted)) >= half)
    return float(torch.nn.functional.cross_entropy(logits[0, :-1][real], wanted[real]))
