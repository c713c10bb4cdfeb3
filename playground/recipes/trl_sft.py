"""TRL's SFTTrainer trains MixLoRA on transformers' own LLaVA: pictures, and a loss on the answers alone.

`python -m playground.recipes.trl_sft`, once `bash scripts/finetune_mixlora.sh` has made data and base.
"""

from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from llava_mixlora import RoutingCallback
from playground.recipes import native_llava


def main(words: list[str] | None = None) -> None:
    """Train as the command line says."""
    parser = native_llava.parser(__doc__, "trl-sft", steps=20)
    parser.add_argument("--init-from", metavar="ADAPTER", help="go on from this adapter of --native, as it is there")
    parser.add_argument("--half-tower", action="store_true", help="vision tower in float16, as in upstream's train()")
    given = parser.parse_args(words)
    native_llava.check(given, parser)

    if given.init_from is None:
        native_llava.export(given.base, given.native)
    model, processor = native_llava.load(given.native)
    if given.half_tower:
        native_llava.halve_tower(model)
    if given.init_from is None:
        model = native_llava.adapted(model)
    else:
        model = PeftModel.from_pretrained(model, given.init_from, is_trainable=True)

    count = given.steps * given.batch_size
    data = native_llava.conversations(native_llava.samples(given.data), count, given.images)
    settings = SFTConfig(
        str(given.output),
        per_device_train_batch_size=given.batch_size,
        assistant_only_loss=True,  # labels of all that is not an answer are -100, by which the routers know the prompt
        max_length=None,  # a cut prompt would lose features of its image
        gradient_checkpointing=False,
        **native_llava.settings(given),
    )
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=data,
        processing_class=processor,
        callbacks=[RoutingCallback()],
    )
    trainer.train()
    trainer.save_state()
    trainer.model.save_pretrained(given.output)
    print(f"adapter of {given.native}: {given.output}\nfor upstream's LLaVA again:")
    print(f"  llava-mixlora import-hf --model-path {given.output} --model-base {given.base} --save-model-path OUT")


if __name__ == "__main__":
    main()
