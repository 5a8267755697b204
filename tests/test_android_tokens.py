"""The native loader's tokenizer and chat templates; the tokenizers library and the templates themselves decide."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from native import Parts

from edgeexport.bundle import conformance
from edgeexport.checkpoint import open_checkpoint
from edgeexport.session.chat import ChatTemplate
from edgeexport.session.tokenizer import Tokenizer
from edgeexport.text_tables import Unsupported, bpe, chat
from edgeexport.text_tables.files import table_files
from edgeexport.text_tables.unicode import composition, matched, numeric

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GLM4 = LLAMA3
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
STARCODER = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|user|>", "[gMASK]", "<sop>")

WORDS = (
    *("the", "model", "don't", "I'LL", "we've", "it's", "'S", "ſ't", "'ſ", "naïve", "cafe\u0301", "e\u0323\u0302"),
    *("Å", "\u212b", "각", "\u1100\u1161\u11a8", "हिन्दी", "नमस्ते", "العربية", "שלום", "ไทย", "Ω", "ﬁ", "ß", "Ǆ", "ΑΣ"),
    *(
        "½",
        "Ⅻ",
        "²",
        "١٢٣",
        "12",
        "3",
        "2026",
        "100000",
        "3.14",
        "你好",
        "世界",
        "手机",
        "。",
        "，",
        "日本語",
        "カタカナ",
    ),
    *(
        "👩‍👩‍👧‍👦",
        "😀",
        "🇫🇷",
        "👍🏽",
        "#️⃣",
        "def f(x):",
        "return x+1;",
        "{}",
        "//",
        "==",
        "\\n",
        "<b>",
        "_",
        "__",
        "`x`",
    ),
    *(*SPECIAL, "<|im", "<think>", "\u200b", "\ufeff", "\u0301", "\u0345\u0301", "a\u0300\u0316b", "\u0958", "\u0344"),
    *("\U0001d400", "\U000e0001", "\u0378", "\ue000", "\U0010ffff", "\ufffd", "\u09c7\u09be", "\u1b05\u1b35"),
)
GAPS = (
    " ",
    "",
    "  ",
    "\n",
    "\r\n",
    " \n ",
    "\t",
    "   \n\n  ",
    " \u00a0",
    "\u3000",
    "\n\n\n",
    "    ",
    "\u2028",
    "\x0b\x1c\x85",
)
RANGES = ((0x20, 0x7F), (0xA0, 0x3000), (0x300, 0x370), (0x900, 0xE00), (0x1100, 0x1200), (0x1AB0, 0x1B00),
          (0x3000, 0xD800), (0xAC00, 0xAC60), (0xE000, 0x20000))  # fmt: skip


def lines(count: int, seed: int = 0) -> list[str]:
    """Mixed texts: Chinese, English, emoji, code, runs of spaces, combining marks, and characters at random."""
    chance = random.Random(seed)
    found = ["", " ", "\n", "a"]
    while len(found) < count:
        if chance.random() < 0.2:
            found.append("".join(chr(chance.randrange(*chance.choice(RANGES))) for _ in range(chance.randrange(30))))
        else:
            found.append("".join(chance.choice(WORDS) + chance.choice(GAPS) for _ in range(chance.randrange(1, 25))))
    return found


def trained(pattern: str, *, nfc: bool = False, whole: bool = False, prefix: bool = False) -> bytes:
    """A tokenizer with a published one's pre-tokeniser, trained on our lines."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    made = Tokenizer(models.BPE(ignore_merges=whole))
    if nfc:
        made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(lines(300, 7), BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("cafe\u0301", normalized=True)])
    if prefix:
        around = [(text, made.token_to_id(text)) for text in ("[gMASK]", "<sop>", "<|im_end|>")]
        made.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A <|im_end|>", special_tokens=around)
    return made.to_str().encode()


@pytest.fixture(scope="module")
def tokenizers_by_name() -> dict[str, bytes]:
    return {
        "smollm2": open_checkpoint("smollm2-135m").read_tokenizer()["tokenizer.json"],
        "qwen": trained(QWEN, nfc=True),
        "glm4": trained(GLM4, prefix=True),
        "llama3": trained(LLAMA3, whole=True, prefix=True),
        "starcoder": trained(STARCODER),
    }


