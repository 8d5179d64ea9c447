"""Tasks for circuits: their ground truth, read back from the prompts themselves."""

import json
import re

import pytest
import torch

from regard.lens import total_effects
from regard.testbeds import circuits
from regard.testbeds.circuits import arithmetic, colored_objects, indirect_object, multiple_choice, word_tokenizer
from tiny import CharTokenizer, tiny_llama


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def words(tokenizer, ids):
    return [tokenizer.convert_ids_to_tokens(int(i)).strip() for i in ids]


TASKS = {
    "ioi": indirect_object,
    "colours": colored_objects,
    "choice": multiple_choice,
    "digits": lambda t, n, s=0: multiple_choice(t, n, s, labels="digits", shuffle=True, shots=1),
    "sums": arithmetic,
    "all": lambda t, n, s=0: arithmetic(t, n, s, operations="+-*/", shots=0),
}


@pytest.mark.parametrize("task", TASKS)
def test_pairs_line_up(tokenizer, task):
    batch = TASKS[task](tokenizer, 12)
    clean, corrupted = batch.clean, batch.corrupted
    assert len(batch) == 12 == len(batch.texts)
    assert clean["input_ids"].shape == corrupted["input_ids"].shape
    assert torch.equal(clean["attention_mask"], corrupted["attention_mask"])
    assert (clean["input_ids"] != corrupted["input_ids"]).any(1).all()
    assert (batch.right != batch.wrong).all() and clean["attention_mask"][:, -1].all()
    assert all(span.any() and not (span & (clean["attention_mask"] == 0)).any() for span in batch.spans.values())
    again, other = TASKS[task](tokenizer, 12), TASKS[task](tokenizer, 12, 5)
    assert torch.equal(again.clean["input_ids"], clean["input_ids"]) and again.texts == batch.texts
    assert other.texts != batch.texts
    some = batch.rows([3, 1])
    assert some.texts == [batch.texts[3], batch.texts[1]] and torch.equal(some.right, batch.right[[3, 1]])
    if batch.choices is not None:
        assert (batch.choices == batch.right[:, None]).sum(1).eq(1).all()


def test_indirect_object(tokenizer):
    batch = indirect_object(tokenizer, 20)
    orders = set()
    for i, (clean, corrupted) in enumerate(batch.texts):
        right, wrong = words(tokenizer, [batch.right[i], batch.wrong[i]])
        named = [w for w in re.findall(r"\w+", clean) if w in circuits.NAMES]
        assert sorted(named) == sorted([right, wrong, wrong]) and named[2] == wrong
        others = [w for w in re.findall(r"\w+", corrupted) if w in circuits.NAMES]
        assert len(set(others)) == 3 and not set(others) & set(named)
        orders.add(named[0] == right)
        for name, word in (("io", right), ("s1", wrong), ("s2", wrong)):
            assert words(tokenizer, batch.clean["input_ids"][i][batch.spans[name][i]]) == [word]
    assert orders == {True, False}


def test_colored_objects(tokenizer):
    batch = colored_objects(tokenizer, 20)
    for i, (clean, corrupted) in enumerate(batch.texts):
        for text, answer in ((clean, batch.right[i]), (corrupted, batch.wrong[i])):
            asked = re.findall(r"color is the (\w+)\?", text)[1]
            color = re.search(rf"an? (\w+) {asked}\b", text.split("\n")[2]).group(1)
            assert words(tokenizer, [answer]) == [color.title()]
        example = re.search(r"color is the (\w+)\?\nA: (\w+)\n", clean)
        assert re.search(rf"an? {example.group(2).lower()} {example.group(1)}\b", clean.split("\n")[0])
        ids = batch.clean["input_ids"][i]
        shown = words(tokenizer, ids[batch.spans["right"][i]]) + words(tokenizer, ids[batch.spans["distractors"][i]])
        assert sorted(c.title() for c in shown) == sorted(words(tokenizer, batch.choices[i]))
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", clean)


@pytest.mark.parametrize("order", ["label", "word"])
@pytest.mark.parametrize("labels", ["letters", "digits", "random"])
def test_multiple_choice(tokenizer, labels, order):
    batch = multiple_choice(tokenizer, 16, labels=labels, shuffle=labels == "letters", order=order, shots=2)
    orders = set()
    for i, (clean, corrupted) in enumerate(batch.texts):
        for text, answer in ((clean, batch.right[i]), (corrupted, batch.wrong[i])):
            for line in text.split("\n"):
                word, said = re.search(r"label of (\w+)(?: is)? ?(\w*)$", line).groups()
                label = re.search(rf"(\w+): {word}\b" if order == "label" else rf"{word} (\w+)[,.]", line).group(1)
                assert said in ("", label)
            assert words(tokenizer, [answer]) == [label]
        assert words(tokenizer, batch.clean["input_ids"][i][batch.labels[i]]) == words(tokenizer, batch.choices[i])
        orders.add(tuple(words(tokenizer, batch.choices[i])))
    assert (len(orders) > 1) == (labels != "digits")


