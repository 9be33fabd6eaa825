"""Times the residual quantization of cheatsheet.py against the reference, a loop over rows, and checks that both agree."""

import argparse
import json
import time

import torch
from torch import Tensor

from decdec import ops, reference
from decdec.errors import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-out", type=int, default=4096, help="output channels (default %(default)s)")
    parser.add_argument("--d-in", type=int, default=14336, help="input channels (default %(default)s)")
    parser.add_argument("--bits", type=int, default=4, help="2, 4 or 8 (default %(default)s)")
    args = parser.parse_args()
    residual = 0.01 * torch.randn(args.d_out, args.d_in, generator=torch.Generator().manual_seed(0))

    def timed(function) -> tuple[float, tuple[Tensor, Tensor]]:
        start = time.perf_counter()
        result = function(residual, args.bits)
        return time.perf_counter() - start, result

    ops.residual_quantize(residual[:64], args.bits)  # warm up
    fast, (codes, scales) = min((timed(ops.residual_quantize) for _ in range(3)), key=lambda pair: pair[0])
    slow, (slow_codes, slow_scales) = timed(reference.residual_quantize)
    print(json.dumps({"d_out": args.d_out, "d_in": args.d_in, "bits": args.bits, "threads": torch.get_num_threads(),
                      "rows_one_by_one_s": round(slow, 3), "vectorised_s": round(fast, 3), "times_faster": round(slow / fast, 1),
                      "rows_that_differ": int(((codes != slow_codes).any(1) | (scales != slow_scales)).sum())}))


if __name__ == "__main__":
    run(main)
