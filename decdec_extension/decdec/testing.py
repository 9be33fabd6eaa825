"""What the tests of several rooms share: running scripts as a user does, reading refusals, quick model folders, logits."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor


def run_script(path: str | Path, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a Python or shell script with this interpreter and capture what it prints."""
    command = [sys.executable] if str(path).endswith(".py") else ["bash"]
    options["env"] = {**os.environ, "PYTHON": sys.executable, **options.get("env", {})}
    return subprocess.run([*command, str(path), *map(str, arguments)], capture_output=True, text=True, **options)


def refused(result: subprocess.CompletedProcess) -> str:
    """The one line of an error; a stack trace or a zero exit fails the test."""
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def poison_shared_memory(dtype: torch.dtype = torch.float16) -> None:
    """Leave NaN in the shared memory of the GPU's SMs, where the next kernel finds it unless it writes first."""
    filled = torch.full((2048, 2048), torch.nan, device="cuda", dtype=dtype)
    filled @ filled


@torch.no_grad()
def logits_of_hugging_face(model, tokens: Tensor, prompt: int) -> Tensor:
    """Logits after the first ``prompt`` of ``tokens`` ``(T,)`` and after each later one, decoded one by one with Hugging Face's
    own cache: float32 ``(T - prompt + 1, vocab)`` on the CPU."""
    out = model(tokens[None, :prompt].to(model.device), use_cache=True)
    rows = [out.logits[0, -1]]
    for token in tokens[prompt:].to(model.device):
        out = model(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1])
    return torch.stack(rows).float().cpu()


def logits_of_decoder(decoder, tokens: Tensor, prompt: int) -> Tensor:
    """The same of the runtime's decoder, step by step."""
    tokens = tokens.to(decoder.embed.weight.device)
    decoder.allocate(len(tokens))
    rows = [decoder.prefill(tokens[:prompt])]
    for position in range(prompt, len(tokens)):
        rows.append(decoder.step(tokens[position:position + 1], torch.tensor([position], device=tokens.device)))
    return torch.stack(rows).cpu()


def quick_folder(model, folder: str | Path, form: str = "codebook", bits: int = 3, residual_bits: int = 4,
                 nested: bool = False, group_size: int = 32) -> Path:
    """Write a Hugging Face causal LM as a DecDEC folder: rounded to nearest, with residuals and made-up thresholds."""
    from safetensors.torch import save_file

    from decdec import artifacts, files, models

    folder = Path(folder)
    linears = models.decoder_linears(model)
    # Cloned, because safetensors stores no tensor twice: a tied head is left out.
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
    residual, scale, row_scale, largest, mean_square = {}, {}, {}, {}, {}
    for name, linear in linears.items():
        weight = tensors.pop(f"{name}.weight").float()
        packed, rounded = _round(weight, form, bits, group_size)
        tensors |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
        difference = weight - rounded
        if nested and form == "codebook":  # any sizes of the rows serve, if layers of one input share them
            row_scale[name] = torch.linspace(0.5, 2, linear.in_features)
            difference = difference / row_scale[name]
            steps = 2 * difference.abs().amax(dim=1).half()[None]
        else:
            steps = packed["scales"] if nested else None
        residual[name], scale[name] = _residual(difference, residual_bits, steps)
        largest[name] = torch.linspace(4, 0.01, linear.in_features)
        mean_square[name] = torch.rand(linear.in_features, generator=torch.Generator().manual_seed(len(mean_square)))
    weights_hash = files.tensors_hash(sorted(tensors.items()))
    quant = artifacts.QuantConfig("rtn", form, bits, group_size if form == "uniform" else None, "quick", weights_hash)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files.write_json(folder / "config.json", model.config.to_dict() | {"quantization_config": quant.to_dict()})
    sheet = artifacts.Cheatsheet(residual_bits, nested, residual, scale, row_scale=row_scale)
    artifacts.save_cheatsheet(folder / artifacts.CHEATSHEET, sheet, quant)
    artifacts.save_thresholds(folder / artifacts.THRESHOLDS, artifacts.Thresholds({}, largest, mean_square), quant)
    return folder


