"""Pages in a real browser try to use a server on the same machine."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.support.blank_pages import blank_pages
from tests.support.keyed import bearer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "k" * 40

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.slow,
]

FUNCTIONS = """
const formData = ([name, config, weights]) => {
  const form = new FormData();
  form.append("id", name);
  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  form.append("files", new File([bytes(config)], "adapter_config.json"));
  form.append("files", new File([bytes(weights)], "adapter_model.safetensors"));
  return form;
};
const tried = async promise => {
  try {
    const response = await promise;
    return {type: response.type, status: response.status, text: await response.text(),
            id: response.headers.get("x-request-id")};
  } catch (error) {
    return {type: error.name};
  }
};
window.upload = (url, parts, options) =>
  tried(fetch(url + "/v1/prompts", {method: "POST", body: formData(parts), ...options}));
window.ask = (url, path, method, options) => tried(fetch(url + path, {method, ...options}));
window.submitForm = (url, parts) => {
  const form = document.createElement("form");
  Object.assign(form, {action: url + "/v1/prompts", method: "POST", enctype: "multipart/form-data"});
  const id = Object.assign(document.createElement("input"), {name: "id", value: parts[0]});
  const files = Object.assign(document.createElement("input"), {name: "files", type: "file", multiple: true});
  const chosen = new DataTransfer();
  for (const file of formData(parts).getAll("files")) chosen.items.add(file);
  files.files = chosen.files;
  form.append(id, files);
  document.body.append(form);
  form.submit();
};
window.embed = (url, tag) => new Promise(resolve => {
  const element = document.createElement(tag);
  element.onload = () => resolve("load");
  element.onerror = () => resolve("error");
  element.src = url;
  document.body.append(element);
});
window.pieces = async (url, body, headers) => {
  const response = await fetch(url + "/v1/completions", {method: "POST", body: JSON.stringify(body),
    headers: {"content-type": "application/json", ...headers}});
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const found = [];
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return found;
    found.push(value);
  }
};
"""


@pytest.fixture(scope="module")
def page_port() -> Iterator[int]:
    with blank_pages() as port:
        yield port


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium that resolves two foreign names to this machine."""
    names = "MAP evil.example 127.0.0.1, MAP prelude.example 127.0.0.1"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*flags, f"--host-resolver-rules={names}"]
        )
        yield launched
        launched.close()


@pytest.fixture
def show(browser: Browser) -> Iterator[Callable[[str], Page]]:
    """Open an address in a page that has ``FUNCTIONS``."""
    context = browser.new_context()
    context.add_init_script(FUNCTIONS)
    context.set_default_timeout(60_000)

    def open_page(url: str) -> Page:
        page = context.new_page()
        page.goto(url, wait_until="commit")
        page.wait_for_load_state("domcontentloaded")
        return page

    yield open_page
    context.close()


@pytest.fixture
def parts(upload_parts: Callable[..., Any]) -> Callable[..., list[str]]:
    """An upload's name and its two files in base 64."""

    def make(name: str, **options: Any) -> list[str]:
        files = {file[0]: file[1] for _, file in upload_parts(name, **options)["files"]}
        return [
            name,
            *(base64.b64encode(files[f]).decode() for f in ("adapter_config.json", "adapter_model.safetensors")),
        ]

    return make


def versions(live: Any, name: str, headers: dict[str, str] | None = None) -> int:
    response = httpx.get(f"{live.url}/v1/prompts/{name}/versions", headers=headers)
    return len(response.json()["data"]) if response.is_success else 0


def refusals(live: Any, code: str, headers: dict[str, str] | None = None) -> float:
    for line in httpx.get(f"{live.url}/metrics", headers=headers).text.splitlines():
        if line.startswith(f'prelude_request_errors_total{{code="{code}"}}'):
            return float(line.rsplit(" ", 1)[1])
    return 0


@contextmanager
def refused(live: Any, code: str, times: int, headers: dict[str, str] | None = None) -> Iterator[None]:
    before = refusals(live, code, headers)
    yield
    assert refusals(live, code, headers) - before == times


@pytest.mark.parametrize("keys", [(), (KEY,)], ids=["open", "keys"])
@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "evil.example"], ids=["same site", "cross site", "strange"]
)
def test_a_page_of_another_origin_is_refused_everything(
    serve: Any, show: Any, parts: Any, page_port: int, engine: Any, keys: tuple[str, ...], host: str
) -> None:
    live = serve(api_keys=keys)
    own = bearer(KEY) if keys else {}
    page = show(f"http://{host}:{page_port}/")
    # Requests without a preflight are sent and refused.
    with refused(live, "cross_origin", 3, own):
        answer = page.evaluate("a => upload(...a)", [live.url, parts("sentiment"), {"mode": "no-cors"}])
        assert answer == {"type": "TypeError"}, "the resource policy must hide the answer"
        body = '{"model": "tiny", "prompt": "abc"}'
        simple = {"mode": "no-cors", "body": body, "headers": {"content-type": "text/plain"}}
        assert page.evaluate("a => ask(...a)", [live.url, "/v1/completions", "POST", simple]) == {"type": "TypeError"}
        with page.expect_response(lambda response: response.url.endswith("/v1/prompts")) as shown:
            page.evaluate("a => submitForm(...a)", [live.url, parts("sentiment")])
        assert shown.value.status == 403
        assert shown.value.json()["error"]["code"] == "cross_origin"
    # Requests with a preflight are not sent, and no answer can be read.
    page = show(f"http://{host}:{page_port}/")
    with refused(live, "cross_origin", 0, own):
        typed = {"body": body, "headers": {"content-type": "application/json", **own}}
        for path, method, options in (
            ("/v1/completions", "POST", typed),
            ("/v1/prompts/sentiment/aliases/latest", "PUT", typed),
            ("/v1/prompts/sentiment", "DELETE", {"headers": own}),
            ("/v1/prompts", "GET", {"headers": own}),
            ("/v1/prompts", "GET", {}),
        ):
            assert page.evaluate("a => ask(...a)", [live.url, path, method, options]) == {"type": "TypeError"}
        assert page.evaluate("a => embed(...a)", [f"{live.url}/openapi.json", "script"]) == "error"
    assert versions(live, "sentiment", own) == 0
    assert engine.requests == []


