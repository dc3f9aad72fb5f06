"""Splits and partitions lose no record, follow the public seed, and leave no site wanting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securefl.config import ConfigurationError, Sites
from securefl.data import Table, declared_split, partition, split


def table(target, task="classification", **groups):
    """A table whose one feature is the row's number."""
    count = len(target)
    kinds = int(max(target)) + 1 if task == "classification" else 0
    return Table(
        features=np.arange(count, dtype=np.float32)[:, None],
        target=np.array(target, np.int64 if task == "classification" else np.float32),
        names=("row",),
        task=task,
        classes=tuple(f"class {k}" for k in range(max(kinds, 2))) if kinds else (),
        groups={name: np.array(values) for name, values in groups.items()},
    )


def rows(*tables):
    return [int(row) for each in tables for row in each.features[:, 0]]


targets = st.lists(st.integers(0, 2), min_size=8, max_size=60)


@given(targets, st.floats(0.05, 0.9), st.integers(0, 2**32 - 1))
def test_a_split_loses_no_record_and_keeps_every_class_in_training(target, fraction, seed):
    whole = table(target)
    train, test = split(whole, fraction, seed)
    assert sorted(rows(train, test)) == rows(whole)
    assert len(test) > 0
    assert set(train.target.tolist()) == set(target)
    assert rows(train) == sorted(rows(train))


@given(st.integers(0, 1000))
def test_a_split_is_stratified_to_the_record(seed):
    train, test = split(table([0] * 212 + [1] * 357), 0.2, seed)
    assert len(test) == 114
    assert np.bincount(test.target).tolist() in ([42, 72], [43, 71])
    assert len(train) == 455


def test_a_split_by_group_gives_every_site_its_share():
    whole = table([0, 1] * 50, ward=["a"] * 80 + ["b"] * 20)
    _, test = split(whole, 0.2, 0, by="ward")
    assert np.unique(test.groups["ward"], return_counts=True)[1].tolist() == [16, 4]


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    whole = table([0, 1] * 50)
    assert rows(split(whole, 0.2, 7)[1]) == rows(split(whole, 0.2, 7)[1])
    assert rows(split(whole, 0.2, 7)[1]) != rows(split(whole, 0.2, 8)[1])


def test_a_split_that_would_hold_nothing_out_is_refused():
    with pytest.raises(ConfigurationError, match="holds none out"):
        split(table([0, 1]), 0.2, 0)
    with pytest.raises(ConfigurationError, match="holds none out"):
        split(table([0.5], task="regression"), 0.5, 0)
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        split(table([0, 1]), 1.0, 0)


@settings(max_examples=50)
@given(
    st.integers(20, 80),
    st.integers(2, 5),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["iid", "dirichlet"]),
)
def test_a_random_partition_deals_out_every_record_once(count, sites, seed, kind):
    whole = table([row % 2 for row in range(count)])
    parts = partition(whole, Sites(count=sites, partition=kind, alpha=10.0), seed)
    assert list(parts) == [f"site-{i + 1}" for i in range(sites)]
    assert sorted(rows(*parts.values())) == rows(whole)
    assert all(len(set(part.target.tolist())) == 2 for part in parts.values())
    again = partition(whole, Sites(count=sites, partition=kind, alpha=10.0), seed)
    assert [rows(part) for part in parts.values()] == [rows(part) for part in again.values()]
    if kind == "iid":
        sizes = [len(part) for part in parts.values()]
        assert max(sizes) - min(sizes) <= 1


def test_a_smaller_alpha_skews_the_classes_more():
    whole = table([0, 1] * 1000)

    def skew(alpha):
        sites = Sites(count=4, partition="dirichlet", alpha=alpha)
        parts = [partition(whole, sites, seed) for seed in range(10)]
        return np.mean([abs(part.target.mean() - 0.5) for p in parts for part in p.values()])

    assert skew(0.3) > 3 * skew(100.0)


def test_a_dirichlet_draw_that_no_redraw_mends_is_refused_with_the_mend():
    sites = Sites(count=5, partition="dirichlet", alpha=0.001)
    with pytest.raises(ConfigurationError, match=r"site 'site-\d' .*: raise sites\.alpha = 0\.001"):
        partition(table([0, 1] * 10), sites, 0)


