"""Measure what compensation is worth in each layer of a model: gains.safetensors, which tuner.py reads.

Text runs forward and backward through the quantized model. For every layer and token, g being the gradient of the loss
at the layer's output, fetching channel c moves the output by x_c R_c and so the loss by about x_c g.R_c; summed over
the channels of largest |x| in every chunk this is the loss that k_chunk removes. The slope falls to nothing as the
error goes (a parabola), so half of it counts. Estimates of small models and short texts are noisy in a single layer,
but tuner.py only sums over them.
"""

import argparse
from functools import partial
from pathlib import Path

import gains as gains_of
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from decdec import artifacts, hub, text
from decdec.artifacts import Cheatsheet
from decdec.errors import UserError, check_device, run
from decdec.files import atomic, config_hash
from decdec.linear import CompensatedLinear
from decdec.models import load_tokenizer
from decdec.reference import CHUNK, chunk_counts

AT_ONCE = 4  # samples in one pass: what a GPU does with one is mostly waiting


def removed_by_rank(x: Tensor, gradient: Tensor, residual: Tensor) -> list[Tensor]:
    """Loss removed by the r-th largest ``|x|`` of each chunk, summed over tokens: float64, one vector a chunk.

    ``x`` (tokens, d_in), ``gradient`` of the loss at the output (tokens, d_out), ``residual`` (d_in, d_out).
    """
    removed = -0.5 * x * (gradient @ residual.t())
    return [part.gather(1, values.abs().argsort(dim=1, descending=True)).sum(dim=0, dtype=torch.float64)
            for part, values in zip(removed.split(CHUNK, dim=1), x.split(CHUNK, dim=1))]


def at_k_chunk(by_rank: list[Tensor]) -> Tensor:
    """The gain at k_chunk 0..1024, float64 ``(1025,)``, from what each rank of each chunk removes."""
    width = sum(len(part) for part in by_rank)
    summed = [torch.cat([torch.zeros(1, dtype=torch.float64), part.cumsum(0)]) for part in by_rank]
    return torch.stack([sum(part[count] for part, count in zip(summed, chunk_counts(width, k)))
                        for k in range(CHUNK + 1)])


class Recorder:
    """Sums :func:`removed_by_rank` over all tokens for each layer, through hooks."""

    def __init__(self, layers: dict[str, CompensatedLinear], sheet: Cheatsheet):
        self.sheet, self.by_rank = sheet, {}
        for name, layer in layers.items():
            if name not in sheet.residual:
                raise UserError(f"{artifacts.CHEATSHEET}: has no residual of layer {name}")
            layer.register_forward_hook(partial(self._forward, name))

    def _forward(self, name: str, layer: CompensatedLinear, inputs: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(partial(self._backward, name, layer, inputs[0].detach()))

    def _backward(self, name: str, layer: CompensatedLinear, x: Tensor, gradient: Tensor) -> None:
        residual = self.sheet.dequantize(name, layer.out_features, x.device)
        found = removed_by_rank(x.flatten(0, -2).float(), gradient.flatten(0, -2).float(), residual)
        if name in self.by_rank:
            found = [old + new for old, new in zip(self.by_rank[name], found)]
        self.by_rank[name] = found


def measure(model: nn.Module, sheet: Cheatsheet, samples: Tensor) -> dict[str, Tensor]:
    """``{layer: gain}`` in nats per token, float32 ``(1025,)`` each, over ``samples`` (count, length)."""
    recorder = Recorder(hub.compensated_layers(model), sheet)
    for batch in tqdm(samples.split(AT_ONCE), desc="gains", unit=f"{AT_ONCE} samples"):
        # The embedding's output starts the graph: weights need no gradients.
        embedded = model.get_input_embeddings()(batch).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum").backward()
    tokens = samples.shape[0] * (samples.shape[1] - 1)
    return {name: (at_k_chunk([part.cpu() for part in parts]) / tokens).float()
            for name, parts in recorder.by_rank.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FOLDER", help="a folder made by decdec_setup, with its cheatsheet.pt")
    parser.add_argument("--text", default="c4", help=f"{', '.join(text.NAMES)} or a file (default c4)")
    parser.add_argument("--samples", type=int, default=16, help="samples of text (default 16)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample (default 512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: the GPU if there is one")
    arguments = parser.parse_args()
    check_device(arguments.device)
    folder = Path(arguments.model)
    quant = artifacts.read_quant_config(folder)
    sheet = artifacts.load_cheatsheet(folder / artifacts.CHEATSHEET, quant)
    source = text.load_text(arguments.text, "calibration")
    samples = text.calibration_samples(source, load_tokenizer(str(folder)), arguments.samples, arguments.length,
                                       arguments.seed)
    metadata = {"weights_hash": quant.weights_hash, "sheet": gains_of.sheet_identity(sheet),
                "text": source.name, "text_hash": source.hash, "samples": str(arguments.samples),
                "length": str(arguments.length), "seed": str(arguments.seed)}
    out, wanted = folder / gains_of.GAINS, config_hash(text.calibration_identity(metadata))
    if gains_of.config_of(out) == wanted:
        print(f"{out} is there already")
        return
    found = measure(hub.load(folder).to(arguments.device), sheet, samples.to(arguments.device))
    with atomic(out) as temporary:
        save_file(found, temporary, metadata | {"config_hash": wanted})
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
