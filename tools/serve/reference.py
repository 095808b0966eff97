"""``docs/serving.md``, made from the declared fields and errors: ``python -m chipbus.tools.serve.reference``.

Owns: nothing. A test compares the page with what this prints.
"""

from __future__ import annotations

from collections.abc import Iterable

import click

from .failures import rows
from .fields import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE, Fields, Where

__all__ = ["page"]

_PAGE = """\
# The server, `bus-run serve`

Printed by `python -m chipbus.tools.serve.reference` from `tools/serve/fields.py` and `tools/serve/failures.py`: edit
those. What the server promises is in [semantics](semantics.md), its settings are in [flags](flags.md).

    pip install 'chipbus[serve]'
    bus-run serve MODEL            # prints http://127.0.0.1:8000/v1 on stdout when it is ready

| endpoint | answer |
| --- | --- |
| `POST /v1/chat/completions`, `POST /v1/completions` | as OpenAI's; with `"stream": true` as server-sent events |
| `GET /v1/models`, `GET /v1/models/ID` | the one model, with `max_model_len` |
| `POST /tokenize`, `POST /detokenize` | `tokens`, `count`; `prompt` |
| `GET /health` | 200 while the process lives |
| `GET /ready` | 200 if a request would be taken, else 503 |
| `GET /version` | the version of chipbus |
| `GET /metrics`, `GET /metrics.json` | what [metrics](metrics.md) lists |
| `GET /`, `GET /state.json`, `GET /events` | the status page and its data |

With a key (`CHIPBUS_API_KEY`), all of it wants `Authorization: Bearer KEY`, but for `/health`, `/ready`, `/version` and
`/`, which tell nothing of the model or its users. Without a key the server listens only where nobody else can reach it,
unless it is told `--insecure`, and answers only to `localhost` and to addresses, so that no web page can be led to it
by a name.

## Fields

A field is used, ignored, or not supported: then it is refused by its name unless it says what would happen anyway.
null stands for not given. An unknown field is refused with the nearest name. Numbers are numbers: `true` and `"1"` are
none. Ranges are those of `SamplingParams`. What is left out is as the model's `generation_config.json` says
(temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens), else as `SamplingParams` does.

{tables}

A message has a role (system, developer, user, assistant) and content: text, or a list of
`{{"type": "text", "text": …}}`. One request makes at most 256 completions, prompts times `n`.

Header `X-Session-Id` says the same as `session_id`, `X-Data-Parallel-Rank` the same as `dp_rank`; where both are given
they must agree.

## Answers

What is not OpenAI's: a choice ends with `stop_reason`, the stop text or id that ended it, and with `chipbus`: replica,
rank and attempt, which is above 1 if a process died meanwhile. A token that is no whole character is written
`bytes:\\xe2\\x82`. `system_fingerprint` is the version and a digest of the model and of all settings that results may
depend on.

* A stream begins with its first token, so what is refused has a status of its own. While nothing comes for 15 s it
  says `: waiting`.
* It ends well with a finish reason, the usage if asked for, and `[DONE]`. If it fails: one event `{{"error": …}}`, and
  the connection ends in the middle. There is no other end.
* Whoever closes the connection aborts the request, streaming or not. Whoever does not read gets fewer, larger chunks.
* A chip, replica, router or tokenizer that dies costs a pause and no token.

## Errors

`{{"error": {{"message", "type", "param", "code"}}}}`. Look at the status, then at `code`. 429 and 503 come with
`Retry-After`.

{errors}

## Limits

Request line and headers 32 KiB; body `--max-body-bytes`; queue `--max-waiting` per replica. A head or the rest of a
body must come within 60 s; a connection without a request is closed after 30 s.

## Signals and exit codes

Ctrl-C or SIGTERM: new requests get 503, open ones may end within `--drain-timeout`; what has not is dropped with an
error event, and told. Once more: everything is killed. 0 after a drain, 1 if the engine died, 2 for settings that
cannot be used or a port that is taken, 130 if it was killed."""


def page() -> str:
    """The whole page, Markdown."""
    endpoints = (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", COMPLETIONS),
        ("/tokenize", TOKENIZE),
        ("/detokenize", DETOKENIZE),
    )
    tables = "\n\n".join(f"### `POST {path}`\n\n{_fields(fields)}" for path, fields in endpoints)
    return _PAGE.format(tables=tables, errors=_table(("status", "type", "code", "when"), rows()))


def _fields(fields: Fields) -> str:
    order = {Where.SERVER: 0, Where.SAMPLING: 1, Where.HANDLING: 2, Where.IGNORED: 3, Where.NEUTRAL: 4}
    ordered = sorted(fields.values(), key=lambda field: order[field.where])
    head = ("field", "type", "", "meaning")
    return _table(
        head,
        (
            (f"`{field.name}`", field.kind, "needed" if field.is_needed else field.where.value, field.text)
            for field in ordered
        ),
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ("---",) * len(head), *rows])


if __name__ == "__main__":
    click.echo(page())
