"""021 SEA: the estimated map finds the keys that the teacher looks at; memory grows with the length and not with its square."""

from __future__ import annotations

import torch
from torch import Tensor

from ...integrations.transformers import attach
from ...losses.runner import fit
from ...losses.sea import sea_distillation
from ...nn.sequence.sparse_linear_attention import EstimatedSparseAttention
from ...ops.attention import attention
from ...ops.masks import causal
from ...ops.reference import attention_scores, softmax_with_lse
from ..text import token_windows
from .claim import Outcome, Scale
from .memory import peak_bytes

PAPER, SLUG = "021", "sea"
SAYS = (
    "SEA: a linear attention distilled to estimate the attention map picks the keys that matter, so that a few exact scores a query come "
    "near the dense layer, at memory linear in the length."
)
LEARNED, FRESH, WINDOW = "SEA, distilled", "SEA, not trained", "sliding window"
MASS, ERROR = "teacher's attention mass kept", "error of the result over the teacher's size"


def measure(scale: Scale) -> Outcome:
    out = Outcome("", "a held-out prompt and layer")
    told = _quality(out, scale)
    _memory(out, scale)
    out.setting = told
    return out


def _quality(out: Outcome, scale: Scale) -> str:
    model, tokenizer = scale.language_model()
    length, k, width = scale.pick((192, 16, 64), (48, 8, 16))
    depth = model.config.get_text_config().num_hidden_layers
    layers = [depth // 3, 2 * depth // 3]
    windows = token_windows(tokenizer, length, scale.pick(14, 3))
    held = scale.pick((4, 9), (1,))
    found: dict[str, dict[str, list[float]]] = {label: {MASS: [], ERROR: []} for label in (LEARNED, FRESH, WINDOW)}
    for layer in layers:
        items = [_teacher(model, ids, layer) for ids in windows]
        torch.manual_seed(0)
        heads, dim = items[0][0].shape[1], items[0][0].shape[3]
        student = EstimatedSparseAttention(heads, dim, k=k, width=width, causal=True, max_len=length)
        for label in (FRESH, LEARNED):
            if label == LEARNED:
                _distil(student, [item for number, item in enumerate(items) if number not in held], scale.pick(150, 2))
            for number in held:
                _take(found[label], student, items[number])
        for number in held:
            _window(found[WINDOW], items[number], k)
    for label, figures in found.items():
        for figure, values in figures.items():
            out.add(label, figure, "", values)
    mass = {label: out.row(label, MASS).mean for label in found}
    error = {label: out.row(label, ERROR).mean for label in found}
    out.check(f"{MASS}, lead over a window of as many keys", mass[LEARNED] - mass[WINDOW], at_least=0.0, digits=3)
    out.check(f"{MASS}, lead over the estimator before training", mass[LEARNED] - mass[FRESH], at_least=0.0, digits=3)
    out.check(f"{ERROR}, over that of the window", error[LEARNED] / error[WINDOW], at_most=1.0)
    out.note = "; ".join(f"{label}: mass {mass[label]:.3f}, error {error[label]:.3f}" for label in found) + ". "
    return (
        f"layers {layers} of {scale.model_name}, {length} tokens, {k} keys a head and query, {width} bins, {scale.pick(150, 2)} steps of "
        "distillation on twelve prompts (the paper: whole models, many epochs)"
    )


@torch.no_grad()
def _teacher(model: object, ids: list[int], layer: int) -> tuple[Tensor, ...]:
    """q, k, v with a kv head for each query head, the scaled scores, and the head outputs."""
    calls = []
    with attach(model) as session:  # type: ignore[arg-type]
        session.observers.append(lambda call: calls.append(call) if call.layer == layer else None)
        model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)  # type: ignore[operator]
    call = calls[0]
    group = call.q.shape[1] // call.k.shape[1]
    k, v = call.k.repeat_interleave(group, 1), call.v.repeat_interleave(group, 1)
    scores = call.q @ k.transpose(-1, -2) * call.q.shape[3] ** -0.5
    return call.q, k, v, scores, attention(call.q, k, v, mask=causal)


def _distil(student: EstimatedSparseAttention, items: list[tuple[Tensor, ...]], steps: int) -> None:
    def loss(item: tuple[Tensor, ...]) -> Tensor:
        q, k, v, scores, context = item
        return sea_distillation(student(q, k, v, return_record=True)[1], scores, context)

    fit(student, loss, items, steps=steps, lr=2e-3, warmup=10, schedule="cosine", clip=1.0, progress=False)
    student.eval()


@torch.no_grad()
def _take(found: dict[str, list[float]], student: EstimatedSparseAttention, item: tuple[Tensor, ...]) -> None:
    q, k, v, scores, context = item
    student.eval()
    out, record = student(q, k, v, return_record=True)
    weights = softmax_with_lse(scores.masked_fill(~record.visible(), -torch.inf))[0]
    late = slice(q.shape[2] // 2, None)  # rows with something to leave out
    found[MASS].append(float((weights * record.kept()).sum(-1)[:, :, late].mean()))
    found[ERROR].append(float((out - context)[:, :, late].norm() / context[:, :, late].norm()))


@torch.no_grad()
def _window(found: dict[str, list[float]], item: tuple[Tensor, ...], k: int) -> None:
    """The last k - 1 keys and the first: as many as SEA reads on average."""
    from ...ops.masks import sink, sliding_window

    q, keys, v, _, context = item
    mask = (sliding_window(k - 1) | sink(1)) & causal
    out = attention(q, keys, v, mask=mask)
    scale = q.shape[3] ** -0.5
    weights = softmax_with_lse(attention_scores(q, keys, mask=causal, q_offset=0, scale=scale))[0]
    late = slice(q.shape[2] // 2, None)
    found[MASS].append(float((weights * mask.materialize(q.shape[2], q.shape[2])).sum(-1)[:, :, late].mean()))
    found[ERROR].append(float((out - context)[:, :, late].norm() / context[:, :, late].norm()))


def _memory(out: Outcome, scale: Scale) -> None:
    torch.manual_seed(0)
    short = scale.pick(2048, 512)
    student = EstimatedSparseAttention(2, 16, k=16, width=128, causal=True, max_len=2 * short).eval()
    used = {}
    for length in (short, 2 * short):
        q, k, v = torch.randn(3, 1, 2, length, 16)
        used[length] = peak_bytes(lambda q=q, k=k, v=v: student(q, k, v))  # type: ignore[misc]
        out.add(f"{length} tokens", "peak memory of a forward", "bytes", used[length])
    ratio = used[2 * short] / used[short]
    out.check(f"peak memory at {2 * short} tokens over that at {short}", ratio, at_most=2.5)
