"""The page over HTTP: who is let in, what is taken, and that nothing is taken twice."""

import json
import re

import pytest
from annotation_pages import Says, config, page, pairs_file

from llama2rt.people.store import week

CHOICE = {"chosen": "a", "rating": "better"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    (folder / "guideline.md").write_text(
        "# Be *kind*\n<script>alert(1)</script> [x](javascript:alert(1)) ![i](http://a.b/c.png)"
    )
    hostile = {"part": "training", "id": "i", "prompt_id": "p", "kind": "safety"}
    hostile |= {
        "messages": [{"role": "user", "content": '"><script>alert("prompt")</script>'}],
        "first": "<img src=x onerror=alert(1)>",
        "second": "</textarea></div>{{ 7 * 7 }}<b>bold</b>",
    }
    path = pairs_file(folder / "pairs.jsonl", 40)
    path.write_text(json.dumps(hostile) + "\n" + path.read_text())
    given = config(
        folder,
        pairs=[path],
        raters=20,
        guidelines={"safety": folder / "guideline.md", "helpfulness": folder / "guideline.md"},
    )
    with page(given) as found:
        yield found


def test_only_those_who_have_a_token_get_in(served) -> None:
    nobody = served.annotator("nobody")
    token = served.site.accounts.invite("eve")
    stored = served.site.store.path.read_bytes()
    wal = served.site.store.path.with_name(served.site.store.path.name + "-wal")
    assert token.encode() not in stored + wal.read_bytes()
    nobody.cookie = ""
    for wrong in ("", "x", token[:-1], token.swapcase(), "' OR 1=1 --", "\0"):
        reply = nobody.log_in(wrong)
        assert reply.status == 401 and "set-cookie" not in reply.headers, wrong
    for cookie in ("", "test=", "test=" + "a" * 43, "other=1"):
        nobody.cookie = cookie
        for path in ("/", "/overview", "/write"):
            assert "Your token" in nobody.get(path).text
        assert nobody.post("/judge", CHOICE).status == 401
    reply = nobody.log_in(token)
    assert reply.status == 303
    cookie = reply.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    # A new token replaces the old one, whose sessions end; a revoked one opens nothing.
    newer = served.site.accounts.invite("eve")
    assert "Your token" in nobody.get().text and nobody.log_in(token).status == 401
    assert nobody.log_in(newer).status == 303
    served.site.accounts.revoke("eve")
    assert "Your token" in nobody.get().text and nobody.log_in(newer).status == 401


def test_posts_of_other_pages_are_refused(served) -> None:
    ann = served.annotator("ann")
    form = ann.get().form("/judge") | CHOICE | {"safety": "both_safe"}
    port = served.url.rpartition(":")[2]
    for origin in (
        "",
        "null",
        "http://evil.example",
        f"https://127.0.0.1:{port}",
        f"http://127.0.0.1.evil.example:{port}",
        "http://127.0.0.1:1",
    ):
        assert ann.post("/judge", form, origin=origin).status == 403, origin
    assert ann.post("/judge", form, sec_fetch_site="cross-site").status == 403
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        f"x@127.0.0.1:{port}",
    ):
        assert ann.get("/", host=host).status == 403, host
        assert ann.post("/judge", form, host=host).status == 403, host
    other = served.annotator("other").get().form("/judge")
    for csrf in ("", "0" * 64, other["csrf"], "é"):
        assert ann.post("/judge", form | {"csrf": csrf}).status == 403, csrf
    assert ann.post("/judge", form | {"nonce": "x"}).status == 400
    assert ann.post("/log_out", {"csrf": ""}).status == 403
    assert not [row for row in served.judgements() if row["task"] == int(form["task"])]
    assert ann.get("/", host=f"localhost:{port}").status == 200