@pytest.mark.parametrize("name", ["smollm2", "qwen", "glm4", "llama3", "starcoder"])
def test_a_thousand_mixed_lines_equal_the_library(
    name: str, tokenizers_by_name: dict[str, bytes], parts: Parts
) -> None:
    from tokenizers import Tokenizer as Library

    data = tokenizers_by_name[name]
    library = Library.from_str(data.decode())
    chance = random.Random(1)
    texts = lines(1000)
    encodes = [{"do": "encode", "text": text, "special": i % 2 == 0} for i, text in enumerate(texts)]
    ids = [library.encode(text, add_special_tokens=False).ids for text in texts]
    # ids in an order that no text gives: characters cut in two, and ids that no token has
    ids += [[chance.randrange(library.get_vocab_size() + 5) for _ in range(chance.randrange(20))] for _ in range(300)]
    decodes = [{"ids": each, "skip": i % 2 == 0} for i, each in enumerate(ids)]
    file = {"do": "read tokenizer", "file": parts.file(f"{name}.bin", bpe.bpe_file(data))}
    found = parts.ask([
        file, *encodes, *({"do": "decode", **each} for each in decodes), *({"do": "stream", **each} for each in decodes)
    ])  # fmt: skip
    assert found.pop(0) == library.get_vocab_size()
    encoded, found = found[:1000], found[1000:]
    decoded, streamed = found[: len(ids)], found[len(ids) :]
    assert encoded == [library.encode(each["text"], add_special_tokens=each["special"]).ids for each in encodes]
    wanted = [library.decode(each["ids"], skip_special_tokens=each["skip"]) for each in decodes]
    assert decoded == wanted
    assert ["".join(pieces) for pieces in streamed] == wanted


def test_a_stream_gives_a_character_when_it_is_whole(tokenizers_by_name: dict[str, bytes], parts: Parts) -> None:
    from tokenizers import Tokenizer as Library

    data = tokenizers_by_name["smollm2"]
    ids = Library.from_str(data.decode()).encode("a\U000e0001b").ids
    read = {"do": "read tokenizer", "file": parts.file("smollm2.bin", bpe.bpe_file(data))}
    pieces = parts.ask([read, {"do": "stream", "ids": ids, "skip": True}])[1]
    assert len(ids) > 4 and pieces[0] == "a" and pieces[-2:] == ["b", ""]
    assert pieces[1:-2] == [""] * (len(ids) - 3) + ["\U000e0001"]


def test_long_runs_take_no_quadratic_time(tokenizers_by_name: dict[str, bytes], parts: Parts) -> None:
    from tokenizers import Tokenizer as Library

    data = tokenizers_by_name["smollm2"]
    texts = ["好" * 100_000, " " * 100_000 + "x", "ab" * 100_000, "\n" * 100_000]
    read = {"do": "read tokenizer", "file": parts.file("smollm2.bin", bpe.bpe_file(data))}
    found = parts.ask([read, *({"do": "encode", "text": text, "special": False} for text in texts)])
    library = Library.from_str(data.decode())
    assert found[1:] == [library.encode(text).ids for text in texts]