def test_dirichlet_has_nothing_to_skew_in_a_regression():
    with pytest.raises(ConfigurationError, match='use "iid" or "column"'):
        partition(table([0.5] * 9, task="regression"), Sites(count=2, partition="dirichlet"), 0)


def test_sites_bear_their_given_names_in_their_given_order():
    parts = partition(table([0, 1] * 10), Sites(names=("north", "east")), 0)
    assert list(parts) == ["north", "east"]


def test_a_regression_table_is_dealt_out_whatever_its_targets():
    parts = partition(table([1.0] * 4, task="regression"), Sites(count=4), 0)
    assert [len(part) for part in parts.values()] == [1, 1, 1, 1]


def test_a_column_makes_one_site_of_each_value():
    whole = table([0, 1] * 3, ward=["St. Mary's", "b", "b", "St. Mary's", "b", "b"])
    parts = partition(whole, Sites(partition="column", column="ward"), 0)
    assert {name: rows(part) for name, part in parts.items()} == {
        "St.-Mary-s": [0, 3],
        "b": [1, 2, 4, 5],
    }
    named = Sites(names=("b", "St.-Mary-s"), partition="column", column="ward")
    assert list(partition(whole, named, 0)) == ["b", "St.-Mary-s"]


@pytest.mark.parametrize(
    ("ward", "keys", "message"),
    [
        (
            ["a", "a", "b", "b"],
            {"column": "wart"},
            "'wart' is not a column of the data; did you mean 'ward'",
        ),
        (["a", "a", "b", "b"], {"column": "row"}, r"is a feature: set data.drop = \[\"row\"\]"),
        (["a", "a", "b", "b"], {"count": 3}, "sites.count = 3, but column 'ward' has 2 values"),
        (["a", "a", "b", "b"], {"names": ("a", "c")}, "site 'c' is left without records"),
        (["a", "a", "b", "c"], {"names": ("a", "b")}, "site 'c', which sites.names lacks"),
        (["a", "a", "a", "a"], {}, "1 site: an aggregate of one site hides nothing"),
        (["a", "a", "", "b"], {}, "row 3: '' names no site"),
        (["x y", "x y", "x/y", "x/y"], {}, "two values make the site name 'x-y'"),
    ],
)
def test_a_column_that_makes_no_fair_sites_is_refused(ward, keys, message):
    sites = Sites(**({"partition": "column", "column": "ward"} | keys))
    with pytest.raises(ConfigurationError, match=message):
        partition(table([0, 1, 0, 1], ward=ward), sites, 0)


def test_a_site_of_a_column_may_hold_one_class_only():
    """Real hospitals do; only random partitions are redrawn."""
    parts = partition(
        table([0, 1, 0, 0], ward=["a", "b", "a", "a"]), Sites(partition="column", column="ward"), 0
    )
    assert [len(part) for part in parts.values()] == [3, 1]


def test_one_site_is_refused():
    with pytest.raises(ConfigurationError, match="1 site: an aggregate of one site hides nothing"):
        partition(table([0, 1] * 10), Sites(count=1), 0)


def test_more_sites_than_records_are_refused():
    with pytest.raises(ConfigurationError, match="5 sites for 4 records"):
        partition(table([0, 1, 0, 1]), Sites(count=5), 0)


def test_an_iid_deal_that_leaves_a_site_one_class_is_refused():
    with pytest.raises(ConfigurationError, match=r"one class only.*: lower sites\.count"):
        partition(table([0] * 9 + [1]), Sites(count=2), 0)


def test_declared_test_rows_are_held_out_and_no_others():
    records = table([0, 1, 0, 1], use=["train", "test", "train", "test"])
    train, test = declared_split(records, "use")
    np.testing.assert_array_equal(train.features, records.features[[0, 2]])
    np.testing.assert_array_equal(test.features, records.features[[1, 3]])


@pytest.mark.parametrize(
    ("use", "column", "message"),
    [
        (["train"] * 4, "use", "marks 0 of 4 records"),
        (["test"] * 4, "use", "marks 4 of 4 records"),
        (["test", "train"] * 2, "uses", "'uses' is not a column of the data"),
    ],
)
def test_test_rows_that_are_not_declared_are_refused(use, column, message):
    with pytest.raises(ConfigurationError, match=message):
        declared_split(table([0, 1, 0, 1], use=use), column)