def test_bodies_that_no_form_sends_are_refused(served) -> None:
    ann = served.annotator("bob")
    form = ann.get().form("/judge")
    large = b"detail=" + b"a" * served.site.config.body_bytes
    assert ann.post("/judge", large).status == 413
    assert ann.post("/log_in", large).status == 413
    assert ann.post("/judge", b"{}", content_type="application/json").status == 415
    assert ann.post("/judge", b"", content_type="multipart/form-data; boundary=a").status == 415
    assert ann.post("/judge", b"csrf=%ff").status == 400
    assert ann.post("/judge", b"csrf=\xff").status == 400
    assert ann.post("/judge", b"csrf=a&csrf=b").status == 400
    assert ann.post("/judge", b"&".join(b"a%d=1" % i for i in range(50))).status == 400
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        assert ann._send(method, "/judge", None, {}).status == 405
    assert ann.get("/../../etc/passwd").status == 404 and ann.get("/judge").status == 405
    for wrong in (
        {"chosen": "c"},
        {"rating": "best"},
        {"safety": ""},
        {"task": "1e3"},
        {"chosen": "a"},
    ):
        assert ann.post("/judge", form | CHOICE | {"safety": "no"} | wrong).status == 422, wrong
    assert ann.post("/judge", form | CHOICE | {"safety": "both_safe", "task": "999"}).status == 409


def test_what_others_wrote_is_text(served) -> None:
    reply = served.annotator("mallory").get()
    for escaped in (
        "&lt;script&gt;alert(&#34;prompt&#34;)",
        "&lt;img src=x onerror=alert(1)&gt;",
        "&lt;/textarea&gt;&lt;/div&gt;{{ 7 * 7 }}&lt;b&gt;",
    ):
        assert escaped in reply.text
    assert re.findall(r"<script[^>]*>", reply.text) == ['<script src="/page.js" defer>']
    assert "<h1>Be <em>kind</em></h1>" in reply.text  # the guideline
    assert "<img" not in reply.text and 'href="javascript' not in reply.text
    assert not re.search(r"\son\w+=", re.sub(r"&lt;.*?&gt;", "", reply.text))
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-content-type-options"] == "nosniff"
    name = "<b>&\"'"
    assert "&lt;b&gt;&amp;&#34;&#39;" in served.annotator(name).get().text
    refused = served.annotator("m2").get("/<script>alert(1)</script>")
    assert refused.status == 404 and "<script>alert" not in refused.text


def test_a_repeated_post_is_answered_as_done(tmp_path) -> None:
    given = config(tmp_path, pairs=[pairs_file(tmp_path / "pairs.jsonl", 3)])
    with page(given) as served:
        ann = served.annotator()
        form = ann.get().form("/judge") | CHOICE
        assert [ann.post("/judge", form).status for _ in range(3)] == [303] * 3
        assert len(served.judgements()) == 1
        # The same pair in another tab, and the same nonce for something else.
        again = form | {"nonce": "0" * 32}
        assert ann.post("/judge", again).status == 409
        second = ann.get()
        assert ann.post("/undo", second.form("/undo") | {"nonce": form["nonce"]}).status == 409
        assert ann.post("/skip", second.form("/skip") | {"reason": "other"}).status == 422
        skip = second.form("/skip") | {"reason": "other", "detail": "<i>too long</i>"}
        assert [ann.post("/skip", skip).status for _ in range(2)] == [303] * 2
        undo = ann.get().form("/undo")
        assert [ann.post("/undo", undo).status for _ in range(2)] == [303] * 2
        rows = served.judgements()
        assert [(row["skipped"], row["undone"]) for row in rows] == [
            (None, 0),
            ("other: <i>too long</i>", 1),
        ]
        # What was taken back is before them again, and the first judgement's repetition stays done.
        assert ann.get().form("/judge")["task"] == skip["task"]
        assert ann.post("/judge", form).status == 303 and len(served.judgements()) == 2
        assert ann.post("/judge", ann.get().form("/judge") | CHOICE).status == 303
        assert ann.post("/judge", ann.get().form("/judge") | CHOICE).status == 303
        assert "nothing left" in ann.get().text
        for _ in range(3):
            assert ann.post("/undo", ann.get().form("/undo")).status == 303
        assert ann.post("/undo", ann.get().form("/undo")).status == 409


def test_undo_stops_at_the_week(tmp_path) -> None:
    given = config(tmp_path, pairs=[pairs_file(tmp_path / "pairs.jsonl", 1)])
    with page(given) as served:
        ann = served.annotator()
        assert ann.post("/judge", ann.get().form("/judge") | CHOICE).status == 303
        with served.site.store.transaction() as db:
            db.execute("UPDATE judgements SET time = '2026-01-04T23:59:59.000000+00:00'")
        reply = ann.post("/undo", ann.get().form("/undo"))
        assert reply.status == 409 and "earlier week" in reply.text
    assert week("2026-01-04T23:59:59.000000+00:00") == "2026-W01"
    assert week("2026-01-05T00:00:00.000000+00:00") == "2026-W02"


