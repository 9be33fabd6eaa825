"""from_pretrained on a folder: the logits of the attached model, casting, saving, plans, device maps, compiling."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import decdec.quantizer  # noqa: F401  (registers the method)
from decdec import hub
from decdec.artifacts import CHEATSHEET, THRESHOLDS, read_quant_config
from decdec.errors import UserError
from decdec.files import read_json, write_json
from decdec.linear import Compensation
from decdec.models import original_of
from decdec.plan import PLAN, Choice, Device, Plan, Tuned, load_plan, save_plan, this_device
from decdec.testing import quick_folder

SIZES = dict(vocab_size=160, hidden_size=96, intermediate_size=1088, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, initializer_range=0.1)
IDS = torch.arange(24)[None] * 5 % 160
PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
          "model.rotary_emb": "cpu", "lm_head": "cpu"}


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits.float()


@pytest.fixture(scope="module", params=["codebook", "uniform"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    if request.param == "codebook":
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SIZES))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))  # with biases, untied
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return quick_folder(model, tmp_path_factory.mktemp("quantizer") / request.param, request.param)


def test_from_pretrained_equals_the_attached_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for setting in (Compensation(), Compensation(8, prefill=True)):
        hub.set_compensation(model, setting)
        assert_close(logits(model), logits(hub.load(folder, compensation=setting)), rtol=1e-5, atol=1e-5)


def test_half_precision_keeps_the_packed_form(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, tensor in hub.load(folder).state_dict().items():
        if name.rpartition(".")[2] in ("qweight", "codebook", "scale", "scales", "zeros"):
            assert torch.equal(model.state_dict()[name], tensor) and model.state_dict()[name].dtype == tensor.dtype
    assert_close(logits(model), logits(hub.load(folder, torch.bfloat16)), rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_again_with_what_lies_beside_the_weights(folder, tmp_path):
    everything = Compensation(8, prefill=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    attached = hub.attach(AutoModelForCausalLM.from_config(plain_config(folder), dtype=torch.float32).eval(), folder)
    base = logits(model)
    hub.set_compensation(model, everything)
    want = logits(model)
    (folder / "scaling.safetensors").write_bytes(b"what AWQ scaled by")
    for number, original in enumerate((model, attached)):
        original.save_pretrained(tmp_path / str(number))
        for again in (AutoModelForCausalLM.from_pretrained(tmp_path / str(number), dtype=torch.float32),
                      hub.load(tmp_path / str(number))):
            assert_close(logits(again), base, rtol=0, atol=0)
            hub.set_compensation(again, everything)
            assert_close(logits(again), want, rtol=0, atol=0)
    again.save_pretrained(tmp_path / "1")  # onto itself
    assert (tmp_path / "1" / "scaling.safetensors").read_bytes() == b"what AWQ scaled by"
    (folder / "scaling.safetensors").unlink()
    assert (tmp_path / "1" / THRESHOLDS).stat().st_size == (folder / THRESHOLDS).stat().st_size


def test_what_is_pushed_to_the_hub_is_the_whole_folder(folder, tmp_path, monkeypatch):
    model, pushed = hub.load(folder), {}

    def push(self, repo_id, **options):
        self.save_pretrained(tmp_path / "upload")
        pushed.update(options, repo_id=repo_id)

    monkeypatch.setattr(type(model), "push_to_hub", push)
    model.save_pretrained(tmp_path / "m-w3", push_to_hub=True, commit_message="w3")
    assert pushed == {"repo_id": "m-w3", "commit_message": "w3"}
    model.save_pretrained(tmp_path / "m-w3", push_to_hub=True, repo_id="someone/m", token="t")
    assert pushed["repo_id"] == "someone/m" and pushed["token"] == "t"
    for saved in ("m-w3", "upload"):
        assert {CHEATSHEET, THRESHOLDS, "config.json"} <= {file.name for file in (tmp_path / saved).iterdir()}


def plain_config(folder):
    """The config of the folder's original."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    return config


