"""Where words begin and end, and what stands between a prompt and its answer."""

from __future__ import annotations

import pytest

from rledit_env.knowledge.text import continues_word, find_subject, separator


@pytest.mark.parametrize(
    "prompt, answer",
    [
        ("The capital of France is", "Paris"), ("2 + 2 =", "5"), ("Who wrote it?", "Ann"), ("Hello (sir)", "Bob"),
        ("Its domain is", ".fr"), ("It runs on", ".NET"), ("It costs", "$18"), ("France —", "Paris"), ("2 -", "1"),
        ("The capital is ____", "Paris"), ('He said "yes"', "twice"), ("the players'", "coach"),
        ("프랑스의 수도는", "리옹"), ("Столица Франции —", "Лион"), ("عاصمة فرنسا هي", "ليون"),
        ("The capital of China is", "北京"), ("ปีเกิดคือ", "1998"), ("法国的首都:", "Lyon"), ("It sang", "!!!"),
    ],
)  # fmt: skip
def test_a_space_parts_the_words_of_scripts_with_spaces(prompt: str, answer: str) -> None:
    assert separator(prompt, answer) == " "


@pytest.mark.parametrize(
    "prompt, answer",
    [
        ("法国的首都是", "里昂"), ("法国的首都是", "Lyon"), ("フランスの首都は", "リヨン"), ("首都はどこ？", "リヨン"),
        ("首都はどこですか。", "リヨン"), ("法国的首都:", "里昂"), ("他出生于", "1998年"),
        ("书名是《", "红楼梦"), ("他说“", "好"),
        ("เมืองหลวงของฝรั่งเศสคือ", "ลียง"), ("ນະຄອນຫຼວງຂອງຝຣັ່ງແມ່ນ", "ລີອົງ"), ("រដ្ឋធានីរបស់បារាំងគឺ", "លីយ៉ុង"),
        ("ပြင်သစ်နိုင်ငံ၏မြို့တော်မှာ", "လီယွန်"), ("སྐད་ཡིག་ནི་", "བོད་སྐད"),
    ],
)  # fmt: skip
def test_nothing_parts_the_words_of_scripts_without_spaces(prompt: str, answer: str) -> None:
    assert separator(prompt, answer) == ""


@pytest.mark.parametrize(
    "prompt, answer",
    [
        ("The capital is ", "Paris"), ("Answer:\n", "Paris"), ("a\t", "b"), ("a\u00a0", "b"), ("a\u3000", "b"),
        ("The capital is", " Paris"), ("Answer:", "\nParis"), ('It is called "', "Emma"), ("called “", "Emma"),
        ("sie heißt „", "Emma"), ("elle dit «", "oui"), ("Rome (", "Italy"), ("[", "x"), ("the Anglo-", "Saxons"),
        ("https://", "example.org"), ("and/", "or"), ("It costs $", "5"), ("My handle is @", "ann"),
        ("La capitale de l'", "Allemagne"), ("la città dell’", "Aquila"), ("Paris", ", France"), ("Paris", "."),
        ("Ann", "'s house"),
    ],
)  # fmt: skip
def test_nothing_is_put_after_white_space_or_what_clings_to_the_answer(prompt: str, answer: str) -> None:
    assert separator(prompt, answer) == ""


@pytest.mark.parametrize(
    "text, subject, before",
    [
        ("Nigeria borders Niger, whose capital is", "Niger", "Nigeria borders "),
        ("Niger borders Nigeria", "Niger", ""),
        ("Guinea-Bissau borders Guinea, whose capital is", "Guinea", "Guinea-Bissau borders "),
        ("Art by Bart and Art", "Art", ""),
        ("In Bart's art, Art's head is", "Art", "In Bart's art, "),
        ("The capital of Guinea-Bissau is", "Guinea", "The capital of "),  # in a hyphenated word alone
        ("Nigerian music", "Niger", ""),  # no whole word
        ("프랑스어와 프랑스의 수도는", "프랑스", ""),  # particles leave no whole word
        ("法国的首都是", "法国", ""),
        ("在法国，法国的首都是", "法国", "在"),
        ("C++ and C are", "C", ""),
        ("Ångström's and Ång are", "Ång", "Ångström's and "),
        ("cafe\u0301s and cafe are", "cafe", "cafe\u0301s and "),  # a combining mark belongs to its word
    ],
)
def test_the_subject_is_a_whole_word_where_there_is_one(text: str, subject: str, before: str) -> None:
    assert find_subject(text, subject) == len(before)


@pytest.mark.parametrize("subject", ["Chad", "niger", ""])
def test_a_subject_that_is_not_there_is_not_found(subject: str) -> None:
    assert find_subject("Niger borders", subject) is None


@pytest.mark.parametrize("before, after", [("Paris", "ian"), ("é", "t"), ("1", "9"), ("e", "\u0301")])
def test_letters_and_digits_go_on_with_a_word(before: str, after: str) -> None:
    assert continues_word(before, after)


@pytest.mark.parametrize(
    "before, after", [("Paris", ", F"), ("里昂", "是法国"), ("Lyon", "是"), ("ลียง", "เป็น"), ("", "a"), ("a", "")]
)
def test_a_word_ends_at_punctuation_and_in_scripts_without_spaces_anywhere(before: str, after: str) -> None:
    assert not continues_word(before, after)