def test_pairs_go_to_as_many_as_should_judge_them(tmp_path) -> None:
    given = config(tmp_path, pairs=[pairs_file(tmp_path / "pairs.jsonl", 4)], raters=2)
    with page(given) as served:
        people = [served.annotator(f"a{i}") for i in range(3)]
        before = [ann.get().form("/judge")["task"] for ann in people]
        # Two have the first pair before them, so the third gets the next.
        assert before == ["1", "1", "2"]
        assert [ann.get().form("/judge")["task"] for ann in people] == before
        for ann in people:
            while "nothing left" not in (reply := ann.get()).text:
                assert ann.post("/judge", reply.form("/judge") | CHOICE).status == 303
        counts = [
            row["n"]
            for row in served.site.store.rows("SELECT count(*) n FROM judgements GROUP BY task")
        ]
        assert counts == [2] * 4
        # Who left a pair open for too long has it taken by others.
        with served.site.store.transaction() as db:
            db.execute("DELETE FROM judgements WHERE task = 1")
            db.execute("UPDATE tasks SET complete = 0 WHERE id = 1")
            db.execute("DELETE FROM assignments WHERE task = 1 AND annotator = 3")
        assert "nothing left" in people[2].get().text
        with served.site.store.transaction() as db:
            db.execute("UPDATE assignments SET time = '2026-01-01' WHERE task = 1")
        assert people[2].get().form("/judge")["task"] == "1"


def test_a_skip_is_taken_back_unless_others_have_the_pair(tmp_path) -> None:
    given = config(tmp_path, pairs=[pairs_file(tmp_path / "pairs.jsonl", 2)])
    with page(given) as served:
        ann, bob = served.annotator("ann"), served.annotator("bob")

        def skip_and_undo(between=lambda: None):
            assert ann.post("/skip", ann.get().form("/skip") | {"reason": "unclear"}).status == 303
            between()
            assert ann.post("/undo", ann.get().form("/undo")).status == 303
            return ann.get().form("/judge")["task"]

        assert skip_and_undo() == "1"
        assert skip_and_undo(lambda: bob.get().form("/judge")) == "2"
        for person in (ann, bob):
            assert person.post("/judge", person.get().form("/judge") | CHOICE).status == 303
            assert "nothing left" in person.get().text


def test_the_order_is_drawn_and_undone_in_the_record(tmp_path) -> None:
    given = config(tmp_path, pairs=[pairs_file(tmp_path / "pairs.jsonl", 40)])
    with page(given) as served:
        ann, seen = served.annotator(), []
        while "nothing left" not in (reply := ann.get()).text:
            shown = re.findall(r'<div class="text">(first|second) answer \d+', reply.text)
            seen.append(shown)
            assert ann.post("/judge", reply.form("/judge") | CHOICE).status == 303
        rows = served.judgements()
        assert [row["chosen"] for row in rows] == [shown[0] for shown in seen]
        assert [bool(row["flipped"]) for row in rows] == [shown[0] == "second" for shown in seen]
        # By the seed: 40 coins, none of them loaded.
        assert 8 <= sum(row["flipped"] for row in rows) <= 32


