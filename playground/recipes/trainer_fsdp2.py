"""transformers' Trainer trains MixLoRA on transformers' own LLaVA, sharded by FSDP2 over two processes or more.

`torchrun --nproc_per_node 2 -m playground.recipes.trainer_fsdp2`, once `bash scripts/finetune_mixlora.sh` has made data
and base. `python -m playground.recipes.trainer_fsdp2` trains the same in one process.
"""

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments, set_seed
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from llava_mixlora import RoutingCallback
from playground.recipes import native_llava

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def main(words: list[str] | None = None) -> None:
    """Train as the command line says; every process does."""
    parser = native_llava.parser(__doc__, "trainer-fsdp2", steps=20)
    parser.add_argument("--router-input", default="words", help="words, or hidden (default: %(default)s)")
    given = parser.parse_args(words)
    native_llava.check(given, parser)
    processes = PartialState(cpu=not torch.cuda.is_available())
    if given.batch_size % processes.num_processes:
        parser.error(f"--batch-size={given.batch_size}: expected a multiple of {processes.num_processes} processes")

    if processes.is_main_process:
        native_llava.export(given.base, given.native)
    processes.wait_for_everyone()
    model, processor = native_llava.load(given.native)
    set_seed(0)  # the same adapter in every process
    model = native_llava.adapted(model, router_input=given.router_input)

    count = given.steps * given.batch_size
    settings = TrainingArguments(
        str(given.output),
        per_device_train_batch_size=given.batch_size // processes.num_processes,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        **(SHARDED if processes.num_processes > 1 else {}),
        **native_llava.settings(given),
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=native_llava.conversations(native_llava.samples(given.data), count, given.images),
        data_collator=DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True),
        callbacks=[RoutingCallback()],
    )
    if processes.num_processes > 1 and settings.use_cpu:
        shard_on_the_cpu(trainer)
    trainer.train()
    trainer.save_state()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(trainer.model, options=whole)  # all processes help to gather the shards
    if processes.is_main_process:
        trainer.model.save_pretrained(given.output, state_dict=tensors)
        print(f"sharded by FSDP2: {isinstance(trainer.model, FSDPModule)}")
        print(f"adapter of {given.native}: {given.output}")
    processes.wait_for_everyone()  # while the first one writes
    processes.destroy_process_group()


def shard_on_the_cpu(trainer: Trainer) -> None:
    """Switch FSDP2 on, which accelerate 1.15 leaves out without a word where there is no accelerator."""
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True


if __name__ == "__main__":
    main()
