"""What Prometheus gets: real scrapes of an engine whose replica is killed, read by Prometheus' own parser."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import attrs
import httpx
import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from chipbus import AsyncEngine, SamplingParams
from chipbus.actors.messages.launching import ChipReport
from chipbus.actors.report import EngineReport
from chipbus.bus import Histogram
from chipbus.errors import ChipbusError
from chipbus.tools.metrics_page import page
from chipbus.tools.serve import metric_table
from chipbus.tools.serve.app import make_app
from chipbus.tools.serve.metric_table import HTTP_RESPONSES, METRICS, PREFIX
from chipbus.tools.serve.metrics import HttpResponses, families, routes
from chipbus.tools.serve.service import Service
from chipbus.topology.rings import RingUse

SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SHIPPED = Path(metric_table.__file__).parent
PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"

EMPTY = ("chipbus_bus_events_total", "chipbus_ring_high_water")
"""Nothing rare has happened, and a null chip captures no graph of a model's programs."""

Sample = tuple[str, frozenset[tuple[str, str]]]


@attrs.frozen
class Scrapes:
    """One engine, seen twice; between, a replica was killed."""

    before: str
    after: str
    openmetrics: str
    as_json: bytes
    content_types: tuple[str, ...]
    report: EngineReport
    when_closed: tuple[int, ...]
    request_ids: tuple[str, ...]


@pytest.fixture(scope="module")
def scrapes(tmp_path_factory: pytest.TempPathFactory) -> Scrapes:
    return asyncio.run(scrape(tmp_path_factory.mktemp("run") / "record"))


async def scrape(record: Path) -> Scrapes:
    responses = HttpResponses()
    async with AsyncEngine("demo", chip="null", data_parallel_size=2, record=record, log_level="error") as engine:
        app = make_app(Service(engine, "demo", 2**20), "key", routes(engine, responses), responses)
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(
            transport=transport, base_url="http://server", headers={"authorization": "Bearer key"}
        ) as client:
            outputs = await engine.generate([[5 + n] for n in range(8)], SHORT)
            with pytest.raises(ChipbusError):
                await engine.generate("")
            assert (await client.get("/nothing")).status_code == 404
            assert (await client.get("/metrics", headers={"authorization": "Bearer guessed"})).status_code == 401
            before = await client.get("/metrics")
            os.kill(next(r.pid for r in engine.tree() if r.name == "replica.0"), signal.SIGKILL)
            lives = 0
            async with asyncio.timeout(20):
                async for event in engine.events():
                    lives += (event.kind, event.subject) == ("ready", "replica.0")
                    if lives == 2:
                        break
            outputs += await engine.generate([[5 + n] for n in range(8)], SHORT)
            after = await seen(client, lambda text: tells_of_the_new_life(samples_of(text), steps_of(before.text)))
            accept = {"accept": "application/openmetrics-text; version=1.0.0"}
            openmetrics = await client.get("/metrics", headers=accept)
            as_json = await client.get("/metrics.json")
            report = await engine.report()
            await engine.close()
            closed = [await client.get(path) for path in ("/metrics", "/metrics.json")]
    answers = (before, after, openmetrics, as_json)
    assert [answer.status_code for answer in answers] == [200] * 4
    return Scrapes(
        before=before.text,
        after=after.text,
        openmetrics=openmetrics.text,
        as_json=as_json.content,
        content_types=tuple(answer.headers["content-type"] for answer in answers[1:]),
        report=report,
        when_closed=tuple(answer.status_code for answer in closed),
        request_ids=tuple(output.request_id for output in outputs),
    )


async def seen(client: httpx.AsyncClient, is_seen: Callable[[str], bool]) -> httpx.Response:
    """The first scrape of which that is true: what replicas answer is shared for a second."""
    async with asyncio.timeout(20):
        while not is_seen((answer := await client.get("/metrics")).text):
            await asyncio.to_thread(threading.Event().wait, 0.05)
    return answer


def tells_of_the_new_life(samples: dict[Sample, float], steps: float) -> bool:
    """All answers in it are from after the last request."""
    silent = total(samples, "worker_silent") + total(samples, "num_requests_running")
    return not silent and total(samples, "steps_total") > steps and total(samples, "reap_seconds_count") > 0


def steps_of(text: str) -> float:
    return total(samples_of(text), "steps_total")


