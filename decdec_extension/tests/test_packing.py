"""The bit layouts against their description, one code at a time, and back."""

import pytest
import torch

from decdec import packing, reference
from decdec.residual import pack_layer, row_scale_of

SHAPES = [(1, 1), (15, 63), (16, 64), (17, 65), (33, 130), (192, 576)]


@pytest.mark.parametrize("bits", packing.BASE_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_base_round_trip(shape, bits):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = packing.pack_codes(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == packing.packed_shape(*shape, bits)
    assert torch.equal(packing.unpack_codes(packed, *shape), codes)


@pytest.mark.parametrize("bits", packing.BASE_BITS)
def test_every_base_code_lies_where_the_layout_says(bits):
    codes = torch.randint(0, 2**bits, (40, 150))
    words = (packing.pack_codes(codes, bits).long() & 0xFFFFFFFF).tolist()
    for row in range(40):
        for column in range(150):
            tile, in_tile = divmod(row, 16)
            h, g = divmod(in_tile, 8)
            unit, in_unit = divmod(column, 64)
            s, in_half = divmod(in_unit, 32)
            upper, in_16 = divmod(in_half, 16)
            t, low = divmod(in_16, 4)
            q, j, lane = 2 * s + h, 4 * upper + low, 4 * g + t
            word = [words[tile][unit][m][lane] for m in range(bits)]
            if bits == 4:
                code = word[q] >> 4 * j & 15
            elif bits == 3 and q < 3:
                code = word[q] >> 4 * j & 7
            elif bits == 3:
                code = sum((word[m] >> 4 * j + 3 & 1) << m for m in range(3))
            else:
                code = word[q % 2] >> 4 * j + 2 * (q // 2) & 3
            assert code == codes[row, column], (row, column)


@pytest.mark.parametrize("bits", packing.BASE_BITS)
def test_padding_is_code_zero(bits):
    packed = packing.pack_codes(torch.full((17, 65), 2**bits - 1), bits)
    whole = packing.unpack_codes(packed, 32, 128)
    assert whole[:17, :65].eq(2**bits - 1).all()
    assert not whole[17:].any() and not whole[:, 65:].any()


@pytest.mark.parametrize("bits", packing.RESIDUAL_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_round_trip(shape, bits):
    half = 2 ** (bits - 1)
    codes = torch.randn(shape).half() if bits == 16 else torch.randint(-half, half, shape, dtype=torch.int8)
    packed = packing.pack_residual(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], packing.residual_row_bytes(shape[1], bits))
    assert packed.shape[1] % 16 == 0 and 0 <= packed.shape[1] - shape[1] * bits / 8 < (32 if bits == 3 else 16)
    assert torch.equal(packing.unpack_residual(packed, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", (1, 2, 4, 8))
def test_every_residual_code_lies_where_the_layout_says(bits):
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (3, 37))
    packed = packing.pack_residual(codes, bits).tolist()
    for channel in range(3):
        for output in range(37):
            code = packed[channel][output * bits // 8] >> output * bits % 8 & 2**bits - 1
            assert code - half == codes[channel, output]


def test_three_bits_are_the_high_two_then_the_low_one():
    codes = torch.randint(-4, 4, (5, 131))
    packed = packing.pack_residual(codes, 3)
    high, low = packed.split([packing.residual_row_bytes(131, 2), packing.residual_row_bytes(131, 1)], dim=1)
    assert torch.equal(packing.unpack_residual(high, 2, 131), codes.div(2, rounding_mode="floor").to(torch.int8))
    assert torch.equal(packing.unpack_residual(low, 1, 131) + 1, codes.remainder(2).to(torch.int8))


def test_codebook_is_off_by_at_most_half_a_step():
    codebook = torch.randn(50, 8)
    codebook[7] = 0
    codes, scale = packing.pack_codebook(codebook)
    assert codes.dtype == torch.int16 and scale.dtype == torch.float32
    error = (codes.double() * scale.double()[:, None] - codebook.double()).abs()
    assert (error <= codebook.double().abs().amax(dim=1, keepdim=True) * 1.001 / 2**16).all()
    assert not codes[7].any()


@pytest.mark.parametrize("pack, codes, bits, message", [
    (packing.pack_codes, torch.tensor([[8]]), 3, "codes: expected values in 0..7"),
    (packing.pack_codes, torch.tensor([[-1]]), 3, "codes: expected values in 0..7"),
    (packing.pack_codes, torch.tensor([[1]]), 5, "bits: expected one of"),
    (packing.pack_codes, torch.tensor([1]), 3, "codes: expected a matrix"),
    (packing.pack_residual, torch.tensor([[8]]), 4, "codes: expected values in 0..15"),
    (packing.pack_residual, torch.tensor([[1]]), 5, "bits: expected one of"),
])
def test_refusals(pack, codes, bits, message):
    with pytest.raises(ValueError, match=message):
        pack(codes, bits)


def test_unpacking_refuses_another_shape():
    packed = packing.pack_codes(torch.zeros((16, 64), dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="qweight: expected shape"):
        packing.unpack_codes(packed, 17, 64)
    with pytest.raises(ValueError, match="residual: expected 16 bytes a row"):
        packing.unpack_residual(torch.zeros((4, 32), dtype=torch.uint8), 4, 8)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_channel_without_residual(bits):
    """Its size is 0, which nothing can be divided by."""
    residual = torch.randn(40, 96)
    residual[:, 5] = 0
    sizes = row_scale_of([residual])
    assert sizes[5] == 0
    rows, width = pack_layer(residual, bits, nested=True, row_scale=sizes)
    assert width.isfinite().all() and (width > 0).all()
    back = reference.residual_dequantize(rows, width, bits, True, 40, torch.float32) * sizes[:, None]
    assert not back[5].any() and (back.t() - residual).norm() < 2 ** (1 - bits) * residual.norm()
