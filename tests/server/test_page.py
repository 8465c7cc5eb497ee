"""The page at ``/`` in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.server.keys import Keyring, hash_key
from tests.browser import browser_page, needs_chromium
from tests.server.live import running, service

pytestmark = needs_chromium
OVERLAPS = """
(() => {
  const boxes = [...document.querySelectorAll('label, button, h1, h2, pre, #tree, #chart, dl > div, footer a')]
    .filter((e) => e.offsetParent !== null).map((e) => [e, e.getBoundingClientRect()]);
  const bad = [];
  for (const [a, p] of boxes) for (const [b, q] of boxes) {
    if (a === b || a.contains(b) || b.contains(a)) continue;
    if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
      bad.push(a.outerHTML.slice(0, 60) + ' / ' + b.outerHTML.slice(0, 60));
  }
  return bad;
})()
"""
CONTRAST = """
(() => {
  const number = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const back = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c !== 'rgba(0, 0, 0, 0)') return c; } return 'rgb(255, 255, 255)'; };
  return [...document.querySelectorAll('p, dt, dd, label, button, .token, .rejected, a, h1, h2')]
    .filter((e) => e.textContent.trim() && !e.disabled).map((e) => {
      const [x, y] = [number(getComputedStyle(e).color), number(back(e))].sort((a, b) => b - a);
      return [(x + 0.05) / (y + 0.05), e.outerHTML.slice(0, 80)]; }).filter(([ratio]) => ratio < 4.5);
})()
"""


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True), (1280, True), (390, False)])
def test_a_prompt_is_tried_and_its_draft_tree_is_seen(live, width: int, dark: bool, tmp_path: Path):
    with browser_page() as page:
        page.open(live.url, width=width, dark=dark)
        page.wait("document.getElementById('drafter').options.length === 3")
        page.run(
            "document.getElementById('prompt').value = 'abcabcabcabc'; document.getElementById('limit').value = 40"
        )
        page.run("document.getElementById('go').focus()")
        page.press("Enter")
        page.wait("document.getElementById('status').textContent.startsWith('done')")
        numbers = page.run("[...document.querySelectorAll('#numbers dd')].map((e) => e.textContent)")
        tokens, steps, _, drafted, accepted, _ = numbers
        assert int(tokens) == 40 == int(accepted) + int(steps)
        assert 0 < int(accepted) <= int(drafted)
        assert page.run("document.querySelectorAll('#text .accepted').length") == int(accepted)
        assert page.run("document.querySelectorAll('#chart .bar-accepted').length") == int(steps)
        page.run("const s = document.getElementById('step'); s.value = 1; s.dispatchEvent(new Event('input'))")
        assert page.run("document.getElementById('step-number').textContent") == f"1 of {steps}"
        assert page.run("document.querySelectorAll('#tree .bonus').length") == 1
        assert page.overflow == 0
        assert page.run(OVERLAPS) == []
        assert page.run(CONTRAST) == []
        assert page.problems == []
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000


def test_every_control_has_a_name_and_errors_are_said(live):
    with browser_page() as page:
        page.open(live.url)
        page.wait("document.getElementById('drafter').options.length === 3")
        unnamed = "[...document.querySelectorAll('input, select, textarea')].filter((e) => !e.labels.length).length"
        assert page.run(unnamed) == 0
        page.run("document.getElementById('prompt').value = 'x'.repeat(500); document.getElementById('go').click()")
        page.wait("document.getElementById('status').textContent.startsWith('error')")
        assert "shorter than the context" in page.run("document.getElementById('status').textContent")


def test_a_server_with_keys_asks_for_one():
    keys = Keyring((("me", hash_key("secret")),))
    with running(service(keys=keys)) as live, browser_page() as page:
        page.open(live.url)
        page.wait("document.getElementById('model').textContent.includes('API key')")
        page.run("const k = document.getElementById('key'); k.value = 'secret'; k.dispatchEvent(new Event('change'))")
        page.wait("document.getElementById('drafter').options.length === 3")
        policy = live.get("/").headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert live.get("/page/nothing.js").status_code == 404
