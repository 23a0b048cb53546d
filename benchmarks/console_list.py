"""The console's list of 10,000 soft prompts in Chromium: first paint, search and scrolling.

    python -m benchmarks.console_list [--count 10000]

The names are written into the catalog's tables, as in ``benchmarks.registry_scale``. Server and browser share the
machine. First paint and first row count from the navigation in a new browser with an empty cache. A search counts
from the key that completes it to the drawn result, so it contains the page's wait of 150 ms for more keys. Then the
page is scrolled to its end, which reads all names in pages of 100; the intervals between frames are those of this
time, and again those of one pass through the whole list.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from benchmarks.registry_scale import name_of, register
from benchmarks.server import serving
from benchmarks.ways import machine
from prompt_store.open_store import CATALOG_FILE, open_store
from server.demo.tour import MODEL_DIRECTORY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_FIRST = """() => new Promise(resolve => {
  const look = () => {
    const paint = performance.getEntriesByName('first-contentful-paint')[0];
    if (paint && document.querySelector('tbody tr'))
      requestAnimationFrame(() => resolve({paint: paint.startTime, row: performance.now()}));
    else requestAnimationFrame(look);
  };
  look();
})"""

_SEARCH = """text => new Promise(resolve => {
  const input = document.querySelector('input[type=search]');
  const started = performance.now();
  input.value = text;
  input.dispatchEvent(new Event('input', {bubbles: true}));
  const look = () => {
    const rows = document.querySelectorAll('tbody tr');
    if (rows.length === 1 && rows[0].innerText.includes(text)) resolve(performance.now() - started);
    else requestAnimationFrame(look);
  };
  look();
})"""

_SCROLL = """async ([count, step]) => {
  const frames = [];
  const started = performance.now();
  let last = started;
  scrollTo(0, 0);
  for (let end = 0; end < 2;) {
    scrollBy(0, step);
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    frames.push(now - last);
    last = now;
    const isAtEnd = scrollY + innerHeight >= document.documentElement.scrollHeight - 2;
    end = isAtEnd && document.querySelectorAll('tbody tr').length >= count ? end + 1 : 0;
  }
  return {seconds: (performance.now() - started) / 1000, frames};
}"""


def measure(page: Page, url: str, count: int) -> dict[str, object]:
    """The figures of one browser."""
    page.goto(f"{url}/console#/prompts")
    first = page.evaluate(_FIRST)
    wanted = (count // 2, count // 3, count - 1, 7, 1234 % count)
    searches = [page.evaluate(_SEARCH, name_of(index + 1)) for index in wanted]
    page.get_by_label("Search", exact=True).fill("")
    expect(page.locator("tbody tr")).to_have_count(100)
    passes = {"reading": page.evaluate(_SCROLL, [count, 3000]), "read": page.evaluate(_SCROLL, [count, 1500])}
    return {
        "first_contentful_paint_ms": round(first["paint"]),
        "first_row_ms": round(first["row"]),
        "search_ms": [round(one) for one in sorted(searches)],
        **{f"{name}_all_rows": frames(found) for name, found in passes.items()},
    }


def frames(found: dict[str, object]) -> dict[str, object]:
    """Seconds of a pass, and its intervals between frames in milliseconds."""
    intervals = found["frames"]
    if not isinstance(intervals, list):
        raise TypeError("frames must be a list")
    cuts = statistics.quantiles(intervals, n=100)
    return {
        "seconds": round(float(str(found["seconds"])), 1),
        "frame_ms_p50_p95_max": [round(cuts[49], 1), round(cuts[94], 1), round(max(intervals), 1)],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "store"
        open_store(store).close()
        register(f"sqlite:///{store / CATALOG_FILE}", arguments.count)
        flags = ("--dtype", "float32", "--kv-cache-memory", "64MiB")
        with serving(MODEL_DIRECTORY, store, *flags) as url, sync_playwright() as playwright:
            arguments_ = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments_)
            figures = measure(browser.new_page(viewport={"width": 1280, "height": 860}), url, arguments.count)
            browser.close()
    print(json.dumps({"machine": machine(), "count": arguments.count, **figures}, indent=2))


if __name__ == "__main__":
    main()
