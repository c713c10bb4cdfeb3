"""One of two processes that train a tiny Llama, sharded and checkpointed, for `test_checkpointing_by_others.py`."""

import copy
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model
from torch import distributed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llava_mixlora.method.model_inputs import IGNORE_INDEX

from ...conftest import LLAMA
from ...tiny import VOCABULARY, paper_form, random_ids, randomise

PROCESSES = 2
KINDS = {"none": None, "reentrant": CheckpointImpl.REENTRANT, "non-reentrant": CheckpointImpl.NO_REENTRANT}
CASES = [f"{version}, {kind}" for version in ("FSDP2", "FSDP1") for kind in KINDS]
ADDED = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def run(rank, folder):
    """Write to `folder/found.pt`, by case, the relative error of each gradient, or the error that was raised."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    plain = _adapted_llama()
    sum(plain(**_batch(number)).loss for number in range(PROCESSES)).div(PROCESSES).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    plain.zero_grad()
    found = {}
    for case in CASES:
        version, kind = case.split(", ")
        try:
            found[case] = _errors(plain, expected, version, KINDS[kind], _batch(rank))
        except Exception as error:
            found[case] = f"{type(error).__name__}: {error}".partition("\n")[0]
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))
    distributed.barrier()
    distributed.destroy_process_group()


def _errors(plain, expected, version, kind, batch):
    model = copy.deepcopy(plain)
    if kind is not None and version == "FSDP2":
        _checkpoint(model, kind)
    model = _fully_sharded(model) if version == "FSDP2" else _sharded_by_the_first_version(model)
    if kind is not None and version == "FSDP1":
        _checkpoint(model, kind)
    model(**batch).loss.backward()
    gradients = _gradients_by_name(model, version)
    assert gradients.keys() == expected.keys(), set(gradients) ^ set(expected)
    return {name: ((gradients[name] - gradient).norm() / gradient.norm()).item() for name, gradient in expected.items()}


def _fully_sharded(model):
    from torch.distributed.fsdp import fully_shard  # of PyTorch 2.6

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _sharded_by_the_first_version(model):
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )


def _checkpoint(model, kind):
    apply_activation_checkpointing(
        model, partial(checkpoint_wrapper, checkpoint_impl=kind), lambda module: isinstance(module, LlamaDecoderLayer)
    )


def _gradients_by_name(model, version):
    if version == "FSDP2":
        named = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    else:
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            named = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for prefix in ADDED:
        named = {name.replace(prefix, ""): gradient for name, gradient in named.items()}
    return named


def _adapted_llama():
    torch.manual_seed(1)
    config = paper_form(r=2, num_factors=6, lora_alpha=8, task_type="CAUSAL_LM")
    model = randomise(get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **LLAMA)), config)).train()
    model.enable_input_require_grads()
    return model


def _batch(number):
    ids, mask = random_ids(3, 8, seed=number), torch.ones(3, 8, dtype=torch.int64)
    mask[number, 6:] = 0
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    for row, length in enumerate((2 + number, 4 - number, 6)):
        labels[row, :length] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "use_cache": False}
