"""What `test_peft_versions.py` runs beside a version of PEFT: `python -m tests.end_to_end.peft_version_runs OUT.json`.

Writes the versions that it ran with and, for each of `RUNS`, what went wrong, or null.
"""

import copy
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava_mixlora import MixLoraConfig, MixLoraLayer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, STEPS = 4, 6


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Always the same one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.3, **sizes)).to(dtype)


def adapted(base: LlamaForCausalLM | None = None, **options: object) -> PeftModel:
    torch.manual_seed(1)
    options = {"r": 2, "num_factors": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    return get_peft_model(base or tiny_llama(), MixLoraConfig(**options))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (BATCH, 12), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "labels": labels}


def trained(model: PeftModel) -> tuple[PeftModel, list[float]]:
    """Some steps on one batch; the losses of each."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    model.train()
    losses = []
    for _ in range(STEPS):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=batch()["input_ids"]).logits


def adapted_layers(model: torch.nn.Module) -> list[MixLoraLayer]:
    return [module for module in model.modules() if isinstance(module, MixLoraLayer)]


def check_statistics(model: torch.nn.Module, adapter: str = "default") -> None:
    found = adapted_layers(model)
    assert len(found) == 14
    for layer in found:
        usage, moments = layer.mixlora_stats_usage[adapter], layer.mixlora_stats_moments[adapter]
        assert usage.dtype == moments.dtype == torch.int64
        assert usage.sum(dim=1).tolist() == [STEPS * BATCH * 2] * 2, usage
        sums = moments.view(torch.float64)
        assert sums.isfinite().all() and sums.any()


def statistics(model: torch.nn.Module, adapter: str = "default") -> list[torch.Tensor]:
    return [getattr(layer, f"mixlora_stats_{kind}")[adapter] for layer in adapted_layers(model) for kind in KINDS]


KINDS = ("usage", "moments")


def check_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    assert torch.equal(logits(model), logits(other))
    assert all(map(torch.equal, statistics(model), statistics(other)))


def fresh_adapter_has_no_effect(place: Path) -> None:
    assert torch.equal(logits(adapted().eval()), logits(tiny_llama().eval()))


def loss_falls_and_statistics_are_counted(place: Path) -> None:
    model, losses = trained(adapted())
    assert losses[-1] < losses[0] - 0.5, losses
    check_statistics(model)
    assert not [name for name, each in model.named_parameters() if each.requires_grad and "mixlora_" not in name]


def checkpointing_changes_nothing(place: Path) -> None:
    _, expected = trained(adapted())
    model = adapted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model, losses = trained(model)
    torch.testing.assert_close(losses, expected)
    check_statistics(model)


def half_precision_leaves_statistics_whole(place: Path) -> None:
    model, _ = trained(adapted(tiny_llama(torch.bfloat16)))
    check_statistics(model)
    assert {each.dtype for name, each in model.named_parameters() if "mixlora_A" in name} == {torch.float32}


def adapter_loads_to_the_bit(place: Path) -> None:
    model, _ = trained(adapted(modules_to_save=["lm_head"]))
    model.save_pretrained(place)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(place)).eval()
    check_same(loaded, model)
    loaded.save_pretrained(place / "again")
    saved, again = (load_file(folder / "adapter_model.safetensors") for folder in (place, place / "again"))
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)
    assert sum("lm_head" in name for name in saved) == 1 and not any("base_layer" in name for name in saved)


def fields_of_a_newer_peft_are_ignored(place: Path) -> None:
    model, _ = trained(adapted())
    model.save_pretrained(place)
    file = place / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "field_of_the_future": 1}))
    config = PeftConfig.from_pretrained(str(place))
    assert (type(config), config.r, config.num_factors) == (MixLoraConfig, 2, 6)
    check_same(PeftModel.from_pretrained(tiny_llama(), str(place)).eval(), model)


def several_adapters(place: Path) -> None:
    first, _ = trained(adapted())
    first.save_pretrained(place / "first")
    alone = logits(first)
    model = first
    options = {"r": 1, "num_factors": 4, "target_modules": ["q_proj", "down_proj"]}
    model.add_adapter("second", MixLoraConfig(task_type="CAUSAL_LM", **options))
    assert model.active_adapter == "default" and torch.equal(logits(model), alone)
    model.set_adapter("second")
    trains = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trains and all(".second" in name for name in trains), trains
    model, losses = trained(model)
    assert losses[-1] < losses[0]
    other = logits(model)
    assert not torch.equal(other, alone)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama().eval()))
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    check_statistics(model)
    model.load_adapter(str(place / "first"), "loaded")
    model.set_adapter("loaded")
    assert torch.equal(logits(model), alone)
    model.set_adapter("second")
    assert torch.equal(logits(model), other)
    model.delete_adapter("second")
    assert set(model.peft_config) == {"default", "loaded"}
    assert not any(".second" in name for name in model.state_dict())
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)


def adapters_are_named_for_instances(place: Path) -> None:
    model, _ = trained(adapted())
    alone = logits(model)
    mixed = {"adapter_names": ["default", "__base__"] * 2}
    with torch.inference_mode():
        found = model(input_ids=batch()["input_ids"], **mixed).logits
    expected = torch.stack([alone[0], logits(tiny_llama().eval())[1]])
    torch.testing.assert_close(found[:2], expected, atol=1e-5, rtol=1e-5)


def transformers_loads_the_adapter(place: Path) -> None:
    model, _ = trained(adapted())
    model.save_pretrained(place)
    base = tiny_llama().eval()
    base.load_adapter(str(place))
    check_same(base, model)


def auto_class_loads_base_and_adapter(place: Path) -> None:
    tiny_llama().save_pretrained(place / "base")
    model, _ = trained(adapted(LlamaForCausalLM.from_pretrained(place / "base")))
    model.save_pretrained(place / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(place / "adapter")).eval()
    check_same(loaded, model)


def merging_is_exact_where_all_take_one_route(place: Path) -> None:
    model, _ = trained(adapted(num_factors=2, modules_to_save=["lm_head"]))
    routed, base = logits(model), logits(tiny_llama().eval())
    unloaded = copy.deepcopy(model).unload()
    merged = model.merge_and_unload()
    assert type(merged) is type(unloaded) is LlamaForCausalLM
    assert not adapted_layers(merged) and not any("modules_to_save" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), routed, atol=1e-3, rtol=1e-3)
    assert (base - routed).abs().max() > 1


def generation_is_the_same_with_and_without_a_cache(place: Path) -> None:
    model, _ = trained(adapted())
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    prompt = batch()["input_ids"][:, :6]
    cached, uncached = (model.generate(input_ids=prompt, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)


RUNS: dict[str, Callable[[Path], None]] = {
    run.__name__: run
    for run in (
        fresh_adapter_has_no_effect,
        loss_falls_and_statistics_are_counted,
        checkpointing_changes_nothing,
        half_precision_leaves_statistics_whole,
        adapter_loads_to_the_bit,
        fields_of_a_newer_peft_are_ignored,
        several_adapters,
        adapters_are_named_for_instances,
        transformers_loads_the_adapter,
        auto_class_loads_base_and_adapter,
        merging_is_exact_where_all_take_one_route,
        generation_is_the_same_with_and_without_a_cache,
    )
}


def _outcome(run: Callable[[Path], None]) -> str | None:
    with tempfile.TemporaryDirectory() as place:
        try:
            run(Path(place))
        except Exception:
            return traceback.format_exc()
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    written = {package: version(package) for package in ("peft", "transformers")}
    written["runs"] = {name: _outcome(run) for name, run in RUNS.items()}
    Path(sys.argv[1]).write_text(json.dumps(written))
