from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from qvl_pipeline.config import BatchingConfig, IngestConfig
from qvl_pipeline.data.plan.steps import imbalance, make_eval_plan, make_plan, plan_fingerprint, source_weights
from qvl_pipeline.data.plan.tokenization import SCHEMA
from qvl_pipeline.errors import UserError
from qvl_pipeline.tokens.work import llm_cost, vision_cost

N_TRAIN = {"text": 120, "images": 80}
WEIGHTS = {"text": 1.0, "images": 1.0}


def write_tokenized(path: Path, lengths_by_source: dict[str, list[int]], patches: dict[str, int] | None = None) -> Path:
    """A table of samples of the given lengths; the sources alternate, and every 10th sample is of the eval split."""
    rows: list[dict[str, Any]] = []
    for source, lengths in lengths_by_source.items():
        for number, length in enumerate(lengths):
            rows.append(
                {name: "" for name in SCHEMA.names[:6]}
                | {
                    "sample_id": f"{source}/{number}",
                    "source": source,
                    "split": "train",
                    "input_ids": list(range(length)),
                    "label_spans": [{"start": length - 3, "end": length}],
                    "length": length,
                    "supervised_tokens": 3,
                    "vit_patches": (patches or {}).get(source, 0),
                    "spectra": 0,
                    "prompt_length": length - 3,
                    "media": [],
                }
            )
    rows += [row | {"split": "eval", "sample_id": f"eval/{number}"} for number, row in enumerate(rows[::10])]
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for start in range(0, len(rows), 64):
            writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + 64], schema=SCHEMA))
    return path


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    lengths = {source: rng.integers(10, 60, size=count).tolist() for source, count in N_TRAIN.items()}
    return write_tokenized(tmp_path_factory.mktemp("plan") / "tokenized.arrow", lengths, {"images": 32})


@pytest.fixture(scope="module")
def table(tokenized: Path) -> pd.DataFrame:
    return pa.ipc.open_file(str(tokenized)).read_pandas()


def batching(**changes: Any) -> BatchingConfig:
    return BatchingConfig(
        **{"packing_length": 128, "data_parallel_size": 2, "gradient_accumulation_steps": 2} | changes
    )


def rows_of(plan: pd.DataFrame) -> list[int]:
    return np.concatenate(plan["sample_rows"].tolist()).tolist()


CONFIGS = {
    "best_fit": {},
    "first_fit": {"packing_strategy": "first_fit"},
    "balanced": {"packing_strategy": "balanced", "packing_vit_patches": 96},
    "two_budgets": {"packing_vit_patches": 64},
    "unpacked": {"packing": False},
    "grouped": {"packing": False, "group_by_length": True},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_every_epoch_trains_on_every_training_sample_once(
    tokenized: Path, table: pd.DataFrame, changes: dict[str, Any]
) -> None:
    plan, summary = make_plan(tokenized, batching(num_train_epochs=3, **changes), WEIGHTS)
    train = set(table.index[table["split"] == "train"])
    assert Counter(rows_of(plan)) == dict.fromkeys(train, 3)
    assert (summary["samples"], summary["epochs"], summary["overlong"]) == (200, 3.0, [])


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_totals_are_those_of_the_samples_and_keep_to_the_budgets(
    tokenized: Path, table: pd.DataFrame, changes: dict[str, Any]
) -> None:
    config = batching(**changes)
    plan, summary = make_plan(tokenized, config, WEIGHTS)
    for column, source in (
        ("tokens", "length"),
        ("vit_patches", "vit_patches"),
        ("supervised_tokens", "supervised_tokens"),
    ):
        assert plan[column].tolist() == [int(table[source].iloc[rows].sum()) for rows in plan["sample_rows"]]
    assert plan["tokens"].max() <= 128
    assert config.packing_vit_patches is None or plan["vit_patches"].max() <= config.packing_vit_patches
    assert summary["tokens"] == plan["tokens"].sum()
    assert summary["supervised_tokens"] == plan["supervised_tokens"].sum() == 600
    assert summary["fill"] == summary["tokens"] / (128 * summary["packs"])


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_all_steps_but_the_last_are_whole(tokenized: Path, changes: dict[str, Any]) -> None:
    plan, summary = make_plan(tokenized, batching(num_train_epochs=2, **changes), WEIGHTS)
    sizes = plan.groupby("step").size()
    assert sizes.index.tolist() == list(range(summary["steps"]))
    assert set(sizes[:-1]) == {4}
    assert 1 <= sizes.iloc[-1] <= 4
    assert len(plan) == summary["packs"]
    assert plan["pack"].tolist() == [pack for size in sizes for pack in range(size)]


def test_columns_are_those_of_the_contract(tokenized: Path, tmp_path: Path) -> None:
    plan, _ = make_plan(tokenized, batching(), WEIGHTS)
    plan.to_parquet(tmp_path / "plan.parquet", index=False)
    schema = pa.parquet.read_schema(tmp_path / "plan.parquet")
    assert {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)} == {
        "step": "int32",
        "pack": "int32",
        "sample_rows": "list<element: int32>",
        "tokens": "int64",
        "vit_patches": "int64",
        "spectra": "int64",
        "supervised_tokens": "int64",
    }


