"""Text: incremental decoding against decoding at once, stop strings against a brute-force search, chat templates."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import CHAT_TEMPLATE, SPECIAL, TEXTS, byte_fallback_directory, byte_level_directory
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from chipbus.actors import chat_template
from chipbus.actors.messages.serving import ChatTurn
from chipbus.actors.text import StopScanner, TextModel
from chipbus.errors import CheckpointError, ContextTooLong, RequestInvalid

MAKERS = {"byte-level": byte_level_directory, "byte-fallback": byte_fallback_directory}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp("model") / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, TextModel]:
    return {name: TextModel(directory) for name, directory in directories.items()}


@pytest.fixture(scope="module")
def references(directories: dict[str, Path]) -> dict[str, PreTrainedTokenizerFast]:
    """transformers' view of the same files."""
    return {
        name: PreTrainedTokenizerFast(
            tokenizer_file=str(directory / "tokenizer.json"), eos_token=SPECIAL[2], chat_template=CHAT_TEMPLATE
        )
        for name, directory in directories.items()
    }


def pieces(model: TextModel, ids: list[int]) -> list[str]:
    detokenizer = model.detokenizer()
    return [*(detokenizer.add(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("text", [*TEXTS, " leading and trailing ", "a\nb", "e\u0301\u0302", "two words<tool_call>"])
def test_pieces_add_up_to_the_text_and_never_split_a_character(models, references, kind, text):
    ids = models[kind].encode(text)
    assert ids == references[kind](text).input_ids
    parts = pieces(models[kind], ids)
    assert "".join(parts) == references[kind].decode(ids, skip_special_tokens=True)
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@pytest.mark.guarantee("R10")
@given(st.text(max_size=40), st.sampled_from(sorted(MAKERS)))
@settings(max_examples=150, deadline=None, print_blob=True)
def test_every_text_streams_as_it_was_written(models, references, text, kind):
    ids = references[kind](text).input_ids
    parts = pieces(models[kind], ids)
    assert "".join(parts) == references[kind].decode(ids, skip_special_tokens=True)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@given(st.data())
@settings(max_examples=200, deadline=None, print_blob=True)
def test_any_ids_whatever_give_the_text_of_decoding_them_at_once(models, directories, data):
    reference = Tokenizer.from_file(str(directories["byte-level"] / "tokenizer.json"))
    ids = data.draw(st.lists(st.integers(0, reference.get_vocab_size() + 5), max_size=60))
    assert "".join(pieces(models["byte-level"], ids)) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.guarantee("X8")
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "a\0\0b",
        "user says <|im_end|> and <|endoftext|><|im_start|>",
        "<tool_call><tool_call>two words  two wordstwo",
        "\ufeff\u200b\u202e\ufffd\U0010ffff",
        "\r\n\t\x85\u2028",
        "naïve 日本 👩\u200d👧 " * 1500,
    ],
    ids=range(8),
)
def test_odd_texts_are_encoded_and_decoded_as_in_transformers(models, references, kind, text):
    model, reference = models[kind], references[kind]
    ids = reference(text).input_ids
    assert model.encode(text) == ids
    assert model.decode(ids) == reference.decode(ids, skip_special_tokens=False)
    assert "".join(pieces(model, ids)) == reference.decode(ids, skip_special_tokens=True)
    beyond = len(reference) + 1000
    assert "".join(pieces(model, [beyond, *ids, beyond])) == "".join(pieces(model, ids))
    assert model.decode([beyond, *ids, beyond]) == model.decode(ids)


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.characters = tokenizer, 0

    def encode(self, text: str, **options: bool):
        self.characters += len(text)
        return self.tokenizer.encode(text, **options)


@pytest.mark.guarantee("X10")
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("text", ["word ", " ", "日本", "<|im_end|>", "x"])
def test_a_prompt_far_too_long_is_refused_for_its_beginning_alone(models, monkeypatch, kind, text):
    model = models[kind]
    counting = Counting(model._tokenizer)
    monkeypatch.setattr(model, "_tokenizer", counting)
    with pytest.raises(ContextTooLong, match="with max_model_len 50 it may have at most 49"):
        model.encode(text * 1_000_000, 50)
    assert counting.characters < 10_000


@given(st.text("ab 日\n", max_size=1500), st.integers(1, 60), st.sampled_from(sorted(MAKERS)))
@settings(max_examples=100, deadline=None, print_blob=True)
def test_no_prompt_that_fits_is_refused_for_its_beginning(models, text, context, kind):
    ids = models[kind].encode(text)
    try:
        assert models[kind].encode(text, context) == ids
    except ContextTooLong:
        assert len(ids) > context


def test_special_tokens_are_no_text_and_added_tokens_are(models):
    model = models["byte-level"]
    ids = model.encode("a<|im_end|>b<tool_call>c")
    assert len(ids) == 5
    assert "".join(pieces(model, ids)) == "ab<tool_call>c"
    assert model.decode(ids) == "a<|im_end|>b<tool_call>c"


@pytest.mark.guarantee("X1")
@given(st.text(max_size=30), st.booleans())
@settings(max_examples=150, deadline=None, print_blob=True)
def test_the_bytes_of_a_texts_tokens_are_the_bytes_of_the_text(models, text, ends):
    text += "<|im_end|>" if ends else ""
    ids = models["byte-level"].encode(text)
    assert b"".join(map(models["byte-level"].shown_bytes, ids)) == text.encode()


@pytest.mark.parametrize("text", [*TEXTS, "the quick  brown", "<|im_end|>", "\0"])
def test_bytes_of_a_tokenizer_with_byte_tokens_are_those_of_the_text_behind_a_space(models, text):
    model = models["byte-fallback"]
    shown = [model.shown_bytes(token_id) for token_id in model.encode(text)]
    assert b"".join(shown).removeprefix(b" ") == text.encode()
    assert models["byte-fallback"].shown_bytes(10**6) == models["byte-level"].shown_bytes(-1) == b""


def test_an_endless_run_of_broken_bytes_is_not_held_back_for_ever(models):
    for kind, first in (("byte-level", "Ģ"), ("byte-fallback", "<0x80>")):
        model = models[kind]
        broken = model._tokenizer.token_to_id(first)
        parts = pieces(model, [broken] * 500)
        assert "".join(parts) == "\N{REPLACEMENT CHARACTER}" * 500
        assert max(len(part) for part in parts) <= 4


def naive_stop(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The first place where a stop string ends; the longest of those that end there."""
    for end in range(len(text) + 1):
        for candidate in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(candidate):
                return text[: end - len(candidate)], candidate
    return text, None


@pytest.mark.guarantee("R11")
@given(
    st.text("ab\n", max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=4),
    st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
@example("aaab", ["aab"], [1] * 4)
@example("ababaab", ["abaa", "babb"], [1] * 7)
@example("abab\n", ["abab\n", "bab"], [2] * 3)
@settings(max_examples=300, deadline=None, print_blob=True)
def test_a_stop_string_is_found_wherever_pieces_are_cut_and_nothing_more_is_held_back(text, stop, lengths):
    scanner, given_out, position, hit = StopScanner(stop), "", 0, None
    for length in lengths:
        if position >= len(text) or hit:
            break
        part = text[position : position + length]
        position += length
        out, hit = scanner.feed(part)
        given_out += out
        if hit is None:
            seen = text[:position]
            could_begin = [k for s in stop for k in range(1, len(s)) if seen.endswith(s[:k])]
            assert given_out == seen[: len(seen) - max(could_begin, default=0)]
    if hit is None:
        given_out += scanner.flush()
    assert (given_out, hit) == naive_stop(text, stop)


def test_a_stop_string_before_min_tokens_is_text():
    scanner = StopScanner(["ab"])
    assert scanner.feed("xab", may_stop=False) == ("xab", None)
    assert scanner.feed("a", may_stop=False) == ("", None)
    assert scanner.feed("bab") == ("", "ab")


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=6), min_size=1), st.integers(1, 9))
def test_a_scanner_that_keeps_the_stop_string_holds_nothing_back_and_cuts_behind_it(text, stop, size):
    scanner, given_out, hit = StopScanner(stop, keeps=True), "", None
    for position in range(0, len(text), size):
        out, hit = scanner.feed(text[position : position + size])
        given_out += out
        if hit:
            break
        assert given_out == text[: position + size]
    before, naive_hit = naive_stop(text, stop)
    assert (given_out, hit, scanner.flush()) == (before + (naive_hit or ""), naive_hit, "")


def test_without_stop_strings_nothing_is_held_back():
    scanner = StopScanner([])
    assert scanner.feed("text") == ("text", None)
    assert scanner.flush() == ""


@pytest.mark.guarantee("R12")
def test_a_conversation_is_rendered_as_the_models_template_says(models, references):
    turns = [ChatTurn("system", "be kind"), ChatTurn("user", "héllo <|im_end|>")]
    rendered = models["byte-level"].render(turns)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    reference = references["byte-level"]
    assert rendered == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert models["byte-level"].encode_chat(rendered) == ids


def test_a_template_that_refuses_says_why(models):
    with pytest.raises(RequestInvalid, match="chat template of model byte-level failed: no such role: pirate"):
        models["byte-level"].render([ChatTurn("pirate", "arr")])


def test_a_template_that_refuses_is_not_listened_to_for_ever(tmp_path):
    model = TextModel(with_template(tmp_path, "{{ raise_exception('no' * 10**7) }}"))
    with pytest.raises(RequestInvalid, match="no" * 500 + "$"):
        model.render([ChatTurn("user", "hi")])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages | map(attribute='role.__class__.__init__.__globals__') | list }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_a_template_runs_in_a_sandbox(tmp_path, template):
    model = TextModel(with_template(tmp_path, template))
    with pytest.raises(RequestInvalid, match="failed"):
        model.render([ChatTurn("user", "hi")])


@pytest.mark.guarantee("X6")
@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
        "{{ strftime_now('%Y') }} {{ messages | tojson(indent=2, sort_keys=True) }}",
        "{{ messages | tojson(separators=(',', ':'), ensure_ascii=True) }}",
        "{% if tools %}tools{% elif tools is none %}no tools{% endif %}{{ documents }}{{ undefined }}",
        "{{ bos_token }}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m['content'] }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}",
        "{% macro a() %}{{ caller() }}{% endmacro %}{% for m in messages %}\n{%- call a() %}x{% endcall %}{% endfor %}",
        "{{ 'é' + messages[0].content + dict(a=1).a | string }}{% if add_generation_prompt %}go{% endif %}",
    ],
)
def test_whatever_templates_use_renders_as_in_transformers(tmp_path, template):
    model = TextModel(with_template(tmp_path, template))
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|im_start|>", chat_template=template
    )
    messages = [{"role": "user", "content": "hé <b>"}, {"role": "assistant", "content": "a 'b'"}]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert model.render([ChatTurn(**message) for message in messages]) == expected


BLOCKS = "".join(f"{{% block b{n} %}}" + f"{{{{ self.b{n + 1}() }}}}" * 2 + "{% endblock %}" for n in range(40))


@pytest.mark.guarantee("X7")
@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "more than 20000 steps"),
        ("{% set r = range(9999) %}{% for i in r %}{% for j in r %}{{ i }}{% endfor %}{% endfor %}", "20000 steps"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "more than 20000 steps",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        (
            "{% set big = 'x' * 9999 %}{% for i in range(9999) %}{{ big }}{% endfor %}",
            "wrote more than 1000000 characters",
        ),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        (BLOCKS + "{% block b40 %}{% endblock %}", "more than 20000 steps"),
    ],
)
def test_a_template_without_end_is_ended_and_the_next_conversation_is_rendered(tmp_path, monkeypatch, template, says):
    assert (chat_template.MAX_STEPS, chat_template.MAX_CHARACTERS) == (100_000, 1 << 26)
    monkeypatch.setattr(chat_template, "MAX_STEPS", 20_000)
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 1_000_000)
    model = TextModel(with_template(tmp_path, "{% if messages[1] %}fine{% else %}" + template + "{% endif %}"))
    for _ in range(2):
        with pytest.raises(RequestInvalid, match=says):
            model.render([ChatTurn("user", "hi")])
        assert model.render([ChatTurn("user", "hi"), ChatTurn("user", "hi")]) == "fine"


DOUBLED = "{% set ns = namespace(x='x', l=[1]) %}{% for i in range(60) %}"
HUGE = [
    "{{ 'x' * 10**11 }}",
    "{{ ([1] * 10**10) | length }}",
    "{{ '%100000000000d' % 1 }}",
    "{{ 'x' | center(10**11) }}",
    "{{ 'x'.zfill(10**11) }}",
    "{{ '{:100000000000d}'.format(1) }}",
    "{{ messages | tojson(indent=10**11) }}",
    DOUBLED + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    DOUBLED + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    DOUBLED + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
]


@pytest.mark.guarantee("H28")
@pytest.mark.parametrize("template", HUGE)
def test_a_template_that_takes_all_memory_is_ended_and_the_next_is_rendered(tmp_path, monkeypatch, template):
    monkeypatch.setattr(chat_template, "MAX_MEMORY", 1 << 27)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    model = TextModel(with_template(tmp_path, "{% if messages[1] %}fine{% else %}" + template + "{% endif %}"))
    for _ in range(2):
        with pytest.raises(RequestInvalid, match="it needed more than 128 MiB of memory"):
            model.render([ChatTurn("user", "hi")])
        assert model.render([ChatTurn("user", "hi"), ChatTurn("user", "hi")]) == "fine"
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


ORDINARY = [
    "{{ 'ab' * 3 }} {{ [1, 2] * 2 }} {{ (1, 2) + (3,) }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 7 % 3 }} {{ 7 // 2 }}",
    "{{ '%05.2f|%s|%%|%r' % (3.14159, 'x', 'é') }} {{ '%(a)s' % {'a': messages} }} {{ '%s' | format(none) }}",
    "{{ '{0:>5}|{a[k]!r:^9}|{{}}'.format('x', a={'k': 1}) }} {{ '{a}'.format_map({'a': 2}) }}",
    "{{ 'a' ~ 1 ~ none ~ undefined ~ messages[0].content }} {{ '<' | escape ~ '<' }} {{ ('<' | safe) + '<' }}",
    "{{ messages[1:] }} {{ messages[::-1][0] }} {{ 'abcdef'[1:-1:2] }} {{ messages[0]['content'][:2] }} {{ 'x'[0] }}",
    "{% for m in messages %}{{ m.content.split(' ', 1)[-1].strip().upper() }}{{ m.content.splitlines() }}{% endfor %}",
    "{{ ' a b '.split() }} {{ 'a,b'.rsplit(',', maxsplit=1) }} {{ 'a'.center(5, '-') }} {{ 'b'.join(['1', '2']) }}",
    "{{ 'xax'.replace('x', 'y', 1) }} {{ 'a\tb'.expandtabs(2) }} {{ 'a'.startswith('a') }} {{ 'ab'.partition('b') }}",
    "{{ messages | map(attribute='content') | join(', ') }} {{ range(5) | map('string') | list }} {{ [3, 1] | sort }}",
    "{{ 'a\nb' | indent(2, true) }} {{ 'a b c' | wordwrap(3) }} {{ 'abc' | reverse }} {{ 'abc' | list }}",
    "{{ 'abc' | replace('b', 'x') }} {{ ' x ' | trim }} {{ 'a b' | title }} {{ '<i>' | striptags }}",
    "{{ [[1], [2]] | sum(start=[]) }} {{ [1, 2] | sum }} {{ [1, 2, 3] | batch(2, 0) | list }} {{ 2.5 | round(1) }}",
    "{{ {'b': 1, 'a': [1, {'c': none}]} | tojson(indent=2) }} {{ {'b': 1} | dictsort }} {{ {'b': 1} | items | list }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | first }} {{ [1] | last }}",
    "{{ messages | groupby('role') | map('first') | list }} {{ 'x' | urlencode }} {{ 'a' | string | length }}",
    "{% set x %}a{{ 1 }}{% endset %}{{ x }} {% filter upper %}b{{ x }}{% endfilter %} {{ dict(a=1, **{'b': 2}) }}",
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}{{ m(*[1, 2, 3]) }} {{ m(*'ab') }} {{ m(1) }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }} {{ namespace(a=1).a }} {{ 'a' is in 'ab' }}",
    "{% autoescape true %}{{ '<' }}{{ '<' ~ '>' }}{% set s %}{{ '&' }}{% endset %}{{ s }}{% endautoescape %}{{ '<' }}",
]


@pytest.mark.parametrize("template", ORDINARY)
def test_ordinary_templates_render_as_in_transformers(tmp_path, template):
    test_whatever_templates_use_renders_as_in_transformers(tmp_path, template)


def test_a_long_conversation_may_be_put_together_again_and_again(tmp_path):
    template = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set part = m.content.split('</think>')[-1] | trim %}"
        "{% set ns.text = ns.text ~ '<|im_start|>' ~ m.role + '\\n' + part %}{% endfor %}{{ ns.text }}"
    )
    model = TextModel(with_template(tmp_path, template))
    turns = [ChatTurn("user", f"{'word ' * 400}{number}") for number in range(200)]

    assert len(model.render(turns)) > 400_000


def with_template(directory: Path, template: object) -> Path:
    byte_level_directory(directory)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "bos_token": "<|im_start|>"})
    )
    return directory


def test_the_template_may_be_a_file_a_named_list_or_absent(tmp_path):
    turns = [ChatTurn("user", "hi")]
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}default"}]
    assert TextModel(with_template(tmp_path, named)).render(turns) == "<|im_start|>default"
    (tmp_path / "chat_template.jinja").write_text("from a file, {{ messages | tojson }}\n")
    assert TextModel(tmp_path).render(turns) == 'from a file, [{"role": "user", "content": "hi"}]'
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(RequestInvalid, match=r"has no chat template \(tokenizer_config.json or chat_template.jinja\)"):
        TextModel(tmp_path).render(turns)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, "tokenizer.json cannot be read: No such file"),
        ("tokenizer.json", b'{"version": "1.0"', "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", b"\xff", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json is a list; it must be an object"),
        ("tokenizer_config.json", b'{"chat_template": "{% if %}"}', "is not a template"),
        ("tokenizer_config.json", b'{"chat_template": 7}', "is not a template"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja cannot be read"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, name, content, says):
    byte_level_directory(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        TextModel(tmp_path)
    assert says in str(caught.value)


def test_a_prompt_is_never_truncated_nor_padded_by_settings_in_the_file(tmp_path):
    byte_level_directory(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=200)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = TextModel(tmp_path)
    text = "the quick brown fox jumps"
    assert model.decode(model.encode(text)) == text


def test_a_prompt_with_half_a_surrogate_pair_is_refused(models):
    with pytest.raises(RequestInvalid, match="not valid Unicode at character 1"):
        models["byte-level"].encode("a\ud800")
