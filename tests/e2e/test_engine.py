"""An engine from the outside, on null chips: outputs, streams, aborts, errors, tree, close."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from chipbus import AsyncEngine, Engine, SamplingParams, errors
from chipbus.kernels.null import null_token
from support import eventually

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("demo", chip="null") as engine:
        yield engine


def expected_tokens(prompt: tuple[int, ...], count: int, vocab: int) -> tuple[int, ...]:
    """What null chips answer, by their documented formula."""
    tokens = [*prompt]
    for position in range(len(prompt) - 1, len(prompt) - 1 + count):
        tokens.append(null_token(tokens[-1], position, vocab))
    return tuple(tokens[len(prompt) :])


def vocabulary(engine: Engine) -> int:
    from chipbus.actors.config import EngineConfig
    from chipbus.actors.plan import plan_engine

    return plan_engine(EngineConfig()).spec.vocab_size


def test_outputs_come_in_the_order_of_the_prompts(engine: Engine) -> None:
    prompts = [[7, 8, 9], [10], [11, 12]]

    outputs = engine.generate(prompts, GREEDY)

    assert [output.prompt_token_ids for output in outputs] == [(7, 8, 9), (10,), (11, 12)]
    vocab = vocabulary(engine)
    for output in outputs:
        assert output.outputs[0].token_ids == expected_tokens(output.prompt_token_ids, 12, vocab)
        assert output.finished
        assert output.outputs[0].finish_reason == "length"


def test_many_requests_share_the_replica_and_all_pages_come_back(engine: Engine) -> None:
    outputs = engine.generate([[5 + i, 6 + i] for i in range(60)], GREEDY)

    vocab = vocabulary(engine)
    for output in outputs:
        assert output.outputs[0].token_ids == expected_tokens(output.prompt_token_ids, 12, vocab)
    statistics = engine.statistics()
    assert statistics.pages_free == statistics.pages_total > 0
    assert (statistics.running, statistics.waiting) == (0, 0)


def test_stream_gives_the_same_tokens_as_generate(engine: Engine) -> None:
    whole = engine.generate([21, 22], GREEDY)[0].outputs[0]

    deltas = list(engine.stream([21, 22], GREEDY))

    assert tuple(token for delta in deltas for c in delta.outputs for token in c.token_ids) == whole.token_ids
    assert "".join(c.text for delta in deltas for c in delta.outputs) == whole.text
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]


@pytest.mark.guarantee("E6")
def test_leaving_a_stream_aborts_it_and_frees_its_pages(engine: Engine) -> None:
    for delta in engine.stream([31, 32], SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)):
        assert not delta.finished
        break

    eventually(
        lambda: (s := engine.statistics()).pages_free == s.pages_total and s.running == 0, "the abort freed the pages"
    )


@pytest.mark.guarantee("E56")
def test_a_stream_that_is_dropped_before_it_was_read_is_aborted(engine: Engine) -> None:
    before = engine.report().failed.get("Aborted", 0)
    unread = engine.stream([31, 32], SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True))
    del unread

    eventually(lambda: engine.report().failed.get("Aborted", 0) == before + 1, "it was aborted")


@pytest.mark.guarantee("E55")
def test_a_request_is_aborted_by_its_id_all_its_completions_and_twice_is_once(engine: Engine) -> None:
    endless = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True, n=2)
    deltas = engine.stream([31, 32], endless)
    first = next(deltas)
    engine.abort(first.request_id)
    engine.abort(first.request_id)
    engine.abort("no such request")

    with pytest.raises(errors.Aborted, match=first.request_id):
        for _ in deltas:
            pass
    eventually(
        lambda: (s := engine.statistics()).pages_free == s.pages_total and s.running == 0, "the abort freed the pages"
    )
    assert engine.generate([3], GREEDY)[0].finished


def test_text_and_ids_of_the_same_prompt_give_the_same_tokens(engine: Engine) -> None:
    by_text = engine.generate("replica", GREEDY)[0]

    by_ids = engine.generate(list(by_text.prompt_token_ids), GREEDY)[0]

    assert by_ids.outputs[0].token_ids == by_text.outputs[0].token_ids
    assert by_ids.prompt == "replica"


def test_an_engine_tells_the_ids_of_text_and_the_text_of_ids(engine: Engine) -> None:
    whole = engine.generate("replica core", GREEDY)[0]
    turns = [{"role": "user", "content": "hi"}]

    assert engine.tokenize("replica core") == list(whole.prompt_token_ids)
    assert engine.tokenize(turns) == list(engine.chat(turns, GREEDY)[0].prompt_token_ids)
    assert engine.detokenize(whole.prompt_token_ids) == "replica core"
    with pytest.raises(errors.RequestInvalid, match="the content of message 0 is not valid Unicode at character 0"):
        engine.chat([{"role": "user", "content": "\udfff"}])
    with pytest.raises(errors.RequestInvalid, match="not valid Unicode at character 0"):
        engine.tokenize("\udfff")
    for wrong in (["a"], [True], [2**31], [-1]):
        with pytest.raises(errors.RequestInvalid):
            engine.detokenize(wrong)  # type: ignore[arg-type]


def test_n_completions_use_one_seed_each(engine: Engine) -> None:
    output = engine.generate("chip", SamplingParams(max_tokens=3, n=3, seed=5))[0]

    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert all(len(c.token_ids) == 3 or c.finish_reason == "stop" for c in output.outputs)


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ("", errors.RequestInvalid, "empty"),
        ([], errors.RequestInvalid, "empty"),
        ([10**9], errors.RequestInvalid, "1000000000"),
        ([-1], errors.RequestInvalid, "-1"),
        ([1] * 5000, errors.ContextTooLong, "5000"),
        (5, errors.RequestInvalid, "int"),
        ([["a"]], errors.RequestInvalid, "list"),
        ("a\ud800", errors.RequestInvalid, "the prompt is not valid Unicode at character 1"),
        ("a " * 10_000_000, errors.ContextTooLong, "of the prompt's 20000000 characters"),
        ([1] * 1_000_000, errors.ContextTooLong, "1000000"),
    ],
)
def test_a_bad_prompt_is_one_typed_sentence_and_harms_nobody(
    engine: Engine, prompt: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        engine.generate(prompt, GREEDY)  # type: ignore[arg-type]

    assert engine.generate([3], GREEDY)[0].finished


def test_an_unknown_sampling_field_names_the_nearest(engine: Engine) -> None:
    from chipbus.actors.sampling import sampling_from_mapping

    with pytest.raises(errors.RequestInvalid, match="did you mean 'temperature'"):
        sampling_from_mapping({"temprature": 1})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1}, r"temperature is -1.*\[0, 100\]"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, r"top_p is 0.*\(0, 1\]"),
        ({"top_k": 1.5}, "top_k is 1.5.*integer"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"n": 65}, "n is 65"),
        ({"stop": [""]}, "stop holds ''"),
        ({"stop": "\ud800"}, "stop is not valid Unicode at character 0"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output is 1.*True or False"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens is 9.*max_tokens, 3"),
    ],
)
def test_out_of_range_sampling_is_refused_when_made(fields: dict[str, object], words: str) -> None:
    with pytest.raises(errors.RequestInvalid, match=words):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_tree_lists_every_process_once(engine: Engine) -> None:
    tree = engine.tree()

    names = [record.name for record in tree]
    assert sorted(names) == sorted({"supervisor", "tokenizer.0", "router", "replica.0", "chip.0.0"})
    assert {record.kind for record in tree} == {"supervisor", "tokenizer", "router", "replica", "chip"}
    assert all(record.state == "ready" and record.incarnation == 1 and record.restarts == 0 for record in tree)
    assert len({record.pid for record in tree}) == len(tree)
    for record in tree:
        os.kill(record.pid, 0)


def test_only_chips_that_compute_map_torch(engine: Engine) -> None:
    for record in engine.tree():
        assert "libtorch" not in Path(f"/proc/{record.pid}/maps").read_text(), record.name


def test_two_replicas_share_the_work() -> None:
    with Engine("demo", chip="null", data_parallel_size=2) as engine:
        outputs = engine.generate([[5 + i] for i in range(16)], GREEDY)

        assert {output.replica for output in outputs} == {0, 1}
        assert engine.statistics().replicas == 2


@pytest.mark.guarantee("E8")
def test_close_reports_every_child_and_is_idempotent() -> None:
    engine = Engine("demo", chip="null")

    report = engine.close()

    assert {end.name for end in report.children} >= {"tokenizer.0", "router", "replica.0", "chip.0.0"}
    assert all(end.how == "stopped" for end in report.children), report
    assert report.left == ()
    assert engine.close() is report
    with pytest.raises(errors.EngineClosed, match="closed"):
        engine.generate([1], GREEDY)


def test_close_while_requests_run_fails_them_with_a_typed_error() -> None:
    engine = Engine("demo", chip="null")
    outcome: list[object] = []
    started = threading.Event()

    def read() -> None:
        try:
            for _ in engine.stream([1, 2], SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)):
                started.set()
            outcome.append("finished")
        except errors.ChipbusError as error:
            outcome.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(10)
    engine.close()
    reader.join(10)

    assert isinstance(outcome[0], errors.EngineClosed) or outcome == ["finished"]


def test_engines_live_side_by_side() -> None:
    with Engine("demo", chip="null") as one, Engine("demo", chip="null") as two:
        assert one.generate([9], GREEDY)[0].outputs[0].token_ids == two.generate([9], GREEDY)[0].outputs[0].token_ids


@pytest.mark.guarantee("E9")
def test_a_forked_copy_is_told_so(engine: Engine) -> None:
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:  # the copy must neither use nor close its parent's engine
        try:
            engine.generate([1], GREEDY)
            word = b"used"
        except errors.EngineClosed:
            word = b"told"
        os.write(write_fd, word)
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        word = pipe.read()
    os.waitpid(pid, 0)

    assert word == b"told"
    assert engine.generate([1], GREEDY)[0].finished


def test_async_engine_gives_the_same_items(engine: Engine) -> None:
    whole = engine.generate([41, 42], GREEDY)[0].outputs[0]

    async def main() -> None:
        async with AsyncEngine("demo", chip="null") as other:
            deltas = [delta async for delta in other.stream([41, 42], GREEDY)]
            assert tuple(t for d in deltas for c in d.outputs for t in c.token_ids) == whole.token_ids
            assert await other.detokenize(await other.tokenize("replica")) == "replica"
            with pytest.raises(errors.RequestInvalid, match="message 0"):
                await other.tokenize([{"role": "user"}])
            both = await other.generate([[41, 42], [43]], GREEDY)
            assert both[0].outputs[0].token_ids == whole.token_ids
            async for _ in other.stream([44], SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)):
                break
            assert other.tree()[0].pid > 0
            assert (await other.close()).left == ()

    asyncio.run(main())


def test_an_engine_that_is_forgotten_takes_its_processes_along() -> None:
    Engine("demo", chip="null").generate([1], GREEDY)
    # no close(): the fixture checks that collection did it
