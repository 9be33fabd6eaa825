"""Generate text with a DecDEC folder (or an original model): prefill, compensated decoding, streamed to stdout.

The prompt comes from --prompt, --prompt-file or stdin. Tokens per second go to stderr; --json prints one line with
everything instead of the text. Greedy unless --temperature is above 0.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from decdec import models
from decdec.errors import UserError, run
from decdec.linear import Compensation
from decdec.placement import PLACES
from runtime import DTYPES, Runtime
from sampling import Sampling
from streaming import TextStream


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="DecDEC folder, or an original model's folder or hub id")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="the prompt (default: read from stdin)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file that holds the prompt, UTF-8")
    parser.add_argument("--chat", action="store_true", help="make the prompt a user's turn in the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--k-chunk", type=int, default=0, metavar="K",
                        help="channels compensated in every 1024-wide chunk, 0..1024 (default 0: the base model)")
    parser.add_argument("--selection", default="bucket", choices=("bucket", "exact"),
                        help="how channels are chosen (default bucket, the paper's)")
    parser.add_argument("--compensate-prefill", action="store_true", help="compensate the prompt's positions too")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default 0)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="sample from the likeliest P of the probability mass (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument("--dtype", choices=DTYPES,
                        help="of activations and unquantized weights (default float16 on a GPU, float32 on the CPU)")
    parser.add_argument("--head-bits", type=int, default=16, choices=(8, 16),
                        help="8 rounds the output head to 8 bits (default 16: as it is)")
    parser.add_argument("--residuals", default="host", choices=PLACES,
                        help="where a GPU reads the residuals: pinned host memory or its own (default host)")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the text")
    return parser.parse_args()


def read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        return arguments.prompt
    try:
        if arguments.prompt_file:
            return Path(arguments.prompt_file).read_text(encoding="utf-8")
        if sys.stdin.isatty():
            print("reading the prompt from stdin; end it with Ctrl-D", file=sys.stderr)
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise UserError(f"prompt: expected UTF-8 text in {arguments.prompt_file or 'stdin'}") from None
    except OSError as error:
        raise UserError(f"--prompt-file: {arguments.prompt_file}: {error.strerror}") from None


def encode(tokenizer, prompt: str, chat: bool) -> list[int]:
    """Token ids of the prompt; of an empty one the model's first token, if it has one."""
    if chat:
        if not tokenizer.chat_template:
            raise UserError("--chat: this model has no chat template")
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise UserError("prompt: expected text, got none")
    return ids


def main() -> None:
    arguments = parse_arguments()
    compensation = Compensation(arguments.k_chunk, arguments.selection, arguments.compensate_prefill)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: expected a positive number, got {arguments.max_new_tokens}")
    tokenizer = models.load_tokenizer(arguments.model)
    context = models.context_length(arguments.model)
    prompt = encode(tokenizer, read_prompt(arguments), arguments.chat)
    if len(prompt) >= context:
        raise UserError(f"prompt: {len(prompt)} tokens, but the model's context is {context}")
    max_new_tokens = min(arguments.max_new_tokens, context - len(prompt))
    if max_new_tokens < arguments.max_new_tokens:
        print(f"only {max_new_tokens} new tokens fit the context of {context}", file=sys.stderr)

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    runtime = Runtime(arguments.model, compensation, arguments.device, dtype, arguments.head_bits, arguments.residuals)
    tokens, text, stream = [], [], TextStream(tokenizer, prompt)

    def show(piece: str, end: str = "") -> None:
        text.append(piece)
        if not arguments.json:
            print(piece, end=end, flush=True)

    for token in runtime.stream(prompt, max_new_tokens, sampling):
        tokens.append(token)
        show(stream.push(token))
    show(stream.flush(), end="\n")

    memory, timing = runtime.memory(), runtime.timing
    if arguments.json:
        print(json.dumps({
            "model": arguments.model, "prompt_tokens": len(prompt), "new_tokens": len(tokens), "text": "".join(text),
            "stopped": len(tokens) < max_new_tokens, "k_chunk": arguments.k_chunk,
            "selection": arguments.selection if arguments.k_chunk else "none",
            "compensate_prefill": arguments.compensate_prefill, "temperature": arguments.temperature,
            "top_k": arguments.top_k, "top_p": arguments.top_p, "seed": arguments.seed,
            "dtype": str(runtime.dtype).removeprefix("torch."), "device": str(runtime.device),
            "head_bits": arguments.head_bits, "threads": torch.get_num_threads(),
            "prefill_tokens_per_s": round(timing.prefill_tokens_per_s, 2),
            "decode_tokens_per_s": round(timing.decode_tokens_per_s, 2), **memory}))
    else:
        print(f"prefill {len(prompt)} tokens, {timing.prefill_tokens_per_s:.1f} tokens/s; decode {timing.steps} steps, "
              f"{timing.decode_tokens_per_s:.1f} tokens/s; device {memory['device_bytes'] / 1e6:.0f} MB, "
              f"host {memory['host_bytes'] / 1e6:.0f} MB", file=sys.stderr)


if __name__ == "__main__":
    run(main)
