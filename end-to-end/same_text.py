"""The same greedy text from every path: our decoder and Hugging Face's, on the CPU and, where there is one, the GPU.

A path's tokens are compared with those of the first, our decoder in float32 on the CPU. Where they part, the row says why:

* a tie of the logits: there the two tokens' logits lie within 0.02 standard deviations;
* a tie of a selection: the other token's is the largest, or lies so near it, once the CPU takes the channels that the
  other path selected, and wherever these are not its own, the channels that changed places differ by less than 5 %;
* or it is no tie, and one of the paths is wrong; the script ends with an error then.

Rows go to stdout, and to --out.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from decdec import hub, models
from decdec.errors import UserError, run
from decdec.files import append_row
from decdec.linear import Compensation
from decdec.testing import logits_of_hugging_face
from decoder import Decoder
from runtime import Runtime, default_device
from selections import Selections, recorded, replayed

PROMPTS = ("The three most important things about the Python language are", "A tree is", "In 1969, the first",
           "def fibonacci(n):", "The recipe for a good soup begins with")
TIE = 0.02  # standard deviations of the logits
CHANNEL_TIE = 0.05  # of a channel's magnitude: float16 in 30 blocks tips channels up to 1.4 % apart (SmolLM2)

SAME, LOGITS, SELECTION, NO_TIE = "same", "tie of the logits", "tie of a selection", "no tie"
Reread = Callable[[Tensor, list[int]], Selections]  # reads a prompt and tokens after it, and tells what was selected


def texts(folder: str, device: str, ids: list[Tensor], setting: Compensation,
          new_tokens: int) -> Iterator[tuple[str, list[list[int]], Reread]]:
    """Path, tokens after every prompt, and how the path reads a text again, on one device."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    runtime = Runtime(folder, setting, device, dtype)
    yield (f"decoder {device}", [list(runtime.stream(prompt.tolist(), new_tokens, stop=())) for prompt in ids],
           lambda *text: selected_by_decoder(runtime.decoder, *text))
    del runtime
    model = hub.load(folder, dtype, setting, device=device)
    model.generation_config = GenerationConfig()  # the arithmetic is compared, not the folder's penalties
    options = dict(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    yield (f"hugging face {device}", [
        model.generate(prompt[None].to(device), attention_mask=torch.ones_like(prompt)[None].to(device), **options)
        [0, len(prompt):].tolist() for prompt in ids], lambda *text: selected_by_hugging_face(model, *text))


def logits_along(decoder: Decoder, prompt: Tensor, tokens: list[int]) -> Tensor:
    """Logits ``(vocab,)`` after ``prompt`` ``(T,)`` and ``tokens``, read one by one, as :func:`generation.generate` does."""
    if len(prompt) + len(tokens) > decoder.places:
        decoder.allocate(len(prompt) + len(tokens))
    device = decoder.embed.weight.device
    whole = torch.cat((prompt, torch.tensor(tokens, dtype=torch.int64))).to(device)
    logits = decoder.prefill(whole[:len(prompt)])
    for position in range(len(prompt), len(whole)):
        if position == decoder.rotary.long_from:
            logits = decoder.prefill(whole[:position + 1])
        else:
            logits = decoder.step(whole[position:position + 1], torch.tensor([position], device=device))
    return logits


def selected_by_decoder(decoder: Decoder, prompt: Tensor, tokens: list[int]) -> Selections:
    with recorded(decoder) as selections:
        logits_along(decoder, prompt, tokens)
    return selections


def selected_by_hugging_face(model: nn.Module, prompt: Tensor, tokens: list[int]) -> Selections:
    with recorded(model) as selections:
        logits_of_hugging_face(model, torch.cat((prompt, torch.tensor(tokens, dtype=torch.int64))), len(prompt))
    return selections


def parting(judge: Decoder, prompt: Tensor, first: list[int], other: list[int], reread: Reread) -> dict:
    """Where ``other`` leaves ``first``, the text of ``judge`` in float32 on the CPU, and why.

    ``gap``: how far the other's token there lies behind the judge's first, in standard deviations of the judge's logits;
    ``gap_replayed``: the same with the channels that the other path selects on its way there (``reread``), ``tipped`` of
    ``selections`` being others than the judge's own, ``widest`` apart.
    """
    at = next((i for i, (a, b) in enumerate(zip(first, other)) if a != b), None)
    row = {"verdict": SAME, "parts_at": at, "gap": None, "gap_replayed": None, "tipped": None, "selections": None, "widest": None}
    if at is None:
        return row
    of_first, row["gap"] = _behind(judge, prompt, first[:at], first[at], other[at])
    if of_first >= TIE or row["gap"] < TIE:
        return row | {"verdict": LOGITS if of_first < TIE else NO_TIE}
    with replayed(judge, reread(prompt, first[:at])) as tips:
        row["gap_replayed"], = _behind(judge, prompt, first[:at], other[at])
    tie = row["gap_replayed"] < TIE and tips.count and tips.widest < CHANNEL_TIE
    return row | {"verdict": SELECTION if tie else NO_TIE, "tipped": tips.count, "selections": tips.of,
                  "widest": round(tips.widest, 5)}


def _behind(judge: Decoder, prompt: Tensor, tokens: list[int], *next_tokens: int) -> list[float]:
    """How far each of ``next_tokens`` lies behind the best one after ``prompt`` and ``tokens``, in standard deviations."""
    logits = logits_along(judge, prompt, tokens)
    return [round(float((logits.max() - logits[token]) / logits.std()), 5) for token in next_tokens]


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
    wrong = []
    for k_chunk in arguments.k_chunk:
        setting = Compensation(k_chunk, "exact", repair=arguments.repair)
        judge, first = Runtime(arguments.model, setting, "cpu").decoder, None
        layer = next(iter(hub.compensated_layers(judge).values()), None)
        if layer is None:
            raise UserError(f"--model: {arguments.model} is not a DecDEC folder")
        what = {"bench": "same text", "model": Path(arguments.model).resolve().name, "residual_bits": layer.residual_bits,
                "nested": layer.nested, "k_chunk": k_chunk, "repair": arguments.repair}
        for device in dict.fromkeys(("cpu", default_device())):
            for path, tokens, reread in texts(arguments.model, device, ids, setting, arguments.max_new_tokens):
                first = first or tokens
                for prompt, text, one, other in zip(ids, PROMPTS, first, tokens):
                    row = {**what, "path": path, "prompt": text, "new_tokens": arguments.max_new_tokens,
                           **parting(judge, prompt, one, other, reread)}
                    print(json.dumps(row), flush=True)
                    if arguments.out:
                        append_row(arguments.out, row)
                    if row["verdict"] == NO_TIE:
                        wrong.append(f"{path} at k_chunk {k_chunk} after {text!r}")
    if wrong:
        raise UserError(f"text: expected the CPU decoder's up to a tie, got another from {', '.join(wrong)}")


if __name__ == "__main__":
    run(main)