def test_the_same_seed_gives_the_same_plan_and_another_seed_another(tokenized: Path) -> None:
    plans = [make_plan(tokenized, batching(seed=seed), WEIGHTS)[0] for seed in (1, 1, 2)]
    orders = [[rows.tolist() for rows in plan["sample_rows"]] for plan in plans]
    assert orders[0] == orders[1] != orders[2]


def test_epochs_differ_in_order_and_in_packs(tokenized: Path) -> None:
    one = make_plan(tokenized, batching(num_train_epochs=1), WEIGHTS)[0]
    two = make_plan(tokenized, batching(num_train_epochs=2), WEIGHTS)[0]
    packs = [frozenset(rows.tolist()) for rows in two["sample_rows"]]
    first, second = set(packs[: len(one) - 4]), set(packs[len(one) + 4 :])
    assert len(first & second) < len(first) / 2


def test_the_plan_does_not_depend_on_the_rank_count_that_a_global_batch_is_written_for(tokenized: Path) -> None:
    four_ranks = batching(data_parallel_size=4, gradient_accumulation_steps=1)
    one_rank = batching(data_parallel_size=1, gradient_accumulation_steps=4)
    pd.testing.assert_frame_equal(
        make_plan(tokenized, four_ranks, WEIGHTS)[0], make_plan(tokenized, one_rank, WEIGHTS)[0]
    )


@pytest.mark.parametrize(
    "changes", [{}, {"packing_strategy": "first_fit"}, {"packing_strategy": "balanced"}, {"packing": False}]
)
def test_steps_are_not_in_order_of_sample_length(tmp_path: Path, changes: dict[str, Any]) -> None:
    lengths = np.random.default_rng(0).lognormal(3, 0.7, 2000).clip(4, 128).astype(int).tolist()
    path = write_tokenized(tmp_path / "tokenized.arrow", {"text": lengths})
    plan, _ = make_plan(path, batching(**changes), WEIGHTS)
    samples = plan.groupby("step")["sample_rows"].agg(lambda rows: sum(map(len, rows)))
    lengths_by_step = plan.groupby("step")["tokens"].sum() / samples
    assert abs(np.corrcoef(lengths_by_step.index, lengths_by_step)[0, 1]) < 0.2


