"""``bus-run`` as a person calls it: whole processes, null chips, exit codes, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chipbus.kernels.native.shapes import engine_of
from chipbus.tools import console
from chipbus.tools.run_commands import bus_run
from support import eventually, our_processes

BUS_RUN = [sys.executable, "-m", "chipbus.tools.bus_run"]
DEMO = Path(__file__).resolve().parents[2] / "chipbus" / "demo"


pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def bus_run_process(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BUS_RUN, *arguments], capture_output=True, text=True, timeout=60, check=False, input=given)


def here(*arguments: str) -> int:
    return console.run("bus-run", lambda: bus_run, arguments)


def test_generate_prints_one_object_per_prompt() -> None:
    done = bus_run_process(
        "generate", "--chip", "null", "-p", "replica", "-p", "-", "--json", "--max-tokens", "5", "--ignore-eos",
        given="from stdin\n",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    first, second = [json.loads(line) for line in done.stdout.splitlines()]
    for result, prompt in ((first, "replica"), (second, "from stdin")):
        assert list(result) == ["prompt", "text", "token_ids", "finish_reason", "replica", "timing"]
        assert list(result["timing"]) == ["queued_s", "ttft_s", "e2e_s"]
        assert result["prompt"] == prompt
        assert len(result["token_ids"]) == 5
        assert result["finish_reason"] == "length"
        assert result["replica"] == 0
        assert 0 <= result["timing"]["queued_s"] <= result["timing"]["ttft_s"] <= result["timing"]["e2e_s"]
    assert "ready in" in done.stderr


def test_generate_prints_prompt_and_text_and_nothing_else_on_stdout() -> None:
    done = bus_run_process("generate", "--chip", "null", "-p", "chip", "--max-tokens", "3", "--log-level", "debug")
    as_json = bus_run_process("generate", "--chip", "null", "-p", "chip", "--max-tokens", "3", "--json")

    assert done.returncode == 0, done.stderr
    assert done.stdout == "chip" + json.loads(as_json.stdout)["text"] + "\n"


def test_on_a_terminal_text_streams_and_the_bars_are_gone_at_the_end() -> None:
    screen, terminal = pty.openpty()
    command = [*BUS_RUN, "generate", "--chip", "null", "-p", "chip", "--max-tokens", "3", "--log-level", "error"]
    child = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody holds the terminal any more
        while chunk := os.read(screen, 4096):
            shown += chunk
    os.close(screen)

    assert child.wait(30) == 0
    *before, text, done = shown.decode().splitlines()
    assert any("ready in" in line for line in before)
    assert text.rsplit("\x1b[2K")[-1].startswith("chip")
    assert "3 tokens of 1 prompts" in done


@pytest.mark.slow
def test_plain_generate_prints_a_sentence_of_the_glossary() -> None:
    done = bus_run_process("generate")

    assert done.returncode == 0, done.stderr
    glossary = (Path(__file__).resolve().parents[2] / "docs" / "glossary.md").read_text()
    meaning = next(line for line in glossary.splitlines() if line.startswith("- **replica**:"))
    assert done.stdout.strip() == meaning.replace("- **replica**:", "replica:")


@pytest.mark.slow
def test_a_record_made_by_a_flag_is_read_and_replayed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    made = bus_run_process("generate", "--chip", "null", "-dp", "2", "-p", "a", "-p", "b", "--record", str(directory))
    again = bus_run_process("generate", "--chip", "null", "--record", str(directory))

    assert made.returncode == 0, made.stderr
    assert (again.returncode, again.stdout) == (2, "")
    assert f"record directory {directory} already holds a run" in again.stderr
    for arguments, words in (
        (["dispatch", str(directory)], "on 2 chips: every digest is equal"),
        (["show", str(directory), "--request", "req-1"], "req-1 prefill"),
    ):
        replay = subprocess.run(
            [sys.executable, "-m", "chipbus.tools.bus_replay", *arguments],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert replay.returncode == 0, replay.stderr
        assert words in replay.stdout


BROKEN: dict[str, dict[str, str]] = {
    "empty": {},
    "half": {"config.json": '{"architectures": ["Qwen3ForCausalLM"]'},
    "foreign": {"config.json": '{"architectures": ["GPT2LMHeadModel"]}'},
}


@pytest.mark.parametrize("command", ["generate", "check"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere"], "/nowhere is no directory"),
        (["BROKEN/empty"], "has no config.json"),
        (["BROKEN/half"], "config.json"),
        (["BROKEN/foreign"], "architecture GPT2LMHeadModel is not supported"),
        (["-dp", "0"], "data_parallel_size is 0; it must be an integer of at least 1 (from flag --data-parallel-size)"),
        (["-dp", "two"], "--data-parallel-size is 'two'; it must be an integer"),
        (["-tp", "2"], "tensor_parallel_size is 2"),
        (["--layers", "0:1"], "layers"),
        (["--layers", "1:0"], "layers '1:0'"),
        (["--devices", "cpu:0,cpu:0", "-dp", "2"], "device cpu:0 is given twice"),
        (["--devices", "gpu:0"], "'gpu'"),
        (["--devices", "cpu:0,cpu:1"], "needs 1"),
        (["--chip", "npu"], "chip kind 'npu' is unknown"),
        (["--dtype", "float16"], "dtype is 'float16'; it must be one of bfloat16, float32"),
        (["--weights", "int4"], "weights is 'int4'; it must be int8 (from flag --weights)"),
        (["--kv-pages", "999999999"], "GiB is available"),
        (["--kv-pages", "1", "--max-model-len", "2000"], "less than"),
        (["--max-model-len", "99999999"], "the model was made for at most"),
        (["--config", "/nowhere.toml"], "/nowhere.toml cannot be read"),
        (["--page-sizes", "3"], "'--page-size'"),
        (["demo", "other"], "unexpected extra argument"),
    ],
)
def test_wrong_settings_are_refused_by_every_command_that_takes_them(
    command: str, arguments: list[str], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, contents in BROKEN.items():
        (tmp_path / name).mkdir()
        for file, text in contents.items():
            (tmp_path / name / file).write_text(text)
    prompt = ["-p", "hi"] if command == "generate" else []

    code = here(command, *prompt, *(argument.replace("BROKEN", str(tmp_path)) for argument in arguments))

    shown = capfd.readouterr()
    assert (code, shown.out) == (2, ""), shown.err
    assert words in shown.err.splitlines()[0]
    assert shown.err.startswith("bus-run: ")
    assert len(shown.err.splitlines()) <= 2
    assert our_processes() == set()


@pytest.mark.parametrize(("file", "content"), [("tokenizer.json", "{"), ("tokenizer.json", None)])
def test_check_refuses_what_the_tokenizer_would_refuse(
    file: str, content: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    (model / file).unlink()
    if content is not None:
        (model / file).write_text(content)

    assert here("check", str(model)) == 2
    assert f"bus-run: tokenizer file {model / file}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temprature", "1"], "'--temperature'"),
        (["--temperature", "-1"], "SamplingParams.temperature is -1.0; it must be a number in [0, 100]"),
        (["--temperature", "hot"], "--temperature is 'hot'; it must be a number"),
        (["--top-p", "0"], "SamplingParams.top_p is 0"),
        (["--max-tokens", "0"], "SamplingParams.max_tokens is 0"),
        (["--max-tokens", "1.5"], "--max-tokens is '1.5'; it must be an integer"),
        (["--stop", ""], "SamplingParams.stop holds ''"),
        (["--stop-token-ids", "-1"], "SamplingParams.stop_token_ids holds -1"),
        (["--min-tokens", "9", "--max-tokens", "3"], "min_tokens is 9"),
        (["--n", "65"], "SamplingParams.n is 65"),
        (["-p", "-", "-p", "-"], "stdin holds one prompt"),
        ([str(DEMO)], "give at least one with -p TEXT"),
    ],
)
def test_wrong_requests_are_refused_before_anything_starts(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code = here("generate", *arguments)

    shown = capfd.readouterr()
    assert (code, shown.out) == (2, ""), shown.err
    assert words in shown.err.splitlines()[0]
    assert our_processes() == set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", ""], "empty"),
        (["-p", "word " * 3000], "max_model_len 2048"),
        (["-p", "hi", "--max-model-len", "4", "-p", "a longer prompt than four tokens"], "max_model_len 4"),
    ],
)
def test_a_prompt_that_cannot_be_served_ends_with_code_2(arguments: list[str], words: str) -> None:
    done = bus_run_process("generate", "--chip", "null", *arguments)

    assert done.returncode == 2
    assert words in next(line for line in done.stderr.splitlines() if line.startswith("bus-run: "))


def test_check_prints_placement_and_budget(capfd: pytest.CaptureFixture[str]) -> None:
    code = here("check", "-dp", "2", "--kv-pages", "10", "--page-size", "16", "--chip", "null")

    shown = capfd.readouterr().out
    assert code == 0
    lines = [line.split() for line in shown.splitlines()]
    assert next(row for row in lines if "chip.0.0" in row)[:5] == ["replica.0", "chip.0.0", "null:0", "10", "160"]
    assert next(row for row in lines if "chip.1.0" in row)[:5] == ["replica.1", "chip.1.0", "null:1", "10", "160"]
    assert next(row for row in lines if row[:1] == ["all"])[:3] == ["all", "20", "320"]
    assert "160 tokens" in shown
    assert "available" in shown


def test_check_says_which_engine_computes_and_what_int8_weights_take(capfd: pytest.CaptureFixture[str]) -> None:
    said: dict[str, dict[str, str]] = {}
    for weights in ("", "int8"):
        assert here("check", "--kv-pages", "10", *(["--weights", weights] if weights else [])) == 0
        lines = capfd.readouterr().out.splitlines()
        said[weights] = {key: rest for key, _, rest in (line.partition(" ") for line in lines)}
        assert said[weights]["engine"].strip() == engine_of(weights=weights)
    assert "bfloat16, int8 weights," in said["int8"]["computed"]
    assert "7.0 MiB" in said[""]["all"]
    assert "4.0 MiB" in said["int8"]["all"]

    assert here("check", "--kv-pages", "10", "--chip", "null", "--weights", "int8") == 0
    assert "engine     null\n" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.guarantee("K48")
def test_check_numerics_says_what_it_probed_and_how_far_int8_weights_move_the_logits(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert here("check", "--kv-pages", "10", "--threads", "1", "--numerics", "--weights", "int8") == 0
    told = capfd.readouterr().out
    assert f"{engine_of().partition(':')[0]}: bfloat16 with int8 weights, 1 threads: " in told
    found = re.search(
        r"int8 against bfloat16 weights, logits at 128 positions of random texts: relative RMS error ([\d.]+)%, largest"
        r" difference ([\d.]+), KL divergence ([\d.e-]+) nats, same likeliest token at ([\d.]+)%",
        told,
    )
    assert found is not None
    error, largest, divergence, agreement = map(float, found.groups())
    assert 0.1 < error < 5
    assert 0 < largest < 5
    assert 0 < divergence < 0.02
    assert 90 < agreement <= 100


def test_print_config_shows_each_value_with_its_source(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "c.toml"
    file.write_text("max_num_seqs = 3\npage_size = 16\n")
    monkeypatch.setenv("CHIPBUS_PAGE_SIZE", "32")

    for command in (["check"], ["generate"], ["bench", "engine"]):
        assert here(*command, "--print-config", "--config", str(file), "-dp", "2", "--block-size", "64") == 0
        shown = capfd.readouterr().out
        rows = {
            line.split(" = ")[0]: line.split(" = ")[1].split("  # ") for line in shown.splitlines() if " = " in line
        }
        assert [cell.strip() for cell in rows["page_size"]] == ["64", "flag --page-size"]
        assert [cell.strip() for cell in rows["data_parallel_size"]] == ["2", "flag --data-parallel-size"]
        assert [cell.strip() for cell in rows["max_num_seqs"]] == ["3", f"file {file}"]
        assert [cell.strip() for cell in rows["dtype"]] == ['"bfloat16"', "default"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_an_interrupt_at_any_moment_ends_everything_with_130(seed: int) -> None:
    """From before the first import to the middle of generating; the moment is drawn from the seed."""
    draw = random.Random(seed)
    command = [*BUS_RUN, "generate", "--chip", "null", "-p", "a", "--max-tokens", "1900", "--ignore-eos"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waiting_until_s = time.monotonic() + 0.12 + draw.random() * 0.8
    eventually(lambda: time.monotonic() >= waiting_until_s or child.poll() is not None, "its moment has come")

    child.send_signal(draw.choice([signal.SIGINT, signal.SIGTERM]))
    _, shown = child.communicate(timeout=30)

    # CPython kills itself with the signal, handled or not, if it came while a string was being executed, as namedtuple
    # does at import: -2 here, and 130 in a shell all the same.
    assert child.returncode in (130, 0, -signal.SIGINT), shown
    # If it came inside a callback of the interpreter's own import system, CPython prints that and drops the interrupt.
    assert "Traceback" not in shown.partition("Exception ignored in: <function _get_module_lock")[0]
