"""Generated opinions: reproducible, balanced, and with the mood that their label says."""

import pytest

from memsave.data.errors import DataError
from memsave.data.text.feedback import PRIVATE_EVENTS, FeedbackData, private_comments, public_reviews


def test_text_i_depends_on_the_seed_and_i_alone():
    assert private_comments(5, seed=3) == private_comments(9, seed=3)[:5]
    assert private_comments(5, seed=3) != private_comments(5, seed=4)
    assert public_reviews(5) == public_reviews(8)[:5]
    assert not {each.text for each in private_comments(50)} & set(public_reviews(50))


def test_held_out_comments_are_others():
    train, held_out = FeedbackData(comments=50, held_out=20).splits()
    assert (len(train), len(held_out)) == (50, 20)
    assert train[:20] != held_out


def test_events_of_the_label_are_in_the_majority():
    agree = differ = 0
    comments = private_comments(400)
    for each in comments:
        said = [sum(event.lower()[-14:] in each.text.lower() for event in events) for events in PRIVATE_EVENTS]
        agree += said[each.label]
        differ += said[1 - each.label]
    assert agree > 3 * differ > 0
    assert 150 < sum(each.label for each in comments) < 250


def test_at_least_one_text_is_needed():
    with pytest.raises(DataError, match="The number of texts is 0"):
        public_reviews(0)
