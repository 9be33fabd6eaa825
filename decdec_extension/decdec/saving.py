"""``save_pretrained`` of a model with compensated layers: what its folder holds beside the weights goes along."""

import os
import shutil
from pathlib import Path
from types import MethodType

from torch import nn

from decdec.artifacts import CHEATSHEET, REPAIR, REPAIRED_CHEATSHEET, THRESHOLDS
from decdec.files import atomic, read_json, write_json
from decdec.plan import PLAN

# What decdec_setup needs to rebuild AWQ's scaled original is saved as well.
BESIDE = (THRESHOLDS, PLAN, REPAIR, REPAIRED_CHEATSHEET, "scaling.safetensors")
# Options of transformers' save_pretrained that are for the upload alone.
_UPLOAD = ("commit_message", "commit_description", "private", "revision", "create_pr", "tags")


def save_artifacts_too(model: nn.Module) -> None:
    """Let ``model.save_pretrained(folder)`` write a whole DecDEC folder, tokenizer apart."""
    model.save_pretrained = MethodType(_save_pretrained, model)


def _save_pretrained(model: nn.Module, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False,
                     repo_id: str | None = None, **kwargs) -> None:
    upload = {name: kwargs.pop(name) for name in _UPLOAD if name in kwargs}
    upload |= {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
    type(model).save_pretrained(model, save_directory, is_main_process=is_main_process, **kwargs)
    if not is_main_process:
        return
    source, target = model.decdec, Path(save_directory)
    for original, name in ((source.cheatsheet, CHEATSHEET), *((source.folder / name, name) for name in BESIDE)):
        if original.is_file() and original.resolve() != (target / name).resolve():
            with atomic(target / name) as temporary:
                shutil.copyfile(original, temporary)
    if (source.folder / source.quant.base_model).is_dir():  # a path relative to the folder, which is another now
        config = read_json(target / "config.json")
        config["quantization_config"]["base_model"] = os.path.relpath(source.folder / source.quant.base_model, target)
        write_json(target / "config.json", config)
    if push_to_hub:  # which saves anew into a folder of its own, by this function: everything is uploaded
        model.push_to_hub(repo_id or target.name, **upload)