def samples_of(text: str) -> dict[Sample, float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def total(samples: dict[Sample, float], name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for (found, given), value in samples.items() if found == PREFIX + name and wanted <= given)


@pytest.mark.guarantee("M20")
def test_what_is_exposed_is_what_is_declared_and_documented(scrapes: Scrapes) -> None:
    assert PAGE.read_text() == page() + "\n", "run: python -m chipbus.tools.metrics_page > docs/metrics.md"
    declared = {metric.name: metric for metric in (*METRICS, HTTP_RESPONSES)}
    assert len(declared) == len(METRICS) + 1
    found = {}
    for family in parse(scrapes.after):
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = family
        assert (family.type, family.documentation) == (declared[name].kind, declared[name].help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(declared[name].labels), sample
    assert found.keys() == declared.keys()
    for name in declared:
        assert f"| `{name}` |" in page()
        assert found[name].samples or name in EMPTY, f"{name} has a value"
    assert "{" not in page()


@pytest.mark.guarantee("M21")
def test_no_exposed_counter_goes_down_when_a_replica_is_killed(scrapes: Scrapes) -> None:
    before, after = samples_of(scrapes.before), samples_of(scrapes.after)
    counting = re.compile(r".*_(total|bucket|count|sum)$")
    fell = {key: (value, after.get(key)) for key, value in before.items()
            if counting.match(key[0]) and not after.get(key, -1.0) >= value}  # fmt: skip

    assert fell == {}
    assert total(after, "worker_incarnation", worker="replica.0") == 2
    for name in ("steps_total", "sampled_tokens_total", "prefill_tokens_total"):
        assert total(after, name) > total(before, name) > 0, name
    assert total(after, "request_success_total", finished_reason="length") == 16
    assert total(after, "request_failure_total", code="RequestInvalid") == 1
    assert (total(before, "generation_tokens_total"), total(after, "generation_tokens_total")) == (48, 96)
    assert total(after, "worker_restarts_total", worker="replica.0", reason="SIGKILL") == 1
    assert total(after, "reaped_children_total") == 2, "the core, and its chip with it"
    assert total(after, "reap_seconds_count") == 2
    assert total(after, "iteration_tokens_total_count") == total(after, "steps_total")
    computed = sum(total(after, "dispatch_tokens_total", program=program) for program in ("prefill", "decode"))
    assert total(after, "iteration_tokens_total_sum") == computed
    assert 0 < total(after, "chip_busy_ratio", chip="chip.1.0") <= 1
    assert total(after, "poisoned_lanes") == total(after, "credit_wait_seconds_count") == 0
    assert total(after, "ready") == 1
    assert [total(after, "http_responses_total", status=status) for status in ("401", "404")] == [1, 1]
    assert total(after, "http_responses_total", status="200") >= 1
    assert total(after, "ledger_bytes_total", actor="router") > 0


@pytest.mark.guarantee("M22")
def test_no_label_is_the_id_of_a_request(scrapes: Scrapes) -> None:
    values = {value for _, labels in samples_of(scrapes.after) for _, value in labels}

    assert len(scrapes.request_ids) == 16
    assert not values & set(scrapes.request_ids)
    assert all(metric.labels == () or "request" not in " ".join(metric.labels) for metric in METRICS)


def test_a_histogram_counts_up_to_all_its_observations(scrapes: Scrapes) -> None:
    samples = samples_of(scrapes.after)
    for metric in METRICS:
        if metric.kind != "histogram":
            continue
        name = metric.name.removeprefix(PREFIX)
        buckets: dict[frozenset[tuple[str, str]], list[tuple[float, float]]] = {}
        for (found, labels), value in samples.items():
            if found == f"{metric.name}_bucket":
                le = float(dict(labels)["le"])
                buckets.setdefault(frozenset(pair for pair in labels if pair[0] != "le"), []).append((le, value))
        for labels, cells in buckets.items():
            values = [value for _, value in sorted(cells)]
            assert values == sorted(values)
            assert max(cells)[0] == float("inf")
            assert values[-1] == samples[f"{metric.name}_count", labels]
        if metric.group == "latency":
            expected = 16 if "inter_token" not in name else sum(scrapes.report.latencies.inter_token.counts)
            assert total(samples, f"{name}_count") == expected


def test_what_chips_processes_and_credit_say_of_themselves_is_exposed_as_it_is(scrapes: Scrapes) -> None:
    rings = (RingUse(tasks=7, heap_bytes=2048), RingUse(), RingUse(), RingUse(tasks=1, dep_entries=70))
    chip = ChipReport(0, "", 0.0, "null", (("decode", 0.25), ("prefill", 0.5)), rings)
    waits = Histogram((0.5, 1.0), (0, 2, 1), 9.5)
    report = attrs.evolve(
        scrapes.report,
        processes=tuple(
            attrs.evolve(p, chip=chip if p.record.name == "chip.1.0" else None) for p in scrapes.report.processes
        ),
        totals=tuple(attrs.evolve(t, credit_waits=waits) for t in scrapes.report.totals if t.name == "router"),
        replicas=tuple(attrs.evolve(row, poisoned_lanes=row.replica) for row in scrapes.report.replicas),
        reaps=Histogram((0.1,), (3, 1), 0.5),
    )

    samples = {
        (sample.name.removeprefix(PREFIX), *sorted(sample.labels.values())): sample.value
        for family in families(report)
        for sample in family.samples
    }

    assert {key[1:]: value for key, value in samples.items() if key[0] == "chip_busy_ratio"} == {
        ("chip.1.0", "decode"): 0.25,
        ("chip.1.0", "prefill"): 0.5,
    }
    held = {key[1:]: value for key, value in samples.items() if key[0] == "ring_high_water"}
    assert len(held) == 12
    assert {key: value for key, value in held.items() if value} == {
        ("0", "chip.1.0", "ring_task_window"): 7,
        ("0", "chip.1.0", "ring_heap"): 2048,
        ("3", "chip.1.0", "ring_task_window"): 1,
        ("3", "chip.1.0", "ring_dep_pool"): 70,
    }
    assert samples["credit_wait_seconds_bucket", "1.0", "router"] == 2
    assert (samples["credit_wait_seconds_count", "router"], samples["credit_wait_seconds_sum", "router"]) == (3, 9.5)
    assert (samples["poisoned_lanes", "0", "demo"], samples["poisoned_lanes", "1", "demo"]) == (0, 1)
    assert (samples["reap_seconds_count",], samples["reap_seconds_sum",]) == (4, 0.5)


def test_other_formats_say_the_same(scrapes: Scrapes) -> None:
    plain, openmetrics, as_json = scrapes.content_types
    assert plain.startswith("text/plain; version=0.0.4")
    assert openmetrics.startswith("application/openmetrics-text")
    assert as_json == "application/json"
    names = {sample.name for family in parse_openmetrics(scrapes.openmetrics) for sample in family.samples}
    assert names == {name for name, _ in samples_of(scrapes.after)}
    told = json.loads(scrapes.as_json)
    assert told["schema"] == 1
    assert told["finished"] == {"length": 16}


def test_a_closed_engine_answers_that_it_is_not_there(scrapes: Scrapes) -> None:
    assert scrapes.when_closed == (503, 503)


def test_a_model_of_a_directory_is_labelled_by_its_last_part(scrapes: Scrapes) -> None:
    report = attrs.evolve(scrapes.report, model="/srv/models/Qwen3-0.6B/")

    [ready] = [family for family in families(report) if family.name == "chipbus_ready"]
    assert ready.samples[0].labels == {"model": "Qwen3-0.6B"}


def promql_names(expression: str) -> set[str]:
    return set(re.findall(r"\bchipbus_\w+", expression))


def exposed_names(scrapes: Scrapes) -> set[str]:
    empty = {metric.name for metric in (*METRICS, HTTP_RESPONSES) if metric.kind != "histogram"}
    return {name for name, _ in samples_of(scrapes.after)} | empty


@pytest.mark.guarantee("M23")
def test_dashboard_and_alerts_ask_only_for_what_is_exposed(scrapes: Scrapes) -> None:
    dashboard = json.loads((SHIPPED / "grafana.json").read_text())
    rules = [
        rule for group in yaml.safe_load((SHIPPED / "alerts.yml").read_text())["groups"] for rule in group["rules"]
    ]
    asked = {target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())}
    asked |= {rule["expr"] for rule in rules}
    asked.add(dashboard["templating"]["list"][1]["query"]["query"])
    labels = {metric.name: {*metric.labels, "le", "instance", "job"} for metric in (*METRICS, HTTP_RESPONSES)}

    for expression in asked:
        names = promql_names(expression)
        assert names, expression
        assert names <= exposed_names(scrapes), expression
        families_asked = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
        known = set.intersection(*(labels[name] for name in families_asked)) if len(families_asked) == 1 else None
        for grouping in re.findall(r"\bby \(([^)]*)\)", expression):
            assert known is None or set(re.split(r",\s*", grouping)) <= known, expression
        assert expression.count("(") == expression.count(")")
    assert len(asked) > 40


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = json.loads((SHIPPED / "grafana.json").read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_alert_says_where_and_how_urgent() -> None:
    [group] = yaml.safe_load((SHIPPED / "alerts.yml").read_text())["groups"]

    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"]) == 9
    for rule in group["rules"]:
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert re.fullmatch(r"\d+[sm]", rule.get("for", "0s"))
