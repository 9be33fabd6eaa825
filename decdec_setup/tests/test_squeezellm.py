import itertools

import pytest
import torch
from torch.nn import functional as F

from decdec.errors import UserError
from decdec.models import decoder_linears, load_model, load_tokenizer
from decdec.text import calibration_samples, load_text

import squeezellm
from blocks import BlockRunner, block_linears
from uniform import fake_quantize


def weighted_error(values, weights, codes, centroids):
    return (weights * (torch.gather(centroids, 1, codes.long()) - values).square()).sum(1)


def best_by_brute_force(values, weights, k):
    """Least weighted error of one row over every way to part its sorted values into k runs."""
    x, order = values.double().sort()
    w = weights.double()[order]
    best = float("inf")
    for inner in itertools.combinations(range(1, len(x)), k - 1):
        error = 0.0
        for start, stop in itertools.pairwise((0, *inner, len(x))):
            mean = (w[start:stop] * x[start:stop]).sum() / w[start:stop].sum()
            error += float((w[start:stop] * (x[start:stop] - mean).square()).sum())
        best = min(best, error)
    return best


@pytest.mark.parametrize("k", [2, 4])
def test_kmeans_is_the_optimum_on_tiny_rows(k):
    generator = torch.Generator().manual_seed(k)
    values = torch.randn(12, 11, generator=generator)
    weights = torch.rand(12, 11, generator=generator) ** 4 + 1e-2
    codes, centroids = squeezellm.kmeans(values, weights, k)
    raised = weights / weights.mean(1, keepdim=True) + 1e-3  # the floor that kmeans documents
    found = weighted_error(values, raised, codes, centroids)
    wanted = torch.tensor([best_by_brute_force(v, w, k) for v, w in zip(values, raised)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_kmeans_beats_round_to_nearest_and_is_a_fixed_point():
    generator = torch.Generator().manual_seed(0)
    values = 0.02 * torch.randn(300, 576, generator=generator)
    weights = torch.rand(300, 576, generator=generator) ** 6
    codes, centroids = squeezellm.kmeans(values, weights, 8)
    found = weighted_error(values, weights, codes, centroids)
    rounded = (weights * (fake_quantize(values[:, None], 3)[:, 0] - values).square()).sum(1)
    assert (found < 0.7 * rounded).all()
    # Each value has its nearest centroid, and each centroid is its members' weighted mean.
    nearest = (values[:, :, None] - centroids[:, None]).abs().min(2).values
    torch.testing.assert_close((torch.gather(centroids, 1, codes.long()) - values).abs(), nearest)
    member = F.one_hot(codes.long(), 8) * (weights / weights.mean(1, keepdim=True) + 1e-3)[:, :, None]
    mean = (member * values[:, :, None]).sum(1) / member.sum(1)
    torch.testing.assert_close(mean, centroids, rtol=1e-3, atol=1e-6)


def test_kmeans_of_rows_without_weights_with_nan_or_with_few_values():
    values = torch.randn(4, 130, generator=torch.Generator().manual_seed(0))
    values[2] = 0.5
    values[3] = torch.arange(130) % 3
    weights = torch.ones(4, 130)
    weights[0] = 0
    weights[1, :7] = torch.nan
    codes, centroids = squeezellm.kmeans(values, weights, 8)
    assert centroids.isfinite().all()
    alone = squeezellm.kmeans(values[:1], torch.ones(1, 130), 8)
    torch.testing.assert_close(centroids[:1], alone[1])
    assert weighted_error(values, torch.ones(4, 130), codes, centroids)[2:].max() < 1e-9


def test_weights_that_are_not_finite_are_refused():
    weight = torch.ones(4, 64)
    weight[1, 2] = torch.inf
    with pytest.raises(UserError, match="q_proj"):
        squeezellm.pack_squeezed("q_proj", weight, torch.ones(4, 64), 3)


def test_fisher_is_the_sum_of_squared_gradients_of_each_token(tiny, monkeypatch):
    """Against autograd: each position's own contribution to a weight's gradient, by a backward pass for every position."""
    tokens = calibration_samples(load_text("pydoc", "calibration"), load_tokenizer(str(tiny)), 2, 6, 0)
    seen = {}

    def keep(name, weight, fisher, bits):
        seen[name] = fisher.clone()
        return {}

    monkeypatch.setattr(squeezellm, "pack_squeezed", keep)
    runner = BlockRunner(load_model(str(tiny), torch.float32), tokens)
    list(squeezellm.quantize_blocks(runner, [3, 3], {0, 1}))

    model = load_model(str(tiny), torch.float32)
    layer = "model.layers.0.mlp.down_proj"
    module = decoder_linears(model)[layer]
    expected = torch.zeros_like(module.weight)
    for sample in tokens:
        kept = {}
        hook = module.register_forward_hook(lambda m, args, out: kept.update(x=args[0], out=out))
        loss = F.cross_entropy(model(sample[None]).logits[0, :-1], sample[1:], reduction="sum")
        hook.remove()
        gradient = torch.autograd.grad(loss, kept["out"])[0][0]
        for g, x in zip(gradient, kept["x"][0]):
            expected += torch.outer(g, x.detach()).square()
    torch.testing.assert_close(seen[layer], expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    assert set(seen) == set(decoder_linears(model))


def test_blocks_run_alone_as_they_do_in_the_model(tiny):
    tokens = calibration_samples(load_text("pydoc", "calibration"), load_tokenizer(str(tiny)), 2, 16, 0)
    model = load_model(str(tiny), torch.float32)
    wanted = model(tokens).logits
    runner = BlockRunner(model, tokens)
    states = runner.embed()
    for index in range(len(runner.blocks)):
        block = runner.copy_block(index)
        assert len(block_linears(runner, index, block)) == 7
        states = [runner.call(index, block, state) for state in states]
    found = torch.stack([runner.logits(state, sample) for state, sample in zip(states, tokens)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
