"""Instructions for Ghost Attention: what files may say, what is drawn, when an answer follows."""

import collections

import pytest

from llama2rt.data import instructions
from llama2rt.errors import InputError

FILE = """
[[attributes]]
name = "figure"
full = "Act as {value}."
terse = "Figure: {value}."
values = ["Ada", { value = "a.b", check = { regex = "^{value}$" } }]
check = { contains = ["{value}"], lacks = ["sorry"] }

[[attributes]]
name = "language"
full = "Speak {value}."
terse = "Language: {value}."
values = [{ value = "Russian", check = { scripts = ["CYRILLIC"] } }, "Latin"]
"""


@pytest.fixture
def attributes(tmp_path):
    path = tmp_path / "attributes.toml"
    path.write_text(FILE)
    return instructions.read(path)


def chosen(attributes, attribute, value):
    return instructions.Chosen(attributes[attribute], attributes[attribute].values[value])


@pytest.mark.parametrize(
    ("attribute", "value", "answer", "follows"),
    [
        (0, 0, "I am ada!", True),
        (0, 0, "Bob", False),
        (0, 0, "Sorry, Ada", False),
        (0, 1, "a.b", True),
        (0, 1, "acb", False),  # a value is no pattern
        (1, 0, "Привет, Ada", True),
        (1, 0, "Привет, dear Augusta Ada", False),
        (1, 0, "12", False),
        (1, 1, "salve", None),
    ],
)
def test_a_rule_says_whether_an_answer_follows(attributes, attribute, value, answer, follows):
    assert chosen(attributes, attribute, value).follows(answer) is follows


def test_beside_other_letters_no_rule_looks_for_latin_words(attributes):
    both = instructions.Instruction((chosen(attributes, 0, 0), chosen(attributes, 1, 0)), False)
    assert both.follows("\u041f\u0440\u0438\u0432\u0435\u0442") == {"language": True}
    latin = instructions.Instruction((chosen(attributes, 0, 0), chosen(attributes, 1, 1)), False)
    assert latin.follows("salve") == {"figure": False}


def test_what_is_drawn(attributes):
    drawn = instructions.draw(attributes, 400, 7)
    assert instructions.draw(attributes, 40, 7) == drawn[:40]
    assert instructions.draw(attributes, 40, 8) != drawn[:40]
    assert 150 < sum(one.terse for one in drawn) < 250
    counts = collections.Counter(len(one.chosen) for one in drawn)
    assert counts.keys() == {1, 2} and min(counts.values()) > 150
    firsts = collections.Counter(one.chosen[0].attribute.name for one in drawn)
    assert min(firsts.values()) > 150  # in any order
    both = next(one for one in drawn if len(one.chosen) == 2 and one.terse)
    names = [c.attribute.name.capitalize() for c in both.chosen]
    values = [c.value.value for c in both.chosen]
    assert both.text == " ".join(f"{n}: {v}." for n, v in zip(names, values, strict=True))
    assert "Act as" in both.full_text and "Speak" in both.full_text
    # Only what can be checked is judged.
    latin = instructions.Instruction((chosen(attributes, 1, 1), chosen(attributes, 0, 0)), False)
    assert latin.follows("ada") == {"figure": True}


def test_the_shipped_attributes(attributes):
    shipped = instructions.read()
    assert {attribute.name for attribute in shipped} == {"hobby", "language", "figure"}
    for attribute in shipped:
        for value in attribute.values:
            assert (value.check or attribute.check) is not None
    french = next(v for v in shipped[1].values if v.value == "French")
    assert french.check.passes("Je suis Napoleon", "French")
    assert not french.check.passes("I am Napoleon", "French")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("{value}.", "him."), "attributes.0.full: expected a text with {value} in it"),
        (('"language"', '"figure"'), "two attributes are called 'figure'"),
        (("contains", "containing"), "attributes.0.check.containing"),
        (("^{value}$", "("), "attributes.0.values.1.check.regex: not a regular expression"),
        (('{ scripts = ["CYRILLIC"] }', "{}"), "give at least one of contains, lacks, regex"),
        (("CYRILLIC", "cyrillic"), "expected names in capitals as LATIN, got 'cyrillic'"),
        (('lacks = ["sorry"]', 'lacks = [" "]'), "a blank text stands in every answer"),
        (("[[attributes]]", "[[attributes]"), "not TOML"),
        ((FILE, ""), "attributes: Field required"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, change, said):
    path = tmp_path / "attributes.toml"
    path.write_text(FILE.replace(*change))
    with pytest.raises(InputError) as error:
        instructions.read(path)
    assert str(error.value).startswith(f"{path}: ") and said in str(error.value)
    with pytest.raises(InputError, match="cannot be read"):
        instructions.read(tmp_path / "none.toml")
