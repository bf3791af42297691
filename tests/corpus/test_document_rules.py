"""The steps that look at one document: what each is for is found, and nothing else is touched."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.corpus import personal, quality
from llama2rt.corpus.contamination import EvaluationSets
from llama2rt.corpus.language import language
from llama2rt.corpus.normalise import normalise
from llama2rt.corpus.words import words_of
from llama2rt.errors import InputError

PROSE = (
    "The river had been low for weeks, and the miller said that it would not rise before the "
    "autumn. People came to look at the stones which they had never seen, and a few of them "
    "talked of the year when it was possible to walk across with dry feet. Nobody knew how that "
    "had ended. The old bridge was closed to carts, but children used it to fish from, with "
    "lines that hardly reached the water."
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("cafe\u0301 \ufb01", "caf\xe9 \ufb01"),
        ("a\x00b\x07\tc\ufeff", "ab\tc"),
        ("line  \t\nnext\n\n\n\n\nlast\n", "line\nnext\n\nlast"),
    ],
)
def test_one_spelling(given, expected):
    assert normalise(given, "NFC") == expected
    assert normalise(expected, "NFC") == expected


def test_compatibility_forms_only_where_asked_for():
    assert normalise("\ufb01\u00b2", "NFKC") == "fi2"
    assert normalise("cafe\u0301", None) == "cafe\u0301"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, "en"),
        ("Der Fluss ist seit Wochen niedrig, und die Leute sagen, dass es nicht der erste Sommer "
         "ist, in dem man die Steine auf dem Grund sehen kann.", "de"),
        ("Le fleuve est bas depuis des semaines, et les gens disent que ce n'est pas la première "
         "fois qu'on voit les pierres dans le lit.", "fr"),
        ("Il fiume è basso da settimane e la gente dice che non è la prima volta che si vedono le "
         "pietre nel letto del fiume.", "it"),
        ("El río está bajo desde hace semanas y la gente dice que no es la primera vez que se ven "
         "las piedras en el fondo.", "es"),
        ("Река уже несколько недель стоит низко, и люди ходят смотреть на камни.", "cyrillic"),
        ("川は何週間も水が少ないままで、人々は石を見に来た。", "kana"),
        ("河水已经低了好几个星期", "han"),
        ("def f(x):\n    return [g(y) for y in x]\n", "und"),
        ("12 34 56", "und"),
    ],
)  # fmt: skip
def test_languages(text, expected):
    assert language(text, words_of(text)) == expected


def test_gopher_keeps_prose_and_names_what_it_drops():
    assert quality.gopher(PROSE) is None and quality.gopher_repetition(PROSE) is None
    for text, reason in [
        ("too short", "2 words"),
        ("antidisestablishmentarianism " * 60, "words of 28.0 characters"),
        (PROSE + " #" * 40, "hashes and ellipses"),
        ("\n".join(f"- {line}." for line in PROSE.split(". ") * 3), "begin with a bullet"),
        ("\n".join(f"{line}..." for line in PROSE.split(". ")), "end with an ellipsis"),
        (PROSE + " 1234" * 60, "of words have a letter"),
        ("word salad without grammar " * 20, "of the words that English has"),
    ]:
        assert reason in (quality.gopher(text) or "")
    lines = PROSE.split(". ")
    for text, reason in [
        ("\n".join([*lines, *lines]), "of lines are repeated"),
        ("\n".join([PROSE, *"abcdefgh", PROSE]), "of characters are in repeated lines"),
        (PROSE + " buy now" * 30, "in one run of 2 words"),
        (" ".join(PROSE.split()[:40] * 2), "in repeated runs of 5 words"),
    ]:
        assert reason in (quality.gopher_repetition(text) or "")


def test_c4_keeps_lines_of_prose():
    menu = "Home | About | Contact\n"
    page = menu + PROSE + "\nClick here\nWe use cookies to make this page better for you.\nPlease "
    left, reason = quality.c4(page + "enable JavaScript to see what this page holds.\n")
    assert (left, reason) == (PROSE, None)
    assert quality.c4(PROSE.replace("weeks", "weeks[12]"))[0] == PROSE
    for text, said in [
        ("One line of prose is here.", "1 sentences"),
        (PROSE + " {", "curly"),
        (PROSE + " Lorem Ipsum.", "lorem"),
    ]:
        assert said in (quality.c4(text)[1] or "")


PLANTED = {
    "EMAIL": ["ann.lee@example.org", "x_1+y@mail.example.co.uk"],
    "CARD_NUMBER": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005"],
    "IP_ADDRESS": ["8.8.8.8", "2001:4860:4860::8888"],
    "PHONE_NUMBER": [
        "+44 20 7946 0958",
        "(415) 555-2671",
        "415-555-2671",
        "415 555-2671",
        "1.800.555.2671",
        "+1 212.555.0187",
        "+33 6 12 34 56 78",
    ],
}
ORDINARY = [
    "4111 1111 1111 1112",  # no checksum
    "1234567890123",
    "1.2.3.4.5 and version 8.8.8.8",
    "127.0.0.1 and 192.168.0.1, which are everyone's",
    "300.1.1.1",
    "12:30:45, std::vector, a::b",
    "@handle, a @ b, user@localhost",
    "He has 5+10+20+30 apples and $1,234,567.89 in 2,000,000 pieces",
    "<<48/2=24>>24 clips, 1990-2003, 12-345-6789, ISBN 978-3-16-148410-0",
    "3.14159265358979 and 0.4111111111111111",
    "On 2023-11-30 at 10:12:45, 100 200 3000 people",
    "Act 1. Scene 2. 1610",
    "Version: 8.8.8.8, theorem 12.1.1.3",
    "Sold 300 400 5000 and 415 555 2671",
    "gains of +100 200 300 400 and +12 34 56 78",
    "lodash@4.17.21.tgz",
    # Three, three and four digits that no area and exchange of the North American plan are.
    "115-555-2671 and 015.555.2671, 415-155-2671 and 415.055.2671",
    "911-555-2671, 415-911-2671, 290-555-2671, 375-555-2671, 960-555-2671",
    "300-555-2671, 255.200.3000",
    "+1 300 400 5000",
    # Those that are announced as something else, or reckoned with.
    "driver version 452.389.1234, release: 530.204.1000 and section 415.555.2671",
    "mobile version 452.389.1234, phone build 530.204.1000, text ISBN 415-555-2671",
    "ISBN 978-030-6406 and ISBN: 415-555-2671, part no. 415-555-2671, order #415-555-2671",
    "it leaves 800-300-2000=500 or 2 * 415-555-2671",
    "415-555.2671, 415.555-2671, 1,415.555.2671, 415-555-2671-3",
    "2023-11-30, 30-11-2023, 11.30.2023, 2023.11.3000",
    "10.0.415.555 and 978-0-306-40615-7",
]


@pytest.mark.parametrize(("kind", "item"), [(k, i) for k, items in PLANTED.items() for i in items])
def test_personal_data_is_found_wherever_it_stands(kind, item):
    for before, after in (("Write to ", " today."), ("(", ")"), ("", ""), ("a\n", ",\nb")):
        text, counts, items = personal.replace(f"{before}{item}{after}")
        assert text == f"{before}<{kind}>{after}"
        assert counts == {kind: 1} and items == [item]


def test_personal_data_stands_beside_other_scripts_and_marks():
    for text, found in (
        ("\u8054\u7cfbjohn@example.com\u8c22", "\u8054\u7cfb<EMAIL>\u8c22"),
        ("_jane@163.com_", "_<EMAIL>_"),
        ("\u7535\u8bdd+8613800138000\u3002", "\u7535\u8bdd<PHONE_NUMBER>\u3002"),
        ("ssh srv 8.8.8.8", "ssh srv <IP_ADDRESS>"),
        ("call me: 415 555 2671", "call me: <PHONE_NUMBER>"),
        ("Part number on request: tel=415-555-2671", "Part number on request: tel=<PHONE_NUMBER>"),
        ("Tel +4915112345678.", "Tel <PHONE_NUMBER>."),
        ("+33 6 12 34 56 78 or later", "<PHONE_NUMBER> or later"),
    ):
        assert personal.replace(text)[0] == found


def test_items_of_a_row_with_commas_are_found():
    row = "Ann,42,4111111111111111,8.8.8.8,+442079460958,415-555-2671,ann@example.org,90210"
    found = "<CARD_NUMBER>,<IP_ADDRESS>,<PHONE_NUMBER>,<PHONE_NUMBER>,<EMAIL>"
    assert personal.replace(row)[0] == f"Ann,42,{found},90210"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Contact:\n* 415-555-2671\n* 415-555-2672", 2),
        ("reach **(415) 555-2671**", 1),
        ("Reach us: 415-555-2671\n* next item", 1),
        ("Our desk 415-555-2671\n=====\nx", 1),
        ("ext (415) 555-2671*", 1),
        ("phone_number=415-555-2671&mobile_phone=415-555-2672&phone1=415-555-2673", 3),
        ("contact=(415) 555-2671&x", 1),
        ("John,42,415-555-2671,NY", 1),
        ("a,415-555-2671,94103\n415-555-2671,415-555-2672", 3),
        ("V: (415) 555-2671 F: (415) 555-2672", 2),
        ("press release: 415-555-2671 and See Section: (415) 555-2671", 2),
        ("FOR IMMEDIATE RELEASE\n(415) 555-2671", 1),
        ("order number\n\n415-555-2671", 1),
    ],
)
def test_phone_numbers_of_lists_tables_forms_and_letterheads(text, count):
    replaced, counts, _ = personal.replace(text)
    assert counts == {"PHONE_NUMBER": count} and "555" not in replaced


@pytest.mark.parametrize("text", ORDINARY)
def test_what_only_looks_alike_stays(text):
    assert personal.replace(text) == (text, {}, [])


@given(st.text("0123456789", min_size=12, max_size=18))
def test_luhn_has_one_last_digit(digits):
    assert sum(personal.luhn(digits + last) for last in "0123456789") == 1


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    path = tmp_path_factory.mktemp("sets") / "questions.json"
    rows = [
        {"question": f"Ann has {n} pears and gives {n // 2} of them to Bob, how many are left?"}
        for n in range(20, 40)
    ]
    rows.append(
        {"messages": [{"role": "user", "content": "Nine words that are all there is here now"}]}
    )
    rows.append({"question": "too short"})
    path.write_text(json.dumps(rows))
    return EvaluationSets([path], 13)


@given(st.data())
def test_planted_questions_are_found_and_nothing_else(sets, data):
    draw = data.draw
    words = draw(st.lists(st.sampled_from(words_of(PROSE)), max_size=60))
    assert sets.find(words) is None
    at = draw(st.integers(0, len(words)))
    question = words_of("Ann has 21 PEARS, and gives 10 of them to Bob; how many are left")
    begin = draw(st.integers(0, len(question) - 13))
    match = sets.find([*words[:at], *question[begin : begin + 13], *words[at:]])
    assert match is not None and match.where.endswith("questions.json:2")
    assert sets.find([*words[:at], *question[:12], "plum", *question[13:], *words[at:]]) is None


def test_short_texts_count_whole_or_not_at_all(sets, tmp_path):
    assert sets.short == 2  # the role too
    assert sets.find(words_of("so: nine words that are all there is here now, he said")) is not None
    assert sets.find(words_of("nine words that are all there is here")) is None
    (tmp_path / "short.json").write_text('[{"a": "few words"}]')
    with pytest.raises(InputError, match=r"short\.json: no text of 8 words"):
        EvaluationSets([tmp_path / "short.json"], 13)


def test_scripts_without_spaces_have_a_word_a_character():
    assert words_of("河水 Low") == ["河", "水", "low"]
