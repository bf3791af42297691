"""The routes: a GET shows what is before an annotator, a POST says something and leads back."""

import contextlib
import hmac
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from llama2rt.data.records import Prompt
from llama2rt.errors import InputError
from llama2rt.people import judgements, summary
from llama2rt.people.accounts import Accounts, Annotator
from llama2rt.people.config import Config
from llama2rt.people.guard import Guard
from llama2rt.people.inputs import drawn_variants
from llama2rt.people.judgements import Judgements
from llama2rt.people.sampling import Sampler
from llama2rt.people.store import Conflict, Store
from llama2rt.people.tasks import NewTask, Task, Tasks
from llama2rt.people.views import FILES, FOLDER, Frame, Views
from llama2rt.serve.errors import ApiError

_NONCE = re.compile(r"[0-9a-f]{32}")
_MOST_FIELDS = 16
Form = Mapping[str, str]


@dataclass
class Site:
    """What the routes share."""

    config: Config
    store: Store
    tasks: Tasks
    views: Views
    sampler: Sampler
    cookie: str
    """name of the session's; browsers keep the cookies of all ports together"""

    def __post_init__(self) -> None:
        self.accounts = Accounts(self.store)
        self.judgements = Judgements(self.store, self.tasks)

    # --- pages ----------------------------------------------------------------------------------

    def home(self, who: Annotator, csrf: str) -> Response:
        """What is before the annotator: a task, its wait, a conversation to go on with, a prompt to
        write, or nothing."""
        frame = self.frame(who, csrf)
        if (found := self.tasks.conversation(who.id, self.config.turns)) is not None:
            parent, prompt = found
            return self._write(frame, parent=parent, prompt=prompt)
        task = self.tasks.next(who.id)
        self.sampler.wake()
        if task is not None:
            return self._before(frame, task)
        if self.tasks.waits():
            return HTMLResponse(self.views.wait(frame, self.sampler.trouble))
        return self._write(frame) if self.config.write else HTMLResponse(self.views.done(frame))

    def write(self, who: Annotator, csrf: str) -> Response:
        """The form for a prompt, where the annotator has nothing before them that was sampled for
        them already."""
        if not self.config.write:
            raise ApiError(404, "prompts are given here; there is nothing to write")
        return self._write(self.frame(who, csrf))

    def overview(self, who: Annotator, csrf: str) -> Response:
        """Counts and agreement, for coordinators: they would tell others how their peers judge."""
        if not who.coordinator:
            raise ApiError(403, "only coordinators see how everybody judges")
        found = summary.summarise(self.store)
        return HTMLResponse(self.views.overview(self.frame(who, csrf), found))

    def _before(self, frame: Frame, task: Task) -> Response:
        if task.state == "waiting":
            return HTMLResponse(self.views.wait(frame, self.sampler.trouble))
        if task.state == "failed":
            *earlier, last = task.prompt.messages
            prompt = Prompt(task.prompt.id, earlier, task.prompt.kind)
            message = f"There is nothing to compare: {task.reason}. Please change your message."
            values = {"text": last["content"], "message": message, "ends": True}
            return self._write(frame, parent=task.parent, prompt=prompt, **values)
        page = self.views.task(
            frame,
            task.id,
            task.prompt.messages,
            task.shown,
            kind=task.prompt.kind,
            evaluation=self.config.mode == "evaluation",
        )
        return HTMLResponse(page)

    def _write(
        self, frame: Frame, *, parent: int | None = None, prompt: Prompt | None = None, **more: Any
    ) -> Response:
        if prompt is not None:
            more |= {"messages": prompt.messages, "kind": prompt.kind}
        page = self.views.write(frame, list(self.config.kinds), parent=parent, **more)
        return HTMLResponse(page, 422 if more.get("refused") else 200)

    def frame(self, who: Annotator, csrf: str) -> Frame:
        """What is shown around every page."""
        query = (
            "SELECT count(*) n FROM judgements WHERE annotator = ? AND undone = 0 "
            "AND skipped IS NULL"
        )
        row = self.store.one(query, who.id)
        return Frame(who, csrf, row["n"] if row else 0, self.config.write)

    # --- posts ----------------------------------------------------------------------------------

    def judge(self, who: Annotator, form: Form) -> Response:
        """A judgement of a pair."""
        task = self._task(form)
        if self.config.mode == "evaluation":
            said = judgements.evaluation(form)
        else:
            row = self.store.one("SELECT kind FROM tasks WHERE id = ?", task)
            said = judgements.preference(form, row["kind"] if row else "helpfulness")
        self.judgements.say(who.id, form["nonce"], task, said)
        return _home()

    def skip(self, who: Annotator, form: Form) -> Response:
        """A pair that is not judged, and why."""
        self.judgements.say(who.id, form["nonce"], self._task(form), judgements.skip(form))
        return _home()

    def undo(self, who: Annotator, form: Form) -> Response:
        """Take the last judgement back."""
        self.judgements.undo(who.id, form["nonce"])
        return _home()

    def finish(self, who: Annotator, form: Form) -> Response:
        """End a conversation."""
        self.judgements.finish(who.id, form["nonce"])
        return _home()

    def message(self, who: Annotator, form: Form) -> Response:
        """A prompt, or the next message of a conversation, to which responses are to be sampled."""
        nonce = form["nonce"]
        with self.store.post(nonce, who.id, "message") as db:
            if db is not None:
                prompt, parent = self._written(who, form)
                first, second = drawn_variants(self.config, prompt.id, nonce)
                new = NewTask(prompt, (first.name, second.name))
                self.tasks.write(db, who.id, new, nonce=nonce, parent=parent)
        self.sampler.wake()
        return _home()

    def _written(self, who: Annotator, form: Form) -> tuple[Prompt, int | None]:
        """What was written, after the conversation that it goes on with. InputError for text that
        no record can hold."""
        # Browsers send line ends as CR LF.
        text = form.get("text", "").replace("\r\n", "\n").strip()
        messages, identifier, kind, parent = [], f"written:{form['nonce']}", form.get("kind"), None
        if form.get("parent"):
            before = self.tasks.before(who.id, self.config.turns)
            if before is None or str(before[0]) != form["parent"]:
                raise Conflict("that conversation does not go on; open the page again")
            parent, prompt = before
            messages, identifier, kind = prompt.messages, prompt.id, prompt.kind
        elif not self.config.write or kind not in self.config.kinds:
            raise Conflict("no prompts of this kind are written here")
        said = [*messages, {"role": "user", "content": text}]
        return Prompt.from_json({"id": identifier, "messages": said, "kind": kind}), parent

    def rewrite(self, who: Annotator, csrf: str, form: Form, message: str) -> Response:
        """The form that a message came from, with what is wrong with it."""
        frame, found = self.frame(who, csrf), None
        if form.get("parent"):
            found = self.tasks.before(who.id, self.config.turns)
        values: dict[str, Any] = {"text": form.get("text", ""), "message": message}
        if found is None and form.get("kind") in self.config.kinds:
            values["kind"] = form["kind"]
        parent, prompt = found or (None, None)
        return self._write(frame, parent=parent, prompt=prompt, refused=True, **values)

    @staticmethod
    def _task(form: Form) -> int:
        text = form.get("task", "")
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InputError("task: expected a number")
        return int(text)


