"""Preparing data: same bytes on any number of cores, bounded memory, reports, splits."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.data.encoder import TokenizerFactory
from lora_trainer.data.prepare import PrepareSettings, prepare_splits
from lora_trainer.data.resolve import SourceSpec
from lora_trainer.data.tokenizer_pool import EncodingPool
from lora_trainer.errors import (
    DataError,
    TrainerError,
)
from support.prepare import END, WordFactory, pairs, run, save_tokenizer, texts, write


def test_rows_are_tokenized_and_reported(tmp_path):
    spec = write(tmp_path / "d.jsonl", [*texts("a bb", "ccc"), *texts("ccc")])
    dataset, report = run(spec, tmp_path)
    assert [dataset[n][0].tolist() for n in range(3)] == [[1, 2, END], [3, END], [3, END]]
    expected = {"rows_read": 3, "rows_used": 3, "rows_repeated": 1, "tokens": 7, "max_tokens": 3}
    assert expected.items() <= asdict(report).items()
    assert report.formats == ["text"]
    json.dumps(asdict(report))


def test_only_the_first_rows_of_each_dataset_are_taken_where_asked(tmp_path):
    spec = write(tmp_path / "d.jsonl", texts("a bb", "ccc", "a"))
    short = replace(spec, max_samples=2)
    assert run([short, short], tmp_path)[1].rows_read == 4
    assert run(spec, tmp_path)[1].rows_read == 3  # from a cache entry of its own


def test_a_second_start_reuses_the_tokens_without_loading_a_tokenizer(tmp_path):
    spec = write(tmp_path / "d.jsonl", texts("a b"))
    _, first = run(spec, tmp_path)

    class NoFactory(WordFactory):
        def __call__(self):
            raise AssertionError("tokenizer loaded")

    _, reused = run(spec, tmp_path, encoder=NoFactory())
    assert (first.cache, reused.cache) == ("made", "reused")
    assert {**asdict(reused), "cache": ""} == {**asdict(first), "cache": ""}


@pytest.mark.parametrize(
    "changes",
    [{"max_seq_length": 99}, {"too_long": "drop"}, {"encoder": WordFactory("other template")}],
)
def test_other_settings_or_another_template_make_new_tokens(tmp_path, changes):
    spec = write(tmp_path / "d.jsonl", texts("a b"))
    run(spec, tmp_path)
    assert run(spec, tmp_path, **changes)[1].cache == "made"


def test_other_content_makes_new_tokens(tmp_path):
    run(write(tmp_path / "d.jsonl", texts("a b")), tmp_path)
    dataset, report = run(write(tmp_path / "d.jsonl", texts("a ccc")), tmp_path)
    assert report.cache == "made"
    assert dataset[0][0].tolist() == [1, 3, END]


def test_a_damaged_cache_is_made_again_and_said(tmp_path):
    spec = write(tmp_path / "d.jsonl", texts("a b"))
    dataset, _ = run(spec, tmp_path)
    (dataset.directory / "ids.bin").write_bytes(b"")
    again, report = run(spec, tmp_path)
    assert report.cache.startswith("remade: ")
    assert again[0][0].tolist() == [1, 1, END]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    spec = write(path, texts("a b"))
    with pytest.raises(DataError, match="changed while it was being read"):
        run(spec, tmp_path, progress=lambda _rows: path.write_text('{"text": "more words"}'))
    assert not any(entry.is_dir() for entry in (tmp_path / "cache").iterdir())


def test_progress_ends_at_the_number_of_rows(tmp_path):
    seen = []
    run(write(tmp_path / "d.jsonl", pairs(1500)), tmp_path, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1500


def test_bad_rows_are_skipped_and_counted_where_allowed(tmp_path):
    rows = [*texts("a", "b", "c"), {"text": ""}, {"text": 5}, {"text": ""}]
    dataset, report = run(write(tmp_path / "d.jsonl", rows), tmp_path, on_bad_rows="skip")
    assert len(dataset) == 3
    assert report.rows_skipped == {
        "field 'text' is empty": 2,
        "field 'text' is int, expected a string": 1,
    }


def test_too_many_skipped_rows_are_refused(tmp_path):
    rows = [*texts("a"), {"text": ""}, {"text": ""}]
    with pytest.raises(DataError, match="max_bad_rows_share"):
        run(write(tmp_path / "d.jsonl", rows), tmp_path, on_bad_rows="skip")


def test_a_dataset_of_bad_rows_alone_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a\\u0000"}\n' * 2)
    with pytest.raises(DataError, match="2 of 2 rows"):
        run(SourceSpec(str(tmp_path / "d.jsonl")), tmp_path, on_bad_rows="skip")


@pytest.mark.parametrize(
    ("too_long", "lengths", "truncated", "dropped"),
    [
        ("truncate", [2, 4], 1, {}),
        ("drop", [2], 0, {"longer than max_seq_length": 1}),
    ],
)
def test_too_long_rows_are_cut_or_dropped_and_counted(
    tmp_path, too_long, lengths, truncated, dropped
):
    spec = write(tmp_path / "d.jsonl", texts("a", "a b c d e f"))
    dataset, report = run(spec, tmp_path, max_seq_length=4, too_long=too_long)
    assert dataset.lengths.tolist() == lengths
    assert (report.rows_truncated, report.rows_dropped) == (truncated, dropped)
    assert report.longest_tokens == 7


def test_too_long_rows_are_refused_with_the_length_that_would_do(tmp_path):
    spec = write(tmp_path / "d.jsonl", texts("a", "a b c d e f"))
    with pytest.raises(DataError) as caught:
        run(spec, tmp_path, max_seq_length=4, too_long="error")
    assert "set max_seq_length: 7" in caught.value.block()
    assert f"{spec.path_or_id}:2" in caught.value.block()


def test_a_row_cut_before_its_answer_is_dropped_and_said(tmp_path):
    rows = [
        {"prompt": "a b c d e", "completion": "f"},
        {"prompt": "a", "completion": "b"},
    ]
    dataset, report = run(write(tmp_path / "d.jsonl", rows), tmp_path, max_seq_length=4)
    assert len(dataset) == 1
    assert report.rows_dropped == {"no supervised token is left after truncation": 1}


def test_a_dataset_of_which_nothing_is_left_is_refused(tmp_path):
    spec = write(tmp_path / "d.jsonl", [{"prompt": "a b c d e", "completion": "f"}])
    with pytest.raises(DataError, match="no row is left") as caught:
        run(spec, tmp_path, max_seq_length=4)
    assert "1 rows: no supervised token is left" in caught.value.block()


def test_the_mask_audit_refuses_a_dataset_for_a_single_row(tmp_path):
    spec = write(tmp_path / "d.jsonl", texts("a", "mute", "b"))
    with pytest.raises(DataError) as caught:
        run(spec, tmp_path, on_bad_rows="skip")
    assert "1 rows have an invalid loss mask" in caught.value.block()
    assert f"{spec.path_or_id}:2" in caught.value.block()


def test_wrong_masks_throughout_stop_the_work_early(tmp_path):
    seen = []
    spec = write(tmp_path / "d.jsonl", texts(*["mute"] * 5000))
    with pytest.raises(DataError, match="at least"):
        run(spec, tmp_path, progress=seen.append)
    assert seen[-1] < 5000


def test_sources_that_cannot_be_found_are_reported_together(tmp_path):
    specs = [SourceSpec(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(DataError) as caught:
        run(specs, tmp_path)
    assert len(caught.value.problems) == 2


def test_each_row_knows_its_source_whatever_its_format(tmp_path):
    first = write(tmp_path / "a.jsonl", texts("a", "b"))
    second = write(tmp_path / "b.jsonl", pairs(1))
    dataset, report = run([first, second], tmp_path)
    assert dataset.sources.tolist() == [0, 0, 1]
    assert report.formats == ["text", "completion"]


def splits(train, evaluation, fraction, tmp_path, seed=0):
    return prepare_splits(
        train,
        evaluation,
        fraction,
        seed,
        encoder=WordFactory(),
        settings=PrepareSettings(100, "truncate", "error", 0.0),
        vocab_size=50_000,
        cache_dir=tmp_path / "cache",
        num_workers=1,
    )


def test_a_training_row_that_stands_in_the_eval_dataset_is_left_out_and_said(tmp_path):
    train = write(tmp_path / "train.jsonl", texts("a", "Held  OUT", "b"))
    held = write(tmp_path / "eval.jsonl", texts("held out"))
    data = splits([train], [held], 0.0, tmp_path)
    assert data.train_rows.tolist() == [0, 2]
    assert data.eval_rows.tolist() == [0]
    assert data.warnings[0].startswith("1 training rows are also in eval_dataset")


def test_an_eval_dataset_that_is_the_training_dataset_is_refused(tmp_path):
    train = write(tmp_path / "train.jsonl", texts("a", "b"))
    with pytest.raises(DataError, match="every training row"):
        splits([train], [train], 0.0, tmp_path)


def test_an_eval_fraction_holds_rows_out_of_the_same_dataset(tmp_path):
    train = write(tmp_path / "train.jsonl", pairs(100))
    data = splits([train], [], 0.1, tmp_path)
    assert len(data.eval_rows) == 10
    assert sorted([*data.train_rows, *data.eval_rows]) == list(range(100))
    assert data.eval is data.train


def test_no_evaluation_is_asked_for_and_none_is_made(tmp_path):
    data = splits([write(tmp_path / "train.jsonl", pairs(9))], [], 0.0, tmp_path)
    assert data.eval is None
    assert len(data.train_rows) == 9


def test_a_factorys_digest_follows_tokenizer_template_and_what_is_trained(tmp_path):
    folder = save_tokenizer(tmp_path / "model")
    factories = [
        TokenizerFactory(folder),
        TokenizerFactory(folder, chat_template="{{ messages }}"),
        TokenizerFactory(folder, train_on="last"),
    ]
    digests = {factory.digest for factory in factories}
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert len({*digests, TokenizerFactory(folder).digest}) == 4


def test_small_datasets_start_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(EncodingPool, "__enter__", lambda _: pytest.fail("pool started"))
    run(write(tmp_path / "d.jsonl", pairs(2000)), tmp_path, workers=8)


def test_a_reused_cache_of_many_rows_opens_fast(tmp_path):
    spec = write(tmp_path / "d.jsonl", pairs(20_000))
    run(spec, tmp_path)
    start = time.monotonic()
    _, report = run(spec, tmp_path)
    assert report.cache == "reused"
    assert time.monotonic() - start < 1


junk = st.lists(
    st.sampled_from(['{"text": "a"}', '{"text": ""}', "{", "[]", "null", '"x"', "\x00", "7"]),
    max_size=8,
)


@given(lines=junk, policy=st.sampled_from(["error", "skip"]))
def test_no_file_makes_prepare_raise_anything_but_our_own_errors(tmp_path_factory, lines, policy):
    folder = tmp_path_factory.mktemp("junk")
    (folder / "d.jsonl").write_text("\n".join(lines))
    try:
        dataset, _ = run(SourceSpec(str(folder / "d.jsonl")), folder, on_bad_rows=policy)
    except TrainerError:
        return
    assert len(dataset) > 0
