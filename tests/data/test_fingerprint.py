"""The digest of raw examples: it depends on their content, and on nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from memsave.data.fingerprint import fingerprint_of
from memsave.data.text.records import Record

texts = st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=5)


@given(one=texts, other=texts)
def test_two_data_sets_have_one_digest_if_they_hold_the_same_examples_in_any_order(one, other):
    same = sorted(one) == sorted(other)
    assert (fingerprint_of(Record(*each) for each in one) == fingerprint_of(Record(*each) for each in other)) == same
    assert fingerprint_of(one) == fingerprint_of(reversed(one))


def test_a_repeated_example_is_another_data_set():
    assert fingerprint_of(["a"]) != fingerprint_of(["a", "a"])
