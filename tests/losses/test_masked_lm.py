"""Masked fine-tuning: which tokens are learned, and what the loss says of them."""

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import CharTokenizer, tiny_llama

from regard.losses import MaskedCollator, chat_parts, masked_lm_loss, weighted_lm_loss


def drawn(batch=3, length=7, vocab=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, length, vocab, generator=generator, dtype=dtype)
    labels = torch.randint(vocab, (batch, length), generator=generator)
    return logits.requires_grad_(), labels


def test_loss_without_weights_is_the_plain_one():
    logits, labels = drawn()
    labels[0, 3:] = -100
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(weighted_lm_loss(logits, labels), want)


def test_loss_by_weights_and_by_sample():
    logits, labels = drawn()
    weights = torch.tensor([[0, 1, 2, 0, 1, 0, 0.5]] * 3, dtype=torch.float64)
    weights[2] = 0
    each = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none") * weights[:, 1:]
    torch.testing.assert_close(weighted_lm_loss(logits, labels, weights), each.sum() / weights[:, 1:].sum())
    rows = each.sum(1)[:2] / weights[:2, 1:].sum(1)
    torch.testing.assert_close(weighted_lm_loss(logits, labels, weights, "samples"), rows.mean())


def test_no_gradient_where_nothing_is_learned():
    logits, labels = drawn()
    weights = torch.ones_like(labels, dtype=torch.float64)
    weights[:, 4] = 0
    (gradient,) = torch.autograd.grad(weighted_lm_loss(logits, labels, weights), logits)
    assert gradient[:, 3].abs().max() == 0 and gradient[:, 6].abs().max() == 0 and gradient[:, 2].abs().min() > 0
    loss = weighted_lm_loss(logits, torch.full_like(labels, -100))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and gradient.abs().max() == 0


def test_collator_marks_the_learned_parts():
    batch = MaskedCollator(CharTokenizer(), eos=True)([[("ab", 0), ("cd", 2)], [("x", 0), ("y", 1), ("zw!", 0)]])
    ids = CharTokenizer()("abcd")["input_ids"]
    assert batch["input_ids"][0].tolist() == [*ids, 0, 0]
    assert batch["labels"][0].tolist() == [-100, -100, *ids[2:], 0, -100]
    assert batch["weights"].tolist() == [[0, 0, 2, 2, 2, 0], [0, 1, 0, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 6]


def test_begin_tokens():
    class Begins(CharTokenizer):
        def __init__(self):
            super().__init__()
            self.bos_token_id = 5

    sample = [("a", 0), ("b", 1)]
    a, b = CharTokenizer()("ab")["input_ids"]
    assert MaskedCollator(Begins())([sample])["labels"].tolist() == [[-100, -100, b]]
    parts = MaskedCollator(Begins(), bos="parts")([sample])
    assert parts["input_ids"].tolist() == [[5, a, 5, b]] and parts["labels"].tolist() == [[-100, -100, 5, b]]
    assert MaskedCollator(Begins(), bos=False)([sample])["input_ids"].tolist() == [[a, b]]


def test_first_token_is_never_learned_and_ids_do_for_text():
    batch = MaskedCollator(pad=9)([[([3, 4], 1)], [([5, 6, 7], 1)]])
    assert batch["labels"].tolist() == [[-100, 4, -100], [-100, 6, 7]]
    assert batch["input_ids"][0, 2] == 9


def test_long_samples():
    long, short = [([1, 2, 3, 4], 0), ([5], 1)], [([1, 2], 1)]
    drop = MaskedCollator(max_length=3)
    assert drop([long, short])["input_ids"].tolist() == [[1, 2]] and drop.dropped == 1
    left = MaskedCollator(max_length=3, too_long="left")([long])
    assert left["input_ids"].tolist() == [[3, 4, 5]] and left["labels"].tolist() == [[-100, -100, 5]]
    assert MaskedCollator(max_length=3, too_long="right")([long])["input_ids"].tolist() == [[1, 2, 3]]
    with pytest.raises(ValueError, match=r"samples: got '5 tokens in sample 0', need at most 3"):
        MaskedCollator(max_length=3, too_long="error")([long])
    with pytest.raises(ValueError, match="samples: got 'none that fits'"):
        MaskedCollator(max_length=3)([long])


@pytest.mark.parametrize("isolate", [True, False])
def test_packing(isolate):
    torch.manual_seed(0)
    samples = [
        [(torch.randint(1, 100, (n,)).tolist(), 0), (torch.randint(1, 100, (n + 1,)).tolist(), 1)]
        for n in (2, 5, 3, 1, 4)
    ]
    packed = MaskedCollator(pack=16, isolate=isolate)(samples)
    padded = MaskedCollator()(samples)
    assert packed["input_ids"].shape[0] < 5
    assert (packed["labels"] >= 0).sum() == (padded["labels"] >= 0).sum()
    model = tiny_llama().double()
    with torch.no_grad():
        one, all_ = masked_lm_loss(model, packed), masked_lm_loss(model, padded)
    if isolate:  # samples of a row do not see each other
        torch.testing.assert_close(one, all_)
    else:
        assert (one - all_).abs() > 1e-6


def test_packing_takes_the_least_filled_row():
    samples = [[([1] * n, 1)] for n in (6, 7, 3, 4, 2)]
    batch = MaskedCollator(pack=10, isolate=False)(samples)
    assert batch["input_ids"].shape == (3, 10)
    assert sorted(batch["attention_mask"].sum(1).tolist()) == [
        6,
        7,
        9,
    ]  # 6 | 6, 7 | 6+3, 7 | 4 needs a row | 2 beside 4
    ids = MaskedCollator(pack=10, isolate=True)(samples)["position_ids"]
    assert ids.max() == 6


class Chat(CharTokenizer):
    chat_template = "yes"

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=False):
        text = "".join(f"<{m['role'][0]}>{m['content']}</>" for m in messages)
        return text + ("<a>" if add_generation_prompt else "")


def test_chat_parts():
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "?"},
    ]
    parts = chat_parts(Chat(), messages)
    assert parts == [("<u>hi</>", 0), ("<a>", 0), ("yo</>", 1), ("<u>?</>", 0)]
    assert chat_parts(Chat(), messages, learn=("user",)) == [("<u>hi</>", 1), ("<a>yo</>", 0), ("<u>?</>", 1)]
    with pytest.raises(ValueError, match="tokenizer: got 'CharTokenizer', need one with a chat template"):
        chat_parts(CharTokenizer(), messages)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: MaskedCollator(CharTokenizer())(["text"]), TypeError, "sample: got str"),
        (lambda: MaskedCollator(CharTokenizer())([["text"]]), TypeError, "sample: got str"),
        (lambda: MaskedCollator()([[("text", 1)]]), ValueError, "tokenizer: got None"),
        (lambda: MaskedCollator(CharTokenizer())([[("text", -1)]]), ValueError, "weight: got -1"),
        (lambda: MaskedCollator(pack=8, max_length=4), ValueError, "max_length: got 4, need None"),
        (lambda: MaskedCollator(too_long="cut"), ValueError, "too_long: unknown name 'cut'"),
        (lambda: MaskedCollator(eos=True), ValueError, "eos: got True"),
        (lambda: weighted_lm_loss(torch.zeros(1, 2, 3), torch.zeros(1, 3).long()), ValueError, "labels: got"),
        (
            lambda: weighted_lm_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), -torch.ones(1, 2)),
            ValueError,
            "weights",
        ),
    ],
)
def test_bad_input(make, error, text):
    with pytest.raises(error, match=text):
        make()
