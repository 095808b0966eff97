"""``docs/metrics.md``, made from the declared metrics: ``python -m chipbus.tools.metrics_page > docs/metrics.md``.

Owns: nothing. A test compares the page with what this prints.
"""

from __future__ import annotations

from collections.abc import Iterable

import click

from .serve.metric_table import GROUPS, HTTP_RESPONSES, METRICS

__all__ = ["page"]

_PAGE = """\
# Metrics, events and logs

Printed by `python -m chipbus.tools.metrics_page` from `tools/serve/metric_table.py`: edit those.

`Engine.report()` and `await AsyncEngine.report()` return one `EngineReport`: everything there is to tell about an
engine at that moment. `/metrics` shows it to Prometheus, `/metrics.json` is the report itself, with `schema` as its
version, and the status page draws it. Processes are asked at most twice a second, however many ask; one that does not
answer is shown as it was last heard. Nothing of what a request says is in it.

| file | what it is for |
| --- | --- |
| `tools/serve/grafana.json` | a dashboard; import it and choose the data source |
| `tools/serve/alerts.yml` | rules for Prometheus; edit the budget of `ChipbusSlowFirstToken` |

Both are in the package, next to `chipbus.tools.serve`.

## What holds for all

* Counters go on over the lives of the processes behind them. What a process did between its last answer and its death
  is not known and not guessed; requests and tokens are counted by the host application, which loses none.
* A replica that is down keeps its counters, and 0 stands for what it has now.
* What a chip says of itself is of its present life, and not there while it does not answer. `chip_busy_ratio` is wall
  time of the thread that computes; `dispatch_seconds_total` is a null chip's modelled time, which has no wall.
  Rings are those of the task graphs of chips (L2); a server has none on the host (L3).
* Labels have few values. No label is the id of a request.
* Histograms of requests and steps have vLLM's bounds, those of latencies finer ones below, too.
* Times in seconds. Latencies are measured where the caller is, on the engine's bus thread; queue, prefill and decode
  times are the replica core's.

{groups}

## Events

`AsyncEngine.events(after)` waits for them, the newest {most} are in every report. Numbers count from 1 without a gap.

| kind | subject | when |
| --- | --- | --- |
| `started` | process | its first life was begun |
| `ready` | process | it can do its work; with its pid and how long that took |
| `exit` | process | a life ended; with signal, exit code or what the supervisor had against it |
| `restart` | process | a further life was begun |
| `draining` | process | it takes no new requests and is to end |
| `lost` | process | it died too often and stays down |
| `retried` | request | it was lost with a process, and goes on |
| `failed` | request | it ended with an error that is not its caller's doing |
| `refused` | request | it cannot be served: wrong, too long, or there is no room |

Of requests, one kind and error makes an event at once and then one a second, with how many there were.

With `record` set, `DIR/events.jsonl` gets every event as a line of JSON when it happens, and `DIR/report.json` the
latest report, at most every two seconds while something changes, and once at the end, with `is_closed`.
`chipbus.actors.run_files.read_recorded(DIR)` reads both, also after SIGKILL.

## Logs

Processes below the host application write logfmt lines to standard error from `log_level` on. The host application's
own events go to structlog if it is configured there, else to the standard library's logger `chipbus`.

| event | level | facts |
| --- | --- | --- |
| `request.finished` | info | request, finish_reason, replica, queued_s, and as below |
| `request.failed` | info | request, error (its class), attempt, prompt_tokens, output_tokens, ttft_s, e2e_s |
| `child.ready` | info | child, life, pid, and how long each phase of its start took |
| `child.exited` | warning, info in a stop | child, life, pid, exit, reason |
| `child.stalled` | error | child, life, reason |
| `group.lost` | error | child, reason |
| `bus.counted` | warning | counter, total, peer: what should be rare happened first, or ten times as often |
| `run_files.failed`, `ledger.failed` | error | path, error: the disk refuses the record; serving goes on |

No log repeats a prompt, a text or token ids."""


def page() -> str:
    """The whole page, Markdown."""
    from ..actors.report import MOST_EVENTS

    metrics = (*METRICS, HTTP_RESPONSES)
    groups = []
    for group, title in GROUPS.items():
        rows = [
            (f"`{m.name}`", m.kind, ", ".join(f"`{label}`" for label in m.labels) or "–", m.help)
            for m in metrics
            if m.group == group
        ]
        groups.append(f"## {title}\n\n{_table(('metric', 'type', 'labels', 'meaning'), rows)}")
    return _PAGE.format(groups="\n\n".join(groups), most=MOST_EVENTS)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ("---",) * len(head), *rows])


if __name__ == "__main__":
    click.echo(page())
