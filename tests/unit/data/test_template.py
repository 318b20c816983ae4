from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from finetune.data.bpe import train
from finetune.data.chat import encode
from finetune.data.template import Rendered, compile_template, has_generation_tags, render, serving_form
from finetune.data_sections import TrainTokenizer
from finetune.errors import DataError

SMOKE = Path(__file__).parents[3] / "recipes" / "smoke" / "chat_template.jinja"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TURNS = [
    {"role": "system", "content": 'Sois bref <b> & "poli".'},
    {"role": "user", "content": "  Où est l'été ?\n"},
    {"role": "assistant", "content": "\nIci 🧠.\n"},
    {"role": "user", "content": "Et\n\naprès ?"},
    {"role": "assistant", "content": "L’hiver… là "},
]


def rendered(source, turns=TURNS, *, prompt=False):
    return render(compile_template(source, "t.jinja"), turns, TOKENS, add_generation_prompt=prompt)


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


def test_faults_of_a_template_are_data_errors():
    with pytest.raises(DataError, match=r"not valid Jinja: .*\n  where:  t.jinja:2"):
        rendered("{{ bos_token }}\n{% for %}")
    with pytest.raises(DataError, match="refuses a conversation: only one turn"):
        rendered("{{ raise_exception('only one turn') }}")
    with pytest.raises(DataError, match="'strftime_now' is undefined"):
        rendered("{{ strftime_now('%Y') }}")
    with pytest.raises(DataError, match="is unsafe"):
        rendered("{{ messages.append(1) }}")


def smoke_tokenizer() -> Tokenizer:
    params = TrainTokenizer(
        strategy="train",
        chat_template="t",
        vocab_size=300,
        min_frequency=1,
        **TOKENS,
        role_markers=["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"],
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
    encoded = encode(result, tokenizer, "assistant")
    assert list(encoded.input_ids) == expected["input_ids"]
    assert list(encoded.trained) == [bool(mask) for mask in expected["assistant_masks"]]
    assert sum(encoded.trained) > 10
