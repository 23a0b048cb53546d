"""What holds on every page: barriers, sizes, colours, keyboard, markup in names."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from server.demo.tour import SOFT_PROMPTS_DIRECTORY
from tests.console.browser.isolated import barriers, run
from tests.console.browser.visitors import SCREENSHOTS, ConsoleServer, Visit, button
from tests.support.serving import adapter, upload

STATIC = Path(__file__).parents[3] / "server" / "console" / "static"

VIEWS = {
    "prompts": "#/prompts",
    "nothing-found": "#/prompts?q=no-such-name",
    "prompt": "#/prompts/sentiment",
    "prefix": "#/prompts/dates",
    "missing-prompt": "#/prompts/no-such-prompt",
    "upload": "#/upload",
    "playground": "#/playground?with=sentiment,prelude-demo",
    "chat": "#/playground?mode=chat",
    "live": "#/live",
    "evaluations": "#/evaluations",
    "training": "#/training",
    "activity": "#/activity",
    "keys": "#/keys",
    "api": "#/api?at=post%20/v1/completions",
    "not-found": "#/no-such-page",
}
WIDTHS = {"wide": 1280, "zoomed": 640, "phone": 390}
"""Widths in CSS pixels; a window of 1280 pixels at 200% has 640."""

LAID_OUT = {"light": "phone", "dark": "wide"}
"""The width at which the barriers of each scheme are looked for."""


def settle(page: Page) -> None:
    """Wait until a page has read what it shows."""
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.get_by_text("Loading …")).to_have_count(0)


SHOW = """where => new Promise(done => {
  const drawn = () => requestAnimationFrame(() => setTimeout(done));
  if (location.hash === where) return drawn();
  addEventListener('hashchange', drawn, {once: true});
  location.hash = where;
})"""


def show(page: Page, where: str) -> None:
    """Go to a view of an open page. The view before is gone when this looks at the page."""
    page.evaluate(SHOW, where)
    settle(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_has_a_barrier_or_scrolls_sideways(visit: Visit, scheme: str) -> None:
    visitor = visit(color_scheme=scheme)
    visitor.watch.allow("status of 404")
    page = visitor.login()
    for name, where in VIEWS.items():
        show(page, where)
        for width, pixels in WIDTHS.items():
            page.set_viewport_size({"width": pixels, "height": 860})
            assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), (name, width)
            if width == LAID_OUT[scheme]:  # both layouts are tried, each in one of the schemes
                assert barriers(page) == [], (name, width)
            if width != "zoomed":
                picture(page, f"{name}-{scheme}-{width}")
        page.set_viewport_size({"width": WIDTHS["wide"], "height": 860})


def picture(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


DIALOGS = {
    "#/prompts/dialogs?version=1": ("Promote", "Roll back", "Start a rollout", "Delete", "Delete version"),
    "#/evaluations": ("New",),
    "#/keys": ("New key",),
}
"""The dialogs of each view, by the name of the button that opens them."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_login_dialogs_and_errors_have_no_barrier(visit: Visit, server: ConsoleServer, scheme: str) -> None:
    visitor = visit(color_scheme=scheme)
    visitor.watch.allow("status of 401", "status of 400")
    page = visitor.page()
    page.get_by_label("API key").fill("wrong")
    button(page, "Log in").click()
    expect(page.get_by_text("the API key is not valid")).to_be_visible()
    assert barriers(page) == []
    server.leftovers.append("dialogs")
    for task in ("sentiment", "intent"):
        upload(server.admin, "dialogs", *adapter(task)).raise_for_status()
    page = visitor.login()
    for where, names in DIALOGS.items():
        show(page, where)
        for name in names:
            button(page, name).click()
            expect(page.get_by_role("dialog")).to_be_visible()
            settle(page)
            assert barriers(page) == [], name
            picture(page, f"dialog-{name.lower().replace(' ', '-')}-{scheme}")
            page.keyboard.press("Escape")
            expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("Control+k")
    expect(page.get_by_role("option", name=re.compile("sentiment"))).to_be_visible()
    assert barriers(page) == []
    page.keyboard.press("Escape")
    show(page, "#/upload")
    page.locator("input[type=file]").set_input_files(
        [
            SOFT_PROMPTS_DIRECTORY / "sentiment" / "adapter_config.json",
            SOFT_PROMPTS_DIRECTORY / "dates" / "adapter_model.safetensors",
        ]
    )
    page.get_by_label("Name", exact=True).fill("faulty")
    button(page, "Upload").click()
    expect(page.get_by_role("list", name="Faults")).to_be_visible()
    assert barriers(page) == []
    picture(page, f"faults-{scheme}")


def test_the_palette_opens_a_prompt_by_keyboard_alone(admin: Page) -> None:
    admin.keyboard.press("Control+k")
    expect(admin.get_by_label("Find a soft prompt or a page")).to_be_focused()
    admin.keyboard.type("intent")
    expect(admin.get_by_role("dialog").get_by_role("option", selected=True)).to_contain_text("intent")
    admin.keyboard.press("Enter")
    expect(admin.get_by_role("heading", name="intent", level=1)).to_be_visible()
    expect(admin.locator("#main")).to_be_focused()


