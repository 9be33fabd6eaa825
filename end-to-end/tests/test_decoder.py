"""The static-cache decoder against Hugging Face's logits, on random models of several shapes: prefill and decode."""

import pytest
import torch
import transformers
from torch.testing import assert_close

import decoder as decoder_module
from decdec import hub
from decdec.errors import UserError
from decdec.linear import Compensation
from decdec.testing import add_repair, logits_of_decoder, logits_of_hugging_face, quick_folder
from decoder import Decoder
from generation import Timing, generate
from random_model import random_model
from stepper import Stepper

SIZES = dict(vocab_size=160, hidden_size=96, intermediate_size=1088, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=0,
             initializer_range=0.1)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
SHAPES = {
    "llama": ("Llama", dict()),
    "tied": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=6)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, head_dim=32)),
    "biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "yarn": ("Llama", dict(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                            "original_max_position_embeddings": 64})),
    "mistral": ("Mistral", dict(sliding_window=8)),
    "qwen2": ("Qwen2", dict()),
    "qwen2-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "phi3": ("Phi3", dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                                           "partial_rotary_factor": 0.5})),
    "longrope": ("Phi3", dict(max_position_embeddings=128, original_max_position_embeddings=18, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 18})),
}
PROMPT = torch.arange(21) * 7 % 160


def original(shape="llama"):
    family, changes = SHAPES[shape]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_hugging_face(shape):
    want = logits_of_hugging_face(original(shape), PROMPT, 15)
    assert_close(logits_of_decoder(Decoder(original(shape)), PROMPT, 15), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape, form, nested", [("llama", "codebook", None), ("biases", "uniform", None), ("qwen3", "codebook", None),
                                                 ("phi3", "uniform", None), ("llama", "codebook", 2), ("biases", "codebook", 3),
                                                 ("llama", "uniform", 2), ("phi3", "uniform", 3)])
def test_compensated_logits_equal_the_attached_model(tmp_path, shape, form, nested):
    folder = quick_folder(original(shape), tmp_path / "m", form, residual_bits=nested or 4, nested=bool(nested))
    decoder, seen = Decoder(hub.load(folder)), []
    for k_chunk, prefill in ((0, False), (8, False), (8, True), (1024, False)):
        setting = Compensation(k_chunk, prefill=prefill)
        hub.set_compensation(decoder, setting)
        seen.append(logits_of_decoder(decoder, PROMPT, 15))
        want = logits_of_hugging_face(hub.load(folder, compensation=setting), PROMPT, 15)
        assert_close(seen[-1], want, rtol=1e-4, atol=1e-4)
    assert_close(seen[1][0], seen[0][0])  # the prompt is not compensated unless asked
    assert not torch.allclose(seen[1][1], seen[0][1], atol=1e-3)
    assert not torch.allclose(seen[2][0], seen[0][0], atol=1e-3)


@pytest.mark.parametrize("form", ["codebook", "uniform"])
def test_a_static_repair_goes_through_the_decoder_too(tmp_path, form):
    folder = add_repair(quick_folder(original("biases"), tmp_path / "m", form))
    decoder, seen = Decoder(hub.load(folder)), []
    for k_chunk, repair in ((0, False), (0, True), (8, True)):
        setting = Compensation(k_chunk, "exact", repair=repair)
        hub.set_compensation(decoder, setting)
        seen.append(logits_of_decoder(decoder, PROMPT, 15))
        want = logits_of_hugging_face(hub.load(folder, compensation=setting), PROMPT, 15)
        assert_close(seen[-1], want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen[1][0], seen[0][0], atol=1e-3)  # the prompt is repaired too
    assert not torch.allclose(seen[2][1], seen[1][1], atol=1e-3)


