"""One token after the other without the host: the token just chosen is the next step's input.

On a GPU a step, from the embedding to the chosen token, is one CUDA graph; token and position stay on the device. There
is a graph for each form of sampling, whose numbers lie on the device too. Attention reads the live length on the
device, so one graph serves all lengths.
"""

import torch
from torch import Tensor

from decoder import Decoder
from sampling import Sampler, Sampling

ROOM = 256  # places of the cache are taken in multiples of this
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
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def begin(self, length: int, sampling: Sampling) -> None:
        """Make ready for a sequence of at most ``length`` tokens, drawn as ``sampling`` says."""
        if length > self.decoder.places:
            self.graphs.clear()  # they hold the old cache
            self.decoder.allocate(min(-(-length // ROOM) * ROOM, max(self.decoder.context, length)))
        self.sampler.set(sampling, len(self.decoder.head.weight))
        if self.on_gpu and self.sampler.form not in self.graphs:
            self._capture()
            self.sampler.set(sampling, len(self.decoder.head.weight))

    def settings_changed(self) -> None:
        """To be called after the decoder's compensation has changed: graphs hold the old one."""
        self.graphs.clear()

    @torch.inference_mode()
    def prefill(self, prompt: Tensor) -> None:
        """Read ``prompt`` int64 ``(T,)`` and choose the first token after it."""
        self.token.copy_(self.sampler.next_token(self.decoder.prefill(prompt)))
        self.position.fill_(len(prompt))

    @torch.inference_mode()
    def advance(self) -> None:
        """Read the token and choose the next one."""
        if self.on_gpu:
            self.graphs[self.sampler.form].replay()
        else:
            self._step()

    def _step(self) -> None:
        self.token.copy_(self.sampler.next_token(self.decoder.step(self.token, self.position)))
        self.position.add_(1)

    def _capture(self) -> None:
        # Before a prompt is read, so it does not matter what these steps write into the cache.
        self.position.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.position.zero_()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.sampler.generator)
        with torch.cuda.graph(graph):
            self._step()
        self.graphs[self.sampler.form] = graph
