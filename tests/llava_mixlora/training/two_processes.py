"""One of two processes that train on the same data; test_statistics_of_processes.py starts them and says as what.

Writes `seen-RANK.pt` into the folder that it is given: what was found, by case.
"""

import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from llava_mixlora import MixLoraError, RoutingCallback, share_statistics
from llava_mixlora.method.word_centre import word_sums
from tests.conftest import LLAMA
from tests.tiny import VOCABULARY, layers, random_ids, randomise

from ...tiny import paper_form

STEPS, BATCH = 3, 4
WORDS = {"pairing": "same", "router_input": "words"}


def base():
    """The same random Llama, however often."""
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **LLAMA))


def adapted(**options):
    config = paper_form(r=2, num_factors=6, task_type="CAUSAL_LM", **options)
    return randomise(get_peft_model(base(), config)).train()


def steps(model, rank=0, processes=1, first=0):
    """Train on a share of each batch; `model` may be wrapped."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(first, first + STEPS):
        ids = random_ids(BATCH, 7, seed=step)[rank::processes]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def statistics(model):
    """Counts and moments of all layers in a row."""
    usage = torch.cat([layer.mixlora_stats_usage["default"].flatten() for layer in layers(model).values()])
    moments = [torch.stack(list(layer.moments("default"))).flatten() for layer in layers(model).values()]
    return usage.clone(), torch.cat(moments)


def train_with_trainer(output, batch, **options):
    """A Trainer whose only MixLoRA is the callback, which comes after a reporter; it, and what the reporter saw."""
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(BATCH * STEPS, 7)]
    options = {"report_to": "none", "max_steps": STEPS, "logging_steps": 1, "disable_tqdm": True, **options}
    arguments = TrainingArguments(
        str(output), use_cpu=True, per_device_train_batch_size=batch, optim="sgd", learning_rate=0.1, seed=0, **options
    )
    trainer = Trainer(adapted(), arguments, train_dataset=rows, callbacks=[Reporter(), RoutingCallback()])
    trainer.train()
    return trainer, seen


def saved(model, folder, **options):
    """Save an adapter in this process; what that warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder, **options)
    return [str(warning.message) for warning in caught if "statistics" in str(warning.message)]


def ddp(rank, folder):
    model = adapted()
    steps(DistributedDataParallel(model), rank, 2)
    found = {"own": statistics(model), "warned before": saved(model, folder / f"own-{rank}")}
    share_statistics(model)
    found["shared"] = statistics(model)
    share_statistics(model)
    found["shared twice"] = statistics(model)
    found["warned after"] = saved(model, folder / f"ddp-{rank}")
    return found


def resumed(rank, folder):
    """Go on from an adapter, and from a state dict of a whole model; each process loads it."""
    from_adapter = PeftModel.from_pretrained(base(), folder / "ddp-0", is_trainable=True).train()
    from_state = adapted()
    from_state.load_state_dict(from_adapter.state_dict())
    found = {}
    for name, model in (("adapter", from_adapter), ("state dict", from_state)):
        steps(DistributedDataParallel(model), rank, 2, first=STEPS)
        share_statistics(model)
        found[name] = statistics(model)
    return found


def broadcasting(rank, folder):
    """What is said of a DistributedDataParallel that could not know of the statistics."""
    model = adapted()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["base_model.model.lm_head.weight"])
    wrapped = steps(DistributedDataParallel(model), rank, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        share_statistics(wrapped)
    return [str(warning.message) for warning in caught]


def trainer(rank, folder):
    made, logs = train_with_trainer(folder / "trainer", BATCH // 2, save_steps=2, save_strategy="steps")
    assert isinstance(made.model_wrapped, DistributedDataParallel)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.save_model(str(folder / f"trainer-{rank}"))
    return {"counts": statistics(made.model), "logs": logs, "warned": ["statistics" in str(w.message) for w in caught]}


def sharded(model):
    """The model under FSDP2."""
    from torch.distributed.fsdp import fully_shard  # torch 2.6; it was elsewhere before

    mesh = distributed.init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def words(rank, folder):
    """The sums that routers' words are centred by."""
    found = {}
    for name, wrapper in (("ddp", DistributedDataParallel), ("fsdp2", sharded)):
        model = adapted(**WORDS)
        steps(wrapper(model), rank, 2)
        share_statistics(model)
        share_statistics(model)
        found[name] = word_sums(model.get_base_model(), "default").clone()
    return found


def fsdp2(rank, folder):
    model = sharded(adapted())
    steps(model, rank, 2)
    share_statistics(model)
    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    warned = saved(model, folder / "fsdp2", state_dict=tensors) if rank == 0 else []
    return {"counts": statistics(model), "warned": warned}


def fsdp1(rank, folder):
    model = adapted()
    kinds = {type(model.get_base_model().model.layers[0])}
    cpu = torch.device("cpu")
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy(kinds), use_orig_params=True, device_id=cpu
    )
    steps(wrapped, rank, 2)
    share_statistics(wrapped)
    # Not by get_model_state_dict: torch 2.13 ends in a segmentation fault where it gathers that of FSDP 1 on the CPU.
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        tensors = {name: parameter.detach() for name, parameter in wrapped.named_parameters()}
        warned = saved(model, folder / "fsdp1", state_dict=tensors) if rank == 0 else []
    return {"counts": statistics(wrapped), "warned": warned}


def main(folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    seen = {}
    try:
        share_statistics(base())
    except MixLoraError as error:
        seen["no layers"] = str(error)
    for case in (ddp, resumed, broadcasting, fsdp2, trainer, fsdp1, words):
        seen[case.__name__] = case(rank, folder)
        distributed.barrier()  # before another case reads what this one has written
    torch.save(seen, folder / f"seen-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