def test_the_table_is_the_same_in_another_process(tokenizers_by_name: dict[str, bytes], parts: Parts) -> None:
    """Where the order of a set went into the file, another seed of Python's hashes would show it."""
    data = tokenizers_by_name["qwen"]
    file = parts.file("tokenizer.json", data)
    code = (
        f"import sys, edgeexport.text_tables.bpe as b; sys.stdout.buffer.write(b.bpe_file(open({file!r}, 'rb').read()))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, env={"PYTHONHASHSEED": "5"}, check=True)
    assert made.stdout == bpe.bpe_file(data)


@pytest.mark.parametrize("data", [b"\xff", b"a\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xbd"])
def test_text_that_is_no_utf8_is_refused(data: bytes, tokenizers_by_name: dict[str, bytes], parts: Parts) -> None:
    read = {"do": "read tokenizer", "file": parts.file("qwen.bin", bpe.bpe_file(tokenizers_by_name["qwen"]))}
    bad = {"do": "encode bytes", "file": parts.file("bad.txt", data)}
    assert parts.ask([read, bad, {"do": "decode", "ids": [-1], "skip": True}])[1:] == [
        {"code": "bad-text", "why": f"at byte {data.startswith(b'a'):d} is no character"},
        {"code": "bad-token", "why": "ids are whole numbers from 0"},
    ]


def test_damaged_tables_are_refused(tokenizers_by_name: dict[str, bytes], parts: Parts) -> None:
    """Whatever is wrong with the file, the reader says so or has a table that it can use safely."""
    good = bpe.bpe_file(tokenizers_by_name["qwen"])
    chance = random.Random(5)
    requests: list[dict[str, Any]] = []
    for i in range(400):
        bad = bytearray(good)
        if i < 50:
            del bad[chance.randrange(len(bad)) :]
        elif i < 100:
            place = 8 + 4 * chance.randrange(9)
            bad[place : place + 4] = struct.pack("<I", chance.choice([0, 1, 3, 1 << 20, 1 << 31, (1 << 32) - 1]))
        else:
            # of these, many fall into the last tenth, where the programs are
            first = chance.choice([0, len(bad) * 9 // 10])
            for _ in range(chance.randrange(1, 4)):
                bad[chance.randrange(first, len(bad))] = chance.randrange(256)
        requests.append({"do": "read tokenizer", "file": parts.file(f"bad{i}.bin", bytes(bad))})
        if i >= 100:
            requests.append({"do": "encode", "text": "I'll take 12 cafe\u0301s\n  now <|im_end|>", "special": True})
    answers = parts.ask([{"do": "read tokenizer", "file": parts.file("good.bin", good)}, *requests])
    refused = [each for each in answers if isinstance(each, dict)]
    assert len(refused) > 80 and {each["code"] for each in refused} == {"tokenizer-unusable"}


def with_step(data: bytes, **changed: Any) -> bytes:
    return json.dumps(json.loads(data) | changed).encode()


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"normalizer": {"type": "NFKC"}}, "normalizer NFKC"),
        ({"decoder": None}, "decoder none"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer Whitespace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
         "pre_tokenizer ByteLevel"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}},
         "pre_tokenizer without ByteLevel"),
    ],
)  # fmt: skip
def test_what_a_table_cannot_hold_is_a_warning(
    changed: dict[str, Any], part: str, tokenizers_by_name: dict[str, bytes]
) -> None:
    files, findings = table_files(with_step(tokenizers_by_name["qwen"], **changed), None, pictures=False)
    assert files == {}
    assert [(each.severity, each.code) for each in findings] == [("warning", "tokenizer-without-table")]
    assert findings[0].what.endswith(part)


@pytest.mark.parametrize(
    "pattern",
    [r"a*", r"a++", r"a+?", r"(?=a)b", r"(a)+", r"a+(?:b|c)", r"\bfoo", r"[a&&b]", r"(?i:ss)", r"(?!ab)c", r"^a", r"."],
)
def test_patterns_that_are_not_plain_are_refused(pattern: str) -> None:
    with pytest.raises(Unsupported):
        bpe.bpe_file(trained(pattern))


def test_added_tokens_that_take_spaces_are_refused(tokenizers_by_name: dict[str, bytes]) -> None:
    whole = json.loads(tokenizers_by_name["qwen"])
    whole["added_tokens"][0]["lstrip"] = True
    with pytest.raises(Unsupported, match="lstrip"):
        bpe.bpe_file(json.dumps(whole).encode())


