"""CAPPr, in process: the joint probability of every label, each ended by the end-of-turn token.

Pins (a venv of its own, Python 3.11): cappr==0.9.6 transformers==4.49.0 "tokenizers<0.22"
"huggingface-hub<1" "numpy<2" "accelerate<1.8" torch. Why: cappr 0.9.6 does not import on
transformers 5 and fails on numpy 2. Further keys of the job: `completions`, and `prefix` with a
`prompt` in each row: llmlabel's own prompt, cut at a space, which CAPPr puts back between the two.

With the end token in the completion and the sum instead of the mean of the log-probabilities CAPPr
computes what llmlabel does, so the distributions can be compared. The shared prefix is cached, as
its documentation advises.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from cappr.huggingface.classify import cache, log_probs_conditional
from protocol import Rows, read_job, run
from transformers import AutoModelForCausalLM, AutoTokenizer

MOST_PAIRS = 320  # texts x labels in a batch: 20 MiB each, since CAPPr keeps all logits


def transformers4_folder(model: Path, folder: Path) -> Path:
    """The same weights and tokens, described as transformers 4 expects.

    Version 4 reads neither `rope_parameters` (it would take a rope_theta of 10,000 in silence) nor
    the tokenizer class of version 5.
    """
    for path in model.iterdir():
        if path.name.startswith("model") or path.name == "tokenizer.json":
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((model / "config.json").read_text("utf-8"))
    if "rope_parameters" in config:
        rope = config.pop("rope_parameters")
        if rope["rope_type"] != "default":
            raise SystemExit(f"rope_type {rope['rope_type']!r}: only the default is translated")
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype"))
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tokens = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    tokens["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokens["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens), "utf-8")
    return folder


def main() -> None:
    job = read_job()
    with tempfile.TemporaryDirectory() as temporary:
        folder = transformers4_folder(Path(job["model"]), Path(temporary))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    completions = job["completions"]

    def label(rows: Rows) -> Rows:
        with torch.inference_mode(), cache((model, tokenizer), job["prefix"]) as cached:
            steps = log_probs_conditional(
                [row["prompt"] for row in rows],
                completions,
                cached,
                end_of_prompt="",
                show_progress_bar=False,
                batch_size=max(1, min(8, MOST_PAIRS // len(completions))),
            )
        joint = np.array([[sum(values) for values in row] for row in steps], dtype=np.float64)
        probs = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))
        return [
            {
                "id": row["id"],
                "pred": job["labels"][int(p.argmax())] if np.isfinite(p).all() else None,
                "probs": np.nan_to_num(p).tolist(),
                "label_mass": float(np.exp(values).sum()),
            }
            for row, p, values in zip(rows, probs, joint, strict=True)
        ]

    run(job, label, packages=("cappr", "transformers", "torch", "numpy"))


if __name__ == "__main__":
    main()
