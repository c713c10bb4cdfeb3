"""What the server gives a browser; tests/end_to_end/test_page.py uses it in one."""

import asyncio
import re

import pytest

pytest.importorskip("starlette", reason="starlette is not installed")

from llava_mixlora.serving.app import Door, app_of
from llava_mixlora.serving.chat import Bounds
from llava_mixlora.serving.page import FILES

KEY = "a-key"


class Engine:
    models = {"mine": {}}


@pytest.fixture(scope="module")
def app():
    return app_of(Engine(), Bounds(), Door(api_key=KEY, hosts=("localhost",)))


def get(app, path, query="", **headers):
    """Status, headers and body of an answer; no server, no client."""
    sent = []
    told = [(name.encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()]
    scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": told}

    async def receive():
        return {"type": "http.request"}

    async def send(message):
        sent.append(message)

    asyncio.run(app({**scope, "scheme": "http", "server": ("localhost", 80), "root_path": ""}, receive, send))
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answered, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize(
    "path, kind", [("/", "text/html"), ("/page/page.css", "text/css"), ("/page/page.js", "text/javascript")]
)
def test_page_is_for_everybody_and_may_load_nothing_from_elsewhere(app, path, kind):
    status, headers, body = get(app, path)
    assert status == 200 and headers["content-type"].startswith(kind)
    assert body == (FILES / (path.rpartition("/")[2] or "index.html")).read_bytes()
    policy = dict(each.strip().split(" ", 1) for each in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert {source for sources in policy.values() for source in sources.split()} == {"'none'", "'self'", "data:"}
    assert "data:" not in policy["script-src"] + policy["connect-src"]
    assert headers["x-content-type-options"] == "nosniff"


def test_files_of_the_page_name_no_other_place_and_no_script_within_the_page():
    files = sorted(FILES.iterdir())
    assert [file.name for file in files] == ["api.js", "index.html", "page.css", "page.js", "routes.js"]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert re.findall(r"\w+://[\w./]*|@import|url\(", text) in ([], ["http://www.w3.org/2000/svg"]), file
        assert not re.search(r"innerHTML|eval\(|style=|\son\w+=\"|<script>", text), file


def test_tasks_are_for_who_says_the_key(app):
    assert get(app, "/page/tasks", "model=mine")[0] == 401
    status, headers, body = get(app, "/page/tasks", "model=mine", authorization=f"Bearer {KEY}")
    assert (status, body) == (200, b'{"tasks":[],"usage":{}}')


@pytest.mark.parametrize("path", ["/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/"])
def test_other_files_are_not_there(app, path):
    assert get(app, path)[0] == 404


def test_page_is_not_given_under_another_hosts_name(app):
    assert get(app, "/", host="elsewhere.example")[0] == 400
