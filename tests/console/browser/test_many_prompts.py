"""The list of 10,000 soft prompts: search and scrolling; ``benchmarks/console_list.py`` measures them."""

from __future__ import annotations

import httpx
import pytest
from playwright.sync_api import Browser, expect

from benchmarks.registry_scale import name_of
from tests.console.browser.isolated import barriers
from tests.console.browser.visitors import MANY, Watch


@pytest.mark.xdist_group("keyless")
def test_the_list_of_10000_names_is_searched_and_scrolled(browser: Browser, keyless: httpx.Client) -> None:
    url = str(keyless.base_url).rstrip("/")
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page, watch = context.new_page(), Watch(url)
    watch.follow(page)
    page.goto(f"{url}/console")
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(100)
    assert barriers(page) == []  # of one page of the list, as more pages have the same rows
    for index in (MANY, MANY // 3, 7):
        page.get_by_label("Search", exact=True).fill(name_of(index))
        expect(rows).to_have_count(1)
        expect(rows).to_contain_text(name_of(index))
    page.get_by_label("Search", exact=True).fill("")
    expect(rows).to_have_count(100)
    for _ in range(5):  # the end of the list reads the next page
        before = rows.count()
        page.evaluate("() => scrollTo(0, document.documentElement.scrollHeight)")
        page.wait_for_function("before => document.querySelectorAll('tbody tr').length >= before + 100", arg=before)
    names = page.locator("tbody td:first-child a").all_inner_texts()
    assert names == sorted(set(names))
    context.close()
    watch.check()
