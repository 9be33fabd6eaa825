"""DecDEC as a model of lm-eval: ``decdec``, registered when this module is imported.

What is compensated: in generation every decoding step, and the prompt only with ``compensate_prompt=True`` (the paper's BBH runs
leave it out). Log-likelihoods score given tokens in one pass over context and continuation; there every position is compensated
on its own channels, as if each had been a decoding step.
"""

import dataclasses

import lm_eval.models.huggingface as huggingface
import torch
import transformers
from lm_eval.api.registry import register_model

from decdec import hub
from decdec.linear import Compensation


@register_model("decdec")
class DecDECLM(huggingface.HFLM):
    """``pretrained``: a DecDEC folder, or an original model (then nothing can be compensated). Other arguments: HFLM's."""

    def __init__(self, pretrained: str, k_chunk: int = 0, selection: str = "bucket", compensate_prompt: bool = False,
                 cheatsheet: str | None = None, seed: int = 0, dtype: str | torch.dtype = "float32", **kwargs) -> None:
        self.cheatsheet = cheatsheet
        super().__init__(pretrained=pretrained, dtype=dtype, **kwargs)
        if hasattr(self, "accelerator"):  # HFLM shares the requests out only if it sees several GPUs
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.compensate(Compensation(k_chunk=int(k_chunk), selection=selection, seed=int(seed)), compensate_prompt)

    def compensate(self, compensation: Compensation, compensate_prompt: bool = False) -> None:
        """Take new settings without loading the model again. ``compensation.prefill`` is set by what is asked of the model."""
        self.compensation, self.compensate_prompt = compensation, compensate_prompt
        self._prefill = None

    def _switch(self, prefill: bool) -> None:
        if self.quantized and prefill != self._prefill:
            hub.set_compensation(self.model, dataclasses.replace(self.compensation, prefill=prefill))
            self._prefill = prefill

    def _model_call(self, *args, **kwargs) -> torch.Tensor:
        self._switch(prefill=True)
        return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args, **kwargs) -> torch.Tensor:
        self._switch(prefill=self.compensate_prompt)
        return super()._model_generate(*args, **kwargs)

    def _get_config(self, pretrained: str, **kwargs) -> None:
        self._config = transformers.AutoConfig.from_pretrained(pretrained)
        self.quantized = hasattr(self._config, "quantization_config")
        if self.quantized:  # hub.load reads it; HFLM would look for a quantizer of transformers by this name
            del self._config.quantization_config

    def _create_model(self, pretrained: str, dtype: str | torch.dtype = "float32", **kwargs) -> None:
        if not self.quantized:
            return super()._create_model(pretrained=pretrained, dtype=dtype, **kwargs)
        model = hub.load(pretrained, dtype=huggingface.get_dtype(dtype), cheatsheet=self.cheatsheet)
        self._model = model.to(self.device)
