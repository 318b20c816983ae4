import json
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from finetune.chat_template import (
    Rendered,
    compile_template,
    has_generation_tags,
    read_template,
    serving_form,
    special_tokens,
    turn_end,
    writes_tool_calls,
    writes_tools,
)
from finetune.data.encoding.chat import encode
from finetune.data.encoding.encoder import make_encoder
from finetune.data.vocabulary.bpe import train
from finetune.data_sections import TrainTokenizer
from finetune.errors import DataError

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke" / "chat_template.jinja"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TURNS = [
    {"role": "system", "content": 'Sois bref <b> & "poli".'},
    {"role": "user", "content": "  Où est l'été ?\n"},
    {"role": "assistant", "content": "\nIci 🧠.\n"},
    {"role": "user", "content": "Et\n\naprès ?"},
    {"role": "assistant", "content": "L’hiver… là "},
]


def rendered(source, turns=TURNS, *, prompt=False):
    return compile_template(source, TOKENS, "t.jinja").render(turns, add_generation_prompt=prompt)


def test_the_spans_are_what_the_generation_blocks_print():
    result = rendered(SMOKE.read_text(encoding="utf-8"))
    assert result.text.startswith("<s><|system|>\nSois bref")
    assert [result.text[start:end] for start, end in result.spans] == ["\nIci 🧠.\n</s>", "L’hiver… là </s>"]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    "source",
    [
        SMOKE.read_text(encoding="utf-8"),
        "{% for m in messages %}\n  {% generation %}\n  {{ m.content }}\n  {% endgeneration %}\n x {% endfor %}\n",
        "{% for m in messages %} a {%- generation -%} b {{ m.content }} {%- endgeneration -%} c {% endfor %}",
        "{% for m in messages %} a {%+ generation +%}\n b {{ m.content }} {%+ endgeneration +%}\n c {% endfor %}",
        "{% for m in messages %}{% generation %}{% set x = m.content %}{% endgeneration %}{{ x }}{% endfor %}",
    ],
)
def test_the_serving_form_prints_byte_for_byte_the_same(source, prompt):
    serving = serving_form(source)
    assert has_generation_tags(source)
    assert not has_generation_tags(serving)
    assert "generation %}" not in serving
    assert rendered(serving, prompt=prompt) == Rendered(rendered(source, prompt=prompt).text, ())


def test_text_is_not_escaped_and_noncharacters_in_it_are_not_mistaken_for_marks():
    source = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
    result = rendered(source, [{"role": "user", "content": "é<&>\ufdd0\ufdd1"}])
    assert result.text == '{"role": "user", "content": "é<&>\ufdd0\ufdd1"}'
    assert result.spans == ((0, 37),)


def test_faults_of_a_template_tell_what_is_wrong():
    with pytest.raises(DataError, match=r"not valid Jinja: .*\n  where:  t.jinja:2"):
        rendered("{{ bos_token }}\n{% for %}")
    with pytest.raises(DataError, match="writes today's date"):
        rendered("{{ strftime_now('%Y') }}")
    with pytest.raises(TemplateError, match="only one turn"):
        rendered("{{ raise_exception('only one turn') }}")
    with pytest.raises(TemplateError, match="is unsafe"):
        rendered("{{ messages.append(1) }}")
    with pytest.raises(TemplateError, match="'NoneType' object is not iterable"):
        rendered("{% for tool in tools %}{% endfor %}")


VARIABLES = (
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ cls_token is defined }}"
    "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ messages | length }}"
)


