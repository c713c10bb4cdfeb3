"""transformers' Trainer trains MixLoRA on transformers' own LLaVA, sharded by FSDP2 over two processes or more.

`torchrun --nproc_per_node 2 -m playground.recipes.trainer_fsdp2`, once `bash scripts/finetune_mixlora.sh` has made data
and base. `python -m playground.recipes.trainer_fsdp2` trains the same in one process.
"""

import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments, set_seed
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from llava_mixlora import RoutingCallback
from playground.recipes import native_llava

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def main(words: list[str] | None = None) -> None:
    """Train as the command line says; every process does."""
    parser = native_llava.parser(__doc__, "trainer-fsdp2", steps=20)
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
    model = native_llava.adapted(model)

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
    trainer.train()
    trainer.save_state()
    trainer.save_model()  # gathers the shards, in which all processes help
    if processes.is_main_process:
        print(f"adapter of {given.native}: {given.output}")
    processes.wait_for_everyone()  # while the first one writes
    processes.destroy_process_group()


if __name__ == "__main__":
    main()
