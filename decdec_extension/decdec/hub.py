"""DecDEC in any Hugging Face causal LM: attach a model folder, set what is compensated, ask what it costs in memory."""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from decdec import artifacts, packing, plan
from decdec.artifacts import QuantConfig
from decdec.beside import Beside, check_weights, is_plain
from decdec.compensated import Compensated
from decdec.errors import UserError
from decdec.files import open_safetensors, safetensors_names
from decdec.linear import Compensation, CompensatedLinear, concatenate_residuals
from decdec.models import KINDS, OTHER, compute_buffers
from decdec.placement import check_place, place_residuals
from decdec.repair import join
from decdec.saving import save_artifacts_too


@dataclass(frozen=True)
class Source:
    """Where an attached model's base weights and residuals come from; the model's attribute ``decdec``."""

    folder: Path
    quant: QuantConfig
    cheatsheet: Path

    def residuals(self, repaired: bool) -> Path:
        """The file of the residuals, or of those of what the static repair leaves. A cheatsheet of the caller's serves either."""
        own = self.cheatsheet == self.folder / artifacts.CHEATSHEET
        return self.folder / artifacts.REPAIRED_CHEATSHEET if repaired and own else self.cheatsheet


def load(folder: str | Path, dtype: torch.dtype = torch.float32,
         compensation: Compensation | Mapping | str = Compensation(), cheatsheet: str | Path | None = None,
         device: torch.device | str = "cpu") -> nn.Module:
    """The Hugging Face causal LM of a DecDEC folder, on ``device``, in eval mode; ``dtype`` is of what is unquantized.

    On a GPU ``dtype`` is float16 or bfloat16, and residuals lie in pinned host memory. How it generates is what the folder's
    ``generation_config.json`` says, if there is one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if torch.device(device).type == "cuda" and dtype == torch.float32:
        raise UserError("dtype: expected float16 or bfloat16 on a GPU, got float32")
    artifacts.read_quant_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: config.json: {str(error).splitlines()[0]}") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (Path(folder) / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: generation_config.json: {str(error).splitlines()[0]}") from None
    model = attach(model, folder, cheatsheet=cheatsheet).eval().to(device)
    set_compensation(model, compensation)
    return model


def attach(model: nn.Module, folder: str | Path, compensation: Compensation | Mapping | str = Compensation(),
           cheatsheet: str | Path | None = None) -> nn.Module:
    """Replace the decoder's linear layers of ``model`` by compensated ones from a DecDEC folder, in place; returns
    ``model``.

    ``model`` is a Hugging Face causal LM of the same architecture, with weights or on the meta device. Every other
    tensor of the folder is loaded as well, since AWQ folds its scales into the norms. Layers that another library has
    quantized, and whose checkpoint ``import_checkpoint.py`` made the folder of, stay: its code runs them, and they are
    compensated beside it. ``cheatsheet`` names another
    residual file than the folder's. Residuals are memory-mapped, and read only if something is to be compensated.
    Raises UserError if the folder is no DecDEC folder or belongs to another model.
    """
    folder = Path(folder)
    quant = artifacts.read_quant_config(folder)
    if compensated_layers(model):
        raise UserError("model: its layers are compensated ones already; set_compensation gives them other settings")
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules()):
        raise UserError("model: its weights are offloaded by accelerate, which would bring the old ones back; "
                        "give the device_map to from_pretrained(folder) instead")
    model.decdec = Source(folder, quant, Path(cheatsheet or folder / artifacts.CHEATSHEET))
    with ExitStack() as stack:
        tensors = _Tensors(folder, stack)
        linears = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
        packed = {name: _packed_layer(name, linear, tensors, quant) for name, linear in linears.items()
                  if f"{name}.qweight" in tensors}
        if not packed:
            raise UserError(f"{folder}: holds no quantized layer of this model")
        kept = [name for name, linear in linears.items() if not is_plain(linear)]
        for name, layer in packed.items():
            if name not in kept:
                replace(model, name, layer)
        _load_rest(model, tensors, kept)
    if kept:  # the library's own way of saving stays as well
        beside = {name: packed[name] for name in kept if name in packed}
        check_weights(model, beside)
        for name, layer in beside.items():
            Beside(linears[name], layer)
    else:
        model.config.quantization_config = quant.to_dict()
        save_artifacts_too(model)
    set_compensation(model, compensation)
    return model


def set_compensation(model: nn.Module, compensation: Compensation | Mapping[str, Compensation] | str,
                     residuals: str = "host") -> None:
    """Give every compensated layer of ``model`` new settings: the same for all, or by kind (``qkv``, ``o``, ``gu``,
    ``d``, ``other``).

    Kinds that a mapping leaves out are not compensated. ``"plan"`` is what the autotuner chose: the folder's
    ``plan.json``, refused if it is of other weights or another GPU. Residuals and thresholds are loaded on first need;
    of layers on a GPU the residuals come to pinned host memory, or with ``residuals="gpu"`` to its own. Where that fails, for a
    file or memory that is not there, nothing is compensated any more.
    """
    check_place(residuals)
    layers = compensated_layers(model).values()
    if compensation == "plan":
        if not layers:
            raise UserError("plan: this model has no compensated layers; attach a DecDEC folder first")
        source = model.decdec
        plan.apply(plan.load_plan(source.folder / plan.PLAN, source.quant, plan.this_device()), model, residuals=residuals)
        return
    by_kind = compensation if isinstance(compensation, Mapping) else dict.fromkeys((*KINDS, OTHER), compensation)
    if unknown := set(by_kind) - {*KINDS, OTHER}:
        raise UserError(f"compensation: expected kinds among {', '.join((*KINDS, OTHER))}, "
                        f"got {', '.join(sorted(map(str, unknown)))}")
    for setting in by_kind.values():
        if not isinstance(setting, Compensation):
            raise UserError(f"compensation: expected a Compensation, a mapping of kinds to them, or 'plan', got {setting!r}")
        if setting.k_chunk and not layers:
            raise UserError("k_chunk: this model has no compensated layers; attach a DecDEC folder first")
    settings = {layer: by_kind.get(layer.kind, Compensation()) for layer in layers}
    try:
        _give_what_is_needed(settings, model, residuals)
        for layer, setting in settings.items():
            layer.compensate(setting)
    except BaseException:  # some layers may have other residuals than their settings speak of
        for layer in layers:
            layer.compensate(Compensation())
        raise


def _give_what_is_needed(settings: Mapping[Compensated, Compensation], model: nn.Module, residuals: str) -> None:
    """Load repairs, residuals and thresholds that layers need for their new settings and have not, and place residuals."""
    wanted = {layer: setting for layer, setting in settings.items() if setting.k_chunk}
    if unrepaired := [layer for layer, setting in settings.items() if setting.repair and layer.repair is None]:
        _give_repairs(unrepaired, model.decdec)
    for repaired in (False, True):
        lacking = [layer for layer, setting in wanted.items()
                   if setting.repair == repaired and (layer.residual is None or layer.repaired != repaired)]
        if lacking:
            _give_residuals(lacking, model.decdec, repaired)
    place_residuals(wanted, residuals)
    calibrated = [layer for layer, setting in wanted.items()
                  if setting.selection in ("bucket", "static") and layer.thresholds is None]
    if calibrated:
        _give_thresholds(calibrated, model.decdec)


def compensated_layers(model: nn.Module) -> dict[str, Compensated]:
    """What can be compensated: layers of ours, and what stands beside another library's."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Compensated)}


