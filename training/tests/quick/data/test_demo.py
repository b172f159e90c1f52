"""The demo dataset: what is committed is what the generator makes, and held out is held out."""

import json
import re
from pathlib import Path

import pytest

from lora_trainer.data import demo

COMMITTED = Path(__file__).parents[4] / "public" / "datasets" / "demo"
SLOTS = {
    **dict.fromkeys(demo.ROOMS, "ROOM"),
    **dict.fromkeys(demo.DEVICES, "DEVICE"),
    **dict.fromkeys(demo.LEVELS, "NUMBER"),
    **dict.fromkeys(demo.HOURS, "NUMBER"),
    "am": "HALF",
    "pm": "HALF",
}


def read(name):
    """Return the (system, request, record) turns of each row of a committed file."""
    lines = (COMMITTED / name).read_text(encoding="utf-8").splitlines()
    return [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]


def pattern(request):
    """Return the request's words, slot values replaced by their kind: what a wording is."""
    words = re.findall(r"[a-z]+", request.lower().replace("'", ""))
    return tuple(SLOTS.get(word, word) for word in words)


def runs(words, length):
    """Return every run of `length` words that stand next to each other."""
    return {words[start : start + length] for start in range(len(words) - length + 1)}


TRAIN, EVAL = read("train.jsonl"), read("eval.jsonl")


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_regenerating_gives_the_committed_bytes(name, tmp_path):
    demo.write_demo(tmp_path)
    assert (tmp_path / name).read_bytes() == (COMMITTED / name).read_bytes()


def test_command_writes_both_files(tmp_path, capsys):
    assert demo.main([str(tmp_path / "new")]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(path).name for path in written] == ["train.jsonl", "eval.jsonl"]


def test_command_without_a_folder_shows_its_usage(capsys):
    assert demo.main([]) == 64
    assert "usage" in capsys.readouterr().err


def test_sizes_are_as_described():
    assert (len(TRAIN), len(EVAL)) == (demo.TRAIN_ROWS, 64)


def test_no_request_occurs_twice():
    requests = [request.lower() for _, request, _ in TRAIN + EVAL]
    assert len(set(requests)) == len(requests)


def test_no_held_out_wording_occurs_in_train():
    assert not {pattern(row[1]) for row in TRAIN} & {pattern(row[1]) for row in EVAL}


def test_every_held_out_row_has_a_wording_of_its_own():
    assert len({pattern(row[1]) for row in EVAL}) == len(EVAL)


def test_every_held_out_wording_joins_words_that_training_never_joins():
    seen = set().union(*(runs(pattern(row[1]), 2) for row in TRAIN))
    assert all(runs(pattern(row[1]), 2) - seen for row in EVAL)


def test_most_word_triples_of_the_held_out_wordings_are_new():
    seen = set().union(*(runs(pattern(row[1]), 3) for row in TRAIN))
    triples = [triple for row in EVAL for triple in runs(pattern(row[1]), 3)]
    assert sum(triple not in seen for triple in triples) > len(triples) / 2


def test_no_held_out_row_pairs_a_room_and_a_device_that_training_pairs():
    def pairs(rows):
        return {(record["room"], record["device"]) for record in (json.loads(r[2]) for r in rows)}

    assert not pairs(TRAIN) & pairs(EVAL)


def test_every_slot_value_of_the_held_out_rows_occurs_in_train():
    for field in ("room", "device", "set", "at"):
        seen = {json.loads(row[2])[field] for row in TRAIN}
        assert {json.loads(row[2])[field] for row in EVAL} <= seen


def test_every_record_has_the_same_fields_in_the_same_order():
    assert {tuple(json.loads(row[2])) for row in TRAIN + EVAL} == {("room", "device", "set", "at")}


def test_every_record_follows_from_its_request():
    for _, request, record in TRAIN + EVAL:
        fields = json.loads(record)
        words = pattern(request)
        assert re.search(rf"\b{fields['room']}\b", request, re.IGNORECASE)
        assert fields["device"] in request
        assert (fields["at"] == "now") == ("HALF" not in words)
        assert fields["set"] in {"on", "off"} or any(
            word in request.lower() and fields["set"] == value
            for word, value in demo.LEVELS.items()
        )


def test_intents_are_balanced_in_both_files():
    for rows in (TRAIN, EVAL):
        sets = [json.loads(row[2])["set"] for row in rows]
        for share in (sets.count("on"), sets.count("off")):
            assert abs(share / len(rows) - 1 / 3) < 0.05


def test_another_seed_makes_other_rows():
    assert demo.make_train_rows(seed=1) != demo.make_train_rows(seed=2)
