"""The page: escaped, self-contained, whole or not written; its numbers readable without eyes."""

import errno
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from llama2rt import report
from llama2rt.report import figures, html
from llama2rt.report.files import write_json

EVIL = "<script>alert('x')</script> & \"quotes\" [INST] </td></table>"


class _Checker(HTMLParser):
    """Collects tags and ids; fails on a tag closed that is not open."""

    VOID = frozenset({"meta", "br", "img", "hr", "link", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag


def _full_page() -> str:
    estimates = [(0.4, 0.35, 0.45), (0.7, 0.66, 0.74)]
    drawn = figures.versions(["SFT", EVIL], estimates, estimates)
    sections = [
        report.Section(
            f"One {EVIL}",
            [
                drawn,
                figures.win_matrix(["a", "b"], [[np.nan, 0.2], [0.8, np.nan]]),
                figures.length_correlation({EVIL: [0.1, 0.5]}),
                report.Table(("name", EVIL), [(EVIL, 1.0)], caption=EVIL),
                report.Facts({EVIL: EVIL}),
                report.Text(EVIL, EVIL),
                report.Dialogues(
                    [
                        report.Answers(
                            [{"role": "user", "content": EVIL}],
                            {"SFT": EVIL, EVIL: ""},
                            {"SFT": EVIL},
                        ),
                        report.Answers([{"role": "user", "content": "q"}], {"SFT": "only one"}),
                    ],
                    caption=EVIL,
                ),
            ],
            text=EVIL,
        ),
        report.Section("Two", [figures.best_of_n({}), drawn]),  # the same figure again
        report.Section("Three", []),
    ]
    return html.page(EVIL, sections, subtitle=EVIL, headlines=[report.Headline(EVIL, EVIL, EVIL)])


@pytest.fixture(scope="module")
def checked() -> tuple[str, _Checker]:
    text = _full_page()
    checker = _Checker()
    checker.feed(text)
    checker.close()
    return text, checker


def test_nothing_from_data_becomes_markup(checked):
    text, checker = checked
    assert checker.open == []
    assert "script" not in checker.tags
    assert "<script" not in text and "</td></table> " not in text
    assert "&lt;script&gt;" in text
    assert not [name for name, _ in checker.attributes if name.startswith("on")]


def test_page_asks_the_network_for_nothing(checked):
    text, checker = checked
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert not {"script", "link", "img", "iframe", "object"} & set(checker.tags)
    targets = [value for name, value in checker.attributes if name in ("href", "src")]
    # A colour bar is a picture inside the file.
    assert targets and all(v.startswith(("#", "data:image/png;base64,")) for v in targets)


def test_ids_are_unique_and_links_lead_somewhere(checked):
    text, checker = checked
    assert len(checker.ids) == len(set(checker.ids))
    wanted = set(re.findall(r"url\(#([^)]+)\)", text))
    wanted |= {v[1:] for n, v in checker.attributes if n == "href" and v.startswith("#")}
    assert wanted and wanted <= set(checker.ids)


def test_each_drawing_has_words_and_its_numbers(checked):
    text, _ = checked
    drawings = text.count("<svg")
    assert drawings == 5
    assert text.count('role="img"') == drawings == text.count("<figcaption>")
    assert text.count("<summary>The numbers</summary>") == drawings
    assert "0.400 [0.350, 0.450]" in text


def test_colours_follow_the_reader(checked):
    text, _ = checked
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--ink)" in drawings and "var(--series-0)" in drawings
    assert "#0072b2" not in drawings
    assert "prefers-color-scheme:dark" in text and "@media print" in text


@pytest.mark.parametrize(
    "value, shown",
    [
        (None, "\N{EN DASH}"),
        (float("nan"), "\N{EN DASH}"),
        (0.123456, "0.1235"),
        (np.float32(2.5), "2.5"),
        (1234, "1234"),
        (1234567, "1\N{THIN SPACE}234\N{THIN SPACE}567"),
        (True, "yes"),
        ((0.42, 0.3537, 0.4893), "0.420 [0.354, 0.489]"),
        ((0.5, 0.5, 0.5), "0.500 [0.500, 0.500]"),
        ((12.3, 2.0, 25.0), "12 [2, 25]"),
        ((0.0012, 0.0011, 0.0013), "0.00120 [0.00110, 0.00130]"),
        ("text", "text"),
    ],
)
def test_cells(value, shown):
    assert html.cell(value) == shown


def test_same_input_gives_the_same_bytes():
    assert _full_page() == _full_page()


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch, failing):
    path = tmp_path / "new" / "report.html"
    html.write(path, "first", [])
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(failing, full)
    with pytest.raises(OSError, match=r"no space left on device: .*report\.html"):
        html.write(path, "second", [])
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_json_is_readable_by_everyone(tmp_path):
    from llama2rt.evaluate.intervals import Interval

    path = tmp_path / "report.json"
    write_json(
        path,
        {
            "mean": Interval(np.float64(0.5), float("nan"), float("inf")),
            "curve": np.array([1.0, 2.0]),
            "flag": np.bool_(True),
            3: (1, "ü"),
            "where": path,
        },
    )
    assert json.loads(path.read_text()) == {
        "mean": {"mean": 0.5, "low": None, "high": None},
        "curve": [1.0, 2.0],
        "flag": True,
        "3": [1, "ü"],
        "where": str(path),
    }
    with pytest.raises(TypeError):
        write_json(path, {"model": object()})
    assert json.loads(path.read_text())["flag"] is True