def test_an_annotator_writes_and_goes_on_with_what_they_chose(tmp_path) -> None:
    says = {"ayes": Says("ayes"), "noes": Says("noes")}
    given = config(tmp_path, write=True, turns=2, kinds=["helpfulness", "safety"])
    with page(given, says) as served:
        ann = served.annotator()
        form = ann.get().form("/message")
        assert ann.post("/message", form | {"text": "  ", "kind": "safety"}).status == 422
        hostile = ann.post("/message", form | {"text": "</textarea>[INST] x", "kind": "safety"})
        assert hostile.status == 422 and "&lt;/textarea&gt;[INST] x" in hostile.text
        assert "[INST]" in re.search(r'role="alert">(.*?)<', hostile.text)[1]
        said = form | {"text": "a\r\nb", "kind": "safety"}
        assert [ann.post("/message", said).status for _ in range(2)] == [303] * 2
        while "sampled" in (reply := ann.get()).text:
            pass
        assert "ayes answers: a\nb" in reply.text and "noes answers: a\nb" in reply.text
        judged = reply.form("/judge") | CHOICE | {"safety": "chosen_safe"}
        shown_first = re.search(r'<div class="text">(ayes|noes) answers', reply.text)[1]
        assert ann.post("/judge", judged).status == 303
        further = ann.get()
        assert further.text.count("answers: a\nb") == 1 and f"{shown_first} answers" in further.text
        message = further.form("/message") | {"text": "and then?"}
        assert ann.post("/message", message).status == 303
        while "sampled" in (reply := ann.get()).text:
            pass
        assert reply.text.count("answers: and then?") == 2
        messages = says["ayes"].asked[-1][0]
        assert [m["role"] for m in messages] == ["user", "assistant", "user"]
        assert messages[1]["content"] == f"{shown_first} answers: a\nb"
        # Undo, twice: the second turn was not judged, so the first judgement is taken back.
        assert ann.post("/undo", reply.form("/undo")).status == 303
        again = ann.get()
        assert again.form("/judge")["task"] == judged["task"]
        assert (
            ann.post("/judge", again.form("/judge") | CHOICE | {"safety": "both_safe"}).status
            == 303
        )
        # A conversation that is ended, and one that has as many turns as it may.
        assert ann.post("/finish", ann.get().form("/finish")).status == 303
        assert "Write a prompt; two responses" in ann.get().text
        row = served.judgements()[-1]
        assert (row["first_safe"], row["second_safe"]) == (1, 1)
        assert len({seed for _, seed in says["ayes"].asked + says["noes"].asked}) == 4


def test_what_cannot_be_sampled_is_said(tmp_path) -> None:
    class Same(Says):
        def answer(self, prompts, seeds):
            super().answer(prompts, seeds)
            return ["the <same>"] * len(prompts)

    class Away(Says):
        def answer(self, prompts, seeds):
            raise ConnectionError("nobody is <there>")

    given = config(tmp_path, write=True)
    with page(given, {"ayes": Same("ayes"), "noes": Same("noes")}) as served:
        ann = served.annotator()
        asked = ann.get().form("/message") | {"text": "why?", "kind": "helpfulness"}
        assert ann.post("/message", asked).status == 303
        while "being sampled" in (reply := ann.get()).text:
            pass
        assert "two responses were the same" in reply.text and "why?</textarea>" in reply.text
        assert "Give this prompt up" in reply.text
        assert ann.post("/finish", reply.form("/finish")).status == 303
        assert "Give this prompt up" not in ann.get().text and "why?" not in ann.get().text
        assert len({seed for _, seed in served.sampler._variants["ayes"].asked}) == 3
        again = reply.form("/message") | {"text": "why not?", "kind": "helpfulness"}
        served.sampler._variants["noes"] = Says("noes")
        assert ann.post("/message", again).status == 303
        while "being sampled" in (reply := ann.get()).text:
            pass
        assert "noes answers: why not?" in reply.text and "the &lt;same&gt;" in reply.text
        # A server that is away is waited for.
        assert ann.post("/judge", reply.form("/judge") | CHOICE).status == 303
        served.sampler._variants["noes"] = Away("noes")
        asked = ann.get().form("/message") | {"text": "who?", "kind": "helpfulness"}
        assert ann.post("/message", asked).status == 303
        while "No responses for now" not in (reply := ann.get()).text:
            pass
        assert "nobody is &lt;there&gt;" in reply.text


def test_the_overview_is_for_coordinators(tmp_path) -> None:
    given = config(tmp_path, pairs=[pairs_file(tmp_path / "pairs.jsonl", 6)], raters=2)
    with page(given) as served:
        ann, bob = served.annotator("ann"), served.annotator("bob", coordinator=True)
        assert ann.get("/overview").status == 403 and "Overview" not in ann.get().text
        assert "Judgements: 0" in bob.get("/overview").text
        for person in (ann, bob):
            while "nothing left" not in (reply := person.get()).text:
                side = "a" if "first answer" in reply.text.split("Response B")[0] else "b"
                form = reply.form("/judge") | {"chosen": side, "rating": "slightly_better"}
                assert person.post("/judge", form).status == 303
            if person is ann:
                assert "no pair has two ratings yet" in bob.get("/overview").text
        text = bob.get("/overview").text
        assert "1.00" in text and "pairs: 6" in text and "Judgements: 12" in text
