"""DecDEC as a quantization method of transformers: ``AutoModelForCausalLM.from_pretrained(folder)``.

Import this module first; without it transformers skips the packed weights with a warning. What is loaded is the base
model: ``hub.set_compensation(model, Compensation(k_chunk=32))`` switches compensation on.
"""

from pathlib import Path

from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from decdec import hub
from decdec.artifacts import CHEATSHEET, QUANT_METHOD, QuantConfig
from decdec.linear import CompensatedLinear
from decdec.models import decoder_linears
from decdec.saving import BESIDE, save_artifacts_too


@register_quantization_config(QUANT_METHOD)
class DecdecConfig(QuantizationConfigMixin):
    """``quantization_config`` of a DecDEC folder, with the fields of :class:`~decdec.artifacts.QuantConfig`."""

    def __init__(self, **content):
        self.__dict__.update(QuantConfig.from_dict(content).to_dict())

    @property
    def quant(self) -> QuantConfig:
        return QuantConfig.from_dict(self.to_dict())


@register_quantizer(QUANT_METHOD)
class DecdecQuantizer(HfQuantizer):
    """Puts compensated layers into the skeleton before the weights are loaded, and the source of residuals after."""

    requires_calibration = True
    is_trainable = False
    is_compileable = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        quant = self.quantization_config.quant
        for name, linear in decoder_linears(model).items():
            if name in quant.dense:
                continue
            packed = hub.empty_packed(name, linear.out_features, linear.in_features, quant)
            bias = None if linear.bias is None else linear.bias.detach()
            hub.replace(model, name, CompensatedLinear(name, linear.in_features, packed, bias))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        folder = _folder_of(model)
        model.decdec = hub.Source(folder, self.quantization_config.quant, folder / CHEATSHEET)
        save_artifacts_too(model)

    def is_serializable(self) -> bool:
        return True


def _folder_of(model: nn.Module) -> Path:
    """Where the files beside the weights lie; those of a hub id are fetched into the hub's cache."""
    folder = Path(model.name_or_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.name_or_path, revision=model.config._commit_hash,
                                  allow_patterns=["config.json", CHEATSHEET, *BESIDE]))
