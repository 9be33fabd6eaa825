"""The arguments that say what runs and how, the same for every script that gives text, and the runtime they ask for."""

import argparse
import sys
from pathlib import Path

from decdec.artifacts import REPAIR
from decdec.errors import UserError
from decdec.linear import Compensation
from decdec.models import KINDS
from decdec.placement import PLACES
from decdec.plan import PLAN, load_plan, this_device
from runtime import DTYPES, Runtime
from sampling import Sampling

# Flags of the original artifact that have another form here.
ANSWERS = {"--bitwidth": "a DecDEC folder says its own bits; with --random-weights give --bits",
           "--backend": "a DecDEC folder says its own format; with --random-weights give --format",
           "--compile": "every token is one CUDA graph already; leave the flag out",
           "--print_result": "the text is always printed; --json puts it into one line with the timing"}


class _Answered(argparse.Action):
    """A flag of the original artifact that is answered with what to do instead."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise UserError(f"{option_string}: {ANSWERS[option_string]}")


def add_runtime_arguments(parser: argparse.ArgumentParser, model_required: bool = True) -> None:
    parser.add_argument("--model", "--model_name", "--checkpoint_path", required=model_required,
                        help="DecDEC folder, or an original model's folder or hub id")
    parser.add_argument("--k-chunk", "--k_chunks", type=int, nargs="+", metavar="K",
                        help="channels compensated in every 1024-wide chunk, 0..1024, for all layers or for "
                             f"{' '.join(KINDS)} (default: the folder's {PLAN} if it was tuned for this GPU, else 0)")
    parser.add_argument("--n-tb", "--n_tbs", type=int, nargs="+", metavar="N", default=[8],
                        help="thread blocks that fetch on a GPU, likewise (default 8)")
    parser.add_argument("--plan", metavar="FILE", help="a plan of the autotuner; on a CPU its k_chunk alone matters")
    parser.add_argument("--target", type=float, metavar="PERCENT", help="of the plan's targets (default: its first)")
    parser.add_argument("--selection", default="exact", choices=("exact", "bucket"),
                        help="how channels are chosen: by exact magnitude (the default) or by the paper's buckets")
    parser.add_argument("--repair", action="store_true",
                        help=f"with the folder's static repair ({REPAIR}), which decdec_setup/repair.py makes")
    parser.add_argument("--compensate-prefill", action="store_true", help="compensate the prompt's positions too")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument("--dtype", choices=DTYPES,
                        help="of activations and unquantized weights (default float16 on a GPU, float32 on the CPU)")
    parser.add_argument("--head-bits", type=int, default=16, choices=(8, 16),
                        help="8 rounds the output head to 8 bits (default 16: as it is)")
    parser.add_argument("--context", type=int, metavar="N",
                        help="longest sequence, prompt and answer together, which bounds the cache's memory (default: the model's)")
    parser.add_argument("--residuals", default="host", choices=PLACES,
                        help="where a GPU reads the residuals: pinned host memory or its own (default host)")
    for flag in ANSWERS:
        parser.add_argument(flag, nargs="*", action=_Answered, help=argparse.SUPPRESS)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default 0)")
    parser.add_argument("--top-k", "--top_k", type=int, default=0, metavar="K",
                        help="sample from the K likeliest (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="sample from the likeliest P of the probability mass (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    return Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)


def compensation_of(arguments: argparse.Namespace) -> Compensation | dict[str, Compensation]:
    """What ``--k-chunk`` and ``--n-tb`` ask for: one setting, or one for each kind of layer."""
    k_chunks = arguments.k_chunk or [0]
    for flag, values in (("--k-chunk", k_chunks), ("--n-tb", arguments.n_tb)):
        if len(values) not in (1, len(KINDS)):
            raise UserError(f"{flag}: expected one number, or {len(KINDS)} for {' '.join(KINDS)}, got {len(values)}")
    count = max(len(k_chunks), len(arguments.n_tb))
    settings = [Compensation(k_chunk, arguments.selection, arguments.compensate_prefill, n_tb, repair=arguments.repair)
                for k_chunk, n_tb in
                zip(k_chunks * (count // len(k_chunks)), arguments.n_tb * (count // len(arguments.n_tb)))]
    return settings[0] if count == 1 else dict(zip(KINDS, settings))


def make_runtime(arguments: argparse.Namespace) -> Runtime:
    """The runtime asked for. Says on stderr which plan it follows, or why it leaves a folder's own aside."""
    if arguments.plan and arguments.k_chunk:
        raise UserError("--plan: cannot be followed together with --k-chunk; leave one out")
    runtime = Runtime(arguments.model, compensation_of(arguments), arguments.device, arguments.dtype,
                      arguments.head_bits, arguments.residuals, arguments.context)
    if arguments.plan and not runtime.quantized:
        raise UserError(f"--plan: {arguments.model} is not a DecDEC folder, nothing can be compensated")
    own = Path(arguments.model) / PLAN
    on_gpu = runtime.device.type == "cuda"
    if arguments.plan:
        plan = load_plan(arguments.plan, runtime.decoder.decdec.quant, this_device() if on_gpu else None)
    elif on_gpu and runtime.quantized and not arguments.k_chunk and own.is_file():
        try:
            plan = load_plan(own, runtime.decoder.decdec.quant, this_device())
        except UserError as error:
            if arguments.target is not None:
                raise
            print(f"not compensating: {error}", file=sys.stderr)
            return runtime
    elif arguments.target is not None:
        raise UserError("--target: expected a plan to follow (--plan, or on a GPU the folder's own), got none")
    else:
        return runtime
    runtime.follow(plan, arguments.target, arguments.compensate_prefill, arguments.residuals)
    tuned = plan.at(arguments.target)
    print(f"following {arguments.plan or own}: "
          f"{', '.join(f'{c.kind} {c.bits}-bit k_chunk {c.k_chunk}' for c in tuned.choices[:8])}", file=sys.stderr)
    return runtime
