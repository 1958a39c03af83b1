from memsave.data.text.records import Record, references


def test_references_gather_the_distinct_texts_of_a_table_in_order():
    records = [Record("b[1]", "Two."), Record("a[1]", "One."), Record("b[1]", "Deux."), Record("b[1]", "Two.")]
    found = references(records)
    assert found == {"b[1]": ["Two.", "Deux."], "a[1]": ["One."]}
    assert list(found) == ["b[1]", "a[1]"]
