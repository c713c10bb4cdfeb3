"""The estimate of a run's memory, beside what real objects and real steps allocate."""

import json
from contextlib import nullcontext

import pytest
import torch
import transformers
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from llava_mixlora import MixLoraError
from llava_mixlora.adapters.adapter_folder import NOT_THE_LANGUAGE_MODEL
from llava_mixlora.cli import main

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("transformers 4.37 cannot run a step on shapes alone", allow_module_level=True)

from llava_mixlora.diagnosis.memory_estimate import (
    COMPUTE_DTYPES,
    REFUSED,
    RunSettings,
    activation_bytes,
    base_bytes,
    build,
    count,
    estimate,
    optimizer_bytes,
    read_model_config,
    trained_by_kind,
)
from llava_mixlora.diagnosis.step_memory import peak_of_step

from ...conftest import LLAMA
from ...tiny import VOCABULARY, message_of

SIZES = {
    "tiny": {**LLAMA, "vocab_size": VOCABULARY},
    "larger": {
        **LLAMA,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "vocab_size": 1000,
    },
}
LENGTH = {"tiny": 64, "larger": 192}
IMAGE_TOKENS = 4
TOLERANCE = 0.15


@pytest.fixture
def make_llava(patched, clip_folder):
    """Makes a real upstream LLaVA as train() leaves it, and the estimate's reading of its configuration."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    def make(size, settings):
        config = LlavaConfig(
            mm_vision_tower=str(clip_folder),
            mm_projector_type="mlp2x_gelu",
            mm_hidden_size=16,
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            use_mm_proj=True,
            pretraining_tp=1,
            use_cache=False,
            **SIZES[size],
        )
        compute = COMPUTE_DTYPES[settings.compute_dtype]
        model = LlavaLlamaForCausalLM(config).to(compute)
        adapter = settings.adapter()
        adapter.exclude_modules = NOT_THE_LANGUAGE_MODEL
        tower = model.get_vision_tower()
        model = get_peft_model(model, adapter)
        tower.load_model()
        tower.to(torch.bfloat16 if compute == torch.bfloat16 else torch.float16)
        for parameter in model.get_model().mm_projector.parameters():
            parameter.requires_grad = True
        folder = clip_folder.parent / f"{size}-llava"
        config.save_pretrained(folder)
        return model.train(), read_model_config(str(folder))

    return make


@pytest.fixture
def quantized(tmp_path):
    """Makes a real quantized language model, through the calls of upstream's train()."""

    def make(size, settings, bits):
        folder = tmp_path / size
        compute = COMPUTE_DTYPES[settings.compute_dtype]
        LlamaForCausalLM(LlamaConfig(**SIZES[size])).save_pretrained(folder)
        quantization = BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            llm_int8_skip_modules=["mm_projector"],
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
        )
        model = LlamaForCausalLM.from_pretrained(
            folder, dtype=compute, device_map={"": "cpu"}, quantization_config=quantization
        )
        model.config.use_cache = False
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.gradient_checkpointing)
        model = get_peft_model(model, settings.adapter())
        model.get_input_embeddings().to(compute)
        return model.train(), read_model_config(str(folder), "none")

    return make


def stored_bytes(tensors):
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def frozen_tensors(model):
    """Weights, the constants of quantized ones, and buffers of a real model."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        if getattr(parameter, "SCB", None) is not None:
            yield parameter.SCB
    yield from model.buffers()


def batch(size, batch_size, settings, image=True):
    from llava.constants import IMAGE_TOKEN_INDEX

    length = LENGTH[size]
    ids = torch.randint(3, VOCABULARY, (batch_size, length - IMAGE_TOKENS + 1 if image else length))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids).bool()}
    if image:
        ids[:, 2] = IMAGE_TOKEN_INDEX
        dtype = torch.bfloat16 if settings.compute_dtype == "bf16" else torch.float32
        inputs["images"] = torch.rand(batch_size, 3, 16, 16).to(dtype)
    return inputs


def measured_peak(model, inputs, settings):
    """The most that a real step allocates, by the allocator's own events; gradients exist before."""
    compute = COMPUTE_DTYPES[settings.compute_dtype]

    def step():
        with torch.autocast("cpu", compute) if compute != torch.float32 else nullcontext():
            loss = model(**inputs).loss
        loss.backward()

    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    step()  # allocates the gradients, and what kernels make once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("routing", ["ifs_cfs", "ifs", "random"])
