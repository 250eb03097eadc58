"""A full distillation on machines that share nothing but S3 (moto's server): it comes to what `nas distill` comes to."""

from __future__ import annotations

import dataclasses
import json
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from api.files import find_file
from nas.bundle import read_tar
from nas.compress.corpus import check_corpus
from nas.distillations import check_distillation, parse_distillation
from nas.errors import Conflict
from nas.full_run import distil_fully
from nas.recipe import Recipe
from nas.search.layout import BUNDLE
from nas.shared_files import SharedFiles
from nas.store.records import BundleState, SearchRecord, SearchState
from nas.trial_bundles import plan_bundle
from tests.workers.inline_service import ONE_RUNG, verified_loser
from tests.workers.test_away import Deployment, LostNode, Nodes, make_deployment
from tests.workers.test_away import verified_here as verified_here
from workers.folders import MODEL, MODEL_TAR

TOKENS = 4096


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, s3_server: str, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]
) -> Iterator[tuple[Deployment, SearchRecord]]:
    """A search that has succeeded, with two finalists."""
    import s3fs

    bucket = f"nas-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(bucket)
    deployment = make_deployment(tmp_path_factory.mktemp("away"), url=f"s3://{bucket}/team", register=register_tiny)
    spec = tiny_spec(sampler={"name": "random", "max_trials": 2}, controls={"anchors": False, "num_random": 0}, rungs=ONE_RUNG, num_finalists=2)
    yield deployment, deployment.run(deployment.submit(spec))
    deployment.store.close()


def submit(deployment: Deployment, search: SearchRecord, **asked: Any) -> str:
    body = {"search_id": search.id, "recipe": {"tokens": TOKENS, "validation_tokens": 256}, **asked}
    plan = check_distillation(parse_distillation(json.dumps(body)), store=deployment.store, settings=deployment.settings)
    return deployment.store.create_distillation(
        search_id=search.id, trial=plan.trial, spec=plan.spec, inputs=plan.inputs, tokens=plan.tokens, label="", project="default"
    ).id


def undisturbed(deployment: Deployment, search: SearchRecord, done: SearchRecord, *, folder: Path) -> bytes:
    """The weights that `nas distill` makes of the downloaded bundle."""
    assert search.winner is not None
    read_tar(find_file(search.winner["bundle"], sha256=search.winner["bundle_sha256"], settings=deployment.settings), folder=folder / "unpacked")
    distil_fully(
        Recipe(**done.spec["recipe"]),
        student=folder / "unpacked" / BUNDLE,
        teacher=Path(search.inputs["teacher"]["path"]),
        corpora=[(check_corpus([Path(file) for file in corpus["files"]]), 1.0) for corpus in search.inputs["corpora"]],
        out=folder / "command",
        device="cpu",
    )
    return (folder / "command" / "model.safetensors").read_bytes()


def weights(deployment: Deployment, done: SearchRecord) -> bytes:
    """As a download has them."""
    assert done.winner is not None, done.error
    with tarfile.open(find_file(done.winner["file"], sha256=done.winner["sha256"], settings=deployment.settings)) as archive:
        file = archive.extractfile(f"{MODEL}/model.safetensors")
        assert file is not None
        return file.read()


def test_a_winner_is_distilled_where_its_files_are_away(found: tuple[Deployment, SearchRecord], tmp_path: Path) -> None:
    deployment, search = found

    done = deployment.run(submit(deployment, search))

    assert done.state is SearchState.SUCCEEDED, done.error
    assert list((deployment.settings.searches_folder / done.id).rglob("*.safetensors")) == [], "weights on the controller's machine"
    assert deployment.nodes.shared is not None
    assert deployment.nodes.shared.children(f"searches/{done.id}") == [MODEL_TAR]
    assert weights(deployment, done) == undisturbed(deployment, search, done, folder=tmp_path)
    left = [path for cache in deployment.nodes.caches for path in cache.folder.rglob(MODEL_TAR)]
    assert left == [], "a node keeps what nobody reads any more"


def test_one_that_is_lost_with_its_node_goes_on_on_another(found: tuple[Deployment, SearchRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment, search = found
    nodes = Nodes(tmp_path, url=deployment.settings.shared_url, data_folder=deployment.settings.data_folder)
    deployment = dataclasses.replace(deployment, nodes=nodes)
    lost = LostNode(nodes, monkeypatch=monkeypatch)

    done = deployment.run(submit(deployment, search))

    lost.check()
    assert weights(deployment, done) == undisturbed(deployment, search, done, folder=tmp_path)
    assert nodes.shared is not None
    assert nodes.shared.children(f"searches/{done.id}") == [MODEL_TAR], "a checkpoint that nobody reads"


def test_a_trial_that_is_no_winner_is_bundled_first(found: tuple[Deployment, SearchRecord]) -> None:
    deployment, search = found
    other = verified_loser(deployment.store, search)

    done = deployment.run(submit(deployment, search, trial=other))

    assert done.state is SearchState.SUCCEEDED, done.error
    assert weights(deployment, done)


def test_a_bundle_that_is_asked_for_is_packed_there_and_nothing_else_stays(found: tuple[Deployment, SearchRecord]) -> None:
    deployment, search = found
    store, shared = deployment.store, deployment.nodes.shared
    assert shared is not None
    other = verified_loser(store, search)
    shared.write_json({}, key=f"searches/{search.id}/bundles/{other}/att_0/of a try whose controller died")
    plan_bundle(search, other, store=store, settings=deployment.settings)()

    deployment.tick_until(lambda: (bundle := store.find_bundle(search.id, other)) is not None and bundle.state is not BundleState.WAITING)

    packed = store.find_bundle(search.id, other)
    assert packed is not None
    assert packed.path is not None, packed.error
    assert packed.sha256 is not None
    assert find_file(packed.path, sha256=packed.sha256, settings=deployment.settings).stat().st_size == packed.num_bytes
    assert [path for path in shared.sizes(f"searches/{search.id}/bundles") if "/" in path] == [packed.path.removeprefix(f"searches/{search.id}/bundles/")]


def test_a_student_that_was_not_kept_is_refused_at_once(found: tuple[Deployment, SearchRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    deployment, search = found
    monkeypatch.setattr(SharedFiles, "find_tree", lambda self, key: None)
    other = verified_loser(deployment.store, search)

    with pytest.raises(Conflict, match="expected its student on the disk, got one that was not kept"):
        submit(deployment, search, trial=other)
