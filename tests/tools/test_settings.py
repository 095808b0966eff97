"""Four sources, one order, and a sentence that names source, value and rule for whatever is wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import attrs
import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.actors.config import EngineConfig
from chipbus.errors import ConfigError
from chipbus.tools.options import engine_options, resolved_from
from chipbus.tools.settings import PREFIX, Resolved, flag_names, resolve_settings, value_type

FIELDS = [field.name for field in attrs.fields(EngineConfig)]
OTHERS = {  # a valid value that is nobody's default, where the type alone does not give one
    "chip": "null", "dtype": "float32", "log_level": "debug", "devices": "null:3", "layers": "0:output",
    "model": "else", "weights": "int8",
}  # fmt: skip


def other_value(name: str) -> Any:
    if value_type(name) is bool:
        return not getattr(EngineConfig(), name)
    return OTHERS.get(name) or {int: 7, float: 2.5, Path: Path("somewhere")}[value_type(name)]


def as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_toml(value: Any) -> str:
    return as_text(value) if isinstance(value, (int, float)) else f'"{value}"'


def of(resolved: Resolved, name: str) -> tuple[Any, str]:
    return next((s.value, s.source) for s in resolved.settings if s.name == name)


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_reached_by_flag_variable_and_file_and_names_its_source(name: str, tmp_path: Path) -> None:
    value = other_value(name)
    file = tmp_path / "chipbus.toml"
    file.write_text(f"{name} = {as_toml(value)}\n")
    variable = PREFIX + name.upper()

    by_flag = resolve_settings({name: as_text(value)}, {}, None)
    by_variable = resolve_settings({}, {variable: as_text(value)}, None)
    by_file = resolve_settings({}, {}, file)

    assert value != getattr(EngineConfig(), name)
    assert of(by_flag, name) == (value, f"flag {flag_names(name)[0]}")
    assert of(by_variable, name) == (value, f"variable {variable}")
    assert of(by_file, name) == (value, f"file {file}")
    assert by_flag.config == by_variable.config == by_file.config == EngineConfig(**{name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_every_spelling_of_every_flag_reaches_its_setting(name: str) -> None:
    seen: list[Resolved] = []

    @click.command()
    @engine_options
    def command(print_config: bool, **options: Any) -> None:
        seen.append(resolved_from(options))

    value, takes_none = str(other_value(name)), value_type(name) is bool
    for spelling in flag_names(name):
        given_arguments = [value] if name == "model" else [spelling] if takes_none else [spelling, value]
        result = CliRunner().invoke(command, given_arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output

    assert [of(resolved, name)[0] for resolved in seen] == [other_value(name)] * len(flag_names(name))


@settings(deadline=None, print_blob=True, max_examples=100)
@given(places=st.dictionaries(st.sampled_from(FIELDS), st.sets(st.sampled_from(["flag", "variable", "file"]))))
def test_a_flag_wins_over_a_variable_over_a_file_over_the_default(
    places: dict[str, set[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("settings") / "chipbus.toml"

    def values(place: str) -> dict[str, Any]:
        return {name: other_value(name) for name, where in places.items() if place in where}

    file.write_text("".join(f"{name} = {as_toml(value)}\n" for name, value in values("file").items()))
    flags = {name: as_text(value) for name, value in values("flag").items()}
    environ = {PREFIX + name.upper(): as_text(value) for name, value in values("variable").items()}

    resolved = resolve_settings(flags, environ, file)

    for name in FIELDS:
        where = places.get(name, set())
        value, source = of(resolved, name)
        winner = next((place for place in ("flag", "variable", "file") if place in where), "default")
        assert source.split()[0] == winner
        assert (
            value == (other_value(name) if where else getattr(EngineConfig(), name)) == getattr(resolved.config, name)
        )


def test_what_is_printed_is_a_file_that_gives_the_same_configuration(tmp_path: Path) -> None:
    first = resolve_settings({name: as_text(other_value(name)) for name in FIELDS}, {}, None)
    odd = resolve_settings({"model": 'a "b" \\c\td\x7fé', "record": "x y"}, {}, None)

    for resolved in (first, odd, resolve_settings({}, {}, None)):
        file = tmp_path / "again.toml"
        file.write_text(resolved.as_toml(), encoding="utf-8")
        assert resolve_settings({}, {}, file).config == resolved.config
        assert all(f"# {setting.source}" in resolved.as_toml() for setting in resolved.settings)
        assert tomllib.loads(resolved.as_toml())["model"] == resolved.config.model


def test_ring_sizes_and_foreign_variables_are_left_alone() -> None:
    environ = {"CHIPBUS_RING_HEAP": "9", "HOME": "/root", "XCHIPBUS_DTYPE": "q"}

    assert resolve_settings({}, environ, None).config == EngineConfig()


@pytest.mark.parametrize(
    ("flags", "environ", "toml", "words"),
    [
        ({"max_num_seqs": "many"}, {}, "", "--max-num-seqs is 'many'; it must be an integer"),
        ({"max_num_seqs": "1_0"}, {}, "", "--max-num-seqs is '1_0'; it must be an integer"),
        ({"max_num_seqs": " 1"}, {}, "", "--max-num-seqs is ' 1'; it must be an integer"),
        ({"max_num_seqs": "1.0"}, {}, "", "--max-num-seqs is '1.0'; it must be an integer"),
        (
            {"max_num_seqs": "0"},
            {},
            "",
            "max_num_seqs is 0; it must be an integer of at least 1 (from flag --max-num-seqs)",
        ),
        ({"start_timeout_s": "nan"}, {}, "", "start_timeout_s is nan; it must be a number of seconds above 0"),
        ({"dtype": "fp16"}, {}, "", "dtype is 'fp16'; it must be one of bfloat16, float32 (from flag --dtype)"),
        ({}, {"CHIPBUS_SEED": "x"}, "", "CHIPBUS_SEED is 'x'; it must be an integer"),
        ({}, {"CHIPBUS_SEED": ""}, "", "CHIPBUS_SEED is ''; it must be an integer"),
        (
            {},
            {"CHIPBUS_DTYPE": ""},
            "",
            "dtype is ''; it must be one of bfloat16, float32 (from variable CHIPBUS_DTYPE)",
        ),
        ({}, {"CHIPBUS_MAX_NUM_SEQ": "3"}, "", "CHIPBUS_MAX_NUM_SEQ; did you mean CHIPBUS_MAX_NUM_SEQS?"),
        ({}, {"CHIPBUS_dtype": "float32"}, "", "CHIPBUS_dtype; did you mean CHIPBUS_DTYPE?"),
        ({}, {"CHIPBUS_ZZZZZZZZZZ": "3"}, "", "CHIPBUS_ZZZZZZZZZZ; known: CHIPBUS_MODEL, "),
        ({}, {}, "max_num_seq = 3", "unknown key 'max_num_seq'; did you mean max_num_seqs?"),
        ({}, {}, "[engine]\nseed = 3", "unknown key 'engine'; "),
        ({}, {}, "seed = '3'", "seed in FILE is '3'; it must be an integer"),
        ({}, {}, "seed = true", "seed in FILE is True; it must be an integer"),
        ({}, {"CHIPBUS_CHECK_NUMERICS": "yes"}, "", "CHIPBUS_CHECK_NUMERICS is 'yes'; it must be true or false"),
        ({}, {}, "check_numerics = 1", "check_numerics in FILE is 1; it must be true or false"),
        ({"weights": "int4"}, {}, "", "weights is 'int4'; it must be int8 (from flag --weights)"),
        ({}, {}, "seed = 1.0", "seed in FILE is 1.0; it must be an integer"),
        ({}, {}, "model = 3", "model in FILE is 3; it must be text"),
        ({}, {}, "start_timeout_s = true", "start_timeout_s in FILE is True; it must be a number"),
        ({}, {}, "record = 3", "record in FILE is 3; it must be a path"),
        ({}, {}, "kv_pages = -1", "kv_pages is -1; it must be an integer of at least 1 (from file FILE)"),
        ({}, {}, "seed = ", "FILE is not TOML"),
        ({}, {}, "a\xff", "FILE is not TOML"),
    ],
)
def test_a_wrong_setting_is_refused_with_source_value_and_rule(
    flags: dict[str, str], environ: dict[str, str], toml: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "chipbus.toml"
    file.write_bytes(toml.encode("latin-1"))

    with pytest.raises(ConfigError) as refused:
        resolve_settings(flags, environ, file)

    assert words.replace("FILE", str(file)) in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        resolve_settings({}, {}, tmp_path / "none.toml")


def test_a_variable_may_say_yes_and_no_in_digits() -> None:
    for text, value in (("1", True), ("true", True), ("0", False), ("false", False)):
        assert resolve_settings({}, {"CHIPBUS_CHECK_NUMERICS": text}, None).config.check_numerics is value


def test_an_integer_will_do_for_a_number_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "chipbus.toml"
    file.write_text("start_timeout_s = 3")

    assert resolve_settings({}, {}, file).config.start_timeout_s == 3.0
