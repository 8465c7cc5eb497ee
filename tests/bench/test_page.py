"""The report in a real browser: nothing on the console, nothing over anything else, at two widths, light and dark."""

from __future__ import annotations

import os
from pathlib import Path

from specdec.bench.html_report import html_report
from specdec.bench.metrics import summarize
from specdec.bench.results_schema import Flag, StepMark
from tests.bench.rows import row
from tests.bench.test_metrics import result_of
from tests.browser import browser_page, needs_chromium

pytestmark = needs_chromium

# Every box of text, with its words; boxes of one another's ancestors do not count, nor cells behind a scroll bar.
OVERLAPS = """
(() => {
  const boxes = [];
  for (const el of document.querySelectorAll('h1,h2,li,th,td,figcaption,summary,svg text')) {
    if (!el.textContent.trim() || el.querySelector('li,th,td')) continue;
    const range = document.createRange();
    range.selectNodeContents(el);
    for (const r of el.closest('svg') ? [el.getBoundingClientRect()] : range.getClientRects()) {
      if (r.width > 1 && r.height > 1) boxes.push([el, r]);
    }
  }
  const found = [];
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const [a, p] = boxes[i], [b, q] = boxes[j];
    if (a === b || a.contains(b) || b.contains(a)) continue;
    const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (x > 1.5 && y > 3) found.push(a.textContent.slice(0, 40) + ' | ' + b.textContent.slice(0, 40));
  }
  return found;
})()
"""
OUTSIDE = """
[...document.querySelectorAll('svg text, h1, h2, figcaption, .legend li')].filter(el => {
  const r = el.getBoundingClientRect();
  return r.right > innerWidth + 1 || r.left < -1;
}).map(el => el.textContent)
"""
CONTRAST = """
(() => {
  const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const back = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll('h1,li,td,figcaption,.tick,.axis')].map(el => {
    const style = getComputedStyle(el);
    const fore = light(el.closest('svg') ? style.fill : style.color);
    return (Math.max(fore, back) + 0.05) / (Math.min(fore, back) + 0.05);
  }).reduce((a, b) => Math.min(a, b), 99);
})()
"""


def full_result():
    """Many sources with long names, many arms, failures, every plot."""
    sources = ["swe_agent-openhands-claude35", "swe_agent-moatless-claude35", "tool_agent-tau", "chat-arenahard"]
    arms = ["plain", "generate", "prompt-lookup", "ngram", "suffix@16", "lookahead", "recycling@32"]
    rows = []
    for n, source in enumerate(sources):
        for i, arm in enumerate(arms):
            for number in range(3):
                for trace in "ab":
                    drafted = {} if i < 2 else dict(
                        num_steps=4, num_accepted=6, num_drafted=20, accepted_histogram=[1, 1, 0, 1, 1],
                        reached=[4] * 12, reached_after=[4, 3, 2, 1] + [1] * 8, num_drafting_steps=4,
                    )  # fmt: skip
                    seconds = 1.0 / (1 + 0.3 * i + 0.1 * n + 0.02 * number + (0.4 if trace == "a" else 0))
                    given = {"call": ord(trace), "trace": trace, "source": source, "round": number, **drafted}
                    rows.append(row(arm, seconds=seconds, **given))
    marks = [
        StepMark(arm=arm, call=call, start_s=0.05 * i, end_s=0.05 * (i + 1), emitted=1 + k)
        for k, arm in enumerate(arms)
        for call in (0, 1)
        for i in range(30 // (1 + k))
    ]
    result = result_of(rows, cost_curve=[(n, 50 + 1.5 * n) for n in (1, 2, 4, 8, 16, 32, 64)], timeline=marks)
    result.references = ["plain", "generate", "prompt-lookup"]
    result.summaries = summarize(rows, result.references)
    result.arms[-1].failure = "UnsupportedError: " + "a long reason why it could not run here, " * 4
    result.summaries = [s for s in result.summaries if s.arm != result.arms[-1].name]
    result.flags = [Flag(code="speedup-above-acceptance", severity="error", message="ngram: " + "why it is wrong " * 9)]
    return result


def test_the_page_is_quiet_and_nothing_overlaps_at_any_width_or_scheme(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(html_report(full_result()), encoding="utf-8")
    keep = Path(os.environ.get("SPECDEC_SCREENSHOTS", tmp_path))  # a folder of yours, to look at them
    with browser_page() as browser:
        for width in (1280, 390):
            for dark in (False, True):
                browser.open(page.as_uri(), width=width, dark=dark)
                assert browser.run("document.querySelectorAll('svg').length") == 5
                assert browser.run("document.documentElement.scrollWidth") <= width
                assert browser.run(OVERLAPS) == [], (width, dark)
                assert browser.run(OUTSIDE) == [], (width, dark)
                # WCAG 2.1 AA asks for 4.5 of body text.
                assert browser.run(CONTRAST) > 4.5, (width, dark)
                back = browser.run("getComputedStyle(document.body).backgroundColor")
                assert (back == "rgb(255, 255, 255)") is not dark
                browser.screenshot(keep / f"report-{width}-{'dark' if dark else 'light'}.png")
        assert browser.problems == []


def test_the_checks_would_see_trouble(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><meta charset=utf-8><body style='background:white'>"
        "<h2 style='position:absolute;top:9px'>one</h2>"
        "<h2 style='position:absolute;top:12px'>two</h2><li style='color:#eee'>pale</li>"
        "<h2 style='position:absolute;left:2000px'>far</h2><script>console.error('x'); nothing()</script>"
    )
    with browser_page() as browser:
        browser.open(page.as_uri(), width=390, dark=False)
        assert "one | two" in browser.run(OVERLAPS)
        assert browser.run(OUTSIDE) == ["far"]
        assert browser.run(CONTRAST) < 4.5
        browser.run("1")
        assert len(browser.problems) == 2