def work_of(plan: pd.DataFrame, table: pd.DataFrame) -> np.ndarray:
    work = llm_cost(table["length"].to_numpy()) + vision_cost(table["vit_patches"].to_numpy())
    return np.array([work[rows].sum() for rows in plan["sample_rows"]])


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("changes", [{}, {"packing_strategy": "balanced"}, {"packing": False}])
def test_ranks_that_take_packs_in_turn_do_even_work(tmp_path: Path, ranks: int, changes: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    lengths = {source: rng.integers(10, 128, size=600).tolist() for source in ("text", "images")}
    path = write_tokenized(tmp_path / "tokenized.arrow", lengths, {"images": 240})
    table = pa.ipc.open_file(str(path)).read_pandas()
    plan, summary = make_plan(path, batching(data_parallel_size=8, gradient_accumulation_steps=4, **changes), WEIGHTS)
    whole = plan[plan["step"] < plan["step"].max()]
    shuffled = whole.iloc[rng.permutation(len(whole))].sort_values("step", kind="stable")
    ours, unsorted = (imbalance(whole, work_of(p, table), ranks) - 1 for p in (whole, shuffled))
    assert ours < 0.6 * unsorted
    assert summary["imbalance"]["together"] == pytest.approx(imbalance(plan, work_of(plan, table), 8))


def test_imbalance_is_the_time_of_the_slowest_over_that_of_even_work() -> None:
    plan = pd.DataFrame({"step": [0, 0, 0, 0, 1], "pack": [0, 1, 2, 3, 0]})
    work = np.array([4.0, 2.0, 3.0, 3.0, 5.0])
    assert imbalance(plan, work, ranks=1) == 1.0
    assert imbalance(plan, work, ranks=2) == pytest.approx((4 + 3 + 5) / ((6 + 6 + 5) / 2))


def test_kinds_are_mixed_over_steps(tokenized: Path) -> None:
    plan, _ = make_plan(tokenized, batching(num_train_epochs=4), WEIGHTS)
    by_step = plan.groupby("step")["vit_patches"].sum()
    halves = by_step[: len(by_step) // 2].sum(), by_step[len(by_step) // 2 :].sum()
    assert 0.8 < halves[0] / halves[1] < 1.25


def test_max_steps_repeats_or_cuts_epochs(tokenized: Path) -> None:
    longest, summary = make_plan(tokenized, batching(max_steps=40, num_train_epochs=1), WEIGHTS)
    assert summary["steps"] == 40
    assert len(longest) == 40 * 4
    assert summary["epochs"] == pytest.approx(len(rows_of(longest)) / 200)
    short, summary = make_plan(tokenized, batching(max_steps=3, num_train_epochs=9), WEIGHTS)
    assert summary["steps"] == 3
    assert summary["samples"] == len(set(rows_of(short))) < 200
    assert summary["epochs"] < 1


@pytest.mark.parametrize(("weight", "expected"), [(2.0, {2}), (2.5, {2, 3}), (0.25, {0, 1}), (1.0, {1})])
def test_a_weight_says_how_often_a_sample_is_seen_per_epoch(
    tokenized: Path, table: pd.DataFrame, weight: float, expected: set[int]
) -> None:
    plan, summary = make_plan(tokenized, batching(), {"text": 1.0, "images": weight})
    seen = Counter(rows_of(plan))
    images = table.index[(table["source"] == "images") & (table["split"] == "train")]
    assert {seen[row] for row in images} == expected
    assert sum(seen[row] for row in images) == 80 * weight
    assert summary["epochs"] == 1.0


def test_a_fraction_reaches_every_sample_in_turn(tokenized: Path, table: pd.DataFrame) -> None:
    plan, _ = make_plan(tokenized, batching(num_train_epochs=4), {"text": 1.0, "images": 0.25})
    seen = Counter(rows_of(plan))
    images = table.index[(table["source"] == "images") & (table["split"] == "train")]
    assert {seen[row] for row in images} == {1}


def test_overlong_samples_are_listed_and_left_out_whole(tmp_path: Path) -> None:
    path = write_tokenized(tmp_path / "tokenized.arrow", {"text": [50, 129, 128, 500], "images": [20, 90]})
    plan, summary = make_plan(path, batching(), WEIGHTS)
    assert summary["overlong"] == ["text/1", "text/3"]
    assert sorted(rows_of(plan)) == [0, 2, 4, 5]


def test_too_many_patches_are_overlong_too(tmp_path: Path) -> None:
    path = write_tokenized(tmp_path / "tokenized.arrow", {"text": [50], "images": [20]}, {"images": 65})
    _, summary = make_plan(path, batching(packing_vit_patches=64), WEIGHTS)
    assert summary["overlong"] == ["images/0"]


def test_overlong_samples_are_refused_when_they_may_not_be_left_out(tmp_path: Path) -> None:
    path = write_tokenized(tmp_path / "tokenized.arrow", {"text": [50, 129, 500]})
    with pytest.raises(UserError, match=r"2 samples do not fit .*packing_length 128.* the first is 'text/1'"):
        make_plan(path, batching(filter_overlong=False), WEIGHTS)


def test_an_empty_plan_is_an_error(tmp_path: Path) -> None:
    empty = write_tokenized(tmp_path / "empty.arrow", {})
    with pytest.raises(UserError, match="no sample of the split 'train'"):
        make_plan(empty, batching(), WEIGHTS)
    too_long = write_tokenized(tmp_path / "long.arrow", {"text": [500, 600]})
    with pytest.raises(UserError, match=r"all 2 samples of the split 'train' are longer than packing_length \(128\)"):
        make_plan(too_long, batching(), WEIGHTS)
    few = write_tokenized(tmp_path / "few.arrow", {"text": [50, 60]})
    with pytest.raises(UserError, match=r"leave no sample to train on: raise ingest.datasets\[\].weight"):
        make_plan(few, batching(max_steps=5), {"text": 0.001})


def test_an_undeclared_source_is_an_error(tokenized: Path) -> None:
    with pytest.raises(UserError, match=r"source 'images' is not declared in ingest\.datasets any more"):
        make_plan(tokenized, batching(), {"text": 1.0})


def test_the_fingerprint_is_of_content_parameters_and_weights(tokenized: Path, tmp_path: Path) -> None:
    reference = plan_fingerprint([tokenized], batching(), WEIGHTS)
    copy = tmp_path / "copy.arrow"
    copy.write_bytes(tokenized.read_bytes())
    assert plan_fingerprint([copy], batching(), dict(reversed(WEIGHTS.items()))) == reference
    assert make_plan(tokenized, batching(), WEIGHTS)[1]["fingerprint"] == reference
    copy.write_bytes(tokenized.read_bytes()[:-1] + b"x")
    others = {
        plan_fingerprint([copy], batching(), WEIGHTS),
        plan_fingerprint([tokenized], batching(seed=7), WEIGHTS),
        plan_fingerprint([tokenized], batching(), WEIGHTS | {"text": 2.0}),
    }
    assert len(others | {reference}) == 4


def test_weights_are_those_of_the_declared_sources() -> None:
    ingest = IngestConfig(
        datasets=[
            {"name": "a", "path": "a.json", "data_type": "json"},
            {"name": "b", "path": "b.json", "data_type": "json", "weight": 0.5},
        ]
    )
    assert source_weights(ingest) == {"a": 1.0, "b": 0.5}


def test_benchmarks_are_in_no_plan(tmp_path: Path) -> None:
    """Neither trained on nor in the loss during training, by which checkpoints are chosen."""
    path = write_tokenized(tmp_path / "tokenized.arrow", {"text": [20] * 40})
    table = pa.ipc.open_file(str(path)).read_all()
    measured = table.slice(0, 7).set_column(
        table.column_names.index("split"), SCHEMA.field("split"), pa.array(["benchmark"] * 7)
    )
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        writer.write_table(pa.concat_tables([measured, table]).combine_chunks())
    batching = BatchingConfig(packing_length=64, data_parallel_size=1, num_train_epochs=2)
    plan, summary = make_plan(path, batching, {"text": 1.0})
    evaluated = make_eval_plan(path, batching)
    for rows, split in ((plan, "train"), (evaluated, "eval")):
        used = {row for pack in rows["sample_rows"] for row in pack}
        assert min(used) >= 7
        assert {pa.concat_tables([measured, table])["split"][row].as_py() for row in used} == {split}
    assert summary["samples"] == 40
