"""The folder models/tokenizer: written from a trained or a copied tokenizer, read back as a Chat."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer

from finetune.chat_template import (
    SERVING_TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TRAINING_TEMPLATE,
    ChatTemplate,
    Turn,
    compile_template,
    has_generation_tags,
    read_template,
    serving_form,
    special_tokens,
    token_text,
    writes_tool_calls,
    writes_tools,
)
from finetune.data.encoding.chat import Chat, SpecialIds, render
from finetune.data.fetching.hub import Repo, cached_file
from finetune.data_sections import TrainTokenizer
from finetune.errors import DataError
from finetune.io import read_json, write_json, write_text
from finetune.tool_forms import canonical_tools

TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
MODEL_CONFIG = "config.json"
SHOWN_TOKENS = 20
# Shapes that a template may render differently once its tags are gone.
PROBES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "a"), ("assistant", "b")),
    (("user", " a \n"), ("assistant", "\n b "), ("user", "c"), ("assistant", "d\n\n")),
    (("system", "s"), ("user", "a"), ("assistant", "b")),
)
TOOLS = canonical_tools([{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}])
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


def write_trained(tokenizer: Tokenizer, params: TrainTokenizer, max_tokens: int, folder: Path) -> None:
    """Write a trained tokenizer so that AutoTokenizer loads it; `max_tokens`: longest row of the training."""
    write_text(folder / TOKENIZER, tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": params.bos_token,
        "eos_token": params.eos_token,
        "pad_token": params.pad_token,
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
    }
    if params.unk_token is not None:
        config["unk_token"] = params.unk_token
    write_json(folder / TOKENIZER_CONFIG, config)


def copy_base_tokenizer(manifest: dict[str, Any], folder: Path) -> Tokenizer:
    """Copy the base model's tokenizer from the Hub cache, without its template, and return it."""
    repo = Repo(manifest["repo_id"], "model", manifest["revision"])
    there = {file["path"] for file in manifest["files"]}
    if TOKENIZER not in there:
        raise DataError(
            f"the base model has no {TOKENIZER}", repo.where(), "choose a revision that has one (a fast tokenizer)"
        )
    for name in TOKENIZER_FILES:
        if name in there:
            shutil.copyfile(cached_file(repo, name), folder / name)
    config = read_json(folder / TOKENIZER_CONFIG) if TOKENIZER_CONFIG in there else {}
    config.pop("chat_template", None)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    # GPT-2's own files name neither: its tokens are defaults of a class, and its model's configuration has their ids.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **(_named_by_model(repo, tokenizer) if MODEL_CONFIG in there else {}),
        **config,
    }
    write_json(folder / TOKENIZER_CONFIG, config)
    return tokenizer


def _named_by_model(repo: Repo, tokenizer: Tokenizer) -> dict[str, str]:
    """The bos and eos tokens by the ids in the model's configuration, where those are special tokens."""
    config, added = read_json(cached_file(repo, MODEL_CONFIG)), tokenizer.get_added_tokens_decoder()
    ids = {name: config.get(f"{name}_id") for name in ("bos_token", "eos_token")}
    return {name: added[token].content for name, token in ids.items() if isinstance(token, int) and token in added}


def base_rows(manifest: dict[str, Any]) -> int:
    """Rows of the base model's embedding table, by the configuration that is in the Hub cache."""
    repo = Repo(manifest["repo_id"], "model", manifest["revision"])
    config = read_json(cached_file(repo, MODEL_CONFIG))
    rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(rows, int):
        raise DataError(f"{MODEL_CONFIG} has no vocab_size", repo.where(), "choose a revision whose configuration has")
    return rows


def choose_pad_token(folder: Path) -> None:
    """Write the token to pad with, which is not eos, into tokenizer_config.json; raises DataError without one."""
    config = read_json(folder / TOKENIZER_CONFIG)
    config["pad_token"] = _pad_token(config, folder)
    write_json(folder / TOKENIZER_CONFIG, config)


