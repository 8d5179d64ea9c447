"""Context-dependency scores, and the data made from them."""

import pytest
import torch

import regard
from regard.lens import ContextDependency, context_dependency, keyword_recall, span_dependency
from regard.losses import MaskedCollator, add_indicator, add_tag_token, chat_parts, masked_lm_loss
from tiny import tiny_llama
from tiny_chat import SIZE, chat_tokenizer

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "The key is red.\nIs it"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Which?"},
    {"role": "assistant", "content": "The red one."},
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=SIZE)


def by_hand(model, prompt, users, response, layer):
    weights = regard.record(model, prompt.inputs).weights(layer)[0]
    return float(weights[:, response][..., users].sum(-1).amax(0).mean())


def test_is_its_definition(model):
    tokenizer = chat_tokenizer()
    prompt = regard.chat_spans(tokenizer, TALK, add_generation_prompt=False)
    [paper] = context_dependency(model, tokenizer, [TALK], layer=1, variant="paper")
    [released] = context_dependency(model, tokenizer, [TALK], layer=1)
    answers = [turn.tokens for turn in prompt.turns[0] if turn.role == "assistant"]
    users = prompt.spans["user"][0]
    wide = (users | prompt.spans["system"][0]) & (prompt.input_ids[0] != tokenizer("\n")["input_ids"][0])
    for number, (begin, end) in enumerate(answers):
        assert paper.responses[number] == pytest.approx(by_hand(model, prompt, users, slice(begin, end), 1))
        longer = slice(begin, end + 2)  # the end token and the line break
        assert released.responses[number] == pytest.approx(by_hand(model, prompt, wide, longer, 1))
    assert released.score == pytest.approx(sum(released.responses) / 2)


def test_between_zero_and_one_and_zero_without_a_user(model):
    tokenizer = chat_tokenizer()
    alone = [{"role": "assistant", "content": "Hello."}]
    scores = context_dependency(model, tokenizer, [TALK, alone], variant="paper")
    assert all(0 < value < 1 for value in scores[0].responses)
    assert scores[1].score == 0.0


def test_what_is_cut_off_has_no_score(model):
    begin = regard.chat_spans(chat_tokenizer(), TALK).turns[0][-1].tokens[0]
    cut = context_dependency(model, chat_tokenizer(), [TALK], max_tokens=begin)[0]
    assert cut.responses[0] == cut.responses[0] and cut.responses[1] != cut.responses[1]
    assert cut.score == cut.responses[0]
    unanswered = context_dependency(model, chat_tokenizer(), [TALK[:2]])[0]
    assert unanswered.responses == () and unanswered.score != unanswered.score


def test_attention_all_on_the_user_scores_one():
    weights = torch.zeros(1, 2, 4, 4)
    weights[0, 0, :, 0], weights[0, 1, :, 1] = 1.0, 1.0
    users, response = torch.tensor([[False, True, False, False]]), torch.tensor([[[False, False, True, True]]])
    assert span_dependency(weights, users, response).item() == 1.0
    assert span_dependency(weights, users, torch.zeros_like(response)).isnan().all()


def test_tags_go_where_answers_depend_on_the_context():
    marked = add_indicator([TALK], [ContextDependency((0.7, 0.2))], threshold=0.6)[0]
    assert marked[1]["content"] == "The key is red.\nIs it. [IND]" and marked[3]["content"] == "Which?"
    assert TALK[1]["content"].endswith("Is it")  # what was given is not changed
    low = add_indicator([TALK], [(0.1, 0.9)])[0]
    assert low[1]["content"] == "The key is red.\nIs it." and low[3]["content"] == "Which? [IND]"
    assert add_indicator([TALK], [(0.1, 0.1)], variant="paper")[0] == TALK
    assert add_indicator([TALK], [(float("nan"), 0.1)])[0] == TALK


def test_tuning_on_tagged_data_learns_the_tag():
    tokenizer, model = chat_tokenizer(), tiny_llama(3, vocab_size=SIZE)
    number = add_tag_token(model, tokenizer)
    assert tokenizer("a [IND]", add_special_tokens=False)["input_ids"][-1] == number
    assert add_tag_token(model, tokenizer) == number and model.get_input_embeddings().weight.shape[0] > number
    talks = [
        [{"role": "user", "content": "Go"}, {"role": "assistant", "content": answer}] for answer in ("abba", "cddc")
    ]
    data = add_indicator(talks, [(0.9,), (0.1,)])
    batch = MaskedCollator(tokenizer, bos=False)([chat_parts(tokenizer, messages) for messages in data])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = masked_lm_loss(model, batch)
        loss.backward()
        optimizer.step()
    said = []
    for text in ("Go. [IND]", "Go."):
        prompt = regard.chat_spans(tokenizer, [{"role": "user", "content": text}])
        said.append(
            tokenizer.decode(
                model.generate(**prompt.inputs, max_new_tokens=4, do_sample=False)[0, prompt.input_ids.shape[1] :]
            )
        )
    assert said == ["abba", "cddc"]


def test_keyword_recall():
    words = ["eat", "sandwich", "park"]
    assert keyword_recall(words, "Eat a SANDWICH, in the\npark!") == 1.0
    assert keyword_recall(words, "sandwiches at the car-park") == pytest.approx(1 / 3)
    assert keyword_recall(words, "") == 0.0


def test_bad_input(model):
    with pytest.raises(ValueError, match="layer"):
        context_dependency(model, chat_tokenizer(), [TALK], layer=7)
    with pytest.raises(TypeError, match="conversations"):
        context_dependency(model, chat_tokenizer(), "hello")
    with pytest.raises(ValueError, match="chat template"):
        context_dependency(model, chat_tokenizer(None), [TALK])
    with pytest.raises(ValueError, match="scores"):
        add_indicator([TALK], [(0.4,)])
    with pytest.raises(ValueError, match="users"):
        span_dependency(
            torch.zeros(1, 1, 3, 3), torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 1, 3, dtype=torch.bool)
        )
