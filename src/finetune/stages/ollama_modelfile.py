"""A quantised GGUF and the tokenizer's chat template -> a Modelfile whose prompts are the trained ones."""

from __future__ import annotations

import os
from pathlib import Path

from finetune.chat_template import SERVING_TEMPLATE, read_template
from finetune.export.gguf_vocab import open_vocab, read_facts
from finetune.export.modelfile import Modelfile, render_modelfile
from finetune.export.parity import compare_prompts, read_trained, require_parity
from finetune.export.parity_chats import parity_chats
from finetune.export.renderer import serve_by_go, serve_by_jinja
from finetune.export.serving_checks import check_system, check_turn_end
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
    serve = serve_by_go if settings.renderer == "go" else serve_by_jinja
    served = serve(chat, facts.chat_template, add_bos=facts.add_bos)
    roles = list(served.roles)
    check_system(settings.system, roles)
    stop = check_turn_end(vocab, facts, chat, model)
    chats = parity_chats(roles, settings.system, tools=served.tools, tool_calls=served.tool_calls)
    program, trained = tool_path(GOTEMPLATE), read_trained(tokenizer)
    report = compare_prompts(chats, trained, vocab, facts, served.text, program, functions_in_go=served.functions_in_go)
    require_parity(report, model)
    stops = tuple(dict.fromkeys([stop, facts.eos_token, *settings.stop]))
    modelfile = Modelfile(
        from_path=Path(os.path.relpath(model, out)).as_posix(),
        template=served.text,
        system=settings.system,
        num_ctx=settings.num_ctx,
        temperature=settings.temperature,
        top_p=settings.top_p,
        repeat_penalty=settings.repeat_penalty,
        stops=stops,
        requires=served.requires,
    )
    write_text(out / "Modelfile", render_modelfile(modelfile, context_tokens=facts.context_tokens))
    write_text(out / "template.gotmpl", served.text)
    numbers = {"chats": report.chats, "parity": report.share(), "add_bos": facts.add_bos, "num_ctx": settings.num_ctx}
    chosen = {"renderer": settings.renderer, "tools": served.tools}
    write_json(metrics, {**numbers, **chosen, "stops": list(stops), "roles": roles})
    logger.info("%d chats, parity %.1f, add_bos %s, num_ctx %d", *numbers.values())


if __name__ == "__main__":
    stage_main(run, PARAMS)