def _home() -> Response:
    return RedirectResponse("/", 303)


PAGES: dict[str, Callable[[Site, Annotator, str], Response]] = {
    "/": Site.home,
    "/write": Site.write,
    "/overview": Site.overview,
}
POSTS: dict[str, Callable[[Site, Annotator, Form], Response]] = {
    "/judge": Site.judge,
    "/skip": Site.skip,
    "/undo": Site.undo,
    "/finish": Site.finish,
    "/message": Site.message,
}


def build(site: Site, origins: frozenset[str]) -> FastAPI:
    """The application. Its lifespan starts the sampler and ends it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        site.sampler.start()
        yield
        site.sampler.stop()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    _add_log_in(app, site)
    for path, show in PAGES.items():
        app.add_api_route(path, _page(site, show), response_model=None)
    for path, do in POSTS.items():
        app.add_api_route(path, _post(site, do), methods=["POST"], response_model=None)
    for file, kind in FILES.items():
        send = _file((FOLDER / file).read_text(encoding="utf-8"), kind)
        app.add_api_route(f"/{file}", send, response_model=None)
    _add_errors(app, site)
    app.add_middleware(Guard, origins=origins, body_bytes=site.config.body_bytes)
    return app


def _add_log_in(app: FastAPI, site: Site) -> None:
    @app.post("/log_in", response_model=None)
    async def log_in(http: Request) -> Response:
        form = await _form(http)
        secret = await run_in_threadpool(site.accounts.log_in, form.get("token", ""))
        if secret is None:
            return HTMLResponse(site.views.log_in("That token is not valid."), 401)
        response = _home()
        secure = site.config.public_url is not None
        response.set_cookie(site.cookie, secret, httponly=True, samesite="strict", secure=secure)
        return response

    @app.post("/log_out", response_model=None)
    async def log_out(http: Request) -> Response:
        form, secret = await _form(http), http.cookies.get(site.cookie, "")
        _check_csrf(secret, form)
        await run_in_threadpool(site.accounts.log_out, secret)
        response = _home()
        response.delete_cookie(site.cookie, httponly=True, samesite="strict")
        return response


def _page(
    site: Site, show: Callable[[Site, Annotator, str], Response]
) -> Callable[[Request], Response]:
    def page(http: Request) -> Response:
        secret = http.cookies.get(site.cookie, "")
        if (who := site.accounts.who(secret)) is None:
            return HTMLResponse(site.views.log_in())
        return show(site, who, csrf_token(secret))

    return page


def _post(site: Site, do: Callable[[Site, Annotator, Form], Response]) -> Callable[..., Any]:
    def carry_out(secret: str, form: Form) -> Response:
        if (who := site.accounts.who(secret)) is None:
            return HTMLResponse(site.views.log_in("Log in again, then repeat that."), 401)
        _check_csrf(secret, form)
        if not _NONCE.fullmatch(form.get("nonce", "")):
            raise ApiError(400, "the form carries no nonce")
        try:
            return do(site, who, form)
        except InputError as error:
            if do is Site.message:
                return site.rewrite(who, csrf_token(secret), form, f"Not sent: {error}.")
            raise

    async def post(http: Request) -> Response:
        secret = http.cookies.get(site.cookie, "")
        return await run_in_threadpool(carry_out, secret, await _form(http))

    return post


def csrf_token(secret: str) -> str:
    """What forms of the session carry, and no other page can know."""
    return hmac.new(secret.encode(), b"csrf", "sha256").hexdigest()


def _check_csrf(secret: str, form: Form) -> None:
    given = form.get("csrf", "").encode()
    if not secret or not hmac.compare_digest(given, csrf_token(secret).encode()):
        raise ApiError(403, "the form is not of this session; open the page again")


async def _form(http: Request) -> dict[str, str]:
    """The fields of a post. ApiError for what no form of ours sends."""
    try:
        fields = parse_qsl(
            (await http.body()).decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_MOST_FIELDS,
        )
    except ValueError:
        raise ApiError(400, "the body is no form of this page") from None
    if len(dict(fields)) < len(fields):
        raise ApiError(400, "the form names a field twice")
    return dict(fields)


def _file(content: str, kind: str) -> Callable[[], Response]:
    def send() -> Response:
        return Response(content, media_type=kind)

    return send


def _add_errors(app: FastAPI, site: Site) -> None:
    def answer(http: Request, status: int, message: str) -> Response:
        secret = http.cookies.get(site.cookie, "")
        who = site.accounts.who(secret)
        frame = None if who is None else site.frame(who, csrf_token(secret))
        return HTMLResponse(site.views.refused(frame, message), status)

    @app.exception_handler(ApiError)
    def refused(http: Request, error: ApiError) -> Response:
        return answer(http, error.status, str(error))

    @app.exception_handler(Conflict)
    def conflict(http: Request, error: Conflict) -> Response:
        return answer(http, 409, str(error))

    @app.exception_handler(InputError)
    def incomplete(http: Request, error: InputError) -> Response:
        return answer(http, 422, str(error))

    @app.exception_handler(HTTPException)
    def other(http: Request, error: HTTPException) -> Response:
        return answer(http, error.status_code, str(error.detail))
