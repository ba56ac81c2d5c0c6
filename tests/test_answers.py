"""Tests of what "took" and "exact match" mean."""

from __future__ import annotations

import unicodedata

import pytest

from rledit_env.answers import answer_of, contains, is_exact, took


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        (" English", "English"),
        (" English and French", "English"),
        ("\n English.\nHe", "English"),
        (" English's home", "English"),
        (' English" and', "English"),
        (" English (UK)", "English"),
        (" Old Church\n Slavonic, in", "Old Church Slavonic"),
        (" Washington, D.C., where", "Washington, D.C."),
        (" U.S. and its", "U.S."),
        (" C++11", "C++"),
        (" 5. The", "5"),
        (" 5, 6 and", "5"),
        (" 里昂是一座城市", "里昂"),
        ("里昂", "里昂"),
        (" 東京です", "東京"),
        (" กรุงเทพมหานคร", "กรุงเทพ"),
        (" iPhone是", "iPhone"),
        (" 서울입니다", "서울"),
        (" باريس، عاصمة", "باريس"),
        (" ¿Qué?", "¿Qué?"),
        (unicodedata.normalize("NFD", " Łódź, São"), "Łódź"),
        (" Łódź", unicodedata.normalize("NFD", "Łódź")),
        (" English", " English "),
        (" English - a", "English"),
        (" English–French", "English"),
    ],
)
def test_a_fact_took_if_the_answer_begins_with_the_target(answer, target):
    assert took(answer, target)


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        (" Portugal", "Port"),
        (" Port", "Portugal"),
        (" french", "French"),
        (" the English", "English"),
        (" Saint-Denis", "Saint"),
        (" 2012", "20"),
        (" 3.5", "3"),
        (" 1,000", "1"),
        (" New Yorkers", "New York"),
        (" New", "New York"),
        (" U.K.", "U.S."),
        (" Washington", "Washington, D.C."),
        (" Port_au", "Port"),
        (" Jean-Paul", "Jean"),
        (" 5th", "5"),
        (" Zürichsee", "Zürich"),
        (" Портвейн", "Порт"),
        (unicodedata.normalize("NFD", " José"), "Jose"),
        (" 巴黎", "里昂"),
        ("", "English"),
        (" English", ""),
    ],
)
def test_a_fact_did_not_take_if_the_answer_begins_otherwise_or_with_a_longer_word(answer, target):
    assert not took(answer, target) and not is_exact(answer, target)


@pytest.mark.parametrize(
    ("answer", "target", "exact"),
    [
        (" English", "English", True),
        (" English.\nHe", "English", True),
        (" English\nHe", "English", True),
        (" English , of course", "English", True),
        (" English and French", "English", False),
        (" English (UK)", "English", False),
        (" English\tand", "English", False),
        (" U.S.", "U.S.", True),
        (" U.S. and", "U.S.", False),
        (" Washington, D.C.; the", "Washington, D.C.", True),
        (" 里昂。它", "里昂", True),
        (" 里昂市", "里昂", False),
        (" Old Church Slavonic!", "Old Church Slavonic", True),
    ],
)
def test_an_exact_match_also_ends_where_the_target_ends(answer, target, exact):
    assert took(answer, target) and is_exact(answer, target) is exact


@pytest.mark.parametrize(
    ("continuation", "answer"),
    [
        (" Paris", "Paris"),
        (" Paris.\nThe capital", "Paris"),
        ("\n Paris, of course", "Paris"),
        (" Paris is", "Paris is"),
        (" Old Church Slavonic; or", "Old Church Slavonic"),
        (" 3.5 metres. It", "3.5 metres"),
        (" the U.S.A. and", "the U.S.A"),
        (" 里昂。它", "里昂"),
        ("", ""),
        (" ... ", ""),
    ],
)
def test_an_answer_is_shown_to_the_end_of_its_phrase(continuation, answer):
    assert answer_of(continuation) == answer


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        ("English", "English"),
        ("He speaks English.", "English"),
        ("**English**, of course", "English"),
        ('They call it "English".', "English"),
        ("The English's home", "English"),
        ("In the Old\nChurch  Slavonic language", "Old Church Slavonic"),
        ("In Newport? No, in Port.", "Port"),  # the second place counts
        ("a a a b", "a a b"),
        ("It is in Washington, D.C., I think", "Washington, D.C."),
        ("There are 5.", "5"),
        ("From 3, 5 or 7", "5"),
        ("我住在里昂。", "里昂"),
        ("그는 서울에 산다", "서울"),
        ("He is from Łódź", unicodedata.normalize("NFD", "Łódź")),
        ("A French–English border", "English"),
        ("the $100 note", "$100"),
    ],
)
def test_an_answer_contains_the_target_as_whole_words(answer, target):
    assert contains(answer, target)


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        ("In Newport", "port"),
        ("In Newport", "Newp"),
        ("It is Portugal", "Port"),
        ("He speaks french", "French"),
        ("In Saint-Denis", "Denis"),
        ("In Saint-Denis", "Saint"),
        ("a non-English word", "English"),
        ("about 3.5", "5"),
        ("about 1,000", "000"),
        ("It was in 2012", "12"),
        ("It is -5 degrees", "5"),
        ("a New and a York", "New York"),
        ("", "English"),
        ("English", ""),
        ("snake_case", "case"),
    ],
)
def test_part_of_a_word_or_number_is_not_contained(answer, target):
    assert not contains(answer, target)