def test_promote_by_keyboard_alone(admin: Page, server: ConsoleServer) -> None:
    name = "keyboard-walk"
    server.leftovers.append(name)
    upload(server.admin, name, *adapter("sentiment"))
    upload(server.admin, name, *adapter("intent"), alias="canary")
    admin.keyboard.press("Control+k")
    expect(admin.get_by_label("Find a soft prompt or a page")).to_be_focused()
    admin.keyboard.type(name)
    expect(admin.get_by_role("dialog").get_by_role("option", selected=True)).to_contain_text(name)
    admin.keyboard.press("Enter")
    expect(admin.get_by_role("heading", name=name, level=1)).to_be_visible()
    expect(admin.locator("#main")).to_be_focused()
    walk_to(admin, "version 2")
    admin.keyboard.press("Enter")
    expect(admin.get_by_role("region", name="Version 2", exact=True)).to_be_visible()
    walk_to(admin, "Promote")
    admin.keyboard.press("Enter")
    expect(admin.get_by_label("Alias")).to_be_focused()
    admin.keyboard.press("Enter")
    expect(admin.get_by_text("latest now points at version 2.")).to_be_visible()
    assert server.admin.get(f"/v1/prompts/{name}").json()["aliases"]["latest"] == 2


IN_FOCUS = """() => {
  const element = document.activeElement;
  return [element.innerText, element.ariaLabel, ...[...(element.labels ?? [])].map(label => label.innerText)];
}"""


def walk_to(page: Page, text: str) -> None:
    """Press Tab until the text or the label of the element in focus begins with a text."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if any(str(name).strip().startswith(text) for name in page.evaluate(IN_FOCUS)):
            return
    raise AssertionError(f"Tab does not reach {text!r}")


MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def test_markup_from_users_is_text(admin: Page, server: ConsoleServer) -> None:
    server.leftovers.append("markup")
    upload(
        server.admin,
        "markup",
        *adapter("sentiment"),
        description=MARKUP,
        metadata=f'{{"{"<b>x"}</b>": "<svg onload=alert(1)>"}}',
    )
    show(admin, "#/prompts")
    expect(admin.get_by_text(MARKUP)).to_be_visible()
    show(admin, "#/prompts/markup")
    expect(admin.get_by_text(MARKUP).first).to_be_visible()
    expect(admin.get_by_text("<svg onload=alert(1)>")).to_be_visible()
    assert run(admin, "document.querySelectorAll('main img, main script, main b b').length") == 0
    expect(admin).not_to_have_title("owned")


CONTRAST = """
(async () => {
  const {hueOf} = await import(document.querySelector('script[type=module]').src);
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const luminance = colour => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(value => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  const element = document.body.appendChild(document.createElement('i'));
  element.className = 'sp';
  const colour = value => { element.style.color = value; return luminance(getComputedStyle(element).color); };
  const grounds = ['--panel', '--bg', '--sunk', '--weak'].map(name => colour(`var(${name})`));
  const byHue = new Map();
  const worst = {marks: 99, text: 99};
  for (let index = 0; index < 10000; index += 1) {
    const hue = hueOf(`prompt-${index}`);
    if (!byHue.has(hue)) {
      element.style.setProperty('--h', hue);
      const [mark, deep, on] = ['--k', '--k-deep', '--k-on'].map(name => colour(`var(${name})`));
      for (const ground of grounds) worst.marks = Math.min(worst.marks, contrast(mark, ground));
      worst.text = Math.min(worst.text, contrast(deep, on));
    }
    byHue.set(hue, (byHue.get(hue) ?? 0) + 1);
  }
  element.remove();
  return {...worst, hues: byHue.size, most: Math.max(...byHue.values())};
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_of_10000_names_have_contrast(visit: Visit, scheme: str) -> None:
    """WCAG 2.2: 3 for marks on every ground that they stand on, 4.5 for text on a colour."""
    page = visit(color_scheme=scheme).login()
    found = page.evaluate(CONTRAST)  # in the page, where the module is already there
    assert found["marks"] >= 3, found
    assert found["text"] >= 4.5, found
    assert found["hues"] == 360
    assert found["most"] < 60, "the names are not spread over the hues"


def test_sizes_of_the_built_files() -> None:
    files = [path for path in STATIC.rglob("*") if path.is_file() and path.suffix not in (".gz", ".br")]
    scripts = sum(len(gzip.compress(path.read_bytes())) for path in files if path.suffix == ".js")
    assert scripts <= 90_000
    assert sum(path.stat().st_size for path in files) <= 400_000
    for path in files:
        assert gzip.decompress(path.with_name(path.name + ".gz").read_bytes()) == path.read_bytes()
        assert path.with_name(path.name + ".br").is_file()
