"""The prompt that each family's format asks for, written out by hand, and the text of it that is trained.

Facts of the formats: the model cards and prompt-format pages of Meta (Llama 3, 3.1), OpenAI (ChatML), Mistral (v3, v7),
Qwen (2.5, 3), Google (Gemma), Microsoft (Phi-3, Phi-4) and Hugging Face (Zephyr), and for the last three the notes.
"""

from __future__ import annotations

from typing import Any

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day"},
    {"role": "user", "content": "Ok"},
]
PADDED = [{"role": "user", "content": "\n Hello  "}]
HOURS: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "hours",
        "description": "Opening hours",
        "parameters": {"type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]},
    },
}
CALL = {"id": "hours0001", "type": "function", "function": {"name": "hours", "arguments": {"day": "été"}}}
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Open?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "9 to 18", "tool_call_id": "hours0001"},
]
# Two calls at once, and their results.
TWO_CALLS: list[dict[str, Any]] = [
    CALLED[0],
    {**CALLED[1], "tool_calls": [CALL, {**CALL, "id": "hours0002"}]},
    CALLED[2],
    {**CALLED[2], "tool_call_id": "hours0002"},
]
# With characters that Go escapes, and properties that it sorts.
PRICE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "price",
        "description": 'Price <€> & "discount"',
        "parameters": {
            "type": "object",
            "properties": {"wheel": {"type": "string", "enum": ["é", "b"]}, "axle": {"type": ["number", "null"]}},
        },
    },
}
# HOURS as `tojson` writes it, with its arguments `separators=(',', ':')`, and with `indent=4`.
HOURS_JSON = (
    '{"type": "function", "function": {"name": "hours", "description": "Opening hours", "parameters": '
    '{"type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]}}}'
)
HOURS_COMPACT = (
    '{"type":"function","function":{"name":"hours","description":"Opening hours","parameters":'
    '{"type":"object","properties":{"day":{"type":"string"}},"required":["day"]}}}'
)
HOURS_INDENTED = """{
    "type": "function",
    "function": {
        "name": "hours",
        "description": "Opening hours",
        "parameters": {
            "type": "object",
            "properties": {
                "day": {
                    "type": "string"
                }
            },
            "required": [
                "day"
            ]
        }
    }
}"""
LLAMA3_TALK = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nGood day<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nOk<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
CHATML_TURNS = (
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nGood day<|im_end|>\n<|im_start|>user\nOk<|im_end|>\n"
    "<|im_start|>assistant\n"
)
CHATML_TALK = f"<|im_start|>system\nBe brief.<|im_end|>\n{CHATML_TURNS}"
GEMMA_TURNS = (
    "Hello<end_of_turn>\n<start_of_turn>model\nGood day<end_of_turn>\n<start_of_turn>user\nOk<end_of_turn>\n"
    "<start_of_turn>model\n"
)
PHI3_TURNS = "<|user|>\nHello<|end|>\n<|assistant|>\nGood day<|end|>\n<|user|>\nOk<|end|>\n<|assistant|>\n"
ROLES_TALK = "<s><|system|>\nBe brief.\n<|user|>\nHello\n<|assistant|>\nGood day</s>\n<|user|>\nOk\n<|assistant|>\n"

