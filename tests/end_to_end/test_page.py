"""The page of `llava-mixlora serve`, in a real browser without a screen, and a real server behind it."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..tiny import draw_pictures, write_adapter
from .training import PLUGIN, environment

# Where scripts/test.sh puts it; behind all that is installed.
sys.path.append(str(Path(__file__).parents[2] / ".stacks" / "browser"))
api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (bash scripts/test.sh installs it)"
)
expect = api.expect
expect.set_options(timeout=20_000)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEY = "a-key"
TASKS = {"colour": "what color is the shape?", "people": "a human and an assistant"}
LONG = "red green blue"
"""A question whose answers are long, and are others with the picture 1.png, and without the adapter."""
FORM = {"pairing": "same", "router_scope": "instruction", "router_input": "words"}
TOKENS = 24


@contextmanager
def serving(*words):
    """A server on a free port; gives its address."""
    command = [*PLUGIN, "serve", *map(str, words), "--port", "0"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = next((line for line in process.stdout if line.startswith("Serving ")), None)
        assert line is not None, process.communicate()[1][-3000:]
        yield line.split(" at ")[1].split()[0].removesuffix("v1")
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory, llava_folder):
    place = tmp_path_factory.mktemp("page")
    draw_pictures(place, 4)
    write_adapter(llava_folder, place / "mine", **FORM)
    write_adapter(llava_folder, place / "paired")  # with two choices in each layer, and without samples
    samples = [
        {
            "image": f"{number}.png",
            "task": task,
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "red"}],
        }
        for task, question in TASKS.items()
        for number in range(2)
    ]
    kept = {"data": "data.json", "image_folder": str(place), "version": "v1", "samples": samples}
    (place / "mine" / "calibration.json").write_text(json.dumps(kept))
    return place


@pytest.fixture(scope="module")
def address(browser, place):
    with serving(place / "mine", place / "paired", "--api-key", KEY) as address:
        yield address


@pytest.fixture
def new_page(browser, address):
    """Opens the page in a window of its own; whatever happens there, the browser asks nobody but the server."""
    opened, asked, failed = [], [], []

    def new_page(width=1000, key=KEY):
        context = browser.new_context(viewport={"width": width, "height": 740})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("console", lambda message: failed.append(message.text) if "Policy" in message.text else None)
        opened.append(context)
        page.goto(address)
        if key is not None:
            page.get_by_label("API key").fill(key)
            page.keyboard.press("Enter")
            expect(models(page)).to_be_enabled()
            page.get_by_text("Settings").click()
            page.get_by_label("Longest answer").fill(str(TOKENS))
        return page

    yield new_page
    for context in opened:
        context.close()
    assert failed == []
    assert asked and {url for url in asked if not url.startswith((address, "data:image/"))} == set()


@pytest.fixture
def page(new_page):
    return new_page()


def from_api(address, place, model, question, picture=None, **more):
    """The text and the routes that the API gives."""
    content = [{"type": "text", "text": question}]
    if picture is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": _data(place / picture)}})
    said = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, **more}
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    body = json.dumps({**said, "mixlora_routes": True}).encode()
    request = urllib.request.Request(f"{address}v1/chat/completions", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    return answer["choices"][0]["message"]["content"], answer["mixlora_routes"]


def _data(picture):
    import base64

    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def models(page):
    return page.get_by_role("combobox", name="Ask")


def ask(page, question, said="Answered"):
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("status")).to_have_text(said)


def texts(page):
    return [_words(text) for text in page.locator(".answer .text").all_text_contents()]


def _words(text):
    """Random answers hold characters that a browser shows as others."""
    return re.sub(r"\s+", " ", text).strip()


def sent(request):
    return json.loads(request.post_data)


def test_uploaded_picture_is_asked_about_and_the_answer_streams(page, address, place):
    page.evaluate(
        """() => {
            window.seen = new Set();
            const look = () => document.querySelectorAll(".text").forEach((text) => seen.add(text.textContent));
            const how = { subtree: true, childList: true, characterData: true };
            new MutationObserver(look).observe(document.getElementById("conversation"), how);
        }"""
    )
    page.set_input_files("#file", place / "1.png")
    expect(page.get_by_alt_text("The picture that goes")).to_be_visible()
    ask(page, LONG)
    whole, _ = from_api(address, place, "mine", LONG, "1.png")
    assert texts(page) == [_words(whole)]
    without, _ = from_api(address, place, "mine", LONG)
    assert whole != without
    stages = sorted(page.evaluate("() => [...window.seen]"), key=len)
    assert len(stages) > 3 and all(longer.startswith(shorter) for shorter, longer in zip(stages, stages[1:]))
    expect(page.get_by_alt_text("Your picture")).to_be_visible()
    expect(page.get_by_alt_text("The picture that goes")).to_be_hidden()


def test_adapter_and_base_answer_side_by_side_each_as_it_does_alone(page, address, place):
    offered = page.locator("#models option").all_text_contents()
    assert offered[:4] == ["mine", "Side by side: mine and mine:base", "mine:base", "paired"] and len(offered) == 6
    models(page).select_option(label="Side by side: mine and mine:base")
    ask(page, LONG)
    expected = [_words(from_api(address, place, name, LONG)[0]) for name in ("mine", "mine:base")]
    assert texts(page) == expected and expected[0] != expected[1]
    expect(page.locator(".answer").first.locator(".map")).to_have_count(1)
    expect(page.locator(".answer").last.locator(".map")).to_have_count(0)
    left, right = (each.bounding_box() for each in page.locator(".answer").all())
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    with page.expect_request(lambda request: sent(request)["model"] == "mine:base") as request:
        ask(page, "and what color?")
    roles = [(message["role"], message["content"]) for message in sent(request.value)["messages"]]
    assert [role for role, _ in roles] == ["user", "assistant", "user"]
    assert _words(roles[1][1]) == expected[1]  # each goes on from its own answer


def test_map_shows_the_factors_that_each_layer_chose_and_the_nearest_task(page, address, place):
    page.set_input_files("#file", place / "1.png")
    ask(page, TASKS["people"])
    _, routes = from_api(address, place, "mine", TASKS["people"], "1.png")
    titles = page.locator(".map .chosen title").all_text_contents()
    assert set(titles) == {f"{layer}: factor {each}" for layer, pools in routes.items() for each in pools[0]}
    assert page.locator(".map").count() == 1 and len(routes) > 4  # one choice for both pools
    expect(page.locator(".nearest")).to_contain_text("route: people (100%); then colour (")
    assert "colour (100%)" not in page.locator(".nearest").text_content()
    page.get_by_text("As a list").click()
    layer, pools = next(iter(routes.items()))
    expect(page.get_by_text(f"{layer}: {', '.join(map(str, pools[0]))}")).to_be_visible()


def test_two_pools_have_two_maps_and_without_samples_no_task_is_told(page, address, place):
    models(page).select_option(label="paired")
    with page.expect_response(re.compile("page/tasks")) as response:
        ask(page, LONG)
    assert response.value.json() == {"tasks": [], "usage": {}}
    _, routes = from_api(address, place, "paired", LONG)
    for pool, chosen in enumerate(page.locator(".map").all()):
        titles = chosen.locator(".chosen title").all_text_contents()
        assert set(titles) == {f"{layer}: factor {each}" for layer, pools in routes.items() for each in pools[pool]}
    assert pool == 1 and any(pools[0] != pools[1] for pools in routes.values())
    expect(page.locator(".nearest")).to_have_count(0)


def test_picture_is_pasted_and_removed(page):
    page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(16, 16);
            canvas.getContext("2d").fillRect(0, 0, 16, 16);
            const data = await canvas.convertToBlob({ type: "image/png" });
            await navigator.clipboard.write([new ClipboardItem({ "image/png": data })]);
        }"""
    )
    page.get_by_label("Question", exact=True).focus()
    page.keyboard.press("Control+V")
    expect(page.get_by_alt_text("The picture that goes")).to_be_visible()
    page.get_by_role("button", name="Remove the picture").click()
    expect(page.get_by_alt_text("The picture that goes")).to_be_hidden()
    with page.expect_request(lambda request: "chat" in request.url) as request:
        ask(page, "circle")
    assert "image_url" not in request.value.post_data


