"""Stanford Human Preferences: two comments on a post, ranked by its readers."""

from collections import defaultdict
from collections.abc import Iterator

from llama2rt.data.formats.registry import Convert, Row, Selection, register
from llama2rt.data.formats.values import choice, conversation, score, text
from llama2rt.errors import InputError

LEAST_RATIO = 2.0
MOST_PAIRS = 5


@register(
    "SHP",
    "comparison",
    "post_id history human_ref_A human_ref_B labels score_ratio",
    carries="domain upvote_ratio c_root_id_A c_root_id_B created_at_utc_A created_at_utc_B "
    "score_A score_B seconds_difference",
)
def _shp(selection: Selection) -> Convert:
    """Pairs with a score ratio above 2, at most five a post."""
    taken: defaultdict[str, int] = defaultdict(int)

    def convert(row: Row) -> Iterator[Row]:
        post, label = text(row, "post_id"), choice(row, "labels")
        if score("score_ratio", row["score_ratio"]) <= LEAST_RATIO:
            selection.left_out["pairs with a score ratio of 2 or less"] += 1
            return
        _check_label(row, label)
        if taken[post] >= MOST_PAIRS:
            selection.left_out["pairs of posts with five already"] += 1
            return
        taken[post] += 1
        a, b = text(row, "human_ref_A"), text(row, "human_ref_B")
        chosen, rejected = (a, b) if label else (b, a)
        prompt = conversation(row, "history")
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": "shp"}

    return convert


def _check_label(row: Row, label: int) -> None:
    """InputError where the readers' votes, which the label was made of, say the other comment."""
    if any(row.get(key) is None for key in ("score_A", "score_B")):
        return
    a, b = (score(key, row[key]) for key in ("score_A", "score_B"))
    if (a > b) != (label == 1):
        side = "human_ref_A" if label else "human_ref_B"
        raise InputError(f"labels: {label} is for {side}, but score_A is {a:g} and score_B {b:g}")
