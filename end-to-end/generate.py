"""Generate text with a DecDEC folder (or an original model): prefill, compensated decoding, streamed to stdout.

The prompt comes from --prompt, --prompt-file, --prompts (one a line) or stdin. Tokens per second go to stderr; --json
prints one line with everything instead of the text. Greedy unless --temperature is above 0. --benchmark measures
decoding instead, --profile says where a token's time goes; with --random-weights both need no model.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmark import add_benchmark_arguments, run_benchmark
from decdec import models
from decdec.errors import UserError, run
from runtime import Runtime, bounded_context
from runtime_arguments import (add_runtime_arguments, add_sampling_arguments, compensation_of, make_runtime,
                               sampling_of)
from sampling import Sampling
from streaming import TextStream


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_runtime_arguments(parser, model_required=False)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="the prompt (default: read from stdin)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file that holds the prompt, UTF-8")
    prompt.add_argument("--prompts", metavar="FILE", help="file with a prompt on every line, answered one by one")
    parser.add_argument("--chat", action="store_true", help="make the prompt a user's turn in the chat template")
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, metavar="N",
                        help="default 128, of a benchmark 200")
    add_sampling_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON line a prompt instead of the text")
    add_benchmark_arguments(parser)
    return parser.parse_args()


def check_measuring(arguments: argparse.Namespace) -> None:
    """Refuse what would be left aside: arguments of a measurement without one, and those that contradict each other."""
    for name in ("random_weights", "sweep", "out"):
        if getattr(arguments, name) is not None and not (arguments.benchmark or arguments.profile):
            raise UserError(f"--{name.replace('_', '-')}: goes with --benchmark or --profile")
    for name in ("k_chunk", "plan"):
        if arguments.sweep and getattr(arguments, name) is not None:
            raise UserError(f"--sweep: instead of --{name.replace('_', '-')}, not with it")
    for name in ("model", "plan", "target", "context", "repair"):
        if arguments.random_weights and getattr(arguments, name) not in (None, False):
            raise UserError(f"--random-weights: does not go with --{name}")


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt is not None:
        return [arguments.prompt]
    path = arguments.prompts or arguments.prompt_file
    try:
        if path:
            text = Path(path).read_text(encoding="utf-8")
        else:
            if sys.stdin.isatty():
                print("reading the prompt from stdin; end it with Ctrl-D", file=sys.stderr)
            text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise UserError(f"prompt: expected UTF-8 text in {path or 'stdin'}") from None
    except OSError as error:
        raise UserError(f"{'--prompts' if arguments.prompts else '--prompt-file'}: {path}: {error.strerror}") from None
    if not arguments.prompts:
        return [text]
    if prompts := [line for line in text.split("\n") if line.strip()]:
        return prompts
    raise UserError(f"--prompts: {path}: expected a prompt on every line, got none")


def check_text(text: str) -> None:
    """Refuse a lone surrogate, from JSON or from bytes of an argument or a terminal that are no UTF-8: tokenizers trip over it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("prompt: expected text that UTF-8 can hold, got a lone surrogate") from None


def encode(tokenizer, prompt: str, chat: bool) -> list[int]:
    """Token ids of the prompt; of an empty one the model's first token, if it has one."""
    check_text(prompt)
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


def answer(runtime: Runtime, tokenizer, prompt: list[int], most: int, arguments: argparse.Namespace,
           sampling: Sampling) -> None:
    """Stream the text after one prompt, or print its JSON line."""
    tokens, text, stream = [], [], TextStream(tokenizer, prompt)

    def show(piece: str, end: str = "") -> None:
        text.append(piece)
        if not arguments.json:
            print(piece, end=end, flush=True)

    for token in runtime.stream(prompt, most, sampling):
        tokens.append(token)
        show(stream.push(token))
    show(stream.flush(), end="\n")

    memory, timing = runtime.memory(), runtime.timing
    if arguments.json:
        print(json.dumps({
            "model": arguments.model, "prompt_tokens": len(prompt), "new_tokens": len(tokens), "text": "".join(text),
            "stopped": len(tokens) < most, **runtime.settings(), "temperature": arguments.temperature,
            "top_k": arguments.top_k, "top_p": arguments.top_p, "seed": arguments.seed,
            "threads": torch.get_num_threads(),
            "prefill_tokens_per_s": round(timing.prefill_tokens_per_s, 2),
            "decode_tokens_per_s": round(timing.decode_tokens_per_s, 2), **memory}), flush=True)
    else:
        print(f"prefill {len(prompt)} tokens, {timing.prefill_tokens_per_s:.1f} tokens/s; decode {timing.steps} steps, "
              f"{timing.decode_tokens_per_s:.1f} tokens/s; device {memory['device_bytes'] / 1e6:.0f} MB, "
              f"host {memory['host_bytes'] / 1e6:.0f} MB", file=sys.stderr)


def main() -> None:
    arguments = parse_arguments()
    sampling = sampling_of(arguments)
    compensation_of(arguments)  # what is wrong with it is said before anything is loaded
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: expected a positive number, got {arguments.max_new_tokens}")
    check_measuring(arguments)
    if arguments.benchmark or arguments.profile:
        run_benchmark(arguments, sampling)
        return
    if arguments.model is None:
        raise UserError("--model: expected a DecDEC folder, or an original model's folder or hub id")
    tokenizer = models.load_tokenizer(arguments.model)
    context = bounded_context(models.context_length(arguments.model), arguments.context)
    prompts = [encode(tokenizer, prompt, arguments.chat) for prompt in read_prompts(arguments)]
    wanted = arguments.max_new_tokens or 128
    for prompt in prompts:
        if len(prompt) >= context:
            raise UserError(f"prompt: {len(prompt)} tokens, but the model's context is {context}")
    runtime = make_runtime(arguments)
    for prompt in prompts:
        most = min(wanted, context - len(prompt))
        if most < wanted:
            print(f"only {most} new tokens fit the context of {context}", file=sys.stderr)
        answer(runtime, tokenizer, prompt, most, arguments, sampling)


if __name__ == "__main__":
    run(main)
