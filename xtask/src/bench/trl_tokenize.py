"""Tokenizes the first rows of a file as TRL's DPOTrainer does, with two processes, and prints rows a second."""

import sys
import time
import types

from datasets import disable_caching, load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

model, file, rows, out = sys.argv[1:]
disable_caching()
data = load_dataset("json", data_files=file, split="train")
data = data.select(range(min(int(rows), len(data))))
tokenizer = AutoTokenizer.from_pretrained(model)
args = DPOConfig(output_dir=out, dataset_num_proc=2, bf16=False, report_to="none")
started = time.time()
DPOTrainer._prepare_dataset(types.SimpleNamespace(_tokenizer=tokenizer), data, tokenizer, args, "train")
seconds = time.time() - started
print("TRL_ROWS_PER_SECOND", len(data) / seconds)
