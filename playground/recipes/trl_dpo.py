"""TRL's DPOTrainer trains MixLoRA on transformers' own LLaVA to prefer right answers about pictures to wrong ones.

`python -m playground.recipes.trl_dpo`, once `bash scripts/finetune_mixlora.sh` has made data and base. The reference is
the model without its adapter; of an adapter that was there before (`--init-from`), TRL keeps a copy named `ref`.
"""

from collections import defaultdict
from itertools import cycle, islice
from typing import Any

from peft import PeftModel
from trl import DPOConfig, DPOTrainer

from llava_mixlora import MixLoraError, RoutingCallback
from playground.recipes import native_llava


def main(words: list[str] | None = None) -> None:
    """Train as the command line says, and print the margins of the rewards."""
    parser = native_llava.parser(__doc__, "trl-dpo", steps=20)
    parser.set_defaults(learning_rate=5e-4)
    parser.add_argument("--init-from", metavar="ADAPTER", help="go on from this adapter of --native, as it is there")
    given = parser.parse_args(words)
    native_llava.check(given, parser)

    if given.init_from is None:
        native_llava.export(given.base, given.native)
    model, processor = native_llava.load(given.native)
    if given.init_from is None:
        model = native_llava.adapted(model)
    else:
        model = PeftModel.from_pretrained(model, given.init_from, is_trainable=True)

    settings = DPOConfig(
        str(given.output),
        per_device_train_batch_size=given.batch_size,
        max_length=None,  # a cut prompt would lose features of its image
        gradient_checkpointing=False,
        **native_llava.settings(given),
    )
    data = pairs(native_llava.samples(given.data), given.steps * given.batch_size)
    trainer = DPOTrainer(
        model,
        args=settings,
        train_dataset=native_llava.dataset(data, given.images),
        processing_class=processor,
        callbacks=[RoutingCallback()],
    )
    trainer.train()
    trainer.save_state()
    trainer.model.save_pretrained(given.output, selected_adapters=["default"])
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    print(
        f"margin between the rewards of right and wrong answers: {margins[0]:.3f} at first, {margins[-1]:.3f} at last"
    )
    print(f"adapter of {given.native}: {given.output}")


def pairs(samples: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first `count` samples' questions, each with its answer and another answer to a question of the same task.

    Raises:
        MixLoraError: a task has one answer only.
    """
    answers: dict[Any, list[str]] = defaultdict(list)
    for sample in samples:
        answers[sample.get("task")].append(sample["conversations"][1]["value"])
    made = []
    for place, sample in enumerate(islice(cycle(samples), count)):
        question, right = native_llava.messages(sample)[:2]
        wrong = [answer for answer in dict.fromkeys(answers[sample.get("task")]) if answer != right["content"]]
        if not wrong:
            raise MixLoraError(f"task {sample.get('task')!r}: {right['content']!r} is its only answer; expected others")
        rejected = {**right, "content": wrong[place % len(wrong)]}
        made.append({"image": sample["image"], "prompt": [question], "chosen": [right], "rejected": [rejected]})
    return made


if __name__ == "__main__":
    main()