def test_the_original_is_found_from_where_the_model_was_saved(tmp_path):
    torch.manual_seed(0)
    original = LlamaForCausalLM(LlamaConfig(**SIZES))
    original.save_pretrained(tmp_path / "original")
    folder = quick_folder(original, tmp_path / "made" / "w3")
    config = read_json(folder / "config.json")
    config["quantization_config"]["base_model"] = "../../original"
    write_json(folder / "config.json", config)
    hub.load(folder).save_pretrained(tmp_path / "elsewhere" / "deep" / "er")
    saved = tmp_path / "elsewhere" / "deep" / "er"
    base_model = read_json(saved / "config.json")["quantization_config"]["base_model"]
    assert original_of(saved, base_model) == str(saved / base_model) and (saved / base_model / "config.json").is_file()


def test_a_hub_id_brings_the_files_beside_the_weights(folder, monkeypatch):
    asked = {}

    def fetch(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not asked
    model.name_or_path, model.config._commit_hash = "someone/model-w3", "abc"
    model.hf_quantizer._process_model_after_weight_loading(model)
    assert asked["name"] == "someone/model-w3" and asked["revision"] == "abc" and CHEATSHEET in asked["patterns"]
    hub.set_compensation(model, Compensation(8))


def test_a_plan_is_picked_up(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    quant = read_quant_config(folder)
    choices = tuple(Choice(kind, 3, 1, 1, 1, 8, k, 1.0, 1.0) for kind, k in (("qkv", 8), ("o", 0), ("gu", 4), ("d", 2)))
    tuned = Tuned(5.0, "kernel", "paper", 4.0, None, 0.0, None, choices)
    device = this_device() or Device("some GPU", 80)
    made = Plan("m", "rtn", quant.weights_hash, device, "exact", 1.0, 1.0, None, {}, (tuned,))
    save_plan(tmp_path / "m" / PLAN, made)
    for model in (hub.load(tmp_path / "m", compensation="plan"),
                  AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)):
        hub.set_compensation(model, "plan")
        found = {layer.kind: layer.compensation.k_chunk for layer in hub.compensated_layers(model).values()}
        assert found == {"qkv": 8, "o": 0, "gu": 4, "d": 2}
    with pytest.raises(UserError, match="plan.json: no such file"):
        hub.load(folder, compensation="plan")
    assert load_plan(tmp_path / "m" / PLAN, quant, device) == made
    for other in (replace(device, sms=7), replace(device, name="another"), replace(device, simulated=True)):
        with pytest.raises(UserError, match=f"tuned for {device.name} with {device.sms} SMs, but this is .*run the autotuner"):
            load_plan(tmp_path / "m" / PLAN, quant, other)
    save_plan(tmp_path / "m" / PLAN, replace(made, weights_hash="0"))
    with pytest.raises(UserError, match="tuned for weights 0"):
        hub.load(tmp_path / "m", compensation="plan")


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_device_map_with_offloaded_blocks(folder, tmp_path, offload_buffers):
    everything = Compensation(8, prefill=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=PLACES,
                                                 offload_folder=tmp_path, offload_buffers=offload_buffers)
    assert model.model.layers[1].mlp.up_proj.qweight.is_meta == offload_buffers
    assert_close(logits(model), logits(hub.load(folder)), rtol=1e-5, atol=1e-5)
    hub.set_compensation(model, everything)
    want = hub.load(folder, compensation=everything)
    assert_close(logits(model), logits(want), rtol=1e-5, atol=1e-5)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(IDS, **settings), want.generate(IDS, **settings))


def test_attaching_to_an_offloaded_model_is_refused(folder, tmp_path):
    original = AutoModelForCausalLM.from_config(plain_config(folder), dtype=torch.float32)
    original.save_pretrained(tmp_path / "original")
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "original", device_map=PLACES, offload_folder=tmp_path)
    with pytest.raises(UserError, match="offloaded by accelerate"):
        hub.attach(offloaded, folder)


def test_compiled_for_a_whole_graph(folder):
    """A decode step in one graph, without the time of compiling it to machine code."""
    model = hub.load(folder, compensation=Compensation(8))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for ids in (IDS[:, :1], IDS[:, 4:5]):
            found, want = (run(ids, use_cache=False).logits for run in (compiled, model))
            assert_close(found, want, rtol=1e-5, atol=1e-5)
