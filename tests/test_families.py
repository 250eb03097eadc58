from __future__ import annotations

import pytest

from nas.families import FAMILIES, Axis

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@every_family
def test_every_weight_that_a_row_mentions_is_in_its_table(family):
    names = {weight.name for weight in family.weights}
    mentioned = {reader for source in family.sources for reader in source.readers} | {source.norm for source in family.sources if source.norm}

    assert mentioned | {*family.output_norms, *family.output_norms.values()} <= names
    assert len(names) == len(family.weights)


@every_family
def test_the_sources_name_every_column_side_that_can_be_cut_once(family):
    read = {reader: source.axis for source in family.sources for reader in source.readers}
    columns = {weight.name: weight.sides[1] for weight in family.weights if len(weight.sides) == 2 and weight.name != "model.embed_tokens.weight"}

    assert {name: (axis,) for name, axis in read.items()} == columns
    assert len(read) == sum(len(source.readers) for source in family.sources)


@every_family
def test_every_norm_over_the_hidden_axis_makes_a_source_or_follows_a_writer(family):
    norms = {weight.name for weight in family.weights if weight.is_norm and weight.sides == ((Axis.HIDDEN,),)}
    reading, following = {source.norm for source in family.sources if source.norm}, set(family.output_norms.values())

    assert not reading & following
    assert norms <= reading | following


@every_family
def test_a_norm_on_a_projection_spans_the_rows_of_that_projection(family):
    sides = {weight.name: weight.sides for weight in family.weights}

    assert all(sides[norm][0] == sides[writer][0] for writer, norm in family.output_norms.items())
