"""Every setting of the server, once: flags, variables and TOML keys all derive from these fields. No HTTP library here.

Owns: nothing.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import attrs

from ...actors.setting import seconds, setting, text, whole, yes_or_no
from ...errors import ConfigError

__all__ = ["ServerConfig"]


def _port(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if type(value) is not int or not 0 <= value < 2**16:
        raise ConfigError(f"setting {field.name} is {value!r}; it must be an integer in [0, 65535]")


def _key(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, str) or not value or not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigError(f"setting {field.name} is no key; it must be printable ASCII characters without spaces")


@attrs.frozen(kw_only=True)
class ServerConfig:
    """Settings of ``bus-run serve`` beside those of its engine. Each is checked here; raises ``ConfigError``."""

    host: str = setting("127.0.0.1", "address to listen at; one that others can reach needs a key", text)
    port: int = setting(8000, "TCP port; 0: any that is free", _port)
    served_model_name: str | None = setting(None, "name of the model for clients; default: its directory's name", text)
    api_key: str | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(_key),
        repr=False,
        metadata={"help": "key that clients must send; better given as a variable", "flags": (), "secret": True},
    )
    insecure: bool = setting(False, "serve without a key also where others can reach it", yes_or_no)
    drain_timeout_s: float = setting(
        300.0, "for open requests to end after Ctrl-C or SIGTERM, seconds", seconds, flags=("--drain-timeout",)
    )
    max_body_bytes: int = setting(4 * 2**20, "longest body of a request", whole(1))

    def check_exposure(self) -> None:
        """Raise ``ConfigError`` if others could reach the server without a key."""
        if self.api_key is None and not self.insecure and not _is_loopback(self.host):
            raise ConfigError(
                f"setting host is {self.host!r}, which others can reach, and there is no key; set CHIPBUS_API_KEY,"
                " or say --insecure"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
