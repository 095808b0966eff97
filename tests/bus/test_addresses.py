"""Names, socket paths, run directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from chipbus.bus.addresses import MAX_PATH_BYTES, check_name, check_run_dir, inbox_paths
from chipbus.errors import ConfigError


@pytest.mark.parametrize("name", ["host", "supervisor", "tokenizer.0", "chip.10.3"])
def test_names_of_nodes_are_words_and_numbers(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", "Router", "a/b", "..", "a..b", ".a", "a b", "x" * 65, "a\n"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="node name"):
        check_name(name)


def test_a_path_holds_name_incarnation_and_socket() -> None:
    assert inbox_paths(Path("/run/x"), "chip.0.1", 7) == (Path("/run/x/chip.0.1.7.c"), Path("/run/x/chip.0.1.7.d"))


def test_a_path_too_long_for_a_socket_is_refused_with_its_length() -> None:
    longest = Path("/" + "d" * (MAX_PATH_BYTES - len("//host.1.c")))
    inbox_paths(longest, "host", 1)

    with pytest.raises(ConfigError, match="101 bytes, at most 100"):
        inbox_paths(Path(f"{longest}d"), "host", 1)


def test_a_run_directory_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    check_run_dir(tmp_path)

    tmp_path.chmod(0o750)
    with pytest.raises(ConfigError, match="mode 0750; it must be ours, mode 0700"):
        check_run_dir(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        check_run_dir(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is no directory"):
        check_run_dir(tmp_path / "file")
