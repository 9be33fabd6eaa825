"""The original model: never written over, never taken for another one."""

import hashlib
import json
import shutil
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import load_file, save_file

from decdec.artifacts import read_quant_config
from decdec.errors import UserError
from decdec.files import read_json, write_json
from decdec.models import load_model, local_folder, original_hash
from decdec.text import Text

import cheatsheet
import thresholds
from base_model import BaseModel
from cheatsheet import make_cheatsheet, make_from_two_folders
from convert_gguf import SOURCE, convert
from foreign_layouts import gptq, settings, write
from import_checkpoint import import_checkpoint
from mixed_precision import make_bit_map
from parts import Parts
from quantize import quantize
from repair import make_repair
from thresholds import make_thresholds


@pytest.fixture(scope="module")
def sibling(tiny, tmp_path_factory):
    """A model of the same shapes as ``tiny`` with one other layer, such as a fine-tuned one."""
    folder = tmp_path_factory.mktemp("sibling") / "tiny"
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("1.mlp.down_proj.weight"))
    save_file(tensors | {name: tensors[name].flip(0).contiguous()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_no_script_writes_over_a_model_that_is_not_its_own(tiny, tmp_path):
    kept = tmp_path / "original"
    shutil.copytree(tiny, kept)
    before = (kept / "model.safetensors").read_bytes()
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    for work in (lambda: quantize(str(tiny), "rtn", 3, str(kept)), lambda: quantize(str(kept), "rtn", 3, str(kept)),
                 lambda: import_checkpoint(str(tiny), kept), lambda: convert(gguf, kept)):
        with pytest.raises(UserError, match="out: .*holds another model"):
            work()
    write_json(kept / SOURCE, {})  # made by convert_gguf.py, which may make it again, and nobody else
    with pytest.raises(UserError, match="holds another model"):
        quantize(str(tiny), "rtn", 3, str(kept))
    with pytest.raises(UserError, match="could not be read"):
        convert(gguf, kept)
    assert (kept / "model.safetensors").read_bytes() == before


def test_a_model_without_all_of_its_weights_is_no_original(tiny, quantized, tmp_path):
    folder = quantized("rtn")
    with pytest.raises(UserError, match="expected an original model, .* is quantized"):
        quantize(str(folder), "rtn", 3, str(tmp_path / "out"))
    lacking = tmp_path / "lacking"
    shutil.copytree(tiny, lacking)
    tensors = load_file(lacking / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    for load in (BaseModel, lambda folder: load_model(str(folder))):
        with pytest.raises(UserError, match="has no model.layers.1.mlp.up_proj.weight"):
            load(lacking)
    write_json(lacking / "config.json", read_json(lacking / "config.json") | {"model_type": "nothing"})
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(str(lacking))
    assert not (tmp_path / "out").exists()


def test_an_original_is_known_wherever_it_lies(tiny, sibling, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy", copy_function=shutil.copyfile)  # with other times
    assert original_hash(tmp_path / "copy") == original_hash(tiny) != original_hash(sibling)
    load_model(str(tiny)).save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert original_hash(tmp_path / "shards") == original_hash(tiny)


@pytest.mark.parametrize("change", [lambda w: w * 2, lambda w: w.view(torch.int16), lambda w: w.unsqueeze(0)])
def test_every_tensor_tells_originals_apart(tiny, tmp_path, change):
    tensors = load_file(tiny / "model.safetensors")
    found = {original_hash(tiny)}
    for name, tensor in tensors.items():
        save_file(tensors | {name: change(tensor)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        found.add(original_hash(tmp_path))
    assert len(found) == len(tensors) + 1


def test_an_original_without_safetensors_is_known_by_its_own_files(tmp_path):
    with pytest.raises(UserError, match="expected safetensors files or pytorch_model"):
        original_hash(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"settings")
    with pytest.raises(UserError, match="expected safetensors files or pytorch_model"):
        original_hash(tmp_path)
    found = set()
    for value in (0.0, 1.0):
        torch.save({"weight": torch.full((9,), value)}, tmp_path / "pytorch_model.bin")
        found.add(original_hash(tmp_path))
    (tmp_path / "training_args.bin").unlink()
    assert len(found) == 2 and original_hash(tmp_path) in found


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_other_weights_are_fetched_where_there_are_no_safetensors(tmp_path, monkeypatch, weights):
    asked = []

    def fetch(source, allow_patterns, **_):
        asked.append(allow_patterns)
        if any(fnmatch(weights, pattern) for pattern in allow_patterns):
            (tmp_path / weights).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert local_folder("some/model") == tmp_path and (tmp_path / weights).exists()
    assert len(asked) == (1 if weights.endswith("safetensors") else 2)


@pytest.mark.parametrize(("method", "text"), [("rtn", {}), ("awq", {"text": "pydoc", "samples": 3, "length": 64})])
def test_folders_made_before_they_said_their_original_are_finished(tiny, quantized, calibration, tmp_path, method, text):
    folder = tmp_path / "folder"
    shutil.copytree(quantized(method), folder)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    told = _as_before(folder, lambda old: {"method": method, "bits": 3, "group_size": None, "calibration": old,
                                           "model": _dated(tiny)})
    assert set(told) == set(text and text | {"text_hash": 0, "seed": 0})
    assert quantize(str(tiny), method, 3, str(folder), **calibration) is False
    assert quantize(str(tiny), method, 3, str(tmp_path / "out"), reuse=[str(folder)], **calibration)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    moved = tmp_path / "moved"
    shutil.copytree(tiny, moved, copy_function=shutil.copyfile)  # with other times, which were the identity
    assert quantize(str(moved), method, 3, str(folder), **calibration) is True


def test_imports_made_before_they_said_their_original_are_finished(tiny, tmp_path):
    foreign, out = tmp_path / "foreign", tmp_path / "out"
    write(tiny, foreign, lambda name, weight: gptq(name, weight, 4), settings("gptq", 4))
    assert import_checkpoint(str(foreign), out, str(tiny))
    _as_before(out, lambda _: {"foreign": _dated(foreign), "model": _dated(tiny)})
    assert import_checkpoint(str(foreign), out, str(tiny)) is False
    assert import_checkpoint(str(foreign), out) is True  # without the original it is another


def test_a_bit_map_that_names_its_text_is_kept(tiny, quantized, calibration, tmp_path):
    path = tmp_path / "map.json"
    work = (str(tiny), quantized("rtn"), quantized("rtn", 4), str(path))
    bits = make_bit_map(*work, **calibration)
    content = read_json(path)
    write_json(path, content | {"bits": bits[::-1], "calibration": {"text": content.pop("text")} | content["calibration"]})
    assert make_bit_map(*work, **calibration) == bits[::-1]
    assert make_bit_map(*work, **calibration | {"seed": 1}) is not None and "text" not in read_json(path)["calibration"]


def _dated(folder):
    path = folder / "model.safetensors"
    return {"config": read_json(folder / "config.json"), "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns]]}


def _as_before(folder, identity):
    """Make the finished ``folder`` what it was before originals were known by their weights; its calibration then."""
    config = read_json(folder / "config.json")
    calibration = config["quantization_config"]["calibration"]
    del calibration["original"], calibration["config_hash"]
    before = dict(calibration)
    calibration["config_hash"] = hashlib.sha256(json.dumps(identity(before), sort_keys=True).encode()).hexdigest()[:16]
    write_json(folder / "config.json", config)
    return before


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_configuration_may_say_that_the_model_is_not_quantized(tiny, tmp_path, nothing):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny, folder)
    write_json(folder / "config.json", read_json(tiny / "config.json") | {"quantization_config": nothing})
    BaseModel(folder)
    with pytest.raises(UserError, match="holds another model"):
        quantize(str(tiny), "rtn", 3, str(folder))


def test_a_configuration_that_is_a_list_is_refused(tiny, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny, folder)
    write_json(folder / "config.json", [1])
    for work in (lambda: BaseModel(folder), lambda: quantize(str(tiny), "rtn", 3, str(folder))):
        with pytest.raises(UserError, match="expected the configuration of a model"):
            work()


def test_another_original_is_refused(calibration, tiny, sibling, quantized, tmp_path):
    folder, other = quantized("rtn"), str(sibling)
    for work in (lambda: make_cheatsheet(folder, other, out=tmp_path / "c.pt"),
                 lambda: make_thresholds(folder, other, out=tmp_path / "t.pt", **calibration),
                 lambda: make_repair(folder, model=other, **calibration | {"samples": 4}),
                 lambda: make_bit_map(other, folder, quantized("rtn", 4), str(tmp_path / "map.json"), **calibration)):
        with pytest.raises(UserError, match="give the model that was quantized"):
            work()
    with pytest.raises(UserError, match="reuse: .*calibration: expected"):
        quantize(other, "rtn", 3, str(tmp_path / "out"), reuse=[str(folder)])
    assert quantize(str(tiny), "rtn", 3, str(tmp_path / "out"), reuse=[str(folder)])


def test_where_a_folder_does_not_say_its_original_a_far_one_is_refused(tiny, quantized, tmp_path):
    folder, far = tmp_path / "folder", tmp_path / "far"
    shutil.copytree(quantized("rtn"), folder)
    config = read_json(folder / "config.json")
    del config["quantization_config"]["calibration"]["original"]
    write_json(folder / "config.json", config)
    shutil.copytree(tiny, far)
    tensors = load_file(far / "model.safetensors")
    save_file({name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}, far / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not a rounding of that of"):
        make_cheatsheet(folder, str(far), out=tmp_path / "c.pt")
    assert make_cheatsheet(folder, str(tiny), out=tmp_path / "c.pt")


def test_parts_of_another_original_are_not_taken(tiny, sibling, tmp_path, monkeypatch):
    packed = []

    def pack(*arguments, pack=cheatsheet._pack):
        if stop_after is not None and len(packed) == stop_after:
            raise KeyboardInterrupt
        packed.append(arguments)
        return pack(*arguments)

    monkeypatch.setattr(cheatsheet, "_pack", pack)
    stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        make_from_two_folders(str(sibling), str(tiny), tmp_path / "c.pt")
    stop_after = None
    packed.clear()
    make_from_two_folders(str(tiny), str(tiny), tmp_path / "c.pt")
    assert len(packed) == len(BaseModel(tiny).linears())


def test_parts_that_a_kill_left_behind_a_finished_cheatsheet_go(tiny, quantized, tmp_path, monkeypatch):
    out = tmp_path / "c.pt"
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "clear", lambda self: None)
        assert make_cheatsheet(quantized("rtn"), str(tiny), out=out)
    assert (tmp_path / ".c.pt.parts").is_dir()
    assert make_cheatsheet(quantized("rtn"), str(tiny), out=out) is None and not (tmp_path / ".c.pt.parts").exists()


def test_the_name_that_a_text_has_without_a_network_changes_nothing(calibration, tiny, quantized, tmp_path, monkeypatch):
    import quantize as script

    folder = tmp_path / "folder"
    shutil.copytree(quantized("rtn"), folder)
    for name, made in (("c4-train-0@0123", True), ("c4-train-0", False)):
        documents = Text(name, ("some words and some more " * 400,))
        for module in (script, thresholds):
            monkeypatch.setattr(module, "load_text", lambda source, part, documents=documents: documents)
        assert quantize(str(tiny), "squeezellm", 3, str(tmp_path / "out"), **calibration) is made
        assert (make_thresholds(folder, str(tiny), **calibration) is not None) is made
    assert read_quant_config(tmp_path / "out").calibration["text"] == "c4-train-0@0123"
