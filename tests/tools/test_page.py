"""The status page as a person meets it: in a real browser, over a real socket, of a real engine; and from a file."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
from page_site import Site, hand_made_report
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from chipbus import AsyncEngine, SamplingParams
from chipbus.actors.messages.tree import ProcessReport, ProgramStatistics
from chipbus.actors.report import EngineReport
from chipbus.tools.serve.page import embedded_page, live_page
from support import eventually, our_processes

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs the programs chromium and chromedriver"),
]
EVIL = '<img src=x onerror="window.evil=1"><script>window.evil=1</script></script><b>&amp;\'"'
COUNT_DRAWS = """
    const drawn = draw;
    window.draws = 0;
    window.began = performance.now();
    draw = () => { window.draws += 1; drawn(); };
"""


class Page:
    """One tab."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def text(self, selector: str = "body") -> str:
        """What is shown there, in one line."""
        return " ".join(self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector).split())

    def shows(self, text: str, selector: str = "body", within_s: float = 15.0) -> None:
        eventually(lambda: text in self.text(selector), f"{text!r} in {selector}: {self.text(selector)!r}", within_s)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def click(self, selector: str) -> None:
        self.js("document.querySelector(arguments[0]).click()", selector)

    def row(self, name: str) -> list[str]:
        """The cells of a process: name, state, life, restarts, pid, last exit."""
        rows = "[...document.querySelectorAll('#processes tbody tr')]"
        cells = self.js(f"return {rows}.map(row => [...row.children].map(cell => cell.innerText))")
        return next((row for row in cells if name in row[0]), [])

    def complaints(self) -> list[dict[str, Any]]:
        """What the browser's console has said since it was last asked."""
        return [dict(entry) for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def is_stale(self) -> bool:
        return bool(self.js("return document.body.classList.contains('stale')"))


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: webdriver.Chrome) -> Iterator[Page]:
    driver.get("about:blank")
    page = Page(driver)
    page.complaints()
    yield page
    driver.get("about:blank")  # it asks nobody any more


@pytest.fixture(scope="module")
def site(driver: webdriver.Chrome) -> Iterator[Site]:
    """Two replicas of null chips."""
    with Site(data_parallel_size=2) as site:
        yield site
        ours = {record.pid for record in site.engine.tree()}
    eventually(lambda: not ours & our_processes(), "every process of the engine is gone")  # the browser has its own
    eventually(lambda: not Path(site.engine.run_dir).exists(), "its run directory is gone")


def write(path: Path, html: str) -> str:
    path.write_text(html)
    return path.as_uri()


@pytest.mark.guarantee("Y1")
def test_a_killed_worker_is_seen_with_its_next_life_and_what_happened(site: Site, page: Page) -> None:
    page.open(site.url)
    page.shows("READY", "#readiness")
    assert page.row("chip.1.0")[2:4] == ["1", "0"]
    os.kill(site.pid("chip.1.0"), signal.SIGKILL)

    eventually(lambda: page.row("chip.1.0")[2] == "2", "the second life is shown")
    eventually(lambda: page.row("chip.1.0")[1].endswith("ready"), "it is ready")
    assert page.row("chip.1.0")[5] == "signal 9 (SIGKILL)"
    page.shows("exit chip.1.0 signal 9 (SIGKILL)", "#events")
    page.shows("restart chip.1.0 life 2", "#events")
    page.shows("down", "#chips .lane:nth-of-type(2)")
    assert "down" not in page.text("#chips .lane:nth-of-type(1)")
    assert page.complaints() == []


@pytest.mark.guarantee("Y2")
def test_requests_are_seen_from_their_first_token_to_their_end(site: Site, page: Page) -> None:
    page.open(site.url)

    chips = [site.pid("chip.0.0"), site.pid("chip.1.0")]

    async def serve(engine: AsyncEngine) -> str:
        stream = engine.stream("replica", SamplingParams(max_tokens=300, ignore_eos=True))
        first = await anext(stream)
        for chip in chips:  # so that it stays as it is while it is looked at
            os.kill(chip, signal.SIGSTOP)
        async for _ in stream:
            pass
        return first.request_id

    serving = site.begin(serve)
    eventually(lambda: page.js("return document.querySelector('#requests button') !== null"), "it is shown")
    request_id = page.text("#requests button")
    page.click("#requests button")
    page.shows("first token", "#details")
    for chip in chips:
        os.kill(chip, signal.SIGCONT)
    assert serving.result(60) == request_id
    page.shows("It has ended; this is how it was last seen.", "#details")
    page.shows("of 1 request that ended well", "#ttft")


def test_the_details_of_a_chip_say_how_busy_it_was_and_what_its_rings_have_held(page: Page, tmp_path: Path) -> None:
    page.open(write(tmp_path / "run.html", embedded_page(hand_made_report(), "run")))
    page.click("button[data-name='chip.0.0']")

    page.shows("ran, last minute decode 25 %, prefill < 1 %", "#details")
    held = "ring 0: 300 tasks, 4,096 bytes; ring 2: 1 task; ring 3: 2 tasks, 70 of its dependency pool"
    page.shows(f"rings, most held {held}", "#details")
    assert page.complaints() == []


