"""Labelled texts: planted truth, real docstrings, files of every kind, and the errors for sets that teach nothing."""

from __future__ import annotations

import json

import pytest
import torch

from regard.testbeds.text_classification import (
    LabelledTexts,
    Vocabulary,
    load_texts,
    planted_sentiment,
    python_docs,
    text_batch,
    text_batches,
    words_of,
)


def test_planted_words_decide_and_are_marked():
    data = planted_sentiment(200, classes=3, planted=2, decoy=0.5, seed=1)
    assert len(data) == 200 and set(data.labels) == {0, 1, 2}
    decoys = 0
    for text, label, marks in zip(data.texts, data.labels, data.rationales):
        cues = [word for word, mark in zip(text, marks) if mark]
        assert len(cues) == 2 and all(cue.startswith(f"cue{label}x") for cue in cues)
        assert sum("cue" in word for word in text) == 2
        decoys += f"decoy{label}" in text
    assert 70 < decoys < 130
    assert data == planted_sentiment(200, classes=3, planted=2, decoy=0.5, seed=1)
    noisy = planted_sentiment(400, noise=0.5, seed=2)
    wrong = sum(not any(f"cue{y}" in word for word in text) for text, y in zip(noisy.texts, noisy.labels))
    assert 60 < wrong < 140  # half of them random, of which half are right by chance


def test_python_docs_are_real_text_of_two_corners():
    data = python_docs(("numbers", "files"), length=(8, 30))
    counts = [data.labels.count(c) for c in (0, 1)]
    assert data.names == ("numbers", "files") and min(counts) > 50
    assert all(8 <= len(text) <= 30 for text in data.texts)
    assert len({tuple(text) for text in data.texts}) == len(data)
    assert not any("the" in text for text in python_docs(("numbers", "files"), drop=["the"]).texts)
    with pytest.raises(ValueError, match="names"):
        python_docs(("numbers", "music"))


def test_split_keeps_classes_apart_and_whole():
    data = planted_sentiment(100, classes=4)
    rest, held = data.split(0.2, seed=3)
    assert len(held) == 20 and len(rest) == 80
    assert all(held.labels.count(c) == 5 for c in range(4))
    assert not {tuple(t) for t in rest.texts} & {tuple(t) for t in held.texts}
    again = data.split(0.2, seed=3)[1]
    assert again == held and data.split(0.2, seed=4)[1] != held


def test_batches_are_padded_cover_everything_and_come_again():
    data = planted_sentiment(50)
    vocabulary = Vocabulary(data.texts)
    make = text_batches(data, vocabulary, batch=16, seed=1)
    epoch = [make(number) for number in range(4)]
    assert sorted(torch.cat([batch.places for batch in epoch]).tolist()) == list(range(50))
    assert torch.equal(make(2).input_ids, epoch[2].input_ids) and not torch.equal(make(4).places, epoch[0].places)
    one = epoch[0]
    assert torch.equal(one.attention_mask.bool(), one.input_ids != 0)
    assert one.rationales.sum(1).tolist() == [1] * 16 and not (one.rationales & (one.input_ids == 0)).any()
    assert [data.labels[i] for i in one.places] == one.labels.tolist()
    words = [vocabulary.words[i] for i in one.input_ids[0][one.attention_mask[0].bool()]]
    assert words == data.texts[one.places[0]]
    assert text_batch(data, vocabulary, [3], max_len=4).input_ids.shape == (1, 4)


def test_vocabulary_orders_by_frequency_and_has_an_unknown_word():
    vocabulary = Vocabulary([["a", "b", "b"], ["c", "b", "c"]], min_count=2)
    assert vocabulary.words == ["<pad>", "<unk>", "b", "c"]
    assert vocabulary.encode(["c", "a", "b", "z"]) == [3, 1, 2, 1]
    assert len(Vocabulary([["a", "b", "c"]], max_size=3)) == 3
    assert words_of("It's 3.5, No?") == ["it's", "3", ".", "5", ",", "no", "?"]


def test_files_and_folders(tmp_path):
    rows = [{"text": "good film", "label": "pos"}, {"text": "bad film", "label": "neg"}, {"text": "", "label": "neg"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n\n", encoding="utf-8")
    data = load_texts(tmp_path / "a.jsonl")
    assert (data.names, data.labels, data.skipped) == (("neg", "pos"), [1, 0], 2)
    assert data.texts == [["good", "film"], ["bad", "film"]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert load_texts(str(tmp_path / "a.json")).texts == data.texts
    (tmp_path / "a.csv").write_text('review,stars\n"good, film",10\nbad,9\n\nx\n')
    table = load_texts(tmp_path / "a.csv", "review", "stars")
    assert (table.names, table.labels, table.skipped) == (("9", "10"), [1, 0], 1)
    (tmp_path / "a.tsv").write_text("text\tlabel\ngood film\t1\nbad film\t0\n")
    assert load_texts(tmp_path / "a.tsv").labels == [1, 0]
    for name, text in (("pos", "good film"), ("neg", "bad film")):
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / "1.txt").write_text(text)
    assert load_texts(tmp_path / "folder").names == ("neg", "pos")
    assert len(load_texts(tmp_path / "a.jsonl", limit=2)) == 2


def test_sets_that_teach_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one class only"):
        LabelledTexts([["a"], ["b"]], [1, 1], ("x", "y"))
    with pytest.raises(ValueError, match="texts"):
        LabelledTexts([], [], ("x", "y"))
    with pytest.raises(ValueError, match="without a word"):
        LabelledTexts([["a"], []], [0, 1], ("x", "y"))
    with pytest.raises(ValueError, match="labels"):
        LabelledTexts([["a"], ["b"]], [0, 2], ("x", "y"))
    with pytest.raises(ValueError, match="rationales"):
        LabelledTexts([["a"], ["b"]], [0, 1], ("x", "y"), [[True], [True, False]])
    (tmp_path / "one.csv").write_text("text,label\na,1\nb,1\n")
    with pytest.raises(ValueError, match="one class only"):
        load_texts(tmp_path / "one.csv")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="source"):
        load_texts(tmp_path / "empty.jsonl")
    for source in (tmp_path / "none.csv", tmp_path / "a.bin"):
        with pytest.raises(ValueError, match="source"):
            load_texts(source)
    with pytest.raises(ValueError, match="length"):
        planted_sentiment(10, length=(2, 5), planted=3)