def test_a_template_sees_the_variables_that_transformers_gives(tmp_path):
    config = {**TOKENS, "unk_token": {"content": "<pad>", "lstrip": False}, "cls_token": None, "model_max_length": 8}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "training_template.jinja").write_text(VARIABLES, encoding="utf-8")
    assert special_tokens(tmp_path) == {**TOKENS, "unk_token": "<pad>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=smoke_tokenizer(), **TOKENS, unk_token="<pad>")
    expected = "<s></s><pad><pad>FalseTrueTrueTrue5"
    ours = read_template(tmp_path, "training_template.jinja").render(TURNS, add_generation_prompt=True)
    assert ours == Rendered(expected, ())
    assert expected == theirs.apply_chat_template(
        TURNS, chat_template=VARIABLES, add_generation_prompt=True, tokenize=False
    )


def smoke_tokenizer() -> Tokenizer:
    params = TrainTokenizer(
        strategy="train",
        chat_template="t",
        vocab_size=300,
        min_frequency=1,
        max_words=10_000,
        corpus=None,
        **TOKENS,
        unk_token=None,
        role_markers=["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"],
        special_tokens=[],
    )
    return train(["Où est l'été ? Ici. L’hiver là"] * 3, params)


def test_text_ids_and_mask_are_those_of_transformers_on_the_smoke_template():
    source = SMOKE.read_text(encoding="utf-8")
    tokenizer = smoke_tokenizer()
    # A leading line break would merge with the one that ends the prompt: transformers trains such a token, we do not.
    turns = [{**turn, "content": turn["content"].lstrip()} for turn in TURNS]
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TOKENS)
    expected = theirs.apply_chat_template(
        turns, chat_template=source, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    result = rendered(source, turns)
    assert result.text == theirs.apply_chat_template(turns, chat_template=source, tokenize=False)
    encoded = encode(result, make_encoder(tokenizer), "assistant")
    assert list(encoded.input_ids) == expected["input_ids"]
    assert list(encoded.trained) == [bool(mask) for mask in expected["assistant_masks"]]
    assert sum(encoded.trained) > 10


ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "tools", "calls"),
    [
        (SMOKE.read_text(encoding="utf-8"), True, True),
        (ROLES, False, False),
        (CALLS, False, True),
        ("{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + ROLES, True, False),
        # The words alone write nothing.
        ("{% if tools %}{% endif %}{# tool_calls #}" + ROLES, False, False),
        ("{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + ROLES, False, False),
        ("{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + ROLES, True, False),
        ("{{ raise_exception('no') if tools }}" + ROLES, False, False),
    ],
)
def test_what_a_template_writes_is_probed(source, tools, calls):
    template = compile_template(source, TOKENS, "t.jinja")
    assert (writes_tools(template), writes_tool_calls(template)) == (tools, calls)


def test_functions_and_calls_are_rendered_as_transformers_renders_them():
    source = SMOKE.read_text(encoding="utf-8")
    tool = {"type": "function", "function": {"name": "f", "description": "<d>", "parameters": {}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "é & \ufdd0"}}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1", "name": "f"},
        {"role": "assistant", "content": "Oui", "tool_calls": [call, call]},
    ]
    result = compile_template(source, TOKENS, "t").render(turns, add_generation_prompt=False, tools=[tool])
    theirs = PreTrainedTokenizerFast(tokenizer_object=smoke_tokenizer(), **TOKENS)
    assert result.text == theirs.apply_chat_template(turns, chat_template=source, tools=[tool], tokenize=False)
    written = '<tool_call>{"name":"f","arguments":{"x":"é \\u0026 \ufdd0"}}</tool_call>'
    assert result.text == (
        '<s><|system|>\nTools: [{"type":"function","function":{"name":"f","description":"\\u003cd\\u003e",'
        f'"parameters":{{}}}}}}]\n<|user|>\nq\n<|assistant|>\n{written}</s>\n<|tool|>\n1\n'
        f"<|assistant|>\nOui\n{written}\n{written}</s>\n"
    )
    assert [result.text[start:end] for start, end in result.spans] == [
        f"{written}</s>",
        f"Oui\n{written}\n{written}</s>",
    ]


def test_a_client_may_send_arguments_as_text_and_no_content():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    result = rendered(SMOKE.read_text(encoding="utf-8"), [{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert result.text == '<s><|assistant|>\n<tool_call>{"name":"f","arguments":{"x": 1}}</tool_call></s>\n'


def test_calls_outside_of_the_generation_block_are_refused():
    outside = CALLS.replace("{% generation %}{{ m.content }}", "{{ m.content }}").replace(
        "{% endfor %}{{ eos", "{% endfor %}{% generation %}{{ eos"
    )
    with pytest.raises(DataError, match="calls outside of its generation block"):
        writes_tool_calls(compile_template(outside, TOKENS, "t.jinja"))


@pytest.mark.parametrize(
    ("source", "end"),
    [
        (SMOKE.read_text(encoding="utf-8"), "</s>\n"),
        (ROLES.replace("m.content }}", "m.content | trim }}<|eot_id|>"), "<|eot_id|>"),
        (ROLES, ""),
    ],
)
def test_the_end_of_a_turn_is_what_follows_an_answer(source, end):
    assert turn_end(compile_template(source, TOKENS, "t.jinja")) == end


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("{{ raise_exception('no') }}", "refuses a chat of user and assistant: no"),
        ("{{ messages[0].content }}", "does not write the assistant's content once"),
        (ROLES + ROLES, "does not write the assistant's content once"),
    ],
)
def test_a_template_without_an_end_of_turn_is_refused(source, fault):
    with pytest.raises(DataError, match=fault):
        turn_end(compile_template(source, TOKENS, "t.jinja"))