@pytest.mark.guarantee("Y3")
def test_no_text_of_a_report_is_ever_markup(page: Page, tmp_path: Path) -> None:
    page.open(write(tmp_path / "evil.html", embedded_page(hand_made_report(EVIL), EVIL)))

    shown = page.text()
    for panel in (
        "header",
        "#notice",
        "#processes",
        "#requests",
        "#mailboxes",
        "#events",
        "#totals",
        "#links",
        "#programs",
    ):
        assert "<img src=x" in page.text(panel), panel
    page.click("#requests tr:nth-of-type(2) button")
    assert "<img src=x" in page.text("#details")
    assert EVIL in shown
    assert page.js("return window.evil") is None
    assert page.js("return document.querySelectorAll('img, #page script, #page iframe, #details b').length") <= 1
    assert page.complaints() == []


@pytest.mark.guarantee("Y4")
def test_a_page_that_hears_nothing_greys_out_and_says_so(site: Site, page: Page) -> None:
    page.open(site.url)
    page.shows("READY", "#readiness")
    assert not page.is_stale()
    site.is_deaf = True
    try:
        eventually(page.is_stale, "it is stale")
        assert "nothing was heard since. The server answered 503." in page.text("#notice")
        assert float(page.js("return getComputedStyle(document.querySelector('main')).opacity")) < 1
    finally:
        site.is_deaf = False
    eventually(lambda: not page.is_stale(), "it is fresh again")
    assert page.text("#notice") == ""


@pytest.mark.guarantee("Y5")
def test_nothing_comes_from_anywhere_but_the_server_itself(site: Site, page: Page) -> None:
    assert len(live_page().encode()) < 150_000
    named = set(re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"// .*", "", live_page())))
    assert named == {"http://www.w3.org"}  # the names of HTML and SVG elements, which nobody fetches
    page.open(site.url)
    page.shows("READY", "#readiness")
    page.click("#processes button")

    names = page.js("return performance.getEntries().filter(e => e.entryType !== 'mark').map(e => e.name)")
    fetched = {name for name in names if "//" in name}
    assert {site.url, site.url + "state.json"} <= fetched
    assert all(name.startswith(site.url) for name in fetched)
    assert page.complaints() == []


@pytest.mark.guarantee("Y6")
def test_a_written_page_shows_its_moment_and_asks_nobody(page: Page, tmp_path: Path) -> None:
    page.open(write(tmp_path / "one.html", embedded_page(hand_made_report(), "Recorded.")))

    assert page.text("#notice") == "Recorded."
    assert "as of 2025-11-29 04:20:00 UTC" in page.text("header")
    page.js("seen.heardAt = -1e6; draw()")
    assert not page.is_stale()
    assert page.js("return performance.getEntriesByType('resource').length") == 0
    assert page.complaints() == []


@pytest.mark.guarantee("Y7")
def test_percentiles_are_of_the_window_and_say_of_how_many(page: Page, tmp_path: Path) -> None:
    page.open(write(tmp_path / "one.html", embedded_page(hand_made_report(), "Recorded.")))

    # Of 36, the 18th is the 7th of 20 between 0.1 and 0.25 s, and the 34.2th the 3.2th of 4 between 0.25 and 0.5 s.
    many = "of 36 requests that ended well in the last 60 s"
    assert page.text("#ttft") == f"Time to first token (TTFT) 153 ms p50 450 ms p95 {many}"
    assert "37.3 ms p50 > 2.50 s p95" in page.text("#tpot")  # 15 of 22 above 0.01 s; 34.2 is beyond the last bound
    assert page.text("#throughput") == "Tokens per second 124 tokens/s out 53.5 tokens/s in in the last 60 s"
    assert "3 running 1 waiting 4 refused" in page.text("#load")
    assert "38 used · 40 cached · 50 empty of 128 pages" in page.text("#pages")
    assert "50 % of 4,096 prompt tokens found in the prefix cache · 1 preemption" in page.text("#pages")


def strip(page: Page, chip: str, *reports: EngineReport) -> str:
    """What is said of a chip's last ten seconds after those reports."""
    given = json.loads(msgspec.json.encode(reports))
    script = "seen.samples = []; arguments[0].forEach(take); return strip(arguments[1]).text"
    return " ".join(page.js(script, given, chip).split())


