"""The host's end of the bus, in a whole engine on a virtual clock."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_engine import VOCAB, LocalEngine
from serving_actors import pass_time

from chipbus.actors.boot import TOKENIZER
from chipbus.actors.host import HostActor
from chipbus.actors.messages.serving import Detokenize, Detokenized, Encoded, Generate, Tokenize
from chipbus.actors.messages.tree import TreeChanged
from chipbus.actors.request import RequestState
from chipbus.actors.sampling import SamplingParams
from chipbus.bus import handles, pack_tokens
from chipbus.errors import DeadlineExceeded, EngineClosed, RequestInvalid, WorkerDied

KILLED = "signal 9 (SIGKILL)"


@pytest.mark.guarantee("E50")
@given(st.integers(0, 2**32), st.integers(0, 40))
@settings(max_examples=25, deadline=None, print_blob=True)
def test_a_question_about_text_is_answered_by_the_next_life_of_the_tokenizer(seed: int, events: int) -> None:
    engine = LocalEngine(seed)
    answers: list[Any] = []
    engine.host.ask_about_text(Tokenize(prompt="replica"), 60.0, answers.append)
    passed = iter(range(events))
    engine.system.run_until(lambda: next(passed, None) is None or answers != [])
    if engine.is_alive(TOKENIZER):
        engine.system.kill(TOKENIZER, KILLED)
    engine.system.run_until(lambda: answers != [])
    [encoded] = answers
    assert isinstance(encoded, Encoded)
    engine.host.ask_about_text(Detokenize(token_ids=encoded.prompt_token_ids), 60.0, answers.append)
    engine.system.run_until(lambda: len(answers) == 2)
    assert answers[1] == Detokenized(text="replica")
    engine.close()


def test_a_question_about_text_ends_with_the_engine_and_at_its_deadline() -> None:
    engine = LocalEngine(0)
    engine.system.freeze(TOKENIZER, 1e6)
    answers: list[Any] = []
    engine.host.ask_about_text(Detokenize(token_ids=pack_tokens([1])), 0.5, answers.append)
    engine.system.run_until(lambda: answers != [])
    engine.host.ask_about_text(Detokenize(token_ids=pack_tokens([1])), 60.0, answers.append)
    engine.host.fail_all(EngineClosed("closed"))
    engine.host.ask_about_text(Tokenize(prompt="late"), 60.0, answers.append)
    assert [type(answer) for answer in answers] == [DeadlineExceeded, EngineClosed, EngineClosed]


def test_a_question_that_only_costs_tokenizers_is_refused() -> None:
    engine = LocalEngine(0, max_request_restarts=2)
    answers: list[Any] = []
    engine.host.ask_about_text(Tokenize(prompt="replica"), 1e5, answers.append)
    for _ in range(3):
        engine.system.run_until(lambda: TOKENIZER in engine.host.ctx.peers())
        engine.system.freeze(TOKENIZER, 1e6)
        pass_time(engine.system, 0.1)
        assert answers == []
        engine.system.kill(TOKENIZER, KILLED)
        engine.system.run_until(lambda: TOKENIZER not in engine.host.ctx.peers())
    [refusal] = answers
    assert type(refusal) is WorkerDied
    assert "max_request_restarts" in str(refusal)
    engine.close()


def test_a_prompt_fails_whole() -> None:
    engine = LocalEngine(0)
    state = RequestState("p", 2, wants_logprobs=False, on_change=lambda: None)
    params = SamplingParams(seed=0, max_tokens=50, ignore_eos=True)
    for index, token_id in enumerate((20, VOCAB)):
        message = Generate(request_id=f"p.{index}", prompt_token_ids=pack_tokens([token_id]), params=params)
        engine.host.submit(message, index, state, 60.0)
    engine.system.run_until(lambda: state.is_over)
    with pytest.raises(RequestInvalid, match="1024"):
        state.whole()
    came = len(state.token_ids(0))
    engine.system.run_until(engine.is_idle)
    assert len(state.token_ids(0)) == came < 40, "the other one was cancelled"
    engine.close()


class Watching(HostActor):
    """Keeps every picture of the tree."""

    pictures: ClassVar[list[dict[str, str]]] = []

    @handles(TreeChanged)
    def _tree_changed(self, message: TreeChanged, _: object) -> None:
        self.pictures.append({record.name: record.state for record in message.children})
        super()._tree_changed(message, _)


@pytest.mark.guarantee("E51")
def test_replicas_and_their_chips_start_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("local_engine.HostActor", Watching)
    monkeypatch.setattr(Watching, "pictures", [])
    LocalEngine(0, replicas=3).close()
    groups = [f"{kind}.{n}{rank}" for n in range(3) for kind, rank in (("replica", ""), ("chip", ".0"))]
    first_ready = next(n for n, tree in enumerate(Watching.pictures) if any(tree[name] == "ready" for name in groups))
    assert any(all(tree[name] == "starting" for name in groups) for tree in Watching.pictures[:first_ready])