def test_picture_is_dropped_and_what_is_none_is_refused(page):
    drop = """(kind) => {
        const data = new DataTransfer();
        const bytes = Uint8Array.from(atob("R0lGODlhAQABAIAAAP8AAAAAACwAAAAAAQABAAACAkQBADs="), (c) => c.charCodeAt(0));
        data.items.add(new File([bytes], "dropped", { type: kind }));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(drop, "text/plain")
    expect(page.get_by_role("alert")).to_have_text("dropped is no picture.")
    page.evaluate(drop, "image/gif")
    expect(page.get_by_alt_text("The picture that goes")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_text("")
    ask(page, "what color")
    assert page.locator(".wrong").count() == 0


def test_everything_can_be_done_from_the_keyboard(new_page, place):
    page = new_page(key=None)
    page.on("filechooser", lambda chooser: chooser.set_files(place / "2.png"))
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Question", exact=True)).to_be_focused()
    reached = []
    for _ in range(12):  # backwards, to the top
        page.keyboard.press("Shift+Tab")
        reached.append(page.evaluate("() => document.activeElement.id || document.activeElement.tagName"))
        if reached[-1] == "models":
            break
    assert reached == ["anew", "SUMMARY", "models"]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type(str(TOKENS), delay=1)  # what is selected is typed over
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("circle")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("square")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # opens what lets the user choose a file
    expect(page.get_by_alt_text("The picture that goes")).to_be_visible()
    page.keyboard.press("Tab")
    with page.expect_request(lambda request: "chat" in request.url) as request:
        page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Answered")
    parts = sent(request.value)["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text"] and parts[1]["text"] == "circle\nsquare"
    assert page.locator(".answer h2").all_text_contents() == ["mine", "mine:base"]


def test_phone_shows_all_without_scrolling_sideways(new_page, place):
    page = new_page(width=360)
    models(page).select_option(label="Side by side: mine and mine:base")
    page.set_input_files("#file", place / "1.png")
    ask(page, "what color is the shape? " * 2 + "x" * 50)
    expect(page.locator(".nearest")).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    outside = """() => [...document.querySelectorAll("body *")].filter((each) => {
        const { right, width } = each.getBoundingClientRect();
        return width > 0 && right > 361;
    }).map((each) => each.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []
    upper, lower = (each.bounding_box() for each in page.locator(".answer").all())
    assert upper["y"] + upper["height"] <= lower["y"]


def test_stop_ends_the_answer_here_and_on_the_server(page, address, place):
    page.get_by_label("Longest answer").fill("100")
    page.evaluate(
        """() => new MutationObserver((_, observer) => {
            if (!document.querySelector(".text")?.textContent) return;
            document.getElementById("stop").click();
            observer.disconnect();
        }).observe(document.getElementById("conversation"), { subtree: true, childList: true, characterData: true })"""
    )
    page.set_input_files("#file", place / "1.png")
    ask(page, LONG, said="Stopped")
    expect(page.get_by_text("Stopped.", exact=True)).to_be_visible()
    assert page.locator(".map").count() == 0 and texts(page) != [""]
    page.get_by_label("Longest answer").fill("2")
    ask(page, "circle")
    with urllib.request.urlopen(f"{address}health") as response:
        assert json.load(response)["answering"] == 0
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("#conversation *").count() == 0
    with page.expect_request(lambda request: "chat" in request.url) as request:
        ask(page, "square")
    assert len(sent(request.value)["messages"]) == 1


def test_refusals_are_shown_in_the_servers_words_and_the_question_is_kept(page):
    page.get_by_label("Longest answer").fill("100000")
    ask(page, "circle", said="Not answered")
    expect(page.locator(".wrong")).to_contain_text("max_tokens: 100000; expected a whole number from 1 to")
    expect(page.get_by_label("Question", exact=True)).to_have_value("circle")
    page.get_by_label("Longest answer").fill("2")
    page.context.set_offline(True)
    ask(page, "square", said="Not answered")
    expect(page.locator(".wrong").last).to_have_text("The server cannot be reached. Is it running?")
    page.context.set_offline(False)
    with page.expect_request(lambda request: "chat" in request.url) as request:
        ask(page, "square")
    assert len(sent(request.value)["messages"]) == 1  # what nobody has answered is not said again


def test_key_is_asked_for_and_stays_in_the_tab(new_page, address):
    page = new_page(key=None)
    expect(page.get_by_label("API key")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_text("")
    page.get_by_label("API key").fill("another")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("a wrong one")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_label("API key")).to_be_hidden()
    page.reload()
    expect(models(page)).to_be_enabled()
    assert page.evaluate("() => [localStorage.length, document.cookie]") == [0, ""]
    with page.context.expect_page() as other:
        page.evaluate("() => window.open(location.href, '_blank', 'noopener')")
    expect(other.value.get_by_label("API key")).to_be_visible()
