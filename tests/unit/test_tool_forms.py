import json
from typing import Any

import pytest

from finetune.errors import ExportError
from finetune.export.gotemplate import GoRequest, render_go
from finetune.export.parity_chats import BOOK, CONTENTS, HOURS
from finetune.tool_forms import canonical_calls, canonical_messages, canonical_tools, dropped_keys, ollama_json
from finetune.tools import GOTEMPLATE, tool_path

TOOLS = "{{ if .Messages }}{{ end }}{{ json .Tools }}"
CALLS = (
    "{{ range .Messages }}{{ range .ToolCalls }}{{ .Function.Name }}{{ json .Function.Arguments }}{{ end }}{{ end }}"
)
# Everything that the structs know, in no order, and shapes that a client may leave out or write in two ways.
WILD: list[dict[str, Any]] = [
    HOURS,
    BOOK,
    {"function": {"name": "bare"}, "type": "function"},
    {"type": "function", "function": {"name": "empty", "description": None, "parameters": None}},
    {"type": "function", "items": {"b": 1, "a": 2}, "function": {"parameters": {"properties": {}}, "name": "none"}},
    {
        "type": "function",
        "function": {
            "name": "all",
            "parameters": {
                "properties": {
                    "œ": {"type": []},
                    "b": {"description": "", "enum": [], "items": {"z": [1.0, 2.5, 1e16, 1e20, -3.0], "a": False}},
                    "a": {"properties": {"z": {"type": ["array"]}, "a": {"properties": {"y": {}, "x": {}}}}},
                    "é": {"anyOf": [{"enum": [1.0, "<&>"], "type": "x"}, {"properties": {}}], "type": ["a", "b"]},
                },
                "required": [],
                "type": "object",
            },
        },
    },
]


def in_go(template: str, **request: Any) -> str:
    asked = GoRequest(system="", messages=request.get("messages", [{"role": "user", "content": ""}]))
    return render_go(tool_path(GOTEMPLATE), template, [{**asked, "tools": request.get("tools", [])}])[0]


def test_golden_form_of_a_definition() -> None:
    assert ollama_json(canonical_tools([BOOK])) == (
        '[{"type":"function","function":{"name":"book_repair","description":"","parameters":{"type":"object",'
        '"$defs":{"a":[10000000000000000,0.25],"z":1},"required":["object","day"],"properties":{'
        '"at":{"anyOf":[{"type":"string"},{"type":"integer"}]},'
        '"day":{"type":["string","null"],"enum":["lundi","mardi"]},'
        '"object":{"type":"object","description":"Objet à réparer : \\u003cb\\u003e\\"lampe\\"\\u003c/b\\u003e '
        '\\u0026 co\\n(un seul)","properties":{"width":{"type":"number"},"brand":'
        '{"type":"string","enum":["Été",null,2]}}},'
        '"parts":{"type":"array","items":{"properties":{"a":{},"z":{}},"type":"object"}}}}}}]'
    )


@pytest.mark.parametrize("tool", WILD, ids=lambda tool: tool["function"]["name"])
def test_the_form_is_the_one_that_gos_structs_write(tool: dict[str, Any]) -> None:
    assert ollama_json(canonical_tools([tool])) == in_go(TOOLS, tools=[tool])
    assert canonical_tools(canonical_tools([tool])) == canonical_tools([tool])
    assert dropped_keys([tool]) == []


@pytest.mark.parametrize("content", [content for _, content in CONTENTS] + ["\u2028\u2029\b\f\x00\x1f\x7f"])
def test_texts_are_escaped_as_go_escapes_them(content: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": content}}
    assert ollama_json(canonical_tools([tool])) == in_go(TOOLS, tools=[tool])
    call = {"type": "function", "function": {"name": "f", "arguments": {content: content}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert "f" + ollama_json({content: content}) == in_go(CALLS, messages=messages)


def test_arguments_are_the_ones_that_gos_maps_write() -> None:
    arguments = {
        "b": [1, 2.0, -0.5, 12345678901234567890, 1e300, 0.0001, True, None],
        "a": {"d": {}, "c": "é"},
        "é": [],
    }
    call = {"name": "f", "arguments": arguments}
    canonical = canonical_calls([call])
    assert ollama_json(canonical[0]["function"]["arguments"]) == (
        '{"a":{"c":"é","d":{}},"b":[1,2,-0.5,12345678901234567000,1e+300,0.0001,true,null],"é":[]}'
    )
    messages = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}]
    assert in_go(CALLS, messages=messages) == "f" + ollama_json(canonical[0]["function"]["arguments"])
    assert canonical_messages(messages) == [{"role": "assistant", "content": "", "tool_calls": canonical}]
    assert canonical_messages([{"role": "user", "content": "a"}]) == [{"role": "user", "content": "a"}]


def test_a_bare_definition_is_wrapped_and_what_ollama_drops_is_kept_and_named() -> None:
    bare = {
        "parameters": {
            "additionalProperties": False,
            "type": "object",
            "properties": {"x": {"default": 1, "type": "string", "anyOf": [{"format": "date"}]}},
        },
        "strict": True,
        "name": "f",
    }
    assert json.dumps(canonical_tools([bare])) == (
        '[{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object", '
        '"properties": {"x": {"anyOf": [{"format": "date"}], "type": "string", "default": 1}}, '
        '"additionalProperties": false}, "strict": true}}]'
    )
    assert dropped_keys([bare]) == ["additionalProperties", "default", "format", "strict"]
    assert in_go(TOOLS, tools=canonical_tools([bare])) == (
        '[{"type":"function","function":{"name":"f","description":"","parameters":{"type":"object",'
        '"properties":{"x":{"anyOf":[{}],"type":"string"}}}}}]'
    )


def test_values_of_a_wrong_type_are_kept_and_ollama_refuses_them() -> None:
    wrong = {
        "type": "function",
        "function": {"name": "f", "description": "", "parameters": {"type": "o", "properties": 3}},
    }
    assert canonical_tools([wrong]) == [wrong]
    with pytest.raises(ExportError, match=r"the Go template program failed: .*cannot unmarshal number"):
        in_go(TOOLS, tools=[wrong])
