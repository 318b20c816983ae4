"""A quantised GGUF and the tokenizer's chat template -> a Modelfile whose prompts are the trained ones."""

from __future__ import annotations

import os
from pathlib import Path

from finetune.chat_template import SERVING_TEMPLATE, read_template
from finetune.errors import ExportError
from finetune.export.gguf_vocab import ends_generation, open_vocab, read_facts
from finetune.export.modelfile import Modelfile, render_modelfile
from finetune.export.parity import compare_prompts, read_trained, require_parity
from finetune.export.parity_chats import parity_chats
from finetune.export.template import derive_template, go_template
from finetune.io import write_json, write_text
from finetune.log import logger
from finetune.sections import OllamaModelfile
from finetune.stages._main import stage_main
from finetune.tools import GOTEMPLATE, tool_path

PARAMS = ("ollama_modelfile",)


def run(gguf: Path, tokenizer: Path, out: Path, metrics: Path, *, ollama_modelfile: OllamaModelfile) -> None:
    """Derive the Go TEMPLATE, prove it by token ids, then write the Modelfile; FROM is relative to its folder."""
    settings = ollama_modelfile
    model = gguf / f"model-{settings.quantization}.gguf"
    vocab = open_vocab(model)
    facts = read_facts(vocab, model)
    chat = read_template(tokenizer, SERVING_TEMPLATE)
    linear = derive_template(chat)
    roles = linear.role_names()
    if settings.system and "system" not in roles:
        raise ExportError(
            "the chat template has no system role",
            "params.yaml: ollama_modelfile.system",
            'set ollama_modelfile.system to ""',
        )
    turn_end = next(form.suffix for form in linear.roles if form.role == "assistant")
    eos = chat.tokens.get("eos_token")
    if facts.eos_token != eos or not ends_generation(vocab, turn_end):
        raise ExportError(
            f"answers would never stop: the template ends them with {turn_end!r}, the GGUF's end token is "
            f"{facts.eos_token!r} and the tokenizer's {eos!r}",
            model,
            "end assistant messages with eos_token in the chat template, and run `dvc repro`",
        )
    text = go_template(linear, add_bos=facts.add_bos)
    chats = parity_chats(roles, settings.system)
    report = compare_prompts(chats, read_trained(tokenizer), vocab, facts, text, tool_path(GOTEMPLATE))
    require_parity(report, model)
    stops = tuple(dict.fromkeys([facts.eos_token, *settings.stop]))
    modelfile = Modelfile(
        from_path=Path(os.path.relpath(model, out)).as_posix(),
        template=text,
        system=settings.system,
        num_ctx=settings.num_ctx,
        temperature=settings.temperature,
        top_p=settings.top_p,
        repeat_penalty=settings.repeat_penalty,
        stops=stops,
    )
    write_text(out / "Modelfile", render_modelfile(modelfile, context_tokens=facts.context_tokens))
    write_text(out / "template.gotmpl", text)
    numbers = {"chats": report.chats, "parity": report.share(), "add_bos": facts.add_bos, "num_ctx": settings.num_ctx}
    write_json(metrics, {**numbers, "stops": list(stops), "roles": roles})
    logger.info("%d chats, parity %.1f, add_bos %s, num_ctx %d", *numbers.values())


if __name__ == "__main__":
    stage_main(run, PARAMS)
