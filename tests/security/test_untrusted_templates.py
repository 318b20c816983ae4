"""Chat templates of anybody, in each place that renders one: sandboxed, so that a template cannot leave its text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from transformers.utils.chat_template_utils import render_jinja_template

from finetune.chat_template import compile_template
from finetune.data.vocabulary.tokenizer_files import install_templates
from finetune.errors import DataError
from finetune.io import write_json

MESSAGES = [{"role": "user", "content": "hi"}]
REFUSED = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch OWNED').read() }}",
    "{{ lipsum.__globals__['os'].popen('touch OWNED').read() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('OWNED', 'w') }}",
    "{{ strftime_now.__func__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% for number in range(10 ** 9) %}x{% endfor %}",
]
# These print nothing of what they ask for.
EMPTY = [
    ("{{ ''|attr('__class__') }}", ""),
    ("{{ messages|map(attribute='__class__')|list }}", "[Undefined]"),
]


def ours(source: str) -> str:
    """As training, the export's gate, `make chat` and `make serve` render."""
    return compile_template(source, {}, "a template").render(MESSAGES, add_generation_prompt=False).text


def of_the_gguf(source: str) -> str:
    """As the gate renders the template inside a GGUF file."""
    return str(Jinja2ChatFormatter(source, eos_token="</s>", bos_token="<s>")(messages=MESSAGES).prompt)


def of_transformers(source: str) -> str:
    """As a model of the registry renders, in MLflow's server."""
    return str(render_jinja_template([MESSAGES], chat_template=source)[0][0])


PLACES = (ours, of_the_gguf, of_transformers)


@pytest.mark.parametrize("render", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("source", REFUSED)
def test_an_escape_is_refused(
    render: Callable[[str], str], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Loops that are too long, and files that nothing loads, have words of their own in the libraries.
    with pytest.raises(TemplateError if render is ours else (TemplateError, OverflowError, TypeError)):
        render(source)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("render", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize(("source", "text"), EMPTY)
def test_a_hidden_attribute_prints_nothing(render: Callable[[str], str], source: str, text: str) -> None:
    assert render(source) == text


@pytest.mark.parametrize("source", REFUSED)
def test_a_recipe_with_such_a_template_ends_in_an_error_that_names_the_file(source: str, tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    template = tmp_path / "chat_template.jinja"
    template.write_text(f"{{% generation %}}{source}{{% endgeneration %}}", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        install_templates(template, tmp_path)
    assert str(template) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat_template.jinja", "tokenizer_config.json"]
