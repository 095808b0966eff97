"""What the status page's routes send, over a real socket, and what ``bus-run page`` writes; without a browser."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from page_site import Site

from chipbus import Engine, SamplingParams
from chipbus.actors.report import EngineReport, Event
from chipbus.actors.run_files import read_recorded
from chipbus.tools import console
from chipbus.tools.run_commands import bus_run
from chipbus.tools.serve import state
from support import eventually


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


class Reader:
    """One open ``/events``."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.iter_lines()

    def event(self) -> tuple[str, Event]:
        """The next one, with its id."""
        found: dict[str, str] = {}
        for line in self._lines:
            if not line and found:
                return found["id"], msgspec.json.decode(found["data"], type=Event)
            name, _, value = line.partition(": ")
            if name:
                found[name] = value
        raise AssertionError("the events have ended")

    def rest(self) -> None:
        """All there is, to the end; a connection that breaks raises."""
        for _ in self._lines:
            pass

    def comment(self) -> str:
        """The next one."""
        return next(line for line in self._lines if line.startswith(":"))


@pytest.mark.guarantee("Y11")
def test_the_state_is_the_engines_report_and_the_page_may_run_nothing_else(site: Site) -> None:
    answer = httpx.get(site.url + "state.json")
    report = msgspec.json.decode(answer.content, type=EngineReport)
    assert (answer.headers["content-type"], answer.headers["cache-control"]) == ("application/json", "no-store")
    assert (report.model, report.chip, report.is_ready) == ("demo", "null", True)
    assert [process.record.name for process in report.processes][-1] == "chip.0.0"

    page = httpx.get(site.url)
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]+='", policy["script-src"])
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in str(policy)


@pytest.mark.slow
@pytest.mark.guarantee("Y12")
def test_events_go_on_after_the_one_heard_last_and_begin_anew_for_another_run(site: Site) -> None:
    with httpx.stream("GET", site.url + "events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        reader = Reader(response)
        heard = [reader.event() for _ in range(4)]
        assert [event.number for _, event in heard] == [1, 2, 3, 4]
        os.kill(site.pid("chip.0.0"), signal.SIGKILL)
        while (event := reader.event()[1]).kind != "exit":
            pass
        assert (event.subject, event.text) == ("chip.0.0", "signal 9 (SIGKILL)")

    for last, number in ((heard[1][0], 3), ("other.2", 1), ("3", 1), (heard[1][0] + "x", 1)):
        with httpx.stream("GET", site.url + "events", headers={"Last-Event-ID": last}) as response:
            assert Reader(response).event()[1].number == number, last


@pytest.mark.guarantee("Y13")
def test_a_reader_of_events_is_kept_alive_and_forgotten_when_it_leaves(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "KEEP_ALIVE_S", 0.01)
    newest = httpx.get(site.url + "state.json").json()["events"][-1]["number"]
    with httpx.stream("GET", site.url + "events") as response:
        reader = Reader(response)
        while reader.event()[1].number < newest:
            pass
        assert reader.comment() == ": nothing new"
        assert len(listeners(site)) == 1
    eventually(lambda: not listeners(site), "nobody listens any more")


def listeners(site: Site) -> Any:
    return site.engine._runtime._host.reporter.log._listeners


@pytest.mark.slow
@pytest.mark.guarantee("Y14")
def test_open_events_end_with_the_engine_and_do_not_hold_the_server() -> None:
    with Site() as site, httpx.stream("GET", site.url + "events") as response:
        reader = Reader(response)
        reader.event()
        site.end()
        reader.rest()


def page_of(*arguments: str) -> int:
    return console.run("bus-run", lambda: bus_run, ["page", *arguments])


def embedded(path: Path) -> dict[str, Any]:
    [data] = re.findall(r'<script type="application/json" id="embedded">(.*?)</script>', path.read_text(), re.DOTALL)
    return dict(json.loads(data))


@pytest.mark.slow
@pytest.mark.guarantee("Y15")
def test_a_page_is_written_of_a_record_and_of_a_running_engine_and_of_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = tmp_path / "record"
    with Engine("demo", chip="null", record=record) as engine:
        engine.generate("replica", SamplingParams(max_tokens=4, ignore_eos=True))
        assert page_of(str(record)) == 0
        assert "had not been closed" in embedded(tmp_path / "record.html")["note"]
        assert page_of(engine.run_dir, "-o", "look.html") == 0

    look = embedded(tmp_path / "look.html")
    assert [process["record"]["name"] for process in look["report"]["processes"]][:2] == ["host", "supervisor"]
    assert "A guest is told of its processes only" in look["note"]
    assert set(look["report"]) == {"at_unix_s", "run_dir", "processes"}

    assert page_of(str(record)) == 0
    written = embedded(tmp_path / "record.html")
    assert "was closed in order" in written["note"]
    assert msgspec.convert(written["report"], EngineReport) == read_recorded(record)
    assert capfd.readouterr().out.split() == ["record.html", "look.html", "record.html"]

    (tmp_path / "empty").mkdir(mode=0o700)
    for source, words in (
        (tmp_path / "empty", "is no record (it has no run.json), and no engine: no engine runs in"),
        (tmp_path / "none", "is no record (it has no run.json), and no engine: "),
    ):
        assert page_of(str(source)) == 2
        shown = capfd.readouterr()
        assert shown.out == ""
        assert words in shown.err.splitlines()[0]
    assert page_of(str(record), "-o", "none/page.html") == 2
    assert "the page cannot be written to none/page.html" in capfd.readouterr().err
