"""The same greedy text from every path: our decoder and Hugging Face's, on the CPU and, where there is one, the GPU.

A path's tokens are compared with those of the first, our decoder in float32 on the CPU. Where they part, the row says
by how much the two tokens' logits differ there, in standard deviations of the logits: small, it was a tie that rounding
broke. Rows go to stdout, and to --out.
"""

import argparse
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from decdec import hub, models
from decdec.errors import UserError, run
from decdec.files import append_row
from decdec.linear import Compensation
from runtime import Runtime, default_device
from sampling import Sampling

PROMPTS = ("The three most important things about the Python language are", "A tree is", "In 1969, the first",
           "def fibonacci(n):", "The recipe for a good soup begins with")


def texts(folder: str, device: str, ids: list[Tensor], setting: Compensation, new_tokens: int) -> Iterator[tuple]:
    """Path and tokens after every prompt on one device."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    runtime = Runtime(folder, setting, device, dtype)
    yield f"decoder {device}", [list(runtime.stream(prompt.tolist(), new_tokens, stop=())) for prompt in ids]
    del runtime
    model = hub.load(folder, dtype, setting, device=device)
    options = dict(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    yield f"hugging face {device}", [
        model.generate(prompt[None].to(device), attention_mask=torch.ones_like(prompt)[None].to(device), **options)
        [0, len(prompt):].tolist() for prompt in ids]


def parting(runtime: Runtime, prompt: Tensor, first: list[int], other: list[int]) -> dict:
    """Where ``other`` leaves ``first``, and how far apart the two tokens' logits are there."""
    at = next((i for i, (a, b) in enumerate(zip(first, other)) if a != b), None)
    if at is None:
        return {"parts_at": None, "gap": None}
    runtime.stepper.begin(len(prompt) + at + 1, Sampling())
    logits = runtime.decoder.prefill(prompt)
    for i, token in enumerate(first[:at]):
        logits = runtime.decoder.step(torch.tensor([token]), torch.tensor([len(prompt) + i]))
    return {"parts_at": at, "gap": round(float(abs(logits[first[at]] - logits[other[at]]) / logits.std()), 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="DecDEC folder")
    parser.add_argument("--k-chunk", type=int, nargs="+", default=[0, 16], metavar="K", help="default 0 16")
    parser.add_argument("--repair", action="store_true", help="with the folder's static repair")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--out", metavar="ROWS.jsonl", help="append a row for every path, prompt and k_chunk")
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: expected a positive number, got {arguments.max_new_tokens}")
    tokenizer = models.load_tokenizer(arguments.model)
    ids = [tokenizer(prompt, return_tensors="pt").input_ids[0] for prompt in PROMPTS]
    for k_chunk in arguments.k_chunk:
        setting = Compensation(k_chunk, repair=arguments.repair)
        judge, first = Runtime(arguments.model, setting, "cpu"), None
        for device in dict.fromkeys(("cpu", default_device())):
            for path, tokens in texts(arguments.model, device, ids, setting, arguments.max_new_tokens):
                first = first or tokens
                for prompt, text, one, other in zip(ids, PROMPTS, first, tokens):
                    row = {"bench": "same text", "path": path, "k_chunk": k_chunk, "repair": arguments.repair, "prompt": text,
                           "new_tokens": arguments.max_new_tokens, **parting(judge, prompt, one, other)}
                    print(json.dumps(row), flush=True)
                    if arguments.out:
                        append_row(arguments.out, row)


if __name__ == "__main__":
    run(main)
