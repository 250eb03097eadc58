"""What the benchmarks read from the ground truth, on tables made up here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nas.architecture import read_architecture
from nas.search.results import Metric
from tests.benchmarks import ground_truth, reproduce, truth
from tests.benchmarks.ground_truth import GRIDS, Cell, Row
from tests.benchmarks.ground_truth_tasks import clear_values, missing
from tests.benchmarks.proxies import Proxy, bootstrap, proxies_of, regret, seed_ceiling, tau_b, tau_of_separated
from tests.benchmarks.replay import Chance, GridSpace, replay_baselines, replay_ours, search_spec, summarise
from tests.benchmarks.task_rows import NAMED, TaskRow, read_task_rows, shares, write_task_rows
from tests.benchmarks.truth import Truth, make_truth

TEACHER = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
GRID = GRIDS[1]
TOKENS = [0, 6_250, 25_000, 100_000, 1_000_000]
NUM_BLOCKS = 128


@pytest.fixture(autouse=True)
def known_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground_truth, "teacher_architecture", lambda _: read_architecture(TEACHER))


def make_rows(*, noise: float = 0.0, seeds: dict[int, int] | None = None, seed_noise: float = 0.0) -> tuple[list[Row], dict[str, NDArray[np.float16]]]:
    """Shape number i has KL (1 + i / 10) of the level of each point; blocks are noisy alike for all shapes, and each apart by `noise`."""
    generator = np.random.default_rng(0)
    common = generator.uniform(0.8, 1.2, size=NUM_BLOCKS)
    rows, blocks = [], {}
    for index, shape in enumerate(GRID.shapes()):
        for seed in range((seeds or {}).get(index, 1)):
            cell = Cell(teacher=GRID.teacher, max_fraction=GRID.max_fraction, shape=shape.key, seed=seed)
            levels = np.array([4.0, 2.0, 1.0, 0.7, 0.4]) * (1 + index / 10) * (1.5 if seed else 1.0) * np.exp(seed_noise * generator.standard_normal())
            kl = (levels[:, None] * common * np.exp(noise * generator.standard_normal((len(levels), NUM_BLOCKS)))).astype(np.float16)
            means = [float(point.mean()) for point in kl]
            rows.append(Row(cell=cell, parameters=1000 - index, tokens=TOKENS, kl=means, final_kl=means, final_loss=means))
            blocks[cell.key] = kl
    return rows, blocks


def make_table(**arguments: object) -> Truth:
    rows, blocks = make_rows(**arguments)  # type: ignore[arg-type]
    made = make_truth(GRID, rows=rows, blocks=blocks)
    assert made is not None
    return made


def test_a_shape_that_has_not_come_as_far_as_the_others_is_left_out() -> None:
    rows, blocks = make_rows()
    short = rows[3]
    rows[3] = Row(**{name: getattr(short, name)[:-1] for name in ("tokens", "kl", "final_kl", "final_loss")}, cell=short.cell, parameters=short.parameters)
    made = make_truth(GRID, rows=rows, blocks=blocks)
    assert made is not None
    assert made.tokens == tuple(TOKENS)
    assert {shape.key for shape in GRID.shapes()} - {shape.key for shape in made.shapes} == {short.cell.shape}


def test_what_a_seed_does_to_all_shapes_alike_is_no_seed_noise() -> None:
    one, several = make_table(), make_table(seeds={0: 3, 1: 3, 2: 3})
    assert several.seed_sd(1_000_000) == pytest.approx(0.0, abs=1e-3)
    np.testing.assert_allclose(several.final, one.final, rtol=1e-3)


def test_seed_noise_of_a_shape_is_found() -> None:
    table = make_table(seeds=dict.fromkeys(range(12), 3), seed_noise=0.05)
    assert table.seed_sd(1_000_000) == pytest.approx(0.05, rel=0.5)
    assert table.final_error()[0] > 0.5 * 0.05 * table.final[0]


def test_the_error_of_a_difference_leaves_out_what_both_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "seed_sd_of_curves", lambda _: 0.0)
    table = make_table()
    proportional = table.difference_error()
    apart = np.abs(table.final[:, None] - table.final[None, :])
    blocks = table.held_out()[0] / table.final[0]
    np.testing.assert_allclose(proportional, apart * blocks.std(ddof=1) / np.sqrt(len(blocks)), atol=2e-4)


def test_only_pairs_that_the_final_result_separates_count() -> None:
    final, error = np.array([1.0, 1.1, 2.0]), np.full((3, 3), 0.2)
    assert tau_of_separated(np.array([2.0, 1.0, 3.0]), final, error=error) == (1.0, 2)
    assert tau_of_separated(np.array([1.0, 3.0, 2.0]), final, error=error) == (0.0, 2)
    assert tau_of_separated(np.array([1.0, np.nan, 2.0]), final, error=error) == (1.0, 1)


def test_the_regret_of_a_proxy_is_that_of_its_best_shape() -> None:
    assert regret(np.array([3.0, 1.0, np.nan]), np.array([0.1, 0.3, 0.0])) == pytest.approx(0.2)


def test_a_proxy_that_knows_every_order_has_tau_one_and_no_regret() -> None:
    table = make_table(noise=0.01)
    for proxy in proxies_of(table, tasks=Path("nowhere")):
        found = bootstrap(table, proxy)
        assert found["tau"].value == pytest.approx(1.0), proxy.name
        assert found["regret"].value == 0.0
        assert found["tau"].low <= found["tau"].value <= found["tau"].high + 1e-9


def task_row(*, shape: str, values: dict[str, dict[str, float]], tokens: int = 100_000) -> TaskRow:
    named = shape in NAMED
    return TaskRow(teacher=GRID.teacher, max_fraction=0.0 if named else GRID.max_fraction, shape=shape, seed=0, tokens=0 if named else tokens, values=values)


def test_a_share_is_the_way_from_random_weights_to_the_teacher_whatever_the_direction() -> None:
    teacher = task_row(shape="teacher", values={"t": {"acc": 0.9, "bits_per_byte": 1.0}})
    random = task_row(shape="random", values={"t": {"acc": 0.5, "bits_per_byte": 5.0}})
    student = task_row(shape="any", values={"t": {"acc": 0.7, "bits_per_byte": 2.0}})
    assert shares(student, teacher=teacher, random=random) == {"t": {"accuracy": pytest.approx(0.5), "bits_per_byte": pytest.approx(0.75)}}


def test_only_metrics_by_which_the_teacher_is_clear_of_random_weights_are_kept_and_only_tasks_with_an_accuracy_among_them() -> None:
    def metric(value: float) -> Metric:
        return Metric(value=value, standard_error=0.04, higher_is_better=True, documents=())

    random = {name: {"acc": metric(0.5), "margin": metric(0.0)} for name in ("both", "accuracy", "margin")}
    teacher = {
        "both": {"acc": metric(0.9), "margin": metric(0.5)},
        "accuracy": {"acc": metric(0.9), "margin": metric(0.1)},
        "margin": {"acc": metric(0.6), "margin": metric(0.5)},
    }
    assert clear_values(teacher, random) == {"both": ["acc", "margin"], "accuracy": ["acc"]}


def test_students_are_scored_once_at_the_points_that_they_have_and_at_their_last() -> None:
    cells = [(Cell(teacher="t", max_fraction=0.5, shape=shape, seed=seed), (0, 6_250, 12_500, 250_000)) for shape, seed in (("a", 0), ("a", 1), ("b", 0))]
    known = [TaskRow(**asdict(cells[2][0]), tokens=tokens, values={}) for tokens in (0, 6_250, 250_000)]
    assert [(cell.shape, cell.seed, todo) for cell, todo in missing(cells, known=known[:2])] == [("a", 0, [0, 6_250, 250_000]), ("b", 0, [250_000])]
    assert [cell.shape for cell, _ in missing(cells, known=known)] == ["a"]


def test_a_better_score_of_a_task_ranks_a_shape_higher(tmp_path: Path) -> None:
    table, file = make_table(), tmp_path / "tasks.jsonl"
    rows = [
        task_row(shape="teacher", values={"t": {"acc": 1.0, "bits_per_byte": 1.0}, "u": {"acc_norm": 1.0}}),
        task_row(shape="random", values={"t": {"acc": 0.5, "bits_per_byte": 5.0}, "u": {"acc_norm": 0.0}}),
    ]
    for index, shape in enumerate(table.shapes):
        values = {"t": {"acc": 1 - index / 100, "bits_per_byte": 1 + index / 100}, "u": {"acc_norm": 0.5}}
        rows += [task_row(shape=shape.key, values=values, tokens=tokens) for tokens in (100_000, 1_000_000)]
    write_task_rows(rows, file=file)
    assert sorted(read_task_rows(file), key=lambda row: row.place) == sorted(rows, key=lambda row: row.place)
    found = {proxy.name: proxy for proxy in proxies_of(table, tasks=file)}
    ranking = ["2 tasks, accuracy, 100,000 tokens", "1 tasks, bits_per_byte, final students", "t, accuracy, 100,000 tokens", "t, bits_per_byte, 100,000 tokens"]
    assert [tau_b(found[name].means(), table.final) for name in ranking] == pytest.approx([1.0] * len(ranking))
    assert tau_b(found["u, accuracy, 100,000 tokens"].means(), table.final) == 0.0


def test_a_proxy_unknown_of_some_shapes_is_judged_on_the_others() -> None:
    values = np.array([1.0, np.nan, 2.0, 3.0])
    assert tau_b(Proxy(name="p", values=values).means(), np.array([1.0, 0.0, 2.0, 3.0])) == pytest.approx(1.0)


def test_the_ceiling_compares_seeds_over_the_shapes_that_have_several() -> None:
    assert seed_ceiling(make_table()) is None
    assert seed_ceiling(make_table(seeds=dict.fromkeys(range(8), 3))) == (pytest.approx(1.0), 8)


def test_a_search_over_the_table_proposes_its_shapes_and_no_others() -> None:
    table = make_table()
    space = GridSpace(GRID.space(), table.shapes[2:9])
    assert set(space.shapes()) == set(table.shapes[2:9])
    assert space.count() == 7
    generator = np.random.default_rng(0)
    assert {space.draw(generator).key for _ in range(200)} == {shape.key for shape in table.shapes[2:9]}
    assert all(space.resolve(space.choices_of(shape)) == shape for shape in table.shapes[2:9])


def test_on_a_table_without_noise_every_procedure_that_trains_every_shape_finds_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "seed_sd_of_curves", lambda _: 0.0)
    table = make_table()
    ours = replay_ours(table, spec=search_spec(table, changes={"rungs": {"first_tokens": 6_250, "factor": 4, "num_trained": 3}}), num_replays=4)
    others = replay_baselines(table, tokens=ours[0].tokens, num_replays=4)
    minitron = summarise(others["every shape to the last rung (Minitron)"], truth=table)
    assert (minitron.best, minitron.token_share, minitron.median_regret) == (1.0, 1.0, 0.0)
    found = summarise(ours, truth=table)
    assert (found.best, found.top_three, found.worst_regret) == (1.0, 1.0, 0.0)
    assert found.token_share < 0.5
    assert summarise(others["one shape at random"], truth=table).mean_regret > 0


def test_the_same_seed_replays_the_same_search() -> None:
    table = make_table(noise=0.5, seed_noise=0.1)
    spec = search_spec(table, changes={"sampler": {"name": "random", "max_trials": 12}, "rungs": {"first_tokens": 25_000, "factor": 4, "num_trained": 2}})
    assert replay_ours(table, spec=spec, num_replays=2) == replay_ours(table, spec=spec, num_replays=2)


def test_chance_draws_every_shape_the_same_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "seed_sd_of_curves", lambda _: 0.0)
    table = make_table()
    documents = Chance.draw(table, seed=3).documents
    ratio = documents[5] / documents[0]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio.mean(axis=1, keepdims=True), ratio.shape), rtol=2e-3)
    assert not np.allclose(documents, Chance.draw(table, seed=4).documents)


def test_a_cell_computed_again_is_judged_at_the_point_that_lies_farthest() -> None:
    rows, _ = make_rows()
    table = make_table(seeds=dict.fromkeys(range(12), 3), seed_noise=0.05)
    kl = list(rows[0].kl[:3])
    apart, allowed, _ = reproduce.farthest(rows[0], kl, truth=table)
    assert apart == 0.0 < allowed
    kl[2] *= 1.5
    apart, allowed, tokens = reproduce.farthest(rows[0], kl, truth=table)
    assert tokens == TOKENS[2]
    assert apart > allowed
