"""``/metrics`` for Prometheus, and the same report as JSON at ``/metrics.json``.

Owns: the count of the server's answers. Everything else is the engine's: each scrape is one report, so nothing is kept
up to date between scrapes and no registry is shared with anybody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Send

from ...actors.async_engine import AsyncEngine
from ...actors.report import EngineReport
from ...bus import Histogram
from ...errors import EngineClosed, EngineDead
from .metric_table import HTTP_RESPONSES, METRICS, Metric

__all__ = ["HttpResponses", "families", "routes"]


class HttpResponses:
    """Answers of one server by status, those included that the engine never heard of. Thread: its loop."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def counted(self, send: Send) -> Send:
        """An ASGI ``send`` that counts the answer it begins."""

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.counts[message["status"]] += 1
            await send(message)

        return counting


def routes(engine: AsyncEngine, responses: HttpResponses | None = None) -> list[Route]:
    """Both endpoints of a running engine; 503 once it is closed or dead."""
    counts: Mapping[int, int] = {} if responses is None else responses.counts

    async def metrics(request: Request) -> Response:
        try:
            report = await engine.report()
        except (EngineClosed, EngineDead) as error:
            return Response(f"{error}\n", status_code=503, media_type="text/plain")
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(_Scrape(report, counts)), headers={"content-type": content_type})

    async def as_json(_: Request) -> Response:
        try:
            report = await engine.report()
        except (EngineClosed, EngineDead) as error:
            return Response(msgspec.json.encode({"error": str(error)}), status_code=503, media_type="application/json")
        return Response(msgspec.json.encode(report), media_type="application/json")

    return [Route("/metrics", metrics), Route("/metrics.json", as_json)]


class _Scrape(Collector):
    """What one report comes to."""

    def __init__(self, report: EngineReport, responses: Mapping[int, int]) -> None:
        self._report = report
        self._responses = responses

    def collect(self) -> Iterable[Family]:
        yield from families(self._report)
        yield _family(HTTP_RESPONSES, (((str(status),), count) for status, count in sorted(self._responses.items())))


def families(report: EngineReport) -> Iterable[Family]:
    """Every metric of an engine."""
    return (_family(metric, metric.read(report)) for metric in METRICS)


def _family(metric: Metric, samples: Iterable[tuple[tuple[str, ...], float | Histogram]]) -> Family:
    if metric.kind == "histogram":
        histograms = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, value in samples:
            assert isinstance(value, Histogram)
            histograms.add_metric(labels, _buckets(value), value.total)
        return histograms
    make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = make(metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        assert not isinstance(value, Histogram)
        family.add_metric(labels, value)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus has them."""
    buckets, so_far = [], 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        so_far += count
        buckets.append((bound, float(so_far)))
    return buckets
