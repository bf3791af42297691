"""The page as a person uses it, in headless Chromium: by keyboard alone, then by mouse."""

import json
import os
import shutil

import pytest
from annotation_pages import Says, config, page, pairs_file

from llama2rt.data import readers
from llama2rt.people import export

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    # As root, as in a container, Chromium has no sandbox.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture
def tab(browser):
    """A page that fails the test where it says anything in its console."""
    with browser.new_context(viewport={"width": 1100, "height": 800}) as context:
        found = context.new_page()
        found.set_default_timeout(10_000)
        said: list[str] = []
        found.on("console", lambda message: said.append(message.text))
        found.on("pageerror", lambda error: said.append(str(error)))
        found.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        yield found
        assert not [text for text in said if "status of 4" not in text], said


def see(tab, text: str) -> None:
    """Wait for a page that says `text`, and until its script listens: keys before that are lost."""
    tab.wait_for_selector(f"text={text}")
    tab.wait_for_load_state()


def log_in(tab, served, **options) -> None:
    tab.goto(served.url)
    tab.wait_for_selector("input:focus")
    tab.keyboard.type(served.site.accounts.invite("ada", **options))
    tab.keyboard.press("Enter")
    see(tab, "ada, 0 judged")


def test_by_keyboard(tab, tmp_path) -> None:
    guideline = tmp_path / "guideline.md"
    guideline.write_text("# Helpfulness\nRead both.\n\n<script>alert('guideline')</script>")
    pairs = pairs_file(tmp_path / "pairs.jsonl", 3, "safety")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[0]["first"] = "<script>alert('response')</script><img src=x onerror=alert(1)>"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = config(tmp_path, pairs=[pairs], guidelines={"safety": guideline})
    with page(given) as served:
        log_in(tab, served)
        assert tab.locator(".guideline").get_attribute("open") is not None
        tab.keyboard.press("g")
        assert tab.locator(".guideline").get_attribute("open") is None
        shown = tab.locator(".response .text").all_text_contents()
        assert rows[0]["first"] in shown
        # Without a choice nothing is sent: the browser asks for it.
        tab.keyboard.press("Enter")
        assert tab.locator("text=ada, 0 judged").count() == 1
        for key in "b28":
            tab.keyboard.press(key)
        assert tab.locator("input:checked").evaluate_all("all => all.map(one => one.value)") == [
            "b",
            "better",
            "both_safe",
        ]
        tab.keyboard.press("Enter")
        see(tab, "ada, 1 judged")
        tab.keyboard.press("u")
        see(tab, "ada, 0 judged")
        assert tab.locator(".response .text").all_text_contents() == shown
        for key in "a49":
            tab.keyboard.press(key)
        tab.keyboard.press("Enter")
        see(tab, "ada, 1 judged")
        # Skip: s opens it at the reason; keys are text there, not shortcuts.
        tab.keyboard.press("s")
        tab.keyboard.type("It needs")
        tab.keyboard.press("Tab")
        tab.keyboard.type("abu 123")
        tab.keyboard.press("Enter")
        see(tab, "question 2")
        row = served.judgements()[-1]
        assert (row["skipped"], row["chosen"]) == ("expertise: abu 123", None)
        # By Tab and arrows, as without the script.
        tab.locator("input[value=a]").focus()
        tab.keyboard.press("Space")
        for _ in range(2):
            tab.keyboard.press("Tab")
            tab.keyboard.press("Space")
        tab.keyboard.press("Enter")
        see(tab, "There is nothing left for you to judge")
        export.export(served.site.store, tmp_path / "out")
        (file,) = (tmp_path / "out").glob("*-safety.jsonl")
        first, third = readers.read(file, "comparison")
        assert (first.chosen, first.rating, first.safety) == (
            shown[0],
            "negligibly_better",
            "both_unsafe",
        )
        assert (third.rating, third.safety) == ("significantly_better", "chosen_safe")


def test_by_mouse(tab, tmp_path) -> None:
    says = {"ayes": Says("ayes"), "noes": Says("noes")}
    given = config(tmp_path, write=True, turns=2)
    with page(given, says) as served:
        log_in(tab, served, coordinator=True)
        tab.wait_for_selector("textarea:focus")
        tab.locator("textarea").fill("<b>What</b> is a fox?\nTell me.")
        tab.get_by_role("button", name="Send").click()
        tab.get_by_text("Slightly better").click()
        tab.get_by_text("Response B", exact=True).last.click()
        shown = tab.locator(".response .text").all_text_contents()
        assert sorted(shown) == [
            f"{n} answers: <b>What</b> is a fox?\nTell me." for n in ("ayes", "noes")
        ]
        tab.get_by_role("button", name="Submit").click()
        see(tab, "Your next message")
        tab.wait_for_selector("textarea:focus")
        assert tab.locator(".turn .text").all_text_contents()[-1] == shown[1]
        tab.locator("textarea").fill("And then?")
        tab.keyboard.press("Control+Enter")
        tab.get_by_text("Skip", exact=False).first.click()
        tab.locator("select").select_option("other")
        tab.get_by_label("In your words").fill("enough")
        tab.get_by_role("button", name="Skip this pair").click()
        see(tab, "Write a prompt; two")
        tab.wait_for_selector("textarea:focus")
        tab.get_by_role("link", name="Overview").click()
        tab.get_by_role("heading", name="Judgements: 1", exact=True).wait_for()
        tab.get_by_role("button", name="Log out").click()
        tab.wait_for_selector("input:focus")
        assert [row["rating"] for row in served.judgements()] == ["slightly_better", None]


def test_an_evaluation_by_its_seven_points(tab, tmp_path) -> None:
    rows = [
        {"prompt_id": f"p{i}", "messages": [{"role": "user", "content": f"question {i}"}]}
        for i in range(2)
    ]
    variants = []
    for name in ("v1", "v2"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps(row | {"response": f"of {name}"}) + "\n" for row in rows)
        )
        variants.append({"name": name, "samples": [str(path)]})
    with page(config(tmp_path, mode="evaluation", variants=variants)) as served:
        log_in(tab, served)
        first_shown = tab.locator(".response .text").first.text_content()
        tab.keyboard.press("1")
        tab.keyboard.press("Enter")
        see(tab, "ada, 1 judged")
        tab.get_by_text("About the same").click()
        tab.get_by_role("button", name="Submit").click()
        see(tab, "There is nothing left")
        scores = [row["score"] for row in served.judgements()]
        assert scores == [3 if first_shown == "of v1" else -3, 0]
