"""The arguments that say what runs and how, the same for every script that gives text, and the runtime they ask for."""

import argparse

import torch

from decdec.linear import Compensation
from decdec.placement import PLACES
from runtime import DTYPES, Runtime


def add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="DecDEC folder, or an original model's folder or hub id")
    parser.add_argument("--k-chunk", type=int, default=0, metavar="K",
                        help="channels compensated in every 1024-wide chunk, 0..1024 (default 0: the base model)")
    parser.add_argument("--selection", default="bucket", choices=("bucket", "exact"),
                        help="how channels are chosen (default bucket, the paper's)")
    parser.add_argument("--compensate-prefill", action="store_true", help="compensate the prompt's positions too")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument("--dtype", choices=DTYPES,
                        help="of activations and unquantized weights (default float16 on a GPU, float32 on the CPU)")
    parser.add_argument("--head-bits", type=int, default=16, choices=(8, 16),
                        help="8 rounds the output head to 8 bits (default 16: as it is)")
    parser.add_argument("--residuals", default="host", choices=PLACES,
                        help="where a GPU reads the residuals: pinned host memory or its own (default host)")


def make_runtime(arguments: argparse.Namespace) -> Runtime:
    compensation = Compensation(arguments.k_chunk, arguments.selection, arguments.compensate_prefill)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    return Runtime(arguments.model, compensation, arguments.device, dtype, arguments.head_bits, arguments.residuals)