def add_repair(folder: str | Path, rank: int = 3, without: str = "k_proj") -> Path:
    """Give a quick folder a made-up static repair, of all layers but those ``without`` names, attention's inputs centred, and as
    residuals of what it leaves its own from the last input to the first; returns the folder."""
    from decdec import artifacts
    from decdec.models import layer_kind
    from decdec.repair import LayerRepair

    folder, layers = Path(folder), {}
    quant = artifacts.read_quant_config(folder)
    sheet = artifacts.load_cheatsheet(folder / artifacts.CHEATSHEET, quant)
    for number, (name, rows) in enumerate(sheet.residual.items()):
        generator = torch.Generator().manual_seed(number)
        d_in, d_out = len(rows), sheet.scale[name].shape[1]
        kept = 0 if without in name else rank
        mean = constant = None
        if layer_kind(name) == "qkv":
            mean, constant = torch.linspace(-0.2, 0.2, d_in), torch.linspace(-0.1, 0.1, d_out).half()
        if kept or mean is not None:
            down = torch.randn((kept, d_in), generator=generator) / d_in**0.5
            up = torch.randn((d_out, kept), generator=generator) / 10
            layers[name] = LayerRepair(down.half(), up.half(), mean, constant)
    repair = artifacts.Repair({"rank": rank}, layers)
    artifacts.save_repair(folder / artifacts.REPAIR, repair, quant)
    remains = dataclasses.replace(sheet, residual={name: rows.flip(0) for name, rows in sheet.residual.items()}, repair=repair.hash)
    artifacts.save_cheatsheet(folder / artifacts.REPAIRED_CHEATSHEET, remains, quant)
    return folder


def _round(weight: Tensor, form: str, bits: int, group_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Packed tensors and the float weights they stand for."""
    from decdec import packing, reference

    d_out, d_in = weight.shape
    groups = weight.view(d_out, -1, d_in if form == "codebook" else group_size)
    low = groups.amin(dim=2, keepdim=True)
    step = ((groups.amax(dim=2, keepdim=True) - low) / (2**bits - 1)).clamp(min=1e-6).half().float()
    zero = (-low / step).round()
    codes = (groups / step + zero).round().clamp(0, 2**bits - 1).view(d_out, d_in).to(torch.uint8)
    qweight = packing.pack_codes(codes, bits)
    if form == "codebook":
        codebook, scale = packing.pack_codebook((torch.arange(2**bits) - zero[:, :, 0]) * step[:, :, 0])
        return ({"qweight": qweight, "codebook": codebook, "scale": scale},
                reference.codebook_dequantize(qweight, codebook, scale, d_in, torch.float32))
    scales, zeros = (part[:, :, 0].t().contiguous().half() for part in (step, zero))
    return ({"qweight": qweight, "scales": scales, "zeros": zeros},
            reference.uniform_dequantize(qweight, scales, zeros, d_in, torch.float32))


def _residual(residual: Tensor, bits: int, steps: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Packed rows and scale of a residual ``(d_out, d_in)``; nested in ``steps`` ``(groups, d_out)`` if they are given."""
    from decdec import packing

    rows = residual.t()
    if bits == 16:
        return packing.pack_residual(rows, 16), None
    if steps is not None:
        step = steps.float().repeat_interleave(len(rows) // len(steps), dim=0) / 2**bits
        codes = (rows / step).floor().clamp(-(2**(bits - 1)), 2**(bits - 1) - 1)
        return packing.pack_residual(codes.to(torch.int8), bits), steps
    top = max(2**(bits - 1) - 1, 1)
    scale = (rows.abs().amax(dim=0, keepdim=True) / top).half()
    codes = (rows / scale.float().clamp(min=1e-8)).round().clamp(-top, top)
    return packing.pack_residual(codes.to(torch.int8), bits), scale