def install_templates(template: Path, folder: Path) -> None:
    """Write the template with its generation tags and the serving form without; both print the same text."""
    if not template.is_file():
        raise DataError("file is missing", template, "mend tokenizer.chat_template in params.yaml")
    source = template.read_text(encoding="utf-8")
    if not has_generation_tags(source):
        raise DataError(
            "the chat template has no {% generation %} tag, so nothing says what is trained",
            template,
            "put {% generation %} and {% endgeneration %} around the assistant's turn",
        )
    serving = serving_form(source)
    tokens = special_tokens(folder)
    training_template = compile_template(source, tokens, template)
    serving_template = compile_template(serving, tokens, template)
    tools = TOOLS if writes_tools(training_template) else None
    for number, probe in enumerate(PROBES):
        turns: list[Turn] = [{"role": role, "content": content} for role, content in probe]
        plain = list(turns)
        if number == 0 and writes_tool_calls(training_template):
            turns.append({"role": "assistant", "content": "", "tool_calls": CALLS})
        # Some families refuse system messages; every template writes a question and its answer.
        if number and not _accepts(training_template, turns):
            continue
        for prompt in (False, True):
            trained, served = (
                render(form, turns, template, add_generation_prompt=prompt, tools=tools)
                for form in (training_template, serving_template)
            )
            if trained.text != served.text:
                raise DataError(
                    f"without its generation tags the template prints {served.text!r} instead of {trained.text!r}",
                    template,
                    "put nothing but {% generation %} and {% endgeneration %} in those tags",
                )
        for offered in (None, tools) if number == 0 else (None,):
            _check_prompts(training_template, plain, offered, template)
    write_text(folder / TRAINING_TEMPLATE, source)
    write_text(folder / SERVING_TEMPLATE, serving)


def _check_prompts(chat: ChatTemplate, turns: Sequence[Turn], tools: Any, template: Path) -> None:
    """Raise DataError unless each answer is trained behind just the prompt that a server builds for it."""
    whole = render(chat, turns, template, tools=tools)
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    for index, (start, _) in zip(answers, whole.spans, strict=False):
        prompt = render(chat, turns[:index], template, add_generation_prompt=True, tools=tools).text
        if prompt != whole.text[:start]:
            raise DataError(
                f"an answer is trained after {whole.text[:start]!r}, and served after {prompt!r}",
                template,
                "write the same text before {% generation %} as under `if add_generation_prompt`",
            )


def _accepts(template: ChatTemplate, turns: Sequence[Turn]) -> bool:
    try:
        template.render(turns, add_generation_prompt=False)
    except TemplateError:
        return False
    return True


def load_chat(folder: Path) -> Chat:
    """The tokenizer and training template of models/tokenizer; raises DataError when its special tokens do not fit."""
    if not (folder / TOKENIZER).is_file():
        raise DataError("file is missing", folder / TOKENIZER, "run `dvc repro tokenizer`")
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    template = read_template(folder, TRAINING_TEMPLATE)
    ids = special_ids(tokenizer, template.tokens, folder)
    # It adds special tokens, which the template does here, and may trim white space off the offsets of the mask.
    tokenizer.post_processor = None
    added = tokenizer.get_added_tokens_decoder()
    return Chat(
        tokenizer=tokenizer,
        template=template,
        ids=ids,
        special_texts=tuple(token.content for _, token in sorted(added.items()) if token.special),
    )


def special_ids(tokenizer: Tokenizer, tokens: Mapping[str, str], where: object) -> SpecialIds:
    """Ids of the special tokens; raises DataError when eos or pad is missing, or pad is eos."""
    ids = {name: tokenizer.token_to_id(text) for name, text in tokens.items()}
    eos, pad = ids.get("eos_token"), ids.get("pad_token")
    if eos is None or pad is None or eos == pad:
        raise DataError(
            f"eos ({tokens.get('eos_token')}, id {eos}) and pad ({tokens.get('pad_token')}, id {pad}) "
            "must be two different tokens of the vocabulary",
            where,
            "name them in the section tokenizer of params.yaml, or choose another base model",
        )
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    bos = ids.get("bos_token")
    # A tokenizer without any rule, such as one trained here, leaves BOS to the template.
    needs_bos = bos is not None and (tokenizer.post_processor is None or tokenizer.encode("a").ids[:1] == [bos])
    return SpecialIds(bos, eos, pad, largest + 1, needs_bos)


def _pad_token(config: dict[str, Any], folder: Path) -> str:
    """The base's own pad token unless it is eos; else its first special token that is named a pad, else unk."""
    eos = token_text(config.get("eos_token"))
    added = Tokenizer.from_file(str(folder / TOKENIZER)).get_added_tokens_decoder()
    special = [token.content for _, token in sorted(added.items())]
    named = [content for content in special if "pad" in content.lower()]
    candidates = [token_text(config.get("pad_token")), *named, token_text(config.get("unk_token"))]
    for candidate in candidates:
        if candidate is not None and candidate != eos:
            return candidate
    raise DataError(
        f"the base tokenizer has no token to pad with: eos ({eos}) cannot be it, none is named pad, and there is no "
        f"unk; its {len(special)} added tokens are: {', '.join(special[:SHOWN_TOKENS])}",
        folder / TOKENIZER_CONFIG,
        "set fetch.base_model to a revision that has a pad_token or an unk_token in its tokenizer_config.json "
        "(an instruct variant often has), or add a token whose name has `pad` in it with tokenizer.strategy: extend",
    )
