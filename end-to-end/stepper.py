"""One token after the other without the host: the token just chosen is the next step's input.

On a GPU a step, from the embedding to the chosen token, is one CUDA graph; token and position stay on the device. There
is a graph for each form of sampling, whose numbers lie on the device too, and one more for short sequences. Attention
reads the live length on the device, so a graph serves all lengths up to its bound.
"""

import torch
from torch import Tensor

from decoder import Decoder
from sampling import Sampler, Sampling

ROOM = 256  # places of the cache are taken in multiples of this
SHORT = 256  # tokens up to which attention has a faster form
WARM_UP = 2  # steps before a capture, in which libraries set themselves up


class Stepper:
    """The decoder, a sampler, and where the sequence stands: ``token`` int64 ``(1,)`` is to be read at ``position``."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        device = decoder.embed.weight.device
        self.on_gpu = device.type == "cuda"
        self.sampler = Sampler(device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.token)
        self.read = 0  # tokens, as the host counts them
        self.graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}  # by form of sampling and bound of the length

    @torch.inference_mode()
    def begin(self, length: int, sampling: Sampling) -> None:
        """Make ready for a sequence of at most ``length`` tokens, drawn as ``sampling`` says."""
        if length > self.decoder.places:
            self.graphs.clear()  # they hold the old cache
            self.decoder.allocate(min(-(-length // ROOM) * ROOM, max(self.decoder.context, length)))
        vocabulary = len(self.decoder.head.weight)
        self.sampler.set(sampling, vocabulary)
        for bound in (SHORT, 0) if length > SHORT else (SHORT,):
            if self.on_gpu and (self.sampler.form, bound) not in self.graphs:
                self._capture(bound)
                self.sampler.set(sampling, vocabulary)

    def settings_changed(self) -> None:
        """To be called after the decoder's compensation has changed: graphs hold the old one."""
        self.graphs.clear()

    @torch.inference_mode()
    def prefill(self, prompt: Tensor) -> None:
        """Read ``prompt`` int64 ``(T,)`` and choose the first token after it."""
        self.token.copy_(self.sampler.next_token(self.decoder.prefill(prompt)))
        self.read = len(prompt)
        self.position.fill_(self.read)

    @torch.inference_mode()
    def advance(self) -> None:
        """Read the token and choose the next one."""
        self.read += 1
        bound = SHORT if self.read <= SHORT else 0
        if self.on_gpu:
            self.graphs[self.sampler.form, bound].replay()
        else:
            self._step(bound)

    def _step(self, live_at_most: int) -> None:
        self.token.copy_(self.sampler.next_token(self.decoder.step(self.token, self.position, live_at_most)))
        self.position.add_(1)

    def _capture(self, bound: int) -> None:
        # Before a prompt is read, so it does not matter what these steps write into the cache.
        self.position.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step(bound)
        torch.cuda.current_stream().wait_stream(side)
        self.position.zero_()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.sampler.generator)
        with torch.cuda.graph(graph):
            self._step(bound)
        self.graphs[self.sampler.form, bound] = graph
