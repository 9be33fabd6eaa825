"""Output errors, layer by layer, against the method written down plainly in numpy from its paper; GPTQ's are in test_gptq.py."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from decdec.models import decoder_linears, load_model, load_tokenizer
from decdec.text import calibration_samples, load_text

from quantized_blocks import QuantizedBlocks
from scaling import read_scaling, scale_model

GROUP, LEVELS = 64, 8  # of the tiny model at 3 bits
BLOCK = "model.layers.0"


@pytest.fixture(scope="module")
def seen(tiny, calibration):
    """``(weights, inputs, Fisher information)`` of the first block's layers, float64: plain hooks on the whole model."""
    tokens = calibration_samples(load_text("pydoc", "calibration"), load_tokenizer(str(tiny)), 3, 64, 0)
    model = load_model(str(tiny), torch.float32)
    layers = {name: module for name, module in decoder_linears(model).items() if name.startswith(BLOCK)}
    inputs = {name: [] for name in layers}
    fisher = {name: 0.0 for name in layers}
    for sample in tokens:
        kept = {}
        hooks = [module.register_forward_hook(lambda _, args, output, name=name: kept.update({name: (args[0], output)}))
                 for name, module in layers.items()]
        loss = F.cross_entropy(model(sample[None]).logits[0, :-1], sample[1:], reduction="sum")
        gradients = torch.autograd.grad(loss, [kept[name][1] for name in layers])
        for hook in hooks:
            hook.remove()
        for name, gradient in zip(layers, gradients):
            x = kept[name][0][0].detach().double()
            inputs[name].append(x)
            fisher[name] += torch.einsum("to,ti->oi", gradient[0].double() ** 2, x**2)
    return ({name: module.weight.detach().double().numpy() for name, module in layers.items()},
            {name: torch.cat(parts).numpy() for name, parts in inputs.items()},
            {name: value.numpy() for name, value in fisher.items()})


def rounded(weight, limit=None):
    """Round to nearest, one group of a row after another; ``limit`` clips the range of a group first."""
    result = np.empty_like(weight)
    for start in range(0, weight.shape[1], GROUP):
        part = weight[:, start:start + GROUP]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if limit is not None:
            low, high = np.maximum(low, -limit[:, start // GROUP]), np.minimum(high, limit[:, start // GROUP])
        step = ((high - low) / (LEVELS - 1)).astype(np.float16).astype(np.float64)[:, None]
        zero = np.round(-low[:, None] / step)
        result[:, start:start + GROUP] = (np.clip(np.round(part / step) + zero, 0, LEVELS - 1) - zero) * step
    return result


def error(dense, weight, x):
    return float((((dense - weight) @ x.T) ** 2).sum())


def found(folder, original):
    """The folder's dense weights of the first block, and those that it stands for, as numpy."""
    blocks = QuantizedBlocks(folder)
    model = scale_model(load_model(str(original), torch.float32), read_scaling(folder))
    layers = {name: module for name, module in decoder_linears(model).items() if name.startswith(BLOCK)}
    return ({name: blocks.weight(name, module.weight.shape).double().numpy() for name, module in layers.items()},
            {name: module.weight.detach().double().numpy() for name, module in layers.items()})


def test_round_to_nearest(tiny, quantized, seen):
    weights, inputs, _ = seen
    dense, _ = found(quantized("rtn"), tiny)
    for name, weight in weights.items():
        assert error(dense[name], weight, inputs[name]) == pytest.approx(error(rounded(weight), weight, inputs[name]), rel=0.01)


def awq_scale(weights, x):
    """The best of twenty powers of the mean magnitude, by the error of all layers that read ``x``."""
    best, chosen = np.inf, None
    for step in range(20):
        scale = np.maximum(np.abs(x).mean(0), 1e-4) ** (step / 20)
        scale /= np.sqrt(scale.max() * scale.min())
        loss = sum(error(rounded(weight * scale) / scale, weight, x) for weight in weights)
        if loss < best:
            best, chosen = loss, scale
    return chosen


def awq_clipped(weight, x):
    """Rounded after the best of ten ranges for each group of each row, by the error of that group's part of the output."""
    largest = np.abs(weight.reshape(len(weight), -1, GROUP)).max(2)
    best, chosen = np.full_like(largest, np.inf), largest.copy()
    for step in range(10):
        limit = largest * (1 - step / 20)
        difference = rounded(weight, limit) - weight
        for g in range(largest.shape[1]):
            columns = slice(g * GROUP, (g + 1) * GROUP)
            loss = ((difference[:, columns] @ x[:, columns].T) ** 2).sum(1)
            better = loss < best[:, g]
            best[better, g], chosen[better, g] = loss[better], limit[better, g]
    return rounded(weight, chosen)


def test_awq(tiny, quantized, seen):
    weights, inputs, _ = (dict(part) for part in seen)
    q, k, v, o, gate, up, down = (f"{BLOCK}.{name}_proj" for name in
                                  ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"))
    # What o reads is not v's output channel by channel (grouped-query attention), so o is not scaled.
    for group, producer in (((q, k, v), None), ((gate, up), None), ((down,), up)):
        scale = awq_scale([weights[name] for name in group], inputs[group[0]])
        for name in group:
            weights[name], inputs[name] = weights[name] * scale, inputs[name] / scale
        if producer:
            weights[producer] = weights[producer] / scale[:, None]
    dense, scaled = found(quantized("awq"), tiny)
    for name, weight in weights.items():
        np.testing.assert_allclose(scaled[name], weight, rtol=1e-3, atol=1e-5)
        plain = rounded(weight) if name in (q, k) else awq_clipped(weight, inputs[name])
        assert error(dense[name], scaled[name], inputs[name]) == pytest.approx(error(plain, weight, inputs[name]), rel=0.02)


def lloyd(values, weights, generator):
    """Weighted k-means of one row by Lloyd's iterations from drawn centroids: the values as their centroids give them."""
    centroids = np.sort(generator.choice(values, LEVELS, replace=False))
    for _ in range(50):
        codes = np.abs(values[:, None] - centroids).argmin(1)
        mass = np.bincount(codes, weights, LEVELS)
        centroids = np.where(mass > 0, np.bincount(codes, weights * values, LEVELS) / np.where(mass > 0, mass, 1), centroids)
    return centroids[np.abs(values[:, None] - centroids).argmin(1)]


def test_squeezellm(tiny, quantized, seen):
    """Its error, weighted by the Fisher information, is no more than the best of twenty random starts leave."""
    weights, inputs, fisher = seen
    generator = np.random.default_rng(0)
    dense, _ = found(quantized("squeezellm"), tiny)
    for name in (f"{BLOCK}.self_attn.k_proj", f"{BLOCK}.mlp.down_proj"):
        rows = slice(0, 12)
        weight, importance = weights[name][rows], fisher[name][rows]
        importance = importance / importance.mean(1, keepdims=True)
        tried = [np.stack([lloyd(v, w, generator) for v, w in zip(weight, importance)]) for _ in range(20)]
        least = np.min([(importance * (plain - weight) ** 2).sum(1) for plain in tried], 0)
        ours = (importance * (dense[name][rows] - weight) ** 2).sum(1)
        assert (ours < 1.03 * least).all() and ours.sum() < 1.005 * least.sum()
        outputs = [error(plain, weight, inputs[name]) for plain in tried]
        assert error(dense[name][rows], weight, inputs[name]) < 1.1 * np.median(outputs)