def test_half_precision_follows_hugging_face(tmp_path):
    folder = quick_folder(original(), tmp_path / "m")
    setting = Compensation(8, "exact")
    exact = logits_of_hugging_face(hub.load(folder, compensation=setting), PROMPT, 15)
    theirs = logits_of_hugging_face(hub.load(folder, torch.bfloat16, setting), PROMPT, 15)
    decoder = Decoder(hub.load(folder, torch.bfloat16))
    hub.set_compensation(decoder, setting)
    ours = logits_of_decoder(decoder, PROMPT, 15)
    assert (ours - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()


def test_prefill_in_chunks_and_a_longer_live_length_change_nothing(monkeypatch):
    decoder = Decoder(original("mistral"))
    want = logits_of_decoder(decoder, PROMPT, 21)
    monkeypatch.setattr(decoder_module, "PREFILL_CHUNK", 5)
    assert_close(logits_of_decoder(decoder, PROMPT, 21), want, rtol=1e-4, atol=1e-5)
    decoder.allocate(64)
    decoder.keys.fill_(torch.nan).nan_to_num_(1e3)  # what lies beyond the live places is masked
    decoder.values.copy_(decoder.keys)
    decoder.prefill(PROMPT[:20])
    with torch.inference_mode():
        assert_close(decoder.step(PROMPT[20:], torch.tensor([20]))[None], want, rtol=1e-4, atol=1e-5)


def test_greedy_text_equals_hugging_face_and_is_timed(tmp_path):
    folder = quick_folder(original("tied"), tmp_path / "m")
    model, decoder, timing = hub.load(folder, compensation=Compensation(16)), Decoder(hub.load(folder)), Timing()
    hub.set_compensation(decoder, Compensation(16))
    stepper = Stepper(decoder)
    want = model.generate(PROMPT[None], attention_mask=torch.ones(1, 21), max_new_tokens=12, do_sample=False,
                          eos_token_id=None)
    got = list(generate(stepper, PROMPT, 12, timing=timing))
    assert got == want[0, 21:].tolist()
    assert (timing.prompt_tokens, timing.steps) == (21, 11) and timing.prefill_s > 0 and timing.decode_s > 0
    assert list(generate(stepper, PROMPT, 12, stop={got[4]})) == got[:got.index(got[4])]


def test_longrope_reads_a_sequence_again_once_it_is_long():
    model, prompt = original("longrope"), PROMPT[:15]
    want = model.generate(prompt[None], attention_mask=torch.ones(1, 15), max_new_tokens=12, do_sample=False,
                          eos_token_id=None)
    assert list(generate(Stepper(Decoder(original("longrope"))), prompt, 12)) == want[0, 15:].tolist()


def test_an_8_bit_head_rounds_every_token_to_its_own_scale():
    plain, rounded = Decoder(original("tied")), Decoder(original("tied"), head_bits=8)
    weight = plain.head.weight.detach()
    assert rounded.head.weight.dtype == torch.int8 and torch.equal(rounded.embed.weight, weight)
    error = (rounded.head.weight * rounded.head.scale[:, None] - weight).abs()
    assert (error <= weight.abs().amax(dim=1, keepdim=True) / 254 * 1.001).all()
    want, got = (logits_of_decoder(decoder, PROMPT, 15) for decoder in (plain, rounded))
    assert 0 < (got - want).abs().mean() < 0.02 * want.std()


@pytest.mark.parametrize("form", ["codebook", "uniform"])
def test_blocks_may_differ_in_their_bits(form):
    config = transformers.LlamaConfig(**SIZES | dict(hidden_size=256, intermediate_size=1152, num_attention_heads=8))

    def made():
        torch.manual_seed(0)
        return random_model(config, 3.5, form, torch.float32, torch.device("cpu")).eval()

    decoder = Decoder(made())
    assert [block.gu.bits for block in decoder.blocks] == [3, 4]
    want = logits_of_hugging_face(made(), PROMPT, 15)
    assert_close(logits_of_decoder(decoder, PROMPT, 15), want, rtol=1e-3, atol=1e-3 * float(want.std()))


def test_memory_and_settings_work_as_on_the_model(tmp_path):
    folder = quick_folder(original("tied"), tmp_path / "m")
    decoder = Decoder(hub.load(folder))
    assert hub.memory(decoder)["host_bytes"] == 0
    hub.set_compensation(decoder, {"qkv": Compensation(8), "gu": Compensation(4)})
    k_chunks = {name: layer.compensation.k_chunk for name, layer in hub.compensated_layers(decoder.blocks[0]).items()}
    assert k_chunks == {"qkv": 8, "o": 0, "gu": 4, "d": 0}
    model = hub.load(folder)
    assert hub.memory(decoder)["device_bytes"] == pytest.approx(hub.memory(model)["device_bytes"], rel=0.02)


@pytest.mark.parametrize("family, changes, match", [
    ("Gemma", dict(head_dim=16), "RMSNorm"), ("Olmo2", dict(), "shape"),
    ("Granite", dict(residual_multiplier=0.5), "residual"), ("GPTNeoX", dict(), "shape"),
    ("Llama", dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
    ("Glm", dict(head_dim=16), "interleaved"), ("Ernie4_5", dict(), "interleaved"), ("Helium", dict(head_dim=16), "interleaved"),
    ("Ministral3", dict(head_dim=16), "llama_4_scaling_beta"), ("Olmo", dict(), "no weight"), ("Moshi", dict(), "no rotary"),
    ("GraniteSWA", dict(), "sink"),
])
def test_models_of_another_shape_are_refused(family, changes, match):
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with pytest.raises(UserError, match=match):
        Decoder(model)
