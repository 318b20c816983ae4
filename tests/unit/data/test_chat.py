from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split

from finetune.chat_template import Rendered, compile_template
from finetune.data.encoding.chat import (
    Chat,
    SpecialIds,
    check_ids,
    conversation,
    encode,
    encode_record,
    flatten,
    render_record,
    special_text_in,
)
from finetune.data.encoding.encoder import make_encoder
from finetune.data.record import Message, make_record
from finetune.errors import DataError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}A{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}U{{ m.content }}{% endif %}{% endfor %}"
)
TWO_TURNS = make_record(
    source="s",
    messages=(Message("user", "ab"), Message("assistant", "c"), Message("user", "d"), Message("assistant", "cd")),
)


def chat(template=TEMPLATE, *, bytes_only=False):
    """One token per character, or with `bytes_only` per byte: letters keep their ids, the bytes of é are 10 and 11."""
    tokens = ["?", "<p>", "<s>", "</s>", *"abcdAU"]
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, "?"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    if bytes_only:
        tokens = list(dict.fromkeys([*tokens, *"Ã©", *sorted(ByteLevel.alphabet())]))
        tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, []))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<p>", "<s>", "</s>"])
    return Chat(
        tokenizer=tokenizer,
        template=compile_template(template, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>"}, "t.jinja"),
        ids=SpecialIds(bos=2, eos=3, pad=1, vocab_size=len(tokens), needs_bos=True),
        special_texts=("<p>", "<s>", "</s>"),
    )


def encoded_record(record, of, loss="assistant"):
    return encode_record(record, of, make_encoder(of.tokenizer), loss)


# <s> U a b A c </s> U d A c d </s>
IDS = (2, 9, 4, 5, 8, 6, 3, 9, 7, 8, 6, 7, 3)


@pytest.mark.parametrize("bytes_only", [False, True])
@pytest.mark.parametrize(
    ("loss", "trained"),
    [
        ("assistant", (0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1)),
        ("last_assistant", (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1)),
        ("all", (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)),
    ],
)
def test_ids_and_mask_of_a_two_turn_conversation(loss, trained, bytes_only):
    of = chat(bytes_only=bytes_only)
    assert (make_encoder(of.tokenizer).fast is not None) == bytes_only
    encoded = encoded_record(TWO_TURNS, of, loss)
    assert encoded.input_ids.tolist() == list(IDS)
    assert encoded.trained.tolist() == list(map(bool, trained))
    assert encoded.straddling == 0


@pytest.mark.parametrize(
    ("loss", "trained"),
    [
        ("assistant", [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1]),
        ("last_assistant", [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_ids_and_mask_where_characters_have_several_bytes(loss, trained):
    letters = ("é", "é", "éa", "aé")
    turns = (Message(role, text) for role, text in zip(("user", "assistant") * 2, letters, strict=True))
    encoded = encoded_record(make_record(source="s", messages=tuple(turns)), chat(bytes_only=True), loss)
    # <s> U é A é </s> U é a A a é </s>
    assert encoded.input_ids.tolist() == [2, 9, 10, 11, 8, 10, 11, 3, 9, 10, 11, 4, 8, 4, 10, 11, 3]
    assert (encoded.trained.astype(int).tolist(), encoded.straddling) == (trained, 0)


def test_a_plain_text_is_bos_text_eos_and_all_of_it_is_trained():
    encoded = encoded_record(make_record(source="s", text="ad"), chat())
    assert (encoded.input_ids.tolist(), encoded.trained.tolist()) == ([2, 4, 7, 3], [True, True, True, True])


def test_a_token_that_straddles_an_edge_of_a_span_is_not_trained_and_is_counted():
    tokenizer = Tokenizer(WordLevel({"?": 0, "ab": 1, "cd": 2, "ef": 3}, "?"))
    tokenizer.pre_tokenizer = Split(Regex(".."), "isolated")
    encoded = encode(Rendered("abcdef", ((1, 5),)), make_encoder(tokenizer), "assistant")
    assert encoded.input_ids.tolist() == [1, 2, 3]
    assert (encoded.trained.tolist(), encoded.straddling) == ([False, True, False], 2)


def test_every_piece_of_a_character_of_several_tokens_is_trained():
    vocabulary = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    encoded = encode(Rendered("a🧠é", ((1, 3),)), make_encoder(tokenizer), "assistant")
    assert encoded.trained.tolist() == [False, True, True, True, True, True, True]


def test_tools_go_into_the_system_turn_and_calls_into_the_answer():
    calls = '[{"arguments": {"x": "é"}, "name": "f"}, {"arguments": {}, "name": "g"}]'
    messages = (Message("user", "q"), Message("assistant", "voici", calls), Message("tool", "1"))
    expected_call = (
        '<tool_call>{"arguments": {"x": "é"}, "name": "f"}</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "g"}</tool_call>'
    )
    assert flatten(make_record(source="s", messages=messages, tools='[{"name": "f"}]')) == [
        {"role": "system", "content": 'Tools: [{"name": "f"}]'},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": f"voici\n{expected_call}"},
        {"role": "tool", "content": "1"},
    ]
    with_system = (Message("system", "Sois bref."), messages[0], replace(messages[1], content=""))
    assert flatten(make_record(source="s", messages=with_system, tools='[{"name": "f"}]')) == [
        {"role": "system", "content": 'Sois bref.\n\nTools: [{"name": "f"}]'},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": expected_call},
    ]


DEFINITIONS = '[{"function": {"parameters": {"properties": {"b": {}, "a": {}}}, "name": "f"}, "type": "function"}]'
CALLED = make_record(
    source="s",
    messages=(
        Message("user", "q"),
        Message("assistant", "", '[{"arguments": {"x": 1.0}, "name": "f"}, {"arguments": {}, "name": "g"}]'),
        Message("tool", "1"),
        Message("tool", "2"),
        Message("tool", "3"),
        Message("assistant", "voici"),
    ),
    tools=DEFINITIONS,
)
CALLS_IN_TURNS = [
    {"role": "user", "content": "q"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
            {"type": "function", "function": {"name": "g", "arguments": {}}},
        ],
    },
    {"role": "tool", "content": "1", "name": "f"},
    {"role": "tool", "content": "2", "name": "g"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "voici"},
]
WRITES_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
WRITES_CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{% endfor %}"


def test_functions_that_the_template_writes_go_to_it_in_the_canonical_form():
    turns, tools = conversation(CALLED, compile_template(WRITES_TOOLS + WRITES_CALLS, {}, "t"))
    assert turns == CALLS_IN_TURNS
    parameters = {"type": "", "properties": {"a": {}, "b": {}}}
    assert tools == [{"type": "function", "function": {"name": "f", "description": "", "parameters": parameters}}]
    assert list(parameters["properties"]) == list(tools[0]["function"]["parameters"]["properties"])


def test_only_what_the_template_writes_is_taken_out_of_the_texts():
    turns, tools = conversation(CALLED, compile_template(WRITES_CALLS, {}, "t"))
    assert (turns, tools) == ([{"role": "system", "content": f"Tools: {DEFINITIONS}"}, *CALLS_IN_TURNS], None)
    turns, tools = conversation(CALLED, compile_template(WRITES_TOOLS, {}, "t"))
    assert turns == flatten(replace(CALLED, tools=None))
    assert len(tools) == 1
    assert conversation(CALLED, compile_template("", {}, "t")) == (flatten(CALLED), None)


def test_calls_are_trained_with_their_stop_and_definitions_are_not():
    source = (
        "{{ bos_token }}{{ tools[0].function.name if tools }}{{ tools | tojson if tools and false }}"
        "{% for m in messages %}{% if m.role == 'assistant' %}A{% generation %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | list | first }}"
        "{{ c.function.arguments.values() | first }}{% endfor %}"
        "{{ eos_token }}{% endgeneration %}{% else %}U{{ m.content }}{% endif %}{% endfor %}"
    )
    calls = '[{"arguments": {"c": "d"}, "name": "b"}]'
    record = make_record(source="s", messages=(Message("user", "a"), Message("assistant", "", calls)))
    encoded = encoded_record(record, chat(source))
    # <s> U a A b c d </s>
    assert encoded.input_ids.tolist() == [2, 9, 4, 8, 5, 6, 7, 3]
    assert encoded.trained.tolist() == [False, False, False, False, True, True, True, True]
    assert render_record(chat(source).template, record, add_generation_prompt=True).text == "<s>UaAbcd</s>"


def test_a_turn_may_end_in_another_special_token_than_eos():
    template = TEMPLATE.replace("eos_token", "'<e>'")
    made = chat(template)
    made.tokenizer.add_special_tokens(["<e>"])
    of = replace(made, special_texts=(*made.special_texts, "<e>"), ids=replace(made.ids, vocab_size=11))
    assert of.stop == ("<e>", 10)
    encoded = encoded_record(TWO_TURNS, of)
    assert encoded.input_ids.tolist() == [10 if token == 3 else token for token in IDS]
    assert encoded.trained[[6, 12]].all()
    # Text that is no special token, or one that begins or pads a document, ends no turn.
    with pytest.raises(DataError, match="2 turns are trained and 0 of them end in the stop token </s>"):
        encoded_record(TWO_TURNS, chat(TEMPLATE.replace("eos_token", "'ab'")))
    with pytest.raises(DataError, match="2 turns are trained and 0 of them end in the stop token </s>"):
        encoded_record(TWO_TURNS, chat(TEMPLATE.replace("eos_token", "pad_token")))
    assert chat(TEMPLATE.replace("eos_token", "'</s>'")).stop == ("</s>", 3)


def test_a_text_that_spells_a_special_token_is_told():
    assert special_text_in(TWO_TURNS, chat()) is None
    assert special_text_in(make_record(source="s", text="a </s> b"), chat()) == "</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE.replace("{{ bos_token }}", ""), r"one BOS \(id 2\) .*\(0\); here they are at positions \[\]"),
        (TEMPLATE.replace("{{ bos_token }}", "{{ bos_token * 2 }}"), r"at positions \[0, 1\]"),
        (TEMPLATE.replace("+ eos_token", ""), "2 turns are trained and 0 of them end in the stop token </s>"),
        (
            TEMPLATE.replace(" + eos_token }}{% endgeneration %}", " }}{% endgeneration %}{{ eos_token }}"),
            "2 turns are trained and 0 of them end",
        ),
        (TEMPLATE.replace("{{ bos_token }}", "U{{ bos_token }}"), r"at positions \[1\]"),
        (
            "{{ raise_exception('one turn only') }}",
            "assistant, user, assistant: one turn only\n  where:  record",
        ),
        (
            TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
            "0 generation blocks for 2 assistant turns",
        ),
    ],
)
def test_a_template_that_breaks_a_promise_is_refused(template, message):
    with pytest.raises(DataError, match=message):
        encoded_record(TWO_TURNS, chat(template))


def test_a_template_may_open_every_turn_with_bos():
    every_turn = TEMPLATE.replace("{{ bos_token }}", "").replace("%}U", "%}{{ bos_token }}U")
    encoded = encoded_record(TWO_TURNS, chat(every_turn))
    assert encoded.input_ids.tolist() == [*IDS[:7], 2, *IDS[7:]]
    with pytest.raises(DataError, match=r"as many as its text spells \(1\); here they are at positions \[0, 2\]"):
        check_ids(np.array([2, 9, 2]), chat().ids, "r1", 1)


def test_an_id_beyond_the_vocabulary_is_an_error_that_names_id_size_and_record():
    with pytest.raises(DataError, match="token id 10 is beyond the vocabulary of 10\n  where:  record r1"):
        check_ids(np.array([2, 10, 3]), chat().ids, "r1", 1)
    with pytest.raises(DataError, match="token id 9 is beyond the vocabulary of 5"):
        encoded_record(TWO_TURNS, replace(chat(), ids=SpecialIds(2, 3, 1, 5, needs_bos=True)))


def test_a_document_may_do_without_bos_only_where_the_tokenizer_adds_none_by_its_own_rule():
    without = chat(TEMPLATE.replace("{{ bos_token }}", ""))
    with pytest.raises(DataError, match=r"begins with one BOS \(id 2\) and has as many as its text spells \(0\)"):
        encoded_record(TWO_TURNS, without)
    free = replace(without, ids=replace(without.ids, needs_bos=False))
    assert encoded_record(TWO_TURNS, free).input_ids.tolist() == list(IDS[1:])
    with pytest.raises(DataError, match=r"here they are at positions \[1\]"):
        check_ids(np.array([9, 2, 3]), free.ids, "r1", 1)
