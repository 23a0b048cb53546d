"""Pages of another origin that try to use a session, or a server without keys, and a name that was rebound."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.console.browser.visitors import REBOUND, ConsoleServer, Visit, Visitor
from tests.support.blank_pages import blank_pages

UPLOAD = """async url => {
  const form = new FormData();
  form.append('id', 'intruder');
  form.append('files', new File(['{}'], 'adapter_config.json'));
  try {
    const options = {method: 'POST', body: form, mode: 'no-cors', credentials: 'include'};
    const response = await fetch(url + '/v1/prompts', options);
    return response.type;
  } catch (error) {
    return error.name;
  }
}"""
CALL = """async ([url, method, body]) => {
  try {
    const response = await fetch(url, {method, body, credentials: 'include', headers: {'x-prelude-console': '1'}});
    return [response.status, await response.text()];
  } catch (error) {
    return error.name;
  }
}"""
FORM = """url => {
  const form = document.createElement('form');
  Object.assign(form, {action: url + '/v1/prompts', method: 'POST', enctype: 'multipart/form-data'});
  form.append(Object.assign(document.createElement('input'), {name: 'id', value: 'intruder'}));
  document.body.append(form);
  form.submit();
}"""
SOCKET = """url => new Promise(resolve => {
  const socket = new WebSocket(url.replace('http', 'ws') + '/v1/events');
  socket.onopen = () => resolve('open');
  socket.onerror = () => resolve('error');
})"""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with blank_pages() as port:
        yield port


@pytest.fixture
def visitor(visit: Visit) -> Visitor:
    """A browser with the session of an administrator."""
    found = visit()
    expect(found.login().get_by_role("link", name="sentiment")).to_be_visible()
    return found


# Of another site, and of the same site on another port, which Chromium sends SameSite=Strict cookies to.
@pytest.fixture(params=["localhost", "127.0.0.1"])
def stranger(visitor: Visitor, port: int, request: pytest.FixtureRequest) -> Page:
    """A page of another origin in the browser that has the session."""
    page = visitor.context.new_page()
    page.goto(f"http://{request.param}:{port}/")
    return page


def test_a_page_of_another_origin_cannot_use_the_session(
    visitor: Visitor, stranger: Page, server: ConsoleServer
) -> None:
    assert stranger.evaluate(UPLOAD, server.url) == "TypeError"
    for method, path in (
        ("GET", "/v1/prompts"),
        ("GET", "/console/session"),
        ("DELETE", "/console/session"),
        ("DELETE", "/v1/prompts/sentiment?force=true"),
        ("PUT", "/v1/prompts/sentiment/aliases/latest"),
    ):
        body = '{"version": 1}' if method == "PUT" else None
        assert stranger.evaluate(CALL, [server.url + path, method, body]) == "TypeError", path
    assert stranger.evaluate(SOCKET, server.url) == "error"
    with stranger.expect_response(f"{server.url}/v1/prompts") as sent:
        stranger.evaluate(FORM, server.url)
    assert sent.value.status in (401, 403)
    assert server.admin.get("/v1/prompts/intruder").status_code == 404
    assert server.admin.get("/v1/prompts/sentiment").status_code == 200
    own = visitor.page("#/prompts/sentiment")
    expect(own.get_by_role("heading", name="sentiment", level=1)).to_be_visible()


def test_the_console_cannot_be_framed(stranger: Page, server: ConsoleServer) -> None:
    with stranger.expect_event("requestfailed") as refused:
        stranger.evaluate(
            "url => { document.body.append(Object.assign(document.createElement('iframe'), {src: url})); }",
            f"{server.url}/console",
        )
    assert refused.value.url == f"{server.url}/console"
    assert refused.value.failure == "net::ERR_BLOCKED_BY_RESPONSE"


def test_a_stolen_cookie_changes_nothing_without_the_header(visitor: Visitor, server: ConsoleServer) -> None:
    (cookie,) = visitor.context.cookies()
    cookies = {str(cookie["name"]): str(cookie["value"])}
    with httpx.Client(base_url=server.url, cookies=cookies) as thief:
        assert thief.get("/v1/prompts/sentiment").status_code == 200
        before = server.admin.get("/v1/prompts/sentiment/history").json()["data"][0]["id"]
        change = thief.put("/v1/prompts/sentiment/aliases/stolen", json={"version": 1})
        assert change.status_code in (401, 403)
        assert server.admin.get("/v1/prompts/sentiment/history").json()["data"][0]["id"] == before


@pytest.fixture
def passer_by(browser: Browser, port: int) -> Iterator[Page]:
    """A page of another origin, in a browser that has visited no server."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{port}/")
    yield page
    context.close()


@pytest.mark.xdist_group("keyless")
def test_a_page_of_another_origin_cannot_use_a_server_without_keys(passer_by: Page, keyless: httpx.Client) -> None:
    url = str(keyless.base_url).rstrip("/")
    assert passer_by.evaluate(UPLOAD, url) == "TypeError"
    for method, path in (
        ("GET", "/v1/prompts"),
        ("DELETE", "/v1/prompts/sentiment?force=true"),
        ("PUT", "/v1/prompts/sentiment/aliases/latest"),
        ("POST", "/v1/completions"),
    ):
        body = '{"version": 1}' if method in ("PUT", "POST") else None
        assert passer_by.evaluate(CALL, [url + path, method, body]) == "TypeError", path
    assert passer_by.evaluate(SOCKET, url) == "error"
    with passer_by.expect_response(f"{url}/v1/prompts") as sent:
        passer_by.evaluate(FORM, url)
    assert sent.value.status == 403
    assert keyless.get("/v1/prompts/intruder").status_code == 404
    assert keyless.get("/v1/prompts/sentiment").status_code == 200


@pytest.mark.xdist_group("keyless")
def test_a_rebound_name_reaches_no_server_without_keys(passer_by: Page, keyless: httpx.Client) -> None:
    rebound = f"http://{REBOUND}:{keyless.base_url.port}"
    response = passer_by.goto(f"{rebound}/console")
    assert response is not None
    assert response.status == 421
    for method, path in (("GET", "/v1/prompts"), ("DELETE", "/v1/prompts/sentiment?force=true")):
        status, text = passer_by.evaluate(CALL, [rebound + path, method, None])  # of the same origin by now
        assert status == 421, path
        assert "prelude-demo" not in text
    assert keyless.get("/v1/prompts/sentiment").status_code == 200


def test_a_rebound_name_has_no_session(visitor: Visitor, server: ConsoleServer) -> None:
    rebound = server.url.replace("127.0.0.1", REBOUND)
    page = visitor.context.new_page()
    page.goto(f"{rebound}/console")
    for method, path in (("GET", "/v1/prompts"), ("DELETE", "/v1/prompts/sentiment?force=true")):
        status, _ = page.evaluate(CALL, [rebound + path, method, None])
        assert status in (401, 403, 421), path
    assert server.admin.get("/v1/prompts/sentiment").status_code == 200
