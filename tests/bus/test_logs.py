"""What a failing handler leaves in a log, wherever the host application sends it: where it failed, and no values."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from bus_actors import Asker, Boom, Number, Server

from chipbus.bus import get_logger, handles
from chipbus.errors import ChipbusError, ConfigError, RequestInvalid
from support import eventually

SECRET = "xyzzy-plugh"


class Leaky(Server):
    """Its handler has a secret in its variables, and in the texts of what it raises and of what led to that."""

    @handles(Boom)
    def _boom(self, message: Boom, _: object) -> None:
        prompt = f"tell me of {SECRET}"
        if message.is_typed:
            raise RequestInvalid(f"{prompt!r} is wrong")
        try:
            raise ValueError(prompt)
        except ValueError as error:
            raise KeyError(prompt) from error


def rendered_by_structlogs_own_defaults() -> io.StringIO:
    """As a host application may have it: a console for developers, which prints the variables of every frame."""
    text = io.StringIO()
    structlog.configure(
        processors=[structlog.dev.ConsoleRenderer(colors=False)], logger_factory=structlog.PrintLoggerFactory(text)
    )
    return text


@pytest.fixture
def unconfigured() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.mark.guarantee("B71")
@pytest.mark.usefixtures("unconfigured")
@pytest.mark.parametrize("is_typed", [True, False])
@pytest.mark.parametrize("is_configured", [True, False])
def test_a_failed_handler_is_logged_without_any_value(
    nodes: Any, caplog: pytest.LogCaptureFixture, is_typed: bool, is_configured: bool
) -> None:
    console = rendered_by_structlogs_own_defaults() if is_configured else io.StringIO()
    caplog.set_level(logging.DEBUG)
    server, asker = Leaky(), Asker()
    nodes.start("server", server)
    asking = nodes.start("asker", asker, ("server", 1))

    asking.do(lambda: asker.ask("server", Boom(is_typed)))
    eventually(lambda: len(asker.heard) == 1, "the error")
    asking.do(lambda: asker.ask("server", Number(1)))
    eventually(lambda: asker.heard[1:] == [2], "the actor lives on")

    assert SECRET in str(asker.heard[0])  # the caller is told: it is his
    logged = console.getvalue() + caplog.text
    assert "actor.handler_failed" in logged
    assert "RequestInvalid" in logged if is_typed else "KeyError" in logged
    assert "in _boom" in logged
    assert SECRET not in logged


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("setting threads is 0"), "ConfigError: setting threads is 0"),
        (FileNotFoundError(2, "No such file", "/etc/x"), "FileNotFoundError: [Errno 2] No such file: "),
        (ChipbusError(repr(KeyError(SECRET))), "ChipbusError (its text may be of a request and is not logged)"),
        (RequestInvalid(SECRET), "RequestInvalid (its text may be of a request and is not logged)"),
        (UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET), "UnicodeDecodeError (its text may be"),
    ],
)
def test_a_text_is_logged_where_we_know_who_wrote_it(
    caplog: pytest.LogCaptureFixture, error: Exception, text: str
) -> None:
    try:
        raise error
    except (ChipbusError, OSError, ValueError) as caught:
        get_logger().error("it.failed", error=repr(caught), exc_info=True)
        get_logger().error("it.failed", exc_info=caught)

    for record in caplog.records:
        assert text in record.getMessage()
        assert SECRET not in record.getMessage()
    assert len(caplog.records) == 2
