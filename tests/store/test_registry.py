from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from nas.errors import Conflict, NotFound
from nas.store.records import CorpusRecord, TaskRecord, TeacherRecord
from nas.store.store import Store

ADDED = datetime(2026, 11, 21, 12, 0, 0, 123456, tzinfo=UTC)
TEACHER = TeacherRecord(name="stories", digest="sha256:aa", path="/models/stories", config={"hidden_size": 64}, parameters=8_030_261_248, added_at=ADDED)
CORPUS = CorpusRecord(name="tales", digest="sha256:bb", files=("a.txt", "b.txt"), num_documents=10, num_bytes=5 * 2**32, added_at=ADDED)
TASK = TaskRecord(name="pairs", digest="sha256:cc", folder="/tasks/pairs", card={"metrics": ["acc"]}, added_at=ADDED)


def test_what_was_added_comes_back(store: Store) -> None:
    assert (store.add_teacher(TEACHER), store.add_corpus(CORPUS), store.add_task(TASK)) == (TEACHER, CORPUS, TASK)

    assert (store.get_teacher("stories"), store.get_corpus("tales"), store.get_task("pairs")) == (TEACHER, CORPUS, TASK)
    assert (store.list_teachers(), store.list_corpora(), store.list_tasks()) == ([TEACHER], [CORPUS], [TASK])


def test_the_same_name_and_digest_again_keeps_what_is_there(store: Store) -> None:
    store.add_teacher(TEACHER)

    assert store.add_teacher(replace(TEACHER, path="/moved", added_at=ADDED + timedelta(days=1))) == TEACHER
    assert store.list_teachers() == [TEACHER]


def test_the_same_name_with_another_digest_is_refused_naming_both(store: Store) -> None:
    store.add_corpus(CORPUS)

    with pytest.raises(Conflict, match=r"corpus 'tales': expected digest sha256:bb.*got sha256:dd"):
        store.add_corpus(replace(CORPUS, digest="sha256:dd"))
    assert store.get_corpus("tales") == CORPUS


def test_an_unknown_name_is_answered_with_those_there_are(store: Store) -> None:
    with pytest.raises(NotFound, match=r"teacher: expected a registered one \(there is none yet\), got 'x'"):
        store.get_teacher("x")
    store.add_teacher(TEACHER)
    with pytest.raises(NotFound, match=r"\(stories\), got 'x'"):
        store.get_teacher("x")


def test_a_time_of_another_zone_comes_back_in_utc(store: Store) -> None:
    there = store.add_task(replace(TASK, added_at=ADDED.astimezone(timezone(timedelta(hours=5)))))

    assert there.added_at == ADDED
    assert there.added_at.tzinfo is UTC
