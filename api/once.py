"""Idempotency-Key: a request that acts and is sent again is answered with what it did the first time (draft-ietf-httpapi-idempotency-key-header)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request, Response

from api.bodies import RawBodyDep
from api.principal import PrincipalDep
from api.routes.dependencies import StoreDep
from nas.store.records import BundleRecord, OnceRequest, SearchRecord, TrialRecord
from nas.store.store import Store

REPLAYED_HEADER = "Idempotency-Replayed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Once:
    """What a route acts through: the effect happens once for each key of the project."""

    store: Store
    request: OnceRequest | None
    response: Response

    def search(self, effect: Callable[[], SearchRecord]) -> SearchRecord:
        """The search that the effect makes or changes."""
        search, is_new = self.store.once(self.request, effect, search_of=lambda search: search.id, again=self.store.get_search)
        self._tell(is_new)
        return search

    def new_search(self, plan: Callable[[], Callable[[], SearchRecord]]) -> SearchRecord:
        """The search that is made: `plan` checks what is asked, and returns what stores it.

        Of a request that came before it is not asked: what was fine then, a search as the teacher for instance, may be gone by now.
        """
        if (done := self.store.find_done(self.request)) is not None:
            self._tell(False)
            return self.store.get_search(done)
        return self.search(plan())

    def trial(self, effect: Callable[[], TrialRecord], *, number: int) -> TrialRecord:
        """The trial that the effect changes."""
        again = lambda search_id: self.store.get_trial(search_id, number)  # noqa: E731  (its type is inferred)
        trial, is_new = self.store.once(self.request, effect, search_of=lambda trial: trial.search_id, again=again)
        self._tell(is_new)
        return trial

    def bundle(self, plan: Callable[[], Callable[[], BundleRecord]], *, again: Callable[[], BundleRecord]) -> BundleRecord:
        """The bundle that is asked for: `plan` looks at files, outside of any transaction, and returns what asks; `again` reads it as it is now."""
        if self.store.find_done(self.request) is not None:
            self._tell(False)
            return again()
        bundle, is_new = self.store.once(self.request, plan(), search_of=lambda bundle: bundle.search_id, again=lambda _: again())
        self._tell(is_new)
        return bundle

    def _tell(self, is_new: bool) -> None:
        if not is_new:
            self.response.headers[REPLAYED_HEADER] = "true"


async def get_once(
    request: Request,
    response: Response,
    store: StoreDep,
    principal: PrincipalDep,
    body: RawBodyDep,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=200,
            pattern=r"^[!-~]+$",
            description="Any text; for 24 hours the same key and request act only once. One that comes while the first is at work waits for it, "
            "and is answered as any later one is; another request with the key is a 422.",
        ),
    ] = None,
) -> Once:
    named = None
    if idempotency_key is not None:
        operation = f"{request.method} {request.url.path}"
        named = OnceRequest(project=principal.project, key=idempotency_key, operation=operation, body_digest=hashlib.sha256(body).hexdigest())
    return Once(store=store, request=named, response=response)


OnceDep = Annotated[Once, Depends(get_once)]