def test_sets_of_characters_are_the_library_s() -> None:
    assert {chr(code) for code in matched(r"\s").nonzero()[0]} >= set(" \n\t\u3000\u2028\u00a0")
    assert matched(r"\p{L}")[ord("é")] and not matched(r"\p{L}")[ord("1")]
    assert numeric()[ord("½")] and numeric()[ord("٣")] and not numeric()[ord("a")] and not numeric()[0x10FFFF]
    assert composition().composed[ord("e"), 0x301] == ord("é")


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
)
GLM4V_CHAT = """[gMASK]<sop>
{%- for msg in messages %}
    {%- if msg.role == 'system' %}
<|system|>
{{ msg.content }}
    {%- elif msg.role == 'user' %}
<|user|>{{ '\\n' }}
        {%- if msg.content is string %}
{{ msg.content }}
        {%- else %}
            {%- for item in msg.content %}
                {%- if item.type == 'image' or 'image' in item %}
<|begin_of_image|><|image|><|end_of_image|>
                {%- elif item.type == 'text' %}
{{ item.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
    {%- elif msg.role == 'assistant' %}
<|assistant|>
{{ msg.content.split('</think>')[-1].strip() }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
QWEN3_CHAT = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3_CHAT, "llama2": LLAMA2_CHAT, "no-system": NO_SYSTEM, "glm4v": GLM4V_CHAT,
    "qwen3": QWEN3_CHAT,
}  # fmt: skip
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TEXT, PICTURE = {"type": "text", "text": " What? \n"}, {"type": "image"}
SPACES = "".join(
    map(chr, (*range(33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x2010), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000))
)
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " Hi <there> & 'you' "}],
    [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": "尺寸\u3000\x1c\u2029"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think>\nhm</think>\n\n  é中😀 \n"},
        {"role": "user", "content": "3</think>\n4"},
        {"role": "assistant", "content": "</think>a</think>"},
        {"role": "user", "content": ""},
    ],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": SPACES + "x" + SPACES},
        {"role": "assistant", "content": SPACES},
        {"role": "user", "content": "\n"},
    ],
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_equal_the_template(name: str, parts: Parts) -> None:
    template = ChatTemplate(TEMPLATES[name], NAMES)
    pictures = name == "glm4v"
    table = chat.chat_table(template, pictures=pictures)
    chats = [each for each in CHATS if name != "no-system" or each[0]["role"] != "system"]
    if pictures:
        contents = ([PICTURE, TEXT], [PICTURE, PICTURE], [TEXT, PICTURE, TEXT], [TEXT])
        chats += [[{"role": "user", "content": content}] for content in contents]
    read = {"do": "read chat", "file": parts.file(f"{name}.json", chat.to_json(table))}
    found = parts.ask([read, *({"do": "chat", "messages": each} for each in chats)])
    assert found[1:] == [template.render(each) for each in chats]


@pytest.mark.parametrize(("name", "pictures"), [("chatml", False), ("glm4v", True)])
def test_a_bundle_s_golden_conversations_are_met(
    name: str, pictures: bool, tokenizers_by_name: dict[str, bytes], parts: Parts
) -> None:
    data, template = tokenizers_by_name["glm4"], ChatTemplate(TEMPLATES[name], NAMES)
    turns = msgspec.to_builtins(conformance.chat_turns(template, Tokenizer(data), pictures=pictures))
    table = chat.chat_table(template, pictures=pictures)
    wrong = [*turns[:-1], turns[-1] | {"tokens": [*turns[-1]["tokens"], 1]}]
    answers = parts.ask([
        {"do": "read tokenizer", "file": parts.file("tokens.bin", bpe.bpe_file(data))},
        {"do": "read chat", "file": parts.file("table.json", chat.to_json(table))},
        *({"do": "check chat", "file": parts.file(f"chat{i}.json", json.dumps(given).encode())}
          for i, given in enumerate((turns, wrong, {}))),
    ])  # fmt: skip
    assert len(turns) == (5 if pictures else 3)
    assert answers[2] is None
    assert [each["code"] for each in answers[3:]] == ["golden-mismatch", "golden-unusable"]


def test_what_the_table_does_not_have_is_refused(parts: Parts) -> None:
    table = chat.chat_table(ChatTemplate(NO_SYSTEM, {}), pictures=False)
    user = {"role": "user", "content": "a"}
    chats = [[], [user, user], [{"role": "system", "content": "a"}, user], [{"role": "user", "content": [PICTURE]}]]
    read = {"do": "read chat", "file": parts.file("table.json", chat.to_json(table))}
    found = parts.ask([read, *({"do": "chat", "messages": each} for each in chats)])[1:]
    assert [each["code"] for each in found] == ["chat-template-failed"] * 4


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "edgeexport.chat/2"},
        {"content": {"user": "upper"}},
        {"joins": ["a"]},
        {"image": 3},
        {"joins": {"a": 1}},
    ],
)
def test_damaged_chat_tables_are_refused(change: dict[str, Any], parts: Parts) -> None:
    table = json.loads(chat.to_json(chat.chat_table(ChatTemplate(CHATML, {}), pictures=False)))
    data = json.dumps(table | change).encode()
    [answer] = parts.ask([{"do": "read chat", "file": parts.file("bad.json", data)}])
    assert answer["code"] == "tokenizer-unusable"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}", "that writes today's date"),
        ("{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}", "depends on more than the roles"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}", "in a way of its own"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | replace('spaces', '') }}{% endfor %}", "of its own"),
        ("{{ raise_exception('never') }}", "that refuses ['user']"),
        ("{{ messages[-1].content }}", "depends on more than the roles"),
    ],
)
def test_templates_of_another_kind_are_a_warning(
    source: str, problem: str, tokenizers_by_name: dict[str, bytes]
) -> None:
    files, findings = table_files(tokenizers_by_name["glm4"], ChatTemplate(source, {}), pictures=False)
    assert list(files) == [bpe.FILE]
    assert [(each.severity, each.code) for each in findings] == [("warning", "chat-template-without-table")]
    assert problem in findings[0].what
