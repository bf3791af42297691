"""An iteration's prompts."""

from llama2rt.data.records import Prompt
from llama2rt.rollout.sampling import draw


def test_draw_uses_every_prompt_before_any_comes_again():
    prompts = [Prompt(str(i), []) for i in range(7)]
    drawn = [p.id for t in range(7) for p in draw(prompts, 3, seed=1, iteration=t)]
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == sorted(drawn[14:]) == sorted("0123456")
    assert drawn[:7] != drawn[7:14]
    assert len(draw(prompts, 20, seed=1, iteration=1)) == 20
