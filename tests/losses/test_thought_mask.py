"""Thought-mask fine-tuning and answers in rounds."""

import pytest
import torch
from tests.tiny import CharTokenizer, tiny_llama

from regard.bench.refinement import refine, scores_by_round
from regard.losses import MaskedCollator, ThoughtMaskCollator, masked_lm_loss, refinement_loss, thought_parts

RECORD = {"query": "2+2*2=", "thoughts": ["8", "7"], "answer": "6"}


def test_only_the_answer_is_learned_and_the_thoughts_are_read():
    model = tiny_llama().double()
    collate = ThoughtMaskCollator(CharTokenizer(), variant="paper")
    batch = collate([RECORD])
    assert (batch["labels"] >= 0).sum() == 2  # the answer and the end
    with torch.no_grad():
        loss = masked_lm_loss(model, batch)
        other = masked_lm_loss(model, collate([{**RECORD, "thoughts": ["9", "7"]}]))
        relabelled = {**batch, "labels": torch.where(batch["labels"] >= 0, batch["labels"], -100)}
        assert masked_lm_loss(model, relabelled) == loss
    assert (loss - other).abs() > 1e-9  # another thought, another loss
    logits = model(batch["input_ids"]).logits
    logits.retain_grad()
    from regard.losses import weighted_lm_loss

    weighted_lm_loss(logits, batch["labels"], batch["weights"]).backward()
    learned = (batch["labels"][0] >= 0).nonzero()[:, 0] - 1
    touched = logits.grad[0].abs().sum(-1).nonzero()[:, 0]
    assert touched.tolist() == learned.tolist()


def test_variants_and_own_form():
    class Begins(CharTokenizer):
        def __init__(self):
            super().__init__()
            self.bos_token_id = 3

    tokenizer = Begins()
    released = ThoughtMaskCollator(tokenizer)([RECORD])
    paper = ThoughtMaskCollator(tokenizer, variant="paper")([RECORD])
    assert (released["input_ids"] == 3).sum() == 2 and (paper["input_ids"] == 3).sum() == 1
    text = "".join(part for part, _ in thought_parts(**RECORD)[:-1])
    own = ThoughtMaskCollator(tokenizer)([{"q": text, "a": "6"}])
    assert all(torch.equal(own[key], released[key]) for key in own)
    everything = thought_parts(**RECORD, learn=("query", "thought", "instruction", "answer"))
    assert (MaskedCollator(tokenizer)([everything])["labels"] >= 0).sum() == len(text) + 1


def test_refinement_loss_adds_the_open_terms():
    model, batch = tiny_llama(), ThoughtMaskCollator(CharTokenizer())([RECORD])
    with torch.no_grad():
        plain = masked_lm_loss(model, batch)
        assert refinement_loss(model, batch) == plain
        found = refinement_loss(model, batch, lambda m, b: torch.tensor(0.25), None, (0.5, 2.0, 0.0))
    torch.testing.assert_close(found, 0.5 * plain + 1.5)
    with pytest.raises(ValueError, match="confidence: got None"):
        refinement_loss(model, batch, weights=(1, 0, 1))


class Chat(CharTokenizer):
    chat_template = "yes"

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=False):
        return "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "<a>"


def test_rounds():
    model, tokenizer = tiny_llama(), Chat()
    answers = refine(model, tokenizer, "hello", rounds=3, instruction="more", max_new_tokens=5)
    assert len(answers) == 3
    first = tokenizer("<u>hello<a>", return_tensors="pt")["input_ids"]
    made = model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=5, do_sample=False)
    assert answers[0] == tokenizer.decode(made[0, first.shape[1] :]).strip()  # one round is plain generation
    plain = refine(model, CharTokenizer(), "hello", rounds=1, max_new_tokens=3)
    assert len(plain) == 1
    with pytest.raises(ValueError, match="chat: got True"):
        refine(model, CharTokenizer(), "hello", chat=True)
    assert scores_by_round([["a", "b"], ["b", "b"]], lambda n, a: float(a == "b")) == [0.5, 1.0]
    with pytest.raises(ValueError, match="rounds"):
        scores_by_round([["a"], ["a", "b"]], lambda n, a: 0.0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ThoughtMaskCollator(variant="code"), "variant"),
        (lambda: ThoughtMaskCollator(CharTokenizer())([{"query": "a"}]), "without answer"),
        (lambda: thought_parts("q", [], ""), "answer"),
        (
            lambda: thought_parts("q", [], "a", learn=("thoughts",)),
            "learn: unknown name 'thoughts'; did you mean thought",
        ),
        (lambda: refine(None, None, "q", rounds=0), "rounds"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text):
        make()
