"""A model ready to give text: what generate.py, chat.py and serve.py share.

    runtime = Runtime("models/SmolLM2-135M-Instruct-squeezellm-w3", compensation=Compensation(k_chunk=32))
    for token in runtime.stream(prompt_ids, max_new_tokens=64, sampling=Sampling(temperature=0.7)):
        ...

One sequence at a time: a stream must be finished or closed before the next begins.
"""

import platform
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from decdec import hub, models
from decdec.artifacts import quant_method
from decdec.errors import UserError, check_device
from decdec.linear import Compensation
from decdec.models import KINDS
from decdec.plan import Plan, apply
from decoder import Decoder
from generation import Timing, generate
from sampling import Sampling
from stepper import Stepper

DTYPES = ("float32", "float16", "bfloat16")


class Runtime:
    """The decoder of a DecDEC folder or an original model (folder or hub id) on one device.

    ``compensation``: one setting for all layers, a mapping by kind, or ``"plan"``, the folder's ``plan.json``; an
    original model has none. ``device`` and ``dtype``: see :func:`device_and_dtype`. ``head_bits`` 8 rounds the output head. ``residuals``: ``"host"`` or
    ``"gpu"`` memory. ``context``: the longest sequence, by default the model's, whose cache may be large.

    ``stop`` are the tokens that end a text, ``timing`` is that of the last stream.
    """

    def __init__(self, source: str | Path, compensation: Compensation | dict | str = Compensation(),
                 device: str | None = None, dtype: torch.dtype | str | None = None, head_bits: int = 16,
                 residuals: str = "host", context: int | None = None):
        self.source = str(source)
        self.device, self.dtype = device_and_dtype(device, dtype)
        model, self.stop = load(self.source, self.dtype, compensation)
        decoder = Decoder(model, head_bits).eval()
        self.context = bounded_context(decoder.context, context)
        try:
            decoder.to(self.device)
        except torch.OutOfMemoryError:
            size = hub.memory(decoder)["device_bytes"]
            raise UserError(f"device: the model takes {size / 1e9:.2f} GB, which the memory of {self.device} "
                            "has not") from None
        self.stepper, self.timing = Stepper(decoder), Timing()
        self.compensate(compensation, residuals)

    @property
    def decoder(self) -> Decoder:
        return self.stepper.decoder

    def compensate(self, compensation: Compensation | dict | str, residuals: str = "host") -> None:
        """Take other settings, between two streams."""
        if self.quantized:
            hub.set_compensation(self.decoder, compensation, residuals)
        self.stepper.settings_changed()

    def follow(self, plan: Plan, target_percent: float | None = None, prefill: bool = False,
               residuals: str = "host") -> None:
        """Compensate as the autotuner's ``plan`` says for a target, by default its first; between two streams."""
        apply(plan, self.decoder, target_percent, prefill, residuals)
        self.stepper.settings_changed()

    @property
    def quantized(self) -> bool:
        """Whether the source is a DecDEC folder, which can be compensated."""
        return hasattr(self.decoder, "decdec")

    def stream(self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = Sampling(),
               stop: Collection[int] | None = None) -> Iterator[int]:
        """Yield at most ``max_new_tokens`` tokens after the token ids ``prompt``, ending before one of ``stop``.

        Raises UserError if they do not fit the context.
        """
        if not len(prompt):
            raise UserError("prompt: expected tokens, got none")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: expected a positive number, got {max_new_tokens}")
        if len(prompt) + max_new_tokens > self.context:
            raise UserError(f"prompt: {len(prompt)} tokens and {max_new_tokens} new ones, but the model's context is "
                            f"{self.context}")
        self.timing = Timing()
        ids = torch.as_tensor(prompt, dtype=torch.int64)
        return generate(self.stepper, ids, max_new_tokens, sampling, self.stop if stop is None else stop, self.timing)

    def settings(self) -> dict[str, object]:
        """What a result row says of how the model is run."""
        return describe(self.decoder)

    def memory(self) -> dict[str, int]:
        """Bytes of weights on the device and of residuals in host memory (:func:`decdec.hub.memory`)."""
        return hub.memory(self.decoder)


def describe(decoder: Decoder) -> dict[str, object]:
    """Compensation, bits and device of ``decoder``; numbers by kind of layer where the kinds differ."""
    layers = hub.compensated_layers(decoder).values()

    def of_kinds(name: str, unused: object) -> object:
        found = {kind: {getattr(layer.compensation, name) for layer in layers if layer.kind == kind} for kind in KINDS}
        values = [sorted(found[kind]) or [unused] for kind in KINDS]
        values = [value[0] if len(value) == 1 else value for value in values]
        return values[0] if all(value == values[0] for value in values) else values

    used = [layer.compensation for layer in layers if layer.compensation.k_chunk]
    weight = decoder.embed.weight
    return {"k_chunk": of_kinds("k_chunk", 0), "n_tb": of_kinds("n_tb", None) if used else None,
            "selection": used[0].selection if used else "none", "compensate_prefill": any(s.prefill for s in used),
            "residuals": next((layer.residual_in for layer in layers if layer.compensation.k_chunk), None),
            "head_bits": decoder.head.bits, "dtype": str(weight.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else f"cpu {platform.machine()}"}


def default_device() -> str:
    """``cuda`` where there is a GPU and the ops were built for it, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() and torch.ops.decdec.has_cuda() else "cpu"


def bounded_context(own: int, wanted: int | None) -> int:
    """``wanted`` tokens, by default the model's ``own``; raises UserError for none and for more than those."""
    if wanted is not None and not 1 <= wanted <= own:
        raise UserError(f"context: expected 1 to {own} tokens, which the model was made for, got {wanted}")
    return own if wanted is None else wanted


def device_and_dtype(device: str | None = None, dtype: torch.dtype | str | None = None
                     ) -> tuple[torch.device, torch.dtype]:
    """Where to compute, ``cpu`` or ``cuda``, and in what: by default the GPU where there is one, float16 there and float32
    on the CPU. Raises UserError for a device that is not there and a dtype that it does not compute in.
    """
    device = default_device() if device is None else device
    check_device(device)
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if device.type == "cpu":
        return device, dtype
    if not torch.ops.decdec.has_cuda():
        raise UserError("device: the ops were built without CUDA; build decdec_extension again where nvcc is")
    if dtype == torch.float32:
        raise UserError("dtype: expected float16 or bfloat16 on a GPU, got float32")
    if device.index is not None:
        torch.cuda.set_device(device)  # graphs are captured, and plans looked up, on the current one
    return device, dtype


def load(source: str, dtype: torch.dtype, compensation: Compensation | dict | str) -> tuple[nn.Module, set[int]]:
    """The model of a folder or an original model, on the CPU, not compensated, and the tokens that end a text."""
    models.check_source(source)
    folder = Path(source)
    if folder.is_dir() and quant_method(folder):
        model = hub.load(folder, dtype)
    elif _compensates(compensation):
        raise UserError(f"k_chunk, repair: {source} is not a DecDEC folder, it can only be run without them")
    else:
        model = models.load_model(source, dtype)
    stop = set()
    for ends in (model.config.eos_token_id, model.generation_config.eos_token_id):
        stop |= set(ends) if isinstance(ends, list) else {ends} - {None}
    return model, stop


def _compensates(compensation: Compensation | dict | str) -> bool:
    if isinstance(compensation, dict):
        return any(map(_compensates, compensation.values()))
    return not isinstance(compensation, Compensation) or compensation.k_chunk > 0 or compensation.repair
