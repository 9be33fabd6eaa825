"""What the selection study's calibrated variants rest on: statistics of every layer's input and of the loss's gradient there."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from selection_study_layers import StudyLinear
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from decdec.reference import CHUNK, chunk_counts


@dataclass
class Seen:
    """Of one layer, over all calibration positions but the first of each sample, on which attention sinks sit."""

    mean: Tensor  # (d_in,) of x
    gram: Tensor  # (d_in, d_in), mean of x x^T
    removed: Tensor  # (CHUNK + 1,): mean squared output error that k_chunk = 0, 1, ... removes, channels taken as independent
    slope: float  # mean square of the loss's gradient at one output

    @property
    def energy(self) -> Tensor:
        return self.gram.diagonal()


class _Watch:
    """Sums the statistics of one layer through hooks."""

    def __init__(self, layer: StudyLinear):
        self.layer, self.tokens = layer, 0
        self.mean = self.gram = self.by_rank = self.gradient = 0
        self.rows = layer.exact.square().sum(0)
        self.hook = layer.register_forward_hook(self._see)

    def _see(self, layer: StudyLinear, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach()[:, 1:].flatten(0, 1).float()
        self.tokens += len(x)
        self.mean = self.mean + x.sum(0)
        self.gram = self.gram + x.t() @ x
        removed = x.square() * self.rows
        ranked = [part.gather(1, of.abs().argsort(dim=1, descending=True)).sum(0)
                  for part, of in zip(removed.split(CHUNK, 1), x.split(CHUNK, 1))]
        self.by_rank = ranked if not self.by_rank else [old + new for old, new in zip(self.by_rank, ranked)]
        output.register_hook(self._slope)

    def _slope(self, gradient: Tensor) -> None:
        self.gradient = self.gradient + gradient[:, 1:].float().square().sum()

    def seen(self) -> Seen:
        sums = [torch.cat([part.new_zeros(1), part.cumsum(0)]) for part in self.by_rank]
        counts = [chunk_counts(self.layer.d_in, k) for k in range(CHUNK + 1)]
        removed = torch.stack([sum(part[count] for part, count in zip(sums, of)) for of in counts])
        return Seen(self.mean / self.tokens, self.gram / self.tokens, removed / self.tokens,
                    float(self.gradient) / (self.tokens * self.layer.d_out))


def calibrate(model: nn.Module, layers: Mapping[str, StudyLinear], samples: Tensor) -> dict[str, Seen]:
    """Statistics of every layer over ``samples``, int64 ``(count, length)``, of the model without compensation."""
    watches = {name: _Watch(layer) for name, layer in layers.items()}
    for sample in tqdm(samples, desc="calibration", unit="sample"):
        # The embedding's output starts the graph: weights need no gradients.
        embedded = model.get_input_embeddings()(sample[None]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        F.cross_entropy(logits[:-1].float(), sample[1:], reduction="sum").backward()
    with torch.no_grad():
        found = {name: watch.seen() for name, watch in watches.items()}
    for watch in watches.values():
        watch.hook.remove()
    return found


def constant_share(layer: StudyLinear, seen: Seen) -> float:
    """How much of the squared output error the mean input makes: what centring removes for nothing."""
    error = (layer.exact @ seen.gram * layer.exact).sum()
    return float((layer.exact @ seen.mean).square().sum() / error)


def low_rank(layer: StudyLinear, seen: Seen, rank: int) -> Tensor:
    """The repair ``U U^T R`` of rank ``rank`` that leaves least squared output error, ``(d_out, d_in)``: ``U`` are the first
    principal directions of the error."""
    torch.manual_seed(0)  # of the randomised range finder
    directions = torch.svd_lowrank(layer.exact @ seen.gram @ layer.exact.t(), q=min(rank + 8, layer.d_out), niter=6)[0][:, :rank]
    return directions.half().float() @ (directions.t() @ layer.exact).half().float()


def spread(layers: Mapping[str, StudyLinear], seen: Mapping[str, Seen], k_chunk: int) -> dict[str, int]:
    """A ``k_chunk`` of its own for every layer, of as many bytes in all as ``k_chunk`` everywhere, where they remove most error.

    A layer's error counts by the slope of the loss there. Steps are taken from the most error a byte down.
    """
    steps, budget = [], 0
    for name, layer in layers.items():
        channels = torch.tensor([sum(chunk_counts(layer.d_in, k)) for k in range(CHUNK + 1)])
        budget += int(channels[k_chunk]) * layer.d_out
        size, removed = channels.diff(), seen[name].removed.diff().cpu()
        more = size.nonzero()[:, 0]  # a narrow chunk gains no channel at some k_chunk
        worth = (removed[more] / size[more]).cummin(0).values * seen[name].slope / layer.d_out
        steps += [(value, int(size[at]) * layer.d_out, name, int(at) + 1) for value, at in zip(worth.tolist(), more)]
    chosen = dict.fromkeys(layers, 0)
    for _, size, name, reached in sorted(steps, key=lambda step: (-step[0], step[3])):
        if size > budget:
            break
        budget -= size
        chosen[name] = reached
    return chosen
