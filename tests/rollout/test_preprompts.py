"""Pre-prompts: what templates may be, that draws are a prompt's own, and where they go."""

import pytest
from pydantic import ValidationError

from llama2rt.data.records import Prompt
from llama2rt.errors import InputError
from llama2rt.rollout import preprompts
from llama2rt.rollout.preprompts import PrepromptOptions

USER = {"role": "user", "content": "how?"}
SYSTEM = {"role": "system", "content": "You sell shoes."}


def options(**keys):
    given = {"templates": ["Be {adjective}.", "A {adjective} one."], "adjectives": ["wise", "kind"]}
    return PrepromptOptions.model_validate(given | keys)


def test_where_a_preprompt_goes():
    alone, told = Prompt("a", [USER]), Prompt("b", [SYSTEM, USER])
    put = preprompts.put_before(alone, "Be wise.", "system")
    assert put.messages == [{"role": "system", "content": "Be wise."}, USER]
    put = preprompts.put_before(told, "Be wise.", "system")
    assert put.messages == [{"role": "system", "content": "Be wise.\n\nYou sell shoes."}, USER]
    put = preprompts.put_before(told, "Be wise.", "turn")
    assert put.messages == [SYSTEM, {"role": "user", "content": "Be wise.\n\nhow?"}]
    assert told.messages == [SYSTEM, USER] and alone.messages == [USER]


def test_a_prompts_draws_are_its_own():
    """Whatever stands beside it in the file, and whatever their order."""
    prompts = [Prompt(f"p{i}", [USER], "safety", "crime" if i % 2 else "") for i in range(40)]
    chosen = options(answers={"crime": "Refuse."}, tailored=0.5)
    drawn = preprompts.draw(chosen, prompts, 3, seed=4)
    backwards = preprompts.draw(chosen, prompts[::-1], 3, seed=4)[::-1]
    assert drawn == backwards
    assert drawn != preprompts.draw(chosen, prompts, 3, seed=5)
    flat = [one for own in drawn for one in own]
    assert {one.text.removesuffix(" Refuse.") for one in flat} == {
        "Be wise.", "Be kind.", "A wise one.", "A kind one."
    }  # fmt: skip
    assert all(one.tailored == one.text.endswith(" Refuse.") for one in flat)
    assert not any(one.tailored for own in drawn[::2] for one in own)
    assert 0.3 < sum(one.tailored for own in drawn[1::2] for one in own) / 60 < 0.7


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"templates": ["Be good."]}, "'Be good.': expected {adjective} once, and no other braces"),
        ({"templates": ["{adjective} {adjective}"]}, "expected {adjective} once"),
        ({"templates": ["Be {adjective} {now}."]}, "no other braces"),
        ({"templates": ["[INST] {adjective}"]}, "holds the format tag [INST]"),
        ({"templates": []}, "at least 1 item"),
        ({"adjectives": ["wise", " "]}, "adjectives: ' ': is blank"),
        ({"adjectives": ["wise", "wise"]}, "'wise' stands there twice"),
        ({"answers": {"crime": " "}}, "answers: crime: is blank"),
        ({"answers": {" ": "Refuse."}}, "answers: a risk category is blank"),
        ({"tailored": 1.5}, "less than or equal to 1"),
    ],
)
def test_templates_that_are_none(keys, said):
    with pytest.raises(ValidationError) as error:
        options(**keys)
    assert said in str(error.value)


def test_a_file_in_place_of_the_keys(tmp_path):
    path = tmp_path / "words.toml"
    path.write_text('adjectives = ["calm"]\n[answers]\ncrime = "Refuse."\n')
    read = PrepromptOptions(file=path, position="turn", tailored=0.5).read()
    assert (read.adjectives, read.answers) == (["calm"], {"crime": "Refuse."})
    assert (read.position, read.tailored) == ("turn", 0.5)
    assert read.templates == PrepromptOptions().templates
    with pytest.raises(ValidationError, match="holds adjectives too: give one of the two"):
        PrepromptOptions(file=path, adjectives=["wise"])
    for text, said in (
        ('adjective = ["calm"]', "expected templates, adjectives or answers, found adjective"),
        ("", "found nothing"),
        ("adjectives = calm", "words.toml: Invalid value"),
        ('templates = ["Be."]', "words.toml: templates: 'Be.': expected {adjective} once"),
    ):
        path.write_text(text)
        with pytest.raises(InputError) as error:
            PrepromptOptions(file=path).read()
        assert said in str(error.value)
    with pytest.raises(InputError, match="No such file"):
        PrepromptOptions(file=tmp_path / "none.toml").read()
