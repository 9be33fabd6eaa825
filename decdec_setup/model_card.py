"""The README.md of a quantized folder: what it is, how it was made, how to run it."""

import re
from pathlib import Path

from decdec.artifacts import QuantConfig
from decdec.text import NAMES as SOURCES

NAMES = {"awq": "AWQ", "squeezellm": "SqueezeLLM", "gptq": "GPTQ", "rtn": "round-to-nearest", "hqq": "HQQ",
         "compressed-tensors": "compressed-tensors"}


def quantize_command(quant: QuantConfig) -> str:
    """The command that made the base weights, as far as their config tells it."""
    calibration = quant.calibration
    if "imported_from" in calibration:
        original = f" --model {quant.base_model}" if "original" in calibration else ""  # else the base model is the checkpoint itself
        return f"python decdec_setup/import_checkpoint.py {calibration['imported_from']} FOLDER{original}"
    mixed = sorted({quant.bits, *quant.layer_bits.values()})
    bits = str(quant.bits) if len(mixed) == 1 else f"{sum(mixed) / 2:g} --bit-map MAP.json"
    options = [f"--model {quant.base_model}", f"--method {quant.method}", f"--bits {bits}"]
    options += [f"--group-size {quant.group_size}"] if quant.group_size else []
    if "text" in calibration:
        text = calibration["text"]  # a file's own name, or "c4-train-0@REVISION" and the like
        source = next((name for name in SOURCES if re.fullmatch(rf"{name}2?-.*(train|train-0|calibration)(@\w+)?", text)), text)
        options += [f"--text {source}", *(f"--{key} {calibration[key]}" for key in ("samples", "length", "seed"))]
    options += ["--no-act-order"] if calibration.get("act_order") is False else []
    return " ".join(["python decdec_setup/quantize.py", *options, "--out FOLDER"])


def card(name: str, quant: QuantConfig, table: str = "", rows: list[dict] = ()) -> str:
    """Markdown; ``table`` describes the layers, ``rows`` are measured perplexities (evaluation/perplexity.py)."""
    bits = " and ".join(map(str, sorted({quant.bits, *quant.layer_bits.values()})))
    text = f"""---
base_model: {Path(quant.base_model).name if quant.base_model.startswith('.') else quant.base_model}
base_model_relation: quantized
library_name: decdec
pipeline_tag: text-generation
tags: [decdec, {quant.method}, quantized]
---

# {name}

{quant.base_model} at {bits} bits by {NAMES.get(quant.method, quant.method)}, for DecDEC: `cheatsheet.pt`, if it is here, holds the
residuals that are fetched from CPU memory while decoding, `thresholds.pt` what calibration saw.

    {quantize_command(quant)}
    python end-to-end/generate.py --model FOLDER --prompt "Hello"
"""
    if rows:
        text += "\n| text | windows x tokens | k_chunk | perplexity |\n|---|---|---|---|\n"
        text += "".join(f"| {row['text']} | {row['windows']} x {row['window_length']} | {row['k_chunk']} | "
                        f"{row['perplexity']:.3f} |\n" for row in rows)
    if table:
        text += f"\n```\n{table}\n```\n"
    return text