def test_parameters_are_those_of_the_real_model(make_llava, routing):
    settings = RunSettings(routing=routing, num_factors=8, r=2)
    real, config = make_llava("tiny", settings)
    kinds = trained_by_kind(build(config, settings, 16))
    assert sum(kinds.values()) == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert kinds["projector"] == sum(p.numel() for p in real.get_model().mm_projector.parameters())
    assert (kinds["routers"] > 0, kinds["cfs"] > 0) == (routing != "random", routing == "ifs_cfs")


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"pairing": "same", "router_input": "hidden"},
        {"pairing": "rank", "router_input": "words"},
        {"cfs": "table"},
    ],
)
def test_parameters_of_further_forms_are_those_of_the_real_model(make_llava, form):
    settings = RunSettings(num_factors=8, r=2, **form)
    real, config = make_llava("tiny", settings)
    kinds = trained_by_kind(build(config, settings, 16))
    assert sum(kinds.values()) == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert base_bytes(build(config, settings, 16).language, 16) == base_bytes(real, 16) - tower_bytes(real)


def tower_bytes(real):
    tower = real.get_model().get_vision_tower()
    return stored_bytes(tower.parameters()) + stored_bytes(tower.buffers())


def test_one_router_and_no_cfs_are_what_equal_pairing_saves(tmp_path):
    """At 7B that is 91 of 170 million numbers; the sizes here are a Llama-7B's in one layer."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_CONFIG, **sizes, "num_hidden_layers": 1}))
    config = read_model_config(str(tmp_path), "none")
    forms = {pairing: RunSettings(pairing=pairing, router_input="hidden") for pairing in ("rank", "same")}
    kinds = {pairing: trained_by_kind(build(config, settings, 16)) for pairing, settings in forms.items()}
    saved = sum(kinds["rank"].values()) - sum(kinds["same"].values())
    assert saved == kinds["rank"]["routers"] // 2 + kinds["rank"]["cfs"] == (16 + 4 * 16) * (6 * 4096 + 11008)


def test_routing_that_is_not_given_is_what_the_pairing_allows():
    assert RunSettings().routing == "ifs" and RunSettings(pairing="rank").routing == "ifs_cfs"


def test_flags_of_the_command_describe_the_form(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    words = ["doctor", "--estimate", str(tmp_path), "--vision-tower", "none", "--bits", "16", "--sequence-length", "8"]
    assert main([*words, "--pairing", "same", "--router-input", "words", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["pairing"], settings["routing"], settings["router_input"]) == ("same", "ifs", "words")
    assert main([*words, "--cfs", "table"]) == 0
    assert "ifs_cfs, pairing rank, router input words, cfs table, num_factors 16, r 4" in capsys.readouterr().out
    assert main([*words, "--pairing", "same", "--routing", "ifs_cfs"]) == 1
    assert "routing='ifs_cfs' chooses B factors by the A factors" in capsys.readouterr().err.splitlines()[-1]


def test_frozen_routers_are_not_counted_as_trained(make_llava):
    settings = RunSettings(router_gradient="none")
    real, config = make_llava("tiny", settings)
    kinds = trained_by_kind(build(config, settings, 16))
    assert kinds["routers"] == kinds["cfs"] == 0
    assert sum(kinds.values()) == sum(p.numel() for p in real.parameters() if p.requires_grad)


@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
def test_bytes_of_weights_gradients_and_adamw_are_exact(make_llava, compute_dtype):
    settings = RunSettings(compute_dtype=compute_dtype)
    real, config = make_llava("larger", settings)
    counted = count(build(config, settings, 16), settings, 16, activations=0)
    tower = real.get_model().get_vision_tower()
    of_tower = stored_bytes(tower.parameters())
    assert counted.tower == of_tower
    # The tower's buffer of position ids is none of the language model's.
    frozen = [
        t for t in frozen_tensors(real) if all(t is not other for other in [*tower.parameters(), *tower.buffers()])
    ]
    assert counted.base == stored_bytes(frozen)
    trained = [p for p in real.parameters() if p.requires_grad]
    assert counted.trained == stored_bytes(trained)
    optimizer = torch.optim.AdamW(trained)
    real(**batch("larger", 1, settings)).loss.backward()
    optimizer.step()
    assert counted.gradients == stored_bytes([p.grad for p in trained if p.grad is not None])
    assert counted.optimizer == stored_bytes([t for state in optimizer.state.values() for t in state.values()])


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_of_quantized_weights_are_exact(quantized, bits):
    settings = RunSettings()
    real, config = quantized("larger", settings, bits)
    assert base_bytes(build(config, settings, bits), bits) == stored_bytes(frozen_tensors(real))


def test_bytes_of_the_8_bit_optimizer_are_exact():
    from bitsandbytes.optim import AdamW8bit

    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (10, 4095, 4096, 100_001)]
    optimizer = AdamW8bit(parameters)
    group = optimizer.param_groups[0]
    for index, parameter in enumerate(parameters):
        optimizer.init_state(group, parameter, 0, index)
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert optimizer_bytes(parameters, "paged_adamw_8bit") == stored_bytes(states)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "compute_dtype", "batch_size"), [("tiny", "fp32", 2), ("larger", "bf16", 4)])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_agree_with_a_real_step(make_llava, size, compute_dtype, batch_size, checkpointing):
    settings = RunSettings(
        compute_dtype=compute_dtype,
        gradient_checkpointing=checkpointing,
        batch_size=batch_size,
        sequence_length=LENGTH[size],
    )
    real, config = make_llava(size, settings)
    measured = measured_peak(real, batch(size, batch_size, settings), settings)
    assert activation_bytes(config, settings, [16])[16] == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("form", [{"router_input": "hidden"}, {"router_input": "words"}])
def test_activations_of_further_forms_agree_with_a_real_step(make_llava, form):
    settings = RunSettings(compute_dtype="fp32", batch_size=2, sequence_length=LENGTH["larger"], **form)
    real, config = make_llava("larger", settings)
    measured = measured_peak(real, batch("larger", 2, settings), settings)
    assert activation_bytes(config, settings, [16])[16] == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "checkpointing"), [(4, True), (8, False)])
def test_activations_of_a_quantized_model_agree_with_a_real_step(quantized, bits, checkpointing):
    settings = RunSettings(gradient_checkpointing=checkpointing, batch_size=4, sequence_length=LENGTH["larger"])
    real, config = quantized("larger", settings, bits)
    measured = measured_peak(real, batch("larger", 4, settings, image=False), settings)
    assert activation_bytes(config, settings, [bits])[bits] == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "checkpointing"), [(16, False), (4, True)])
def test_two_layers_tell_what_any_depth_needs(make_llava, bits, checkpointing):
    settings = RunSettings(gradient_checkpointing=checkpointing, batch_size=2, sequence_length=LENGTH["larger"])
    _, config = make_llava("larger", settings)
    depth = config.language.num_hidden_layers
    shapes = depth, settings.batch_size, settings.sequence_length, checkpointing, torch.bfloat16
    in_full = peak_of_step(build(config, settings, bits), *shapes)
    assert peak_of_step(build(config, settings, bits, layers=2), *shapes) == pytest.approx(in_full, rel=0.01)


@pytest.mark.slow
def test_zero_divides_what_it_shards_and_refuses_quantized_weights(make_llava):
    _, config = make_llava("tiny", RunSettings())
    result = estimate(config, RunSettings(gpus=8, batch_size=1, sequence_length=8), [16, 4])
    whole, cells = result.components[16], result.cells[16]
    assert whole.base + whole.activations < cells["ZeRO-2"].gpu < cells["none"].gpu
    offloaded = cells["ZeRO-3 + CPU offload"]
    assert offloaded.gpu + offloaded.host == cells["ZeRO-3"].gpu
    assert offloaded.host < cells["none"].gpu / 7
    assert result.cells[4]["ZeRO-3"].refused == REFUSED and not result.cells[4]["ZeRO-2"].refused
    assert result.components[4].base < whole.base


LLAMA_CONFIG = {"model_type": "llama", **LLAMA, "vocab_size": VOCABULARY}


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("no json", "not valid JSON"),
        ('["a", "list"]', "expected a JSON object"),
        (json.dumps({**LLAMA_CONFIG, "model_type": "gpt2"}), "'gpt2' is not supported"),
        (json.dumps({**LLAMA_CONFIG, "model_type": "llava", "text_config": {}}), "'llava' is not supported"),
        (json.dumps({"model_type": "llama"}), "hidden_size is None"),
    ],
)
def test_a_file_that_is_no_supported_configuration_is_named(tmp_path, written, named):
    (tmp_path / "config.json").write_text(written)
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(MixLoraError, match=named) as error:
            read_model_config(str(source))
        assert "config.json" in str(error.value) or str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["/gone/model", "/gone/config.json"])
def test_a_missing_model_is_named(source):
    with pytest.raises(MixLoraError, match=source):
        read_model_config(source)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"gpus": 0}, "gpus=0"),
        ({"r": 17}, "r=17"),
        ({"pairing": "pairs"}, "pairing='pairs'"),
        ({"router_input": "pictures"}, "router_input='pictures'"),
        ({"pairing": "same", "cfs": "table"}, "cfs='table' has no meaning"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"compute_dtype": "int8"}, "compute_dtype='int8'"),
    ],
)
def test_a_setting_outside_its_range_is_named(wrong, named):
    with pytest.raises(MixLoraError, match=named):
        RunSettings(**wrong)


@pytest.mark.parametrize("bits", [0, 3, 32])
def test_unknown_bits_are_named(make_llava, bits):
    _, config = make_llava("tiny", RunSettings())
    with pytest.raises(MixLoraError, match=f"bits={bits}: expected 16, 8 or 4"):
        estimate(config, RunSettings(), [16, bits])


def test_a_sequence_must_hold_its_image(make_llava):
    _, config = make_llava("tiny", RunSettings())
    with pytest.raises(MixLoraError, match=f"sequence_length={IMAGE_TOKENS}"):
        estimate(config, RunSettings(sequence_length=IMAGE_TOKENS))


def test_an_unnamed_tower_is_taken_for_clip_large(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    config = read_model_config(str(tmp_path))
    assert config.image_tokens == 576 and "assuming openai/clip-vit-large-patch14-336" in config.notes[0]


@pytest.mark.parametrize(
    "fields", [{"num_hidden_layers": 10**9}, {"hidden_size": 10**9}, {"mm_projector_type": "mlp999999999x_gelu"}]
)
def test_sizes_that_no_model_has_are_refused_before_a_layer_is_made(llava_folder, tmp_path, fields):
    values = {**json.loads((llava_folder / "config.json").read_text()), **fields}
    (tmp_path / "config.json").write_text(json.dumps(values))
    ((name, value),) = fields.items()
    assert f"{name}={value!r}" in message_of(read_model_config, str(tmp_path))


def test_kernel_that_a_model_names_is_not_loaded(llava_folder, tmp_path):
    values = {**json.loads((llava_folder / "config.json").read_text()), "_attn_implementation": "owner/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_model_config(str(tmp_path)).language._attn_implementation != "owner/kernel"
