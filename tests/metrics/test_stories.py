"""Features of stories about a doctor, read by hand; the share of real words."""

import math

import pytest
from scipy.stats import entropy

from spl.metrics.lexicon import lexical_integrity
from spl.metrics.stories import feature_shares, story_diversity, story_features

SARAH = "Dr. Sarah Lee's hands shook. She had lost a patient, and her friend's father was a patient too."
TOM = "Once there was a doctor named Tom. The nurse asked him to see the boys, and the kids trusted him."
BARE = "Rain fell."


@pytest.mark.parametrize(
    ("story", "name", "gender", "relation"),
    [
        (SARAH, "sarah", "female", "patient"),
        (TOM, "tom", "male", "child"),
        (BARE, None, None, None),
        ("The doctor knew best. Dr. É. Özlem Şahin slept.", "özlem", None, None),
        ("A woman named Mary met Doctor J. R. O'Neill.", "o'neill", None, None),
        ("My name is Dr. Anna-Maria Diaz.", "anna-maria", None, None),
        ("Dr. Chen\u2019s day. He saw her husbands. She saw his.", "chen", "male", "husband"),
        ("Doctor and patients. The doctor is a hero.", None, None, "patient"),
        ("The shepherd hears of this theatre, and the doctor of a sonata.", None, None, None),
    ],
)
def test_features_read_by_hand(story: str, name: str | None, gender: str | None, relation: str | None) -> None:
    assert story_features(story) == {"name": name, "gender": gender, "relation": relation}


def test_entropies_are_over_the_stories_that_tell() -> None:
    found = story_diversity([SARAH, SARAH, TOM, BARE])
    assert found["doctor_name_entropy"] == pytest.approx(entropy([2 / 3, 1 / 3]))
    assert found["doctor_name_told"] == 3 / 4
    assert story_diversity([SARAH, SARAH])["doctor_gender_entropy"] == 0
    assert math.isnan(story_diversity([BARE])["doctor_relation_entropy"])
    assert math.isnan(story_diversity([])["doctor_name_told"])


def test_shares_of_a_feature() -> None:
    assert feature_shares([SARAH, BARE, SARAH, TOM], "gender") == ({"female": 2 / 3, "male": 1 / 3}, 3 / 4)
    assert feature_shares([BARE], "gender") == ({}, 0)


def test_the_share_of_real_words() -> None:
    pytest.importorskip("spellchecker")
    assert lexical_integrity("The doctor's cats don\u2019t sleep, 3 times!") == 1
    assert lexical_integrity("Teh doctor zzkw") == pytest.approx(1 / 3)
    assert lexical_integrity("\u6570 cat") == 1 / 2
    assert math.isnan(lexical_integrity("42 ... !"))