def test_a_page_whose_name_resolves_to_the_server_is_refused(serve: Any, show: Any, parts: Any) -> None:
    with blank_pages() as port:
        page = show(f"http://evil.example:{port}")
    live = serve(port=port)  # simulates DNS rebinding from the page's server to this one
    answers = [
        page.evaluate("a => upload(...a)", ["", parts("sentiment"), {}]),
        page.evaluate("a => ask(...a)", ["", "/v1/prompts", "GET", {}]),
        page.evaluate("a => ask(...a)", ["", "/v1/prompts/sentiment", "DELETE", {}]),
        page.evaluate("a => ask(...a)", ["", "/metrics", "GET", {}]),
    ]
    assert [(answer["type"], answer["status"]) for answer in answers] == [("basic", 421)] * 4
    assert all("misdirected_request" in answer["text"] for answer in answers)
    assert refusals(live, "misdirected_request") >= 4  # Chromium asks once more on another connection
    assert versions(live, "sentiment") == 0


def test_an_allowed_origin_works_and_no_other(serve: Any, show: Any, parts: Any, page_port: int, engine: Any) -> None:
    origin = f"http://localhost:{page_port}"
    for keys in ((), (KEY,)):
        live = serve(api_keys=keys, allow_origin=(origin,))
        own = bearer(KEY) if keys else {}
        name = "with-keys" if keys else "open"
        page = show(origin)
        answer = page.evaluate("a => upload(...a)", [live.url, parts(name, seed=len(keys)), {"headers": own}])
        assert (answer["type"], answer["status"]) == ("cors", 201), answer
        assert answer["id"]
        body = {"model": name, "prompt": "abc", "max_tokens": 20, "stream": True}
        engine.step_seconds = 0.05
        pieces = page.evaluate("a => pieces(...a)", [live.url, body, own])
        engine.step_seconds = 0.0
        assert len(pieces) > 1, "the stream arrived in one piece"
        assert "".join(pieces).endswith("data: [DONE]\n\n")
        answer = page.evaluate(
            "a => ask(...a)", [live.url, f"/v1/prompts/{name}/versions/9", "DELETE", {"headers": own}]
        )
        assert (answer["type"], answer["status"]) == ("cors", 404)
        large = {"method": "POST", "body": "x" * 100_000, "headers": {"content-type": "application/json", **own}}
        answer = page.evaluate("a => ask(...a)", [live.url, "/v1/completions", "POST", large])
        assert (answer["type"], answer["status"]) == ("cors", 413)
        if keys:
            answer = page.evaluate("a => ask(...a)", [live.url, "/v1/prompts", "GET", {}])
            assert (answer["type"], answer["status"]) == ("cors", 401)
        other = show(f"http://127.0.0.1:{page_port}")
        asked = [live.url, f"/v1/prompts/{name}", "DELETE", {"headers": own}]
        assert other.evaluate("a => ask(...a)", asked) == {"type": "TypeError"}
        with refused(live, "cross_origin", 1, own):
            other.evaluate("a => upload(...a)", [live.url, parts(name, seed=9), {"mode": "no-cors"}])
        assert versions(live, name, own) == 1


@pytest.mark.parametrize("keys", [(), (KEY,)], ids=["open", "keys"])
def test_pages_of_the_server_work(serve: Any, show: Any, parts: Any, keys: tuple[str, ...]) -> None:
    live = serve(api_keys=keys)
    own = bearer(KEY) if keys else {}
    page = show(f"{live.url}/live")
    answer = page.evaluate("a => upload(...a)", ["", parts("sentiment"), {"headers": own}])
    assert (answer["type"], answer["status"]) == ("basic", 201)
    with page.expect_response(lambda response: response.url.endswith("/v1/prompts")) as shown:
        page.evaluate("a => submitForm(...a)", ["", parts("sentiment", seed=1)])
    # The referrer policy makes the form's origin 'null'; Sec-Fetch-Site gives the relation to the server.
    assert shown.value.status == (401 if keys else 201)
    if not keys:
        page = show(f"{live.url}/docs")
        assert page.url.startswith(f"{live.url}/console#/api")
        assert page.evaluate("a => ask(...a)", ["", "/openapi.json", "GET", {}])["status"] == 200


def test_without_fetch_metadata_the_origin_decides(serve: Any, show: Any, parts: Any, page_port: int) -> None:
    """Over plain HTTP, browsers send ``Sec-Fetch-Site`` only to loopback names."""
    live = serve(api_keys=(KEY,))
    named = f"http://prelude.example:{httpx.URL(live.url).port}"
    with refused(live, "cross_origin", 1, bearer(KEY)):
        page = show(f"http://evil.example:{page_port}")
        page.evaluate("a => upload(...a)", [named, parts("sentiment"), {"mode": "no-cors"}])
    page = show(f"{named}/live")
    answer = page.evaluate("a => upload(...a)", ["", parts("sentiment"), {"headers": bearer(KEY)}])
    assert (answer["type"], answer["status"]) == ("basic", 201)
