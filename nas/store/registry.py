"""What the operator registered: teachers, corpora, tasks. A name stands for one content for ever, told by its digest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, RowMapping, Table, select

from nas.errors import Conflict, NotFound
from nas.store.database import Database
from nas.store.records import CorpusRecord, TaskRecord, TeacherRecord
from nas.store.tables import corpora, tasks, teachers

Record = TypeVar("Record", TeacherRecord, CorpusRecord, TaskRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """What was looked for and is there."""

    teacher: TeacherRecord | None
    corpora: Mapping[str, CorpusRecord]
    """By name, as the tasks."""
    tasks: Mapping[str, TaskRecord]


class Registry(Database):
    """Add, get, find and list by name.

    `add_*` of a name and digest that are there already is a no-op and returns what is there; with another digest it
    raises Conflict. `get_*` raises NotFound. `list_*` is by name: all of them, or a page behind one that was seen.
    """

    def add_teacher(self, record: TeacherRecord) -> TeacherRecord:
        return self._add(teachers, _teacher, record, noun="teacher")

    def get_teacher(self, name: str) -> TeacherRecord:
        return self._get(teachers, _teacher, name, noun="teacher")

    def list_teachers(self, *, after: str | None = None, limit: int | None = None) -> list[TeacherRecord]:
        return self._list(teachers, _teacher, after=after, limit=limit)

    def add_corpus(self, record: CorpusRecord) -> CorpusRecord:
        return self._add(corpora, _corpus, record, noun="corpus")

    def get_corpus(self, name: str) -> CorpusRecord:
        return self._get(corpora, _corpus, name, noun="corpus")

    def list_corpora(self, *, after: str | None = None, limit: int | None = None) -> list[CorpusRecord]:
        return self._list(corpora, _corpus, after=after, limit=limit)

    def add_task(self, record: TaskRecord) -> TaskRecord:
        return self._add(tasks, _task, record, noun="task")

    def get_task(self, name: str) -> TaskRecord:
        return self._get(tasks, _task, name, noun="task")

    def list_tasks(self, *, after: str | None = None, limit: int | None = None) -> list[TaskRecord]:
        return self._list(tasks, _task, after=after, limit=limit)

    def find_registered(self, *, teacher: str, corpus_names: Collection[str], task_names: Collection[str]) -> Registered:
        """What there is of these names, in one transaction."""
        with self.read() as connection:
            return Registered(
                teacher=_find(connection, teachers, _teacher, [teacher]).get(teacher),
                corpora=_find(connection, corpora, _corpus, corpus_names),
                tasks=_find(connection, tasks, _task, task_names),
            )

    def _add(self, table: Table, make: Callable[[RowMapping], Record], record: Record, *, noun: str) -> Record:
        with self.write(fence=None) as connection:
            connection.execute(self.insert_if_new(table).values(asdict(record)))
            there = make(connection.execute(select(table).where(table.c.name == record.name)).mappings().one())
        if there.digest != record.digest:
            raise Conflict(f"{noun} {record.name!r}: expected digest {there.digest}, under which it is registered, got {record.digest}; choose another name")
        return there

    def _get(self, table: Table, make: Callable[[RowMapping], Record], name: str, *, noun: str) -> Record:
        with self.read() as connection:
            row = connection.execute(select(table).where(table.c.name == name)).mappings().one_or_none()
            if row is None:
                names = connection.execute(select(table.c.name).order_by(table.c.name).limit(20)).scalars().all()
                raise NotFound(f"{noun}: expected a registered one ({', '.join(names) or 'there is none yet'}), got {name!r}")
        return make(row)

    def _list(self, table: Table, make: Callable[[RowMapping], Record], *, after: str | None, limit: int | None) -> list[Record]:
        """By name, behind one that was seen. The database's order of names is its own, and the same for every page."""
        query = select(table).order_by(table.c.name).limit(limit)
        if after is not None:
            query = query.where(table.c.name > after)
        with self.read() as connection:
            return [make(row) for row in connection.execute(query).mappings()]


def _find(connection: Connection, table: Table, make: Callable[[RowMapping], Record], names: Collection[str]) -> dict[str, Record]:
    return {row["name"]: make(row) for row in connection.execute(select(table).where(table.c.name.in_(names))).mappings()}


def _teacher(row: RowMapping) -> TeacherRecord:
    return TeacherRecord(**row)


def _corpus(row: RowMapping) -> CorpusRecord:
    values: dict[str, Any] = {**row}
    return CorpusRecord(**values | {"files": tuple(row["files"])})


def _task(row: RowMapping) -> TaskRecord:
    return TaskRecord(**row)