def memory(model: nn.Module) -> dict[str, int]:
    """Bytes of ``model``: ``device_bytes`` of weights, buffers and residual scales, ``host_bytes`` of residual rows.

    Rows count if they are in use; those placed in a GPU's memory count there.
    """
    layers = compensated_layers(model).values()
    small = [t for layer in layers for t in (layer.residual_scale, layer.row_scale, layer.static_channels) if t is not None]
    small += [t for layer in layers if layer.repair and layer.compensation.repair for t in layer.repair.tensors()]
    on_device = {(t.data_ptr(), t.nbytes) for t in (*model.parameters(), *model.buffers(), *small)}
    residuals = {"host": 0, "gpu": 0}
    for layer in layers:
        if layer.compensation.k_chunk:
            residuals[layer.residual_in] += layer.residual.nbytes
    return {"device_bytes": sum(size for _, size in on_device) + residuals["gpu"], "host_bytes": residuals["host"]}


class _Tensors:
    """The tensors of a folder's safetensors files by name, read one by one."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        self.file_of = {}
        for name in safetensors_names(folder) or ["model.safetensors"]:
            if not (folder / name).is_file():
                raise UserError(f"{folder / name}: no such file; decdec_setup/quantize.py writes it")
            file = stack.enter_context(open_safetensors(folder / name))
            self.file_of |= dict.fromkeys(file.keys(), file)
        self.unread = set(self.file_of)

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def take(self, name: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
        if name not in self.file_of:
            raise UserError(f"{self.folder}: has no tensor {name}: an incomplete folder, or one of another model")
        tensor = self.file_of[name].get_tensor(name)
        if tensor.shape != tuple(shape):
            raise UserError(f"{self.folder}: {name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}: "
                            "a folder of another model")
        self.unread.discard(name)
        return tensor


def _packed_layer(name: str, linear: nn.Linear, tensors: _Tensors, quant: QuantConfig) -> CompensatedLinear:
    """The compensated layer of the weights of ``linear``, on its device (the CPU if it is on meta)."""
    d_out, d_in = linear.out_features, linear.in_features
    own = next(chain(linear.parameters(), linear.buffers()))
    device = "cpu" if own.is_meta else own.device
    empty = empty_packed(name, d_out, d_in, quant)
    packed = {key: tensors.take(f"{name}.{key}", tensor.shape).to(device) for key, tensor in empty.items()}
    bias = None
    if getattr(linear, "bias", None) is not None:
        bias = tensors.take(f"{name}.bias", (d_out,)).to(device, linear.bias.dtype)
    return CompensatedLinear(name, d_in, packed, bias)


def empty_packed(name: str, d_out: int, d_in: int, quant: QuantConfig) -> dict[str, Tensor]:
    """The packed tensors of one layer by their names, with shapes and dtypes but on the meta device."""
    bits = quant.bits_of(name)
    shapes = {"qweight": (packing.packed_shape(d_out, d_in, bits), torch.int32)}
    if quant.format == "codebook":
        shapes |= {"codebook": ((d_out, 2**bits), torch.int16), "scale": ((d_out,), torch.float32)}
    else:
        group_size = quant.group_size or d_in
        if d_in % group_size:
            raise UserError(f"group_size: {group_size} does not divide the {d_in} inputs of layer {name}")
        shapes |= dict.fromkeys(("scales", "zeros"), ((d_in // group_size, d_out), torch.float16))
    if quant.ordered:
        shapes["order"] = ((d_in,), torch.int32)
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in shapes.items()}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` into ``model`` in place of the layer ``name``."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, leaf, module)
    if not owner._parameters and not owner._buffers:
        # Some of transformers' blocks initialise the weights of their layers, which are no longer there.
        owner._is_hf_initialized = True


def _load_rest(model: nn.Module, tensors: _Tensors, kept: Collection[str] = ()) -> None:
    """Load what is not quantized, tie what the config ties, and compute the buffers that no file holds.

    Layers of the names ``kept`` have their tensors already.
    """
    # Before the weights come: transformers initialises those of a module together with its buffers.
    compute_buffers(model)
    model.tie_weights()
    there = {*compensated_layers(model), *kept}
    packed = {f"{prefix}.{key}" for prefix in there for key in model.get_submodule(prefix).state_dict()}
    tensors.unread -= {name for name in tensors.unread if name.rpartition(".")[0] in kept}
    stored = model.state_dict(keep_vars=True)
    present = {id(tensor) for name, tensor in stored.items() if name in tensors}
    for name, tensor in stored.items():
        if name in packed or (name not in tensors and id(tensor) in present):  # the latter is tied to one that is there
            continue
        value = tensors.take(name, tensor.shape)
        if tensor.is_meta:
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            value = value.to(tensor.dtype)
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if leaf in owner._parameters else value)
        else:
            with torch.no_grad():
                tensor.copy_(value)
    model.tie_weights()
    if tensors.unread:
        raise UserError(f"{tensors.folder}: tensor {min(tensors.unread)} fits nothing in this model: "
                        "a folder of another model")


def _give_repairs(layers: list[CompensatedLinear], source: Source) -> None:
    repairs = artifacts.load_repair(source.folder / artifacts.REPAIR, source.quant).layers
    for layer in layers:
        repair = join([repairs.get(name) for name, _ in layer.parts], [width for _, width in layer.parts], layer.in_features)
        if repair is not None and (repair.down.shape[1], len(repair.up)) != (layer.in_features, layer.out_features):
            raise UserError(f"{source.folder / artifacts.REPAIR}: {layer.name}: a repair of another model")
        layer.repair = repair if repair is None or layer.order is None else repair.reordered(layer.order.cpu().long())


def _give_residuals(layers: list[Compensated], source: Source, repaired: bool) -> None:
    path = source.residuals(repaired)
    sheet = artifacts.load_cheatsheet(path, source.quant)
    if sheet.repair != (artifacts.load_repair(source.folder / artifacts.REPAIR, source.quant).hash if repaired else None):
        raise UserError(f"{path}: expected the residuals {'of what ' + artifacts.REPAIR + ' leaves' if repaired else 'without a repair'}; "
                        f"make it with cheatsheet.py{' --repaired' if repaired else ''}")
    for layer in layers:
        names, widths = zip(*layer.parts)
        if missing := [name for name in names if name not in sheet.residual]:
            raise UserError(f"{path}: has no residual of layer {missing[0]}")
        for name, width in layer.parts:
            row_bytes = packing.residual_row_bytes(width, sheet.bits)
            if sheet.residual[name].shape != (layer.in_features, row_bytes):
                raise UserError(f"{path}: {name}: expected residual rows "
                                f"{(layer.in_features, row_bytes)}, got {tuple(sheet.residual[name].shape)}")
        residuals, scales = [sheet.residual[name] for name in names], [sheet.scale[name] for name in names]
        if sheet.bits != 16 and any(scale is None for scale in scales):
            raise UserError(f"{path}: has no residual scale of layer {layer.name}")
        rows = residuals[0] if len(names) == 1 else concatenate_residuals(residuals, widths, sheet.bits)
        row_scale = sheet.row_scale.get(names[0])  # one input, so one for all parts
        if layer.order is not None:
            rows = rows[layer.order.cpu()]
            row_scale = None if row_scale is None else row_scale[layer.order.cpu()]
        layer.set_residual(rows, None if sheet.bits == 16 else torch.cat(scales, dim=1), sheet.bits, sheet.nested, row_scale,
                           repaired)


def _give_thresholds(layers: list[Compensated], source: Source) -> None:
    path = source.folder / artifacts.THRESHOLDS
    thresholds = artifacts.load_thresholds(path, source.quant)
    for layer in layers:
        name = layer.parts[0][0]
        if name not in thresholds.largest:
            raise UserError(f"{path}: has no thresholds of layer {name}")
        mean_square = thresholds.mean_square[name]
        if layer.order is not None:
            mean_square = mean_square[layer.order.cpu()]
        layer.set_thresholds(thresholds.largest[name], mean_square)
