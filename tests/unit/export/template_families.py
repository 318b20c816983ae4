"""Each template of chat_templates/ -> the special tokens of its family, a tokenizer that has them, and a GGUF of it.

One byte-level BPE is trained at home and every family adds its own tokens; the GGUFs (vocabulary alone) come out of
the real converter, in one process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tiny_gguf import CORPUS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig

from finetune.chat_template import SERVING_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, TRAINING_TEMPLATE, serving_form
from finetune.io import write_json
from finetune.pretokenizer import LLAMA3_PATTERN
from finetune.tools import tool_path

LIBRARY = Path("chat_templates")
NAMES = tuple(sorted(file.stem for file in LIBRARY.glob("*.jinja")))
CONTEXT_TOKENS = 4096
VOCABULARY = 400


@dataclass(frozen=True)
class Family:
    """The tokens that a family's own tokenizer has; `turn_end` ends an assistant's turn and is not always eos.

    `special` and `plain` are added tokens (plain ones are ordinary text to a decoder); `bos` is None where the
    tokenizer names none, and `add_bos` is its own rule. `strips`: special tokens take the white space after them.
    """

    bos: str | None
    eos: str
    pad: str
    turn_end: str
    add_bos: bool
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    strips: tuple[str, ...] = ()

    def tokens(self) -> dict[str, str]:
        """The special tokens map of the tokenizer."""
        named = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        return {name: token for name, token in named.items() if token is not None}

    def all_special(self) -> list[str]:
        """Every special token once, in a fixed order."""
        return list(dict.fromkeys([*self.tokens().values(), self.turn_end, *self.special]))


LLAMA3 = Family(
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
    turn_end="<|eot_id|>",
    add_bos=True,
    special=("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"),
)
CHATML = Family(None, "<|im_end|>", "<|endoftext|>", "<|im_end|>", add_bos=False, special=("<|im_start|>",))
QWEN = Family(
    None,
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_end|>",
    add_bos=False,
    special=("<|im_start|>",),
    plain=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
INSTRUCT = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]")
MISTRAL = Family("<s>", "</s>", "<unk>", "</s>", add_bos=True, special=(*INSTRUCT, "[/TOOL_RESULTS]"))
MISTRAL_V7 = Family(
    "<s>", "</s>", "<unk>", "</s>", add_bos=True, special=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
)
# The end of a turn of Gemma and Phi-3 is not their eos: llama.cpp stops at it by its text.
GEMMA = Family("<bos>", "<eos>", "<pad>", "<end_of_turn>", add_bos=True, special=("<start_of_turn>",))
PHI3_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PHI3 = Family(
    "<s>",
    "<|endoftext|>",
    "<unk>",
    "<|end|>",
    add_bos=False,
    special=("</s>", *PHI3_MARKERS),
    strips=("</s>", *PHI3_MARKERS),
)
PHI4 = Family(
    "<|endoftext|>", "<|im_end|>", "<|dummy_85|>", "<|im_end|>", add_bos=False, special=("<|im_start|>", "<|im_sep|>")
)
# Zephyr writes its role markers as ordinary text.
PLAIN_MARKERS = Family("<s>", "</s>", "<unk>", "</s>", add_bos=True)
ROLE_MARKERS = Family(
    "<s>", "</s>", "<pad>", "</s>", add_bos=False, special=("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
)
USER_ASSISTANT = Family("<s>", "</s>", "<pad>", "</s>", add_bos=False, special=("<user>", "<assistant>"))
FAMILIES = {
    "chatml": CHATML,
    "chatml_tools": QWEN,
    "gemma": GEMMA,
    "gemma_linear": GEMMA,
    "llama3": LLAMA3,
    "llama3_1": LLAMA3,
    "llama3_linear": LLAMA3,
    "mistral": MISTRAL,
    "mistral_v7": MISTRAL_V7,
    "phi3": PHI3,
    "phi3_linear": PHI3,
    "phi4": PHI4,
    "qwen2": QWEN,
    "qwen3": QWEN,
    "role_markers": ROLE_MARKERS,
    "tweet": PLAIN_MARKERS,
    "user_assistant": USER_ASSISTANT,
    "zephyr": PLAIN_MARKERS,
}
# Runs the project's launcher of the converter for each folder, which names the model too; torch is imported once.
CONVERT_ALL = """
import sys, tempfile
from pathlib import Path
from finetune.export.converter import converter_arguments, main
for folder in map(Path, sys.argv[2:]):
    with tempfile.TemporaryDirectory() as keys:
        arguments = converter_arguments(folder, folder / "model.gguf", "f32", folder.name, {}, Path(keys))
        main(sys.argv[1], [*arguments, "--vocab-only"])
"""


def library_text(name: str) -> str:
    """The template of the library, with its generation tags."""
    return (LIBRARY / f"{name}.jinja").read_text(encoding="utf-8")


def train_base() -> Tokenizer:
    """A byte-level BPE without a special token."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, initial_alphabet=alphabet)
    )
    return tokenizer


def write_family(folder: Path, base: str, family: Family, template: str) -> None:
    """A model folder as the converter and transformers read it: tokenizer, both templates and a configuration."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_str(base)
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False, rstrip=text in family.strips)
            for text in family.all_special()
        ]
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.plain])
    if family.add_bos and family.bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))]
        )
    tokenizer.save(str(folder / TOKENIZER))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": family.add_bos, **family.tokens()}
    write_json(folder / TOKENIZER_CONFIG, {**config, "clean_up_tokenization_spaces": False})
    (folder / SERVING_TEMPLATE).write_text(serving_form(template), encoding="utf-8")
    (folder / TRAINING_TEMPLATE).write_text(template, encoding="utf-8")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=None if family.bos is None else tokenizer.token_to_id(family.bos),
        eos_token_id=tokenizer.token_to_id(family.eos),
        pad_token_id=tokenizer.token_to_id(family.pad),
    ).save_pretrained(folder)


def convert_all(folders: Collection[Path]) -> None:
    """Write `model.gguf` into each folder, by the real converter in one process."""
    command = [sys.executable, "-c", CONVERT_ALL, str(tool_path("convert")), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
