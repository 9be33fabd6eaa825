import pytest
from candidates import largest_candidate, n_tb_candidates
from shapes import NAMED, random_weights


def of(model, kind):
    layer, = [layer for layer in random_weights(model, 3, "codebook").layers if layer.kind == kind]
    return n_tb_candidates(layer.d_in, layer.d_out)


def test_the_examples_of_the_paper():
    assert of("llama-3-8b", "qkv") == [1, 2, 3, 4, 5, 6, 8, 12, 24]
    assert of("llama-3-8b", "o") == [1, 2, 3, 4, 6, 8, 16]
    assert of("llama-3-8b", "d") == [*range(1, 15), 16]
    assert len(of("llama-3-8b", "gu")) == 21 and of("llama-3-8b", "gu")[-1] == 112
    assert [len(of("phi-3-medium", kind)) for kind in ("qkv", "o", "gu")] == [10, 8, 23]
    assert of("phi-3-medium", "d") == [*range(1, 18), 20]
    assert [len(of("llama-3-70b", kind)) for kind in ("qkv", "o", "gu", "d")] == [12, 11, 29, 29]


def test_n_tb_of_the_worked_example():
    """The paper prints (24, 16, 23, 14) for n_tb^max = 24; by its own rule d's largest candidate is 16, since 4096
    outputs are 16 segments."""
    assert [largest_candidate(of("llama-3-8b", kind), 24) for kind in ("qkv", "o", "gu", "d")] == [24, 16, 23, 16]


@pytest.mark.parametrize("d_in, d_out", [(576, 576), (1024, 1), (1088, 192), (4096, 257)])
def test_any_shape_has_candidates_from_1(d_in, d_out):
    found = n_tb_candidates(d_in, d_out)
    assert found[0] == 1 and found == sorted(set(found))


def test_a_larger_candidate_always_lightens_a_block():
    for d_out in range(256, 20_000, 997):
        segments = -(-d_out // 256)
        shares = [-(-segments // n) for n in n_tb_candidates(512, d_out)]
        assert shares == sorted(set(shares), reverse=True)
        assert set(shares) == {-(-segments // n) for n in range(1, segments + 1)}


def test_no_candidate_below_the_first():
    assert largest_candidate([4, 8], 3) is None


def test_every_named_model_has_four_kinds():
    for name in NAMED:
        assert [layer.kind for layer in random_weights(name, 3, "uniform").layers] == ["qkv", "o", "gu", "d"]