@pytest.mark.guarantee("Y16")
def test_prefill_decode_idle_down_and_unknown_are_told_apart(page: Page, tmp_path: Path) -> None:
    page.open(write(tmp_path / "one.html", embedded_page(hand_made_report(), "Recorded.")))

    def after(age_s: float, prefill_s: float, decode_s: float, **chip: Any) -> EngineReport:
        report = hand_made_report()
        nodes = [attrs.evolve(process.node, age_s=age_s) if process.node else None for process in report.processes]
        records = [
            attrs.evolve(process.record, **(chip if process.record.name == "chip.0.0" else {}))
            for process in report.processes
        ]
        times = {"prefill": prefill_s, "decode": decode_s, "lm_head": 1.0}
        programs = tuple(ProgramStatistics(name, 1, 1, int(1e9 * time_s)) for name, time_s in times.items())
        return attrs.evolve(
            report,
            processes=tuple(ProcessReport(*pair) for pair in zip(records, nodes, strict=True)),
            replicas=(attrs.evolve(report.replicas[0], programs=programs),),
        )

    first = after(100.0, 1.0, 5.0)
    second = after(102.0, 1.2, 6.0)
    assert strip(page, "chip.0.0", first) == "the second report is still to come"
    assert strip(page, "chip.0.0", first, second) == "last 2 s: prefill 10 % · decode 50 % · other 0 % · idle 40 %"
    assert (
        strip(page, "chip.1.0", first, second)
        == "last 2 s: prefill 0 % · decode 0 % · other 0 % · idle 0 % · down 100 %"
    )
    reborn = after(104.0, 1.2, 6.0, incarnation=2)
    assert "idle 20 % · down 50 %" in strip(page, "chip.0.0", first, second, reborn)
    assert "idle 0 % · not known 100 %" in strip(page, "chip.0.0", first, after(110.0, 1.2, 6.0))  # nobody looked
    silent = [
        process if process.record.kind != "chip" else attrs.evolve(process, node=None) for process in second.processes
    ]
    unheard = attrs.evolve(second, processes=tuple(silent))
    assert "idle 0 % · not known 100 %" in strip(page, "chip.0.0", first, unheard)
    assert "last 10 s: " in strip(page, "chip.0.0", *(after(100.0 + i, 1.0, 5.0) for i in range(20)))


@pytest.mark.guarantee("Y8")
def test_a_server_with_a_key_is_asked_for_it_once_and_only_the_tab_keeps_it(site: Site, page: Page) -> None:
    site.key = "abc"
    try:
        page.open(site.url)
        eventually(lambda: page.js("return document.getElementById('key').open"), "the key is asked for")
        field = page.driver.find_element(By.ID, "key-text")
        field.send_keys("wrong" + Keys.ENTER)
        page.shows("This key was refused.", "#key")
        field.send_keys("abc" + Keys.ENTER)
        page.shows("READY", "#readiness")
        page.shows("started", "#events")
        page.open(site.url)
        page.shows("READY", "#readiness")
        assert not page.js("return document.getElementById('key').open")
        assert page.js("return [localStorage.length, document.cookie]") == [0, ""]
    finally:
        site.key = ""
        page.js("sessionStorage.clear()")


@pytest.mark.guarantee("Y9")
def test_it_asks_and_draws_once_a_second_and_not_at_all_while_nobody_looks(site: Site, page: Page) -> None:
    page.open(site.url)
    page.shows("READY", "#readiness")
    page.js(COUNT_DRAWS)
    site.asked.clear()
    eventually(lambda: page.js("return window.draws") >= 3, "it is drawn")
    seconds, draws = page.js("return [(performance.now() - window.began) / 1000, window.draws]")
    assert draws <= seconds + 1
    assert site.asked.count("/state.json") <= seconds + 1

    page.driver.switch_to.new_window("tab")
    hidden = page.driver.current_window_handle
    shown = next(handle for handle in page.driver.window_handles if handle != hidden)
    site.asked.clear()
    eventually(lambda: page.js("return performance.now()") > 2500, "it could have asked")
    asked = len(site.asked)
    page.driver.close()
    page.driver.switch_to.window(shown)
    assert asked <= 1  # which was under way
    eventually(lambda: "/events" in site.asked and "/state.json" in site.asked, "it asks again")


@pytest.mark.guarantee("Y10")
def test_a_keyboard_alone_reaches_details_and_keeps_its_place_while_figures_change(site: Site, page: Page) -> None:
    page.open(site.url)
    page.shows("READY", "#readiness")
    page.js(COUNT_DRAWS)
    page.js("document.querySelector(\"#processes button[data-name='router']\").focus()")
    eventually(lambda: page.js("return window.draws") >= 2, "it is drawn anew")
    assert page.js("return document.activeElement.dataset.name") == "router"
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    page.shows("age of this life", "#details")
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    eventually(lambda: not page.js("return document.getElementById('details').open"), "the details are closed")
    assert page.js("return document.activeElement.dataset.name") == "router"


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(width: int, page: Page, tmp_path: Path) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.open(write(tmp_path / "one.html", embedded_page(hand_made_report("x" * 60), "Recorded.")))

    shown, needed = page.js("const root = document.documentElement; return [root.clientWidth, root.scrollWidth]")
    assert needed == shown <= width
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.guarantee("Y17")
def test_a_process_that_does_not_answer_is_shown_as_silent(site: Site, page: Page) -> None:
    page.open(site.url)
    page.shows("READY", "#readiness")
    os.kill(site.pid("chip.0.0"), signal.SIGSTOP)
    try:
        eventually(lambda: page.row("chip.0.0")[1].split() == ["?", "silent"], "it is silent")
        assert page.row("chip.1.0")[1].split() == ["R", "ready"]
    finally:
        os.kill(site.pid("chip.0.0"), signal.SIGCONT)
    eventually(lambda: page.row("chip.0.0")[1].split() == ["R", "ready"], "it answers again")
