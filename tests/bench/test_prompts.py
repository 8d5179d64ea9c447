"""What the long-context tasks ask: every answer stands in the prompt, and the questions come after it."""

import math

import pytest
import torch

import regard
from regard.bench.compare import Settings, compare
from regard.bench.prompts import ASKED, English, Words, prompts_for
from regard.bench.roster import at_budgets, parse_method
from regard.bench.tasks import loss_by_position
from regard.testbeds import recall
from tiny import CharTokenizer, tiny_llama


@pytest.mark.parametrize("task", ASKED)
def test_answers_stand_in_the_prompt(task):
    tokenizer = CharTokenizer()
    asked = English(tokenizer).asked(task, 1200, 3)
    again = English(tokenizer).asked(task, 1200, 3)
    assert asked == again and asked != English(tokenizer).asked(task, 1200, 4)
    assert len(asked.prompt) <= 1200 and len(asked.prompt) > 1150
    prompt, said = tokenizer.decode(asked.prompt), tokenizer.decode(asked.continuation)
    answers = "".join(c if is_answer else "|" for c, is_answer in zip(said, asked.answers, strict=True))
    for answer in answers.replace(",", "|").split("|"):
        assert answer.strip() in prompt
    assert any(asked.answers) and not asked.answers[0]


def test_tracking_is_a_chain():
    tokenizer = CharTokenizer()
    asked = English(tokenizer).asked("tracking", 1500, 0)
    prompt, said = tokenizer.decode(asked.prompt), tokenizer.decode(asked.continuation)
    name, value = said.split("VAR ")[1].split(" is ")[0], said.split(" is ")[1].split("\n")[0]
    for _ in range(3):
        name = prompt.split(f"VAR {name} = VAR ")[1].split("\n")[0]
    assert f"VAR {name} = {value}" in prompt


def test_aggregation_repeats_three_words():
    tokenizer = CharTokenizer()
    asked = English(tokenizer).asked("aggregation", 1500, 1)
    listed = tokenizer.decode(asked.prompt).split()
    common = tokenizer.decode(asked.continuation).split(" are ")[1].split(", ")
    least = min(listed.count(word) for word in common)
    assert least > 2 * max(listed.count(word) for word in set(listed) - set(common) if len(word) > 3)


def test_context_too_small_for_the_facts():
    with pytest.raises(ValueError, match="context: got 100"):
        English(CharTokenizer()).asked("recall", 100, 0)


def test_words_of_the_testbed():
    words = prompts_for(recall.tokenizer())
    assert isinstance(words, Words) and isinstance(prompts_for(CharTokenizer()), English)
    prompt, answer = words.needle(300, 0.5, 1)
    assert len(prompt) == 300 and prompt[-2] == recall.ASK
    at = prompt.index(prompt[-1])
    assert prompt[at + 1] == answer[0] and abs(at - 148) < 4
    asked = words.asked("recall", 400, 0)
    told = [token for token, is_answer in zip(asked.continuation, asked.answers, strict=True) if is_answer]
    assert len(asked.prompt) == 400 and len(told) == 16
    assert asked.continuation[0] == recall.ASK
    for key, value in zip(asked.continuation[1::2], asked.continuation[2::2]):
        assert asked.prompt[asked.prompt.index(key) + 1] == value
    with pytest.raises(ValueError, match="task: got 'tracking'"):
        words.asked("tracking", 400, 0)


def test_loss_by_position_is_the_mean_of_its_part():
    model = tiny_llama()
    ids = list(range(1, 98))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    want = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    torch.testing.assert_close(torch.tensor(loss_by_position(model, ids, 4)), want.view(4, 24).mean(1))
    assert len(loss_by_position(model, ids, 3, most=5)) == 3


def test_all_tasks_are_compared_at_several_budgets():
    roster = at_budgets(["sliding-window", "zero-tuning", "hip(budget=64)"], (0.5, 0.25), 1100)
    assert [label for label, _ in roster] == [
        "sliding-window @ 0.5",
        "sliding-window @ 0.25",
        "zero-tuning",
        "hip(budget=64)",
    ]
    tasks = ("agreement", "positions", *ASKED)
    settings = Settings("tiny", context=1100, decode=4, repeats=1, tasks=tasks, budget=(0.5, 0.25))
    result = compare(tiny_llama(max_position_embeddings=4096), CharTokenizer(), roster[:2], settings)
    assert not result.skipped
    for label in ("dense", "sliding-window @ 0.5", "sliding-window @ 0.25"):
        for figure in (*ASKED, "hits", "ppl@1/4", "ppl@4/4", "kl"):
            assert math.isfinite(result.mean(label, figure)), (label, figure)
    from regard.bench.report import markdown, page, table

    assert "Perplexity by position" in page(result) and table(result).columns
    lines = markdown(result).splitlines()
    assert (
        lines[2].startswith("| method | ") and sum(line.startswith("| sliding-window @ 0.5 |") for line in lines) == 1
    )
    with pytest.raises(ValueError, match="budget: got 0"):
        Settings("tiny", budget=(0.5, 0))


def test_the_shipped_model_reads_words_off_its_context():
    model, tokenizer = regard.load("tiny-recall")
    generator = torch.Generator().manual_seed(5)
    assert tokenizer("<ask> w7")["input_ids"] == [recall.ASK, 7 + len(recall.SPECIAL)]
    assert recall.accuracy(model, [recall.recall_sample(2048, 64, 16, generator)]) > 0.9
    assert recall.accuracy(model, [recall.copy_sample(2048, generator=generator)]) > 0.9
    label, window = parse_method("sliding-window", budget=0.05, context=2048)
    with regard.attach(model, window):
        assert recall.accuracy(model, [recall.recall_sample(2048, 64, 16, generator)]) < 0.5, label
