"""Text files become documents, and what is wrong with them is named."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.compress.corpus import check_corpus, fetch_corpus, read_documents
from nas.errors import CorpusUnavailable
from tests.compress.text_files import stories, write_jsonl


def test_the_three_kinds_of_file_hold_the_same_documents(tmp_path: Path) -> None:
    documents = stories(5)
    jsonl = write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "b.txt").write_text("\n\n".join(documents))
    pq.write_table(pa.table({"text": documents}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("\n".join(documents))
    for file in (jsonl, tmp_path / "b.txt", tmp_path / "c.parquet", tmp_path / "d.txt"):
        assert list(read_documents([file])) == documents


def test_a_paragraph_keeps_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\none\ntwo\n \n\nthree\r\n")
    assert list(read_documents([tmp_path / "a.txt"])) == ["one\ntwo", "three"]


@given(st.lists(st.sampled_from(["", " ", "\t"]), max_size=3), st.lists(st.sampled_from(["", " "]), max_size=3), st.booleans())
@settings(max_examples=25, deadline=None)
def test_blank_lines_around_the_text_do_not_change_its_documents(before: list[str], after: list[str], paragraphs: bool) -> None:
    text = ["one", "two", *([""] if paragraphs else []), "three"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.txt"
        file.write_text("\n".join([*before, *text, *after]))
        assert list(read_documents([file])) == (["one\ntwo", "three"] if paragraphs else ["one", "two", "three"])


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "x.jsonl", ["second"])
    write_jsonl(tmp_path / "b.jsonl", ["first"])
    (tmp_path / "README.md").write_text("not a document")
    corpus = check_corpus([tmp_path])
    assert list(read_documents(corpus.files)) == ["first", "second"]
    assert (corpus.num_documents, corpus.num_bytes) == (2, len("firstsecond"))


def test_the_digest_follows_name_and_content(tmp_path: Path) -> None:
    first = check_corpus([write_jsonl(tmp_path / "a.jsonl", ["x"])]).digest
    assert check_corpus([write_jsonl(tmp_path / "a.jsonl", ["x"])]).digest == first
    assert check_corpus([write_jsonl(tmp_path / "b.jsonl", ["x"])]).digest != first
    assert check_corpus([write_jsonl(tmp_path / "a.jsonl", ["y"])]).digest != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "good"}\nnot json\n', r"a\.jsonl:2: expected a JSON object"),
        ("a.jsonl", b'{"txt": "good"}\n', r"a\.jsonl:1: expected a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: expected text .* got int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: expected a JSON object"),
        ("a.jsonl", b'{"text": "\\uD83D"}\n', r"a\.jsonl:1: expected a JSON object"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: expected at least one document, got none"),
        ("a.txt", b"fine\n\xff\xfe\n", r"a\.txt:2: expected UTF-8 text"),
        ("a.txt", b"", r"a\.txt: expected at least one document, got none"),
        ("a.parquet", b"PAR?", r"a\.parquet: expected a parquet file"),
        ("a.csv", b"text\nx\n", r"a\.csv: expected a file ending in \.txt, \.jsonl, \.parquet, got \.csv"),
    ],
)
def test_a_bad_file_is_named_with_what_was_expected(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusUnavailable, match=message):
        check_corpus([tmp_path / name])


def test_a_parquet_file_without_text_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(CorpusUnavailable, match=r"a\.parquet: expected a parquet file with the column 'text'"):
        check_corpus([tmp_path / "a.parquet"])
    with pytest.raises(CorpusUnavailable, match=r"b\.parquet: expected text in the column 'text', got int64"):
        check_corpus([tmp_path / "b.parquet"])


def test_a_missing_path_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusUnavailable, match=r"gone: expected a file or a folder"):
        check_corpus([tmp_path / "gone"])
    with pytest.raises(CorpusUnavailable, match="expected a folder with"):
        check_corpus([tmp_path])
    with pytest.raises(CorpusUnavailable, match="expected at least one file"):
        check_corpus([])


def test_an_existing_path_is_fetched_as_it_is(tmp_path: Path) -> None:
    assert fetch_corpus(str(tmp_path), cache=tmp_path / "cache") == [tmp_path]


def test_a_dataset_id_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*arguments: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(CorpusUnavailable, match=r"'nobody/nothing' .*no network"):
        fetch_corpus("nobody/nothing", cache=tmp_path)


def test_a_fetched_dataset_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: datasets.Dataset.from_dict({"text": ["a", "b"], "id": [1, 2]}))
    files = fetch_corpus("owner/set:small", cache=tmp_path)
    assert list(read_documents(files)) == ["a", "b"]
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert fetch_corpus("owner/set:small", cache=tmp_path) == files