# A system message and TALK.
WITH_SYSTEM = {
    "chatml": CHATML_TALK,
    "chatml_tools": CHATML_TALK,
    "gemma": f"<bos><start_of_turn>user\nBe brief.\n\n{GEMMA_TURNS}",
    "llama3": LLAMA3_TALK,
    "llama3_1": LLAMA3_TALK.replace(
        "Be brief.", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief."
    ),
    "llama3_linear": LLAMA3_TALK,
    "mistral": "<s>[INST] Hello[/INST] Good day</s>[INST] Be brief.\n\nOk[/INST]",
    "mistral_v7": "<s>[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Hello[/INST] Good day</s>[INST] Ok[/INST]",
    "phi3": f"<|system|>\nBe brief.<|end|>\n{PHI3_TURNS}",
    "phi3_linear": f"<|system|>\nBe brief.<|end|>\n{PHI3_TURNS}",
    "phi4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hello<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Good day<|im_end|><|im_start|>user<|im_sep|>Ok<|im_end|>"
        "<|im_start|>assistant<|im_sep|>"
    ),
    "qwen2": CHATML_TALK,
    "qwen3": CHATML_TALK,
    "role_markers": ROLES_TALK,
    "tweet": "<s>[INST] Be brief. [/INST][INST] Hello [/INST] Good day</s>[INST] Ok [/INST]",
    "user_assistant": "<s><system>Be brief.<user>Hello<assistant>Good day</s><user>Ok<assistant>",
    "zephyr": "<s><|system|>\nBe brief.</s>\n<|user|>\nHello</s>\n<|assistant|>\nGood day</s>\n<|user|>\nOk</s>\n"
    "<|assistant|>\n",
}
# TALK alone, where that is more than the text above without its first turn.
WITHOUT_SYSTEM = {
    "gemma": f"<bos><start_of_turn>user\n{GEMMA_TURNS}",
    "gemma_linear": f"<bos><start_of_turn>user\n{GEMMA_TURNS}",
    "llama3_1": WITH_SYSTEM["llama3_1"].replace("Be brief.", ""),
    "mistral": "<s>[INST] Hello[/INST] Good day</s>[INST] Ok[/INST]",
    "mistral_v7": "<s>[INST] Hello[/INST] Good day</s>[INST] Ok[/INST]",
    "phi3": PHI3_TURNS,
    "qwen2": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        + CHATML_TURNS
    ),
    "qwen3": CHATML_TURNS,
}
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{HOURS_JSON}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
QWEN_CALLED = (
    '<|im_start|>user\nOpen?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{"name": "hours", "arguments": '
    '{"day": "été"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\n9 to 18\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
# CALLED with the tool HOURS.
WITH_TOOLS = {
    "chatml_tools": (
        "<|im_start|>system\nYou may call these functions:\n<tools>\n"
        f"{HOURS_COMPACT}\n</tools>\nCall one by its name and arguments in JSON:\n"
        '<tool_call>\n{"name":"its name","arguments":{"key":"value"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nOpen?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name":"hours","arguments":{"day":"été"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n9 to 18<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama3_1": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a "
        "function call with its proper arguments that best answers the given prompt.\n\nRespond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
        f"{HOURS_INDENTED}\n\nOpen?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "hours", "parameters": {"day": "été"}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"9 to 18"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": (
        f"<s>[AVAILABLE_TOOLS] [{HOURS_JSON}][/AVAILABLE_TOOLS][INST] Open?[/INST]"
        '[TOOL_CALLS] [{"name": "hours", "arguments": {"day": "été"}, "id": "hours0001"}]</s>'
        '[TOOL_RESULTS] {"content": 9 to 18, "call_id": "hours0001"}[/TOOL_RESULTS]'
    ),
    "qwen2": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n"
        f"{QWEN_TOOLS}{QWEN_CALLED}"
    ),
    "qwen3": f"<|im_start|>system\n{QWEN_TOOLS}{QWEN_CALLED}",
}
WITH_TOOLS["role_markers"] = (
    f"<s><|system|>\nTools: [{HOURS_COMPACT}]\n<|user|>\nOpen?\n"
    '<|assistant|>\n<tool_call>{"name":"hours","arguments":{"day":"été"}}</tool_call></s>\n'
    "<|tool|>\n9 to 18\n<|assistant|>\n"
)
# The one user message PADDED, in the families that trim it.
TRIMMED = {
    "gemma": "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n",
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama3_1": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}
# What is trained of TALK and the answer "Sure" to its last question.
TRAINED = {
    "chatml": ["Good day<|im_end|>", "Sure<|im_end|>"],
    "chatml_tools": ["Good day<|im_end|>", "Sure<|im_end|>"],
    "gemma": ["Good day<end_of_turn>", "Sure<end_of_turn>"],
    "gemma_linear": ["Good day<end_of_turn>", "Sure<end_of_turn>"],
    "llama3": ["Good day<|eot_id|>", "Sure<|eot_id|>"],
    "llama3_1": ["Good day<|eot_id|>", "Sure<|eot_id|>"],
    "llama3_linear": ["Good day<|eot_id|>", "Sure<|eot_id|>"],
    "mistral": [" Good day</s>", " Sure</s>"],
    "mistral_v7": [" Good day</s>", " Sure</s>"],
    "phi3": ["Good day<|end|>\n", "Sure<|end|>\n"],
    "phi3_linear": ["Good day<|end|>\n", "Sure<|end|>\n"],
    "phi4": ["Good day<|im_end|>", "Sure<|im_end|>"],
    "qwen2": ["Good day<|im_end|>", "Sure<|im_end|>"],
    "qwen3": ["Good day<|im_end|>", "<think>\n\n</think>\n\nSure<|im_end|>"],
    "role_markers": ["Good day</s>", "Sure</s>"],
    "tweet": [" Good day</s>", " Sure</s>"],
    "user_assistant": ["Good day</s>", "Sure</s>"],
    "zephyr": ["Good day</s>", "Sure</s>"],
}
