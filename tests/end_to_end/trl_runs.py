"""Training runs with TRL on a tiny Llama, and what came of each.

The tests make them with the TRL that is installed. `python -m tests.end_to_end.trl_runs FILE` makes all of them with
the TRL that stands first on the path, and writes them to FILE: one program, since to import TRL takes longest.
"""

import dataclasses
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from ..conftest import LLAMA
from ..tiny import paper_form, randomise

ROLES = {"user": "<user>", "assistant": "<assistant>"}
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user> {{ message['content'] }} {% else %}"
    "<assistant> {% generation %}{{ message['content'] }} </s> {% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
EXAMPLES = [  # prompt, answer, worse answer; no prompt begins another
    ("what color is the circle", "the circle is red", "blue"),
    ("name a shape", "a green square", "a red shape is blue"),
    ("is the blue square in the red circle or is it green", "it is in the circle", "no"),
    ("who is it", "no circle", "it is a square or a shape"),
]
PACKED = {"packing": True, "max_length": 40}
PADDING_FREE = {"padding_free": True, "max_length": None}
WRAPPED = {**PACKED, "packing_strategy": "wrapped", "max_length": 11}  # the fourth row begins inside an answer
ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
BALANCED = {"balance_loss_weight": 2.0}


def mean_loss(outputs, labels, num_items_in_batch=None):
    """The cross entropy, for `compute_loss_func`."""
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@dataclasses.dataclass
class Settings:
    """What is trained: the data's form, options of the trainer, of its configuration, and of the adapter."""

    data: str = "prompt-completion"
    arguments: dict = dataclasses.field(default_factory=dict)
    adapter: dict = dataclasses.field(default_factory=dict)
    trainer: dict = dataclasses.field(default_factory=dict)


RUNS = {
    "prompt-completion": Settings(),
    "chat prompt-completion": Settings("chat"),
    "assistant only": Settings("messages", {"assistant_only_loss": True}),
    "messages": Settings("messages"),
    "messages, sequence": Settings("messages", adapter={"router_scope": "sequence"}),
    "messages, error": Settings("messages", adapter={"unknown_prompt": "error"}),
    "messages, packed": Settings("messages", PACKED),
    "messages, padding-free": Settings("messages", PADDING_FREE),
    "label smoothing": Settings(arguments={"label_smoothing_factor": 0.1}),
    "compute_loss_func": Settings(trainer={"compute_loss_func": mean_loss}),
    "dft": Settings(arguments={"loss_type": "dft"}),
    "packed": Settings(arguments=PACKED),
    "wrapped": Settings(arguments=WRAPPED),
    "padding-free": Settings(arguments=PADDING_FREE),
    "balanced": Settings(adapter=BALANCED),
    "accumulated": Settings(arguments=ACCUMULATED),
    "balanced, accumulated": Settings(arguments=ACCUMULATED, adapter=BALANCED),
    "balanced, dft": Settings(arguments={"loss_type": "dft"}, adapter=BALANCED),
    "balanced, label smoothing": Settings(arguments={"label_smoothing_factor": 0.1}, adapter=BALANCED),
    "dpo": Settings("preference"),
    "dpo, error": Settings("preference", adapter={"unknown_prompt": "error"}),
    "dpo, padding-free": Settings("preference", {"padding_free": True}),
    "balanced, dpo": Settings("preference", adapter=BALANCED),
}


@dataclasses.dataclass
class Run:
    """What came of a run.

    Attributes:
        error: the kind and text of what ended it, or None.
        warnings: texts of the `UserWarning`s that speak of a prompt or of the balance term.
        given: the names of what the model's forward pass in training was given.
        routed: by layer, the two lists of chosen factors of each sample of the first forward pass in training.
        alone: the same for forward passes on the prompt alone of each of these samples.
        loss: what the trainer logs of the first step.
        gradient: of all routers, what arrived at the first step of the optimizer.
        of_the_models_loss: the same where the loss that the model itself returns for these batches is backpropagated.
    """

    error: str | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    given: list[str] = dataclasses.field(default_factory=list)
    routed: dict[str, list] = dataclasses.field(default_factory=dict)
    alone: dict[str, list] = dataclasses.field(default_factory=dict)
    loss: float | None = None
    gradient: list[float] = dataclasses.field(default_factory=list)
    of_the_models_loss: list[float] = dataclasses.field(default_factory=list)


def tokenizer():
    """A tokenizer of whole words, with a chat template that marks what the assistant says."""
    words = sorted({word for example in EXAMPLES for text in example for word in text.split()})
    special = ["<pad>", "<s>", "</s>", "<unk>", *ROLES.values()]
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    by_words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    by_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    by_words.add_special_tokens(special)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=by_words, **names)
    wrapped.chat_template = TEMPLATE
    return wrapped


def data(form):
    """The examples in one of the forms that TRL knows."""
    if form == "preference":
        return Dataset.from_list([{"prompt": p + " ", "chosen": a, "rejected": worse} for p, a, worse in EXAMPLES])
    if form == "prompt-completion":
        return Dataset.from_list([{"prompt": p + " ", "completion": a + " "} for p, a, _ in EXAMPLES])
    pairs = [([{"role": "user", "content": p}], [{"role": "assistant", "content": a}]) for p, a, _ in EXAMPLES]
    if form == "chat":
        return Dataset.from_list([{"prompt": question, "completion": answer} for question, answer in pairs])
    return Dataset.from_list([{"messages": question + answer} for question, answer in pairs])