@pytest.mark.parametrize("op", "+-*/")
def test_arithmetic(tokenizer, op):
    batch = arithmetic(tokenizer, 16, operations=op, largest=12)
    signs = {"+": "plus", "-": "minus", "*": "times", "/": "over"}
    for i, (clean, corrupted) in enumerate(batch.texts):
        *shown, last = clean.split("\n")
        for line, answer in [(line, line.split()[-1]) for line in shown] + [
            (last, words(tokenizer, [batch.right[i]])[0])
        ]:
            a, sign, b = line.split()[:3]
            assert sign in (op, signs[op]) and int(answer) == eval(f"{a} {op.replace('/', '//')} {b}")
        tail = corrupted.split("\n")[-1]
        assert not set(tail.split()) & {op, signs[op], "="} and a in tail and b in tail
        ids = batch.clean["input_ids"][i]
        assert words(tokenizer, ids[batch.spans["a"][i]]) == [a] and words(tokenizer, ids[batch.spans["b"][i]]) == [b]
        assert words(tokenizer, ids[batch.spans["operation"][i]])[-1] == sign


def test_a_model_meets_a_task(tokenizer):
    model = tiny_llama(vocab_size=400)
    batch = colored_objects(tokenizer, 6)
    among = batch.accuracy(model, among_choices=True)
    assert 0 <= batch.accuracy(model) <= among <= 1
    if among:
        assert batch.solved(model, True).accuracy(model, True) == 1.0
    effects = total_effects(
        model, batch.clean, batch.corrupted, batch.label_margin(), position=-1, nodes=[(2, 1)], relative="none"
    )
    assert not effects.scores[2, 1].isnan()
    rows = torch.arange(6)
    torch.testing.assert_close(
        batch.label_loss()(batch.logits(model, 4), rows).exp().reciprocal() > 0.5,
        batch.label_loss()(batch.logits(model), rows) < 0.6931,
    )


def test_bad_settings(tokenizer):
    with pytest.raises(ValueError, match="tokenizer"):
        indirect_object(CharTokenizer(), 2)
    with pytest.raises(ValueError, match="labels"):
        multiple_choice(tokenizer, 2, labels="roman")
    with pytest.raises(ValueError, match="operations"):
        arithmetic(tokenizer, 2, operations="%")
    with pytest.raises(ValueError, match="count"):
        colored_objects(tokenizer, 0)
    batch = indirect_object(tokenizer, 2)
    with pytest.raises(ValueError, match="choices"):
        batch.label_loss()
    with pytest.raises(ValueError, match="rows"):
        batch.rows(torch.tensor([False, False]))


def test_pairs_from_files(tokenizer, tmp_path):
    from regard.testbeds.published_pairs import read_pairs

    batch = colored_objects(tokenizer, 5)
    rows = [
        [[text[i], f" {words(tokenizer, [ids[n]])[0]}"] for n, text in enumerate(batch.texts)]
        for i, ids in ((0, batch.right), (1, batch.wrong))
    ]
    rows[0].append(["fox", " red"])
    rows[1].append(["fox fox", " blue"])  # longer than its partner
    rows[0].append(["fox", " red blue"])
    rows[1].append(["boat", " blue"])  # not one token
    paths = [tmp_path / "clean.json", tmp_path / "corrupted.json"]
    for path, row in zip(paths, rows):
        path.write_text(json.dumps(row))
    again = read_pairs(tokenizer, *paths)
    assert (
        again.texts == batch.texts and torch.equal(again.right, batch.right) and torch.equal(again.wrong, batch.wrong)
    )
    assert torch.equal(again.corrupted["input_ids"], batch.corrupted["input_ids"]) and not again.spans
    assert len(read_pairs(tokenizer, *paths, limit=2)) == 2
    paths[1].write_text(json.dumps(rows[1][:-1]))
    with pytest.raises(ValueError, match="as many"):
        read_pairs(tokenizer, *paths)
    paths[1].write_text('{"prompt": 1}')
    with pytest.raises(ValueError, match="corrupted"):
        read_pairs(tokenizer, *paths)
