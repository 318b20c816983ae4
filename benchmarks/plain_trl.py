"""The peer of the training benchmarks: QLoRA by plain TRL as its documentation shows it, `plain_trl.py RUN.json`.

RUN.json names what the project's own run gets too: `base`, `tokenizer`, `rows`, `validation`, `adapter`, `checkpoints`,
`seed`, `threads`, the section `train_qlora`, and `resume`, `kill_at_step` and `report`; `float32_adapter` is for TRL
alone. Imports nothing of the project.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

UNTRAINED = -100


class Watch(TrainerCallback):  # type: ignore[misc]
    """Notes where the run started, writes the time of its first step to `report`, and dies at `kill_at_step`."""

    def __init__(self, report: Path, kill_at_step: int | None) -> None:
        self.report, self.kill_at_step = report, kill_at_step
        self.facts: dict[str, Any] = {}

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Note the step that the run goes on from."""
        self.facts["from_step"] = state.global_step
        self.write()

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Write the time of the first step, on the clock that all processes share; kill at the step asked for."""
        if "first_step_at_s" not in self.facts:
            self.facts["first_step_at_s"] = time.monotonic()
            self.write()
        if state.global_step == self.kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self) -> None:
        """Put the facts into the report file."""
        self.report.write_text(json.dumps(self.facts), encoding="utf-8")


def validation_rows(path: str) -> Dataset:
    """Rows with `input_ids` and `trained` as the trainer's labels."""
    rows = Dataset.from_parquet(path)
    return rows.map(
        lambda row: {
            "labels": [
                token if trained else UNTRAINED for token, trained in zip(row["input_ids"], row["trained"], strict=True)
            ],
            "seq_lengths": [len(row["input_ids"])],
        },
        remove_columns=[name for name in rows.column_names if name != "input_ids"],
    )


def sft_config(run: dict[str, Any]) -> SFTConfig:
    """The project's settings under TRL's names; checkpoints and evaluations come at the same steps."""
    section = run["train_qlora"]
    evaluates = run["validation"] is not None
    return SFTConfig(
        output_dir=run["checkpoints"],
        seed=run["seed"],
        use_cpu=not torch.cuda.is_available(),
        bf16=section["compute_dtype"] == "bfloat16",
        num_train_epochs=section["epochs"],
        per_device_train_batch_size=section["micro_batch_rows"],
        gradient_accumulation_steps=section["batch_rows"] // section["micro_batch_rows"],
        learning_rate=section["learning_rate"],
        lr_scheduler_type=section["scheduler"],
        warmup_steps=section["warmup_share"],
        weight_decay=section["weight_decay"],
        max_grad_norm=section["max_gradient_norm"],
        optim=section["optimizer"],
        gradient_checkpointing=section["gradient_checkpointing"] != "none",
        logging_steps=section["log_every_steps"],
        eval_strategy="steps" if evaluates else "no",
        eval_steps=section["evaluate_every_steps"] if evaluates else None,
        save_steps=section["save_every_steps"],
        save_total_limit=section["keep_checkpoints"],
        report_to="none",
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def train(run: dict[str, Any]) -> None:
    """Train the adapter of RUN.json, save it, and write the report."""
    if run["threads"]:
        torch.set_num_threads(run["threads"])
    section = run["train_qlora"]
    lora, dtype = section["lora"], getattr(torch, section["compute_dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        run["base"],
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=section["quantization"]["format"],
            bnb_4bit_use_double_quant=section["quantization"]["double_quantization"],
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    watch = Watch(Path(run["report"]), run["kill_at_step"])
    trainer = SFTTrainer(
        model=model,
        args=sft_config(run),
        train_dataset=Dataset.from_parquet(run["rows"]),
        eval_dataset=None if run["validation"] is None else validation_rows(run["validation"]),
        processing_class=AutoTokenizer.from_pretrained(run["tokenizer"]),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            target_modules=lora["target_modules"],
        ),
        callbacks=[watch],
    )
    if run["float32_adapter"]:
        # TRL has just cast it to bfloat16, which is another arithmetic, and on a processor with AMX a faster one.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train(resume_from_checkpoint=run["resume"])
    if run["validation"] is not None and trainer.state.global_step % section["evaluate_every_steps"]:
        trainer.evaluate()
    trainer.save_model(run["adapter"])
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    watch.facts |= {"steps": trainer.state.global_step, "validations": len(losses), "validation_loss": losses[-1:]}
    watch.write()


def train_with_defaults(
    model: Any, tokenizer: Any, rows: Dataset, folder: Path, batch_rows: int, **changes: Any
) -> None:
    """One epoch of packed rows with TRL's defaults and LoRA of rank 16 on all linear layers; nothing is saved."""
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=batch_rows,
        save_strategy="no",
        report_to="none",
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        **changes,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora).train()


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