def prompts(form, words):
    """The token ids of every example's prompt."""
    texts = [p if form in ("prompt-completion", "preference") else f"<user> {p} <assistant>" for p, _, _ in EXAMPLES]
    return [words(text)["input_ids"] for text in texts]


def adapted(words, options):
    """A Llama with an adapter whose routers tell prompts apart."""
    torch.manual_seed(1)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **LLAMA))
    options = {"r": 2, "num_factors": 6, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    return randomise(get_peft_model(base, paper_form(**options)))


class Watch(TrainerCallback):
    """Notes what the base model is given in training, the routes that it takes, and the routers' gradient."""

    def __init__(self, model):
        self.model, self.batches, self.routed, self.gradient = model, [], [], []
        model.base_model.model.register_forward_hook(self.forward, with_kwargs=True)

    def forward(self, base, args, given, output):
        if base.training and torch.is_grad_enabled():
            given = {**given, **({"input_ids": args[0]} if args else {})}
            self.batches.append({name: value for name, value in given.items() if value is not None})
            self.routed.append(routes(self.model))

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.gradient = self.gradient or router_gradient(self.model)


def routes(model):
    """By layer: for each routed instance the chosen factors of pool A, and of pool B."""
    chosen = model.base_model.routes().items()
    return {name: [route.index_A.tolist(), route.index_B.tolist()] for name, route in chosen}


def router_gradient(model):
    """Of all routers, as a flat list."""
    named = [p.grad for name, p in model.named_parameters() if "router" in name and p.grad is not None]
    return torch.cat([gradient.flatten() for gradient in named]).tolist() if named else []


def samples(batch):
    """The token ids of each sample of a batch, in order."""
    ids, mask, positions = (batch.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if mask is not None:
        return [row[of_row.bool()].tolist() for row, of_row in zip(ids, mask)]
    begins = (positions[0] == 0).nonzero().flatten().tolist()
    return [ids[0, begin:end].tolist() for begin, end in zip(begins, [*begins[1:], None])]


def routes_alone(model, form, words, batch):
    """By layer, the routes of the prompts of a batch's samples, each in a forward pass of its own."""
    alone = {}
    for sample in samples(batch):
        (prompt,) = [prompt for prompt in prompts(form, words) if sample[: len(prompt)] == prompt]
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([prompt]))
        for name, pools in routes(model).items():
            for total, chosen in zip(alone.setdefault(name, [[], []]), pools):
                total.extend(chosen)
    return alone


def gradient_of_models_loss(words, settings, batches):
    """The routers' gradient where the model's own loss of these batches is backpropagated, as a mean over tokens."""
    model = adapted(words, settings.adapter).train()
    total = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        model(**inputs, num_items_in_batch=total).loss.backward()
    return router_gradient(model)


def trainer_of(settings, model, words, place, steps):
    """TRL's trainer, whose steps change nothing."""
    preference = settings.data == "preference"
    arguments = {
        "output_dir": str(place),
        "per_device_train_batch_size": 4,
        "learning_rate": 0.0,
        "max_steps": steps,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **settings.arguments,
    }
    kind, configuration = (trl.DPOTrainer, trl.DPOConfig) if preference else (trl.SFTTrainer, trl.SFTConfig)
    return kind(
        model=model,
        args=configuration(**arguments),
        train_dataset=data(settings.data),
        processing_class=words,
        **settings.trainer,
    )


def run(name, place, steps=2):
    """Make one of `RUNS`."""
    settings, done = RUNS[name], Run()
    words = tokenizer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = None
        try:
            watch = Watch(model := adapted(words, settings.adapter))
            trainer = trainer_of(settings, model, words, place, steps)
            trainer.add_callback(watch)
            trainer.train()
            done.loss = trainer.state.log_history[0]["loss"]
        except Exception as error:
            done.error = f"{type(error).__name__}: {error}"
    spoken = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    done.warnings = [text for text in spoken if "prompt" in text or "balance_loss_weight" in text]
    if watch is not None and watch.batches:
        done.given, done.routed, done.gradient = sorted(watch.batches[0]), watch.routed[0], watch.gradient
        if done.error is None:
            complete(done, settings, words, watch)
    return done


def complete(done, settings, words, watch):
    """Add what the run is to be compared with."""
    rows_are_samples = settings.arguments.get("packing_strategy") != "wrapped"
    if rows_are_samples and ("attention_mask" in done.given or "position_ids" in done.given):
        done.alone = routes_alone(watch.model, settings.data, words, watch.batches[0])
    if not settings.trainer and settings.data == "prompt-completion" and {"labels", "attention_mask"} <= {*done.given}:
        accumulated = settings.arguments.get("gradient_accumulation_steps", 1)
        done.of_the_models_loss = gradient_of_models_loss(words, settings, watch.batches[:accumulated])


def main(file):
    """Make all runs."""
    with tempfile.TemporaryDirectory() as place:
        made = {name: dataclasses.asdict(run(name, place)) for name in RUNS}
    Path(file).write_text(json.dumps({"trl": trl.__version__, "runs": made}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
