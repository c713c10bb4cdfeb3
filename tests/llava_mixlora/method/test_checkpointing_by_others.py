"""Gradient checkpointing by other functions than transformers' own, which nobody tells of the adapter.

Recomputation has to route as the forward pass has routed. What shows it is that the gradients of all parameters of the
adapter, routers too, are those of a step without checkpointing, where prompts and padding differ from row to row and
from batch to batch.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import multiprocessing, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
from torch.utils.checkpoint import (
    checkpoint,  # taken before there is an adapter, as a user's own module does
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from transformers import T5Config, T5ForConditionalGeneration

from llava_mixlora import MixLoraError
from llava_mixlora.method import training_statistics
from llava_mixlora.method.forward_passes import current_scope
from llava_mixlora.method.model_inputs import IGNORE_INDEX

from ...tiny import VOCABULARY, deepspeed_on_cpu, layers, paper_form, random_ids, randomise
from . import fsdp_worker

pytestmark = pytest.mark.one_stack  # what checkpoints here is PyTorch

WRAPPED = "_checkpoint_wrapped_module."
PROMPT_LENGTHS = [(2, 3, 6), (4, 2, 5)]  # of the rows of two batches


def adapt(model, **options):
    options = {"r": 2, "num_factors": 6, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    model = randomise(get_peft_model(model, paper_form(**options))).train()
    model.enable_input_require_grads()  # or reentrant checkpoints leave the first layer without a gradient
    return model


def batch(number=0):
    """Three rows of eight positions, one of them padded; in no other batch are the prompts as long."""
    ids, mask = random_ids(3, 8, seed=number), torch.ones(3, 8, dtype=torch.int64)
    mask[number, 6 - number :] = 0
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    for row, length in zip(labels, PROMPT_LENGTHS[number]):
        row[:length] = IGNORE_INDEX
    # Recomputation would write into a cache a second time.
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "use_cache": False}


def decoder(model):
    return model.base_model.model.model


def gradients_of(model, step):
    """What `step(model)` leaves in the parameters that train, by their names without any checkpointing."""
    step(model)
    gradients = {n.replace(WRAPPED, ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert current_scope() is None
    return gradients


def assert_same(actual, expected):
    assert actual.keys() == expected.keys() and any("router" in name for name in expected)
    for name, gradient in expected.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert actual[name] is not None, name
        torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def assert_counted_once(checkpointed, plain):
    """After two batches."""
    for layer, expected in zip(layers(checkpointed).values(), layers(plain).values()):
        usage = layer.mixlora_stats_usage["default"]
        assert usage.sum(dim=1).tolist() == [12, 12]  # six instances, two choices from each pool
        assert torch.equal(usage, expected.mixlora_stats_usage["default"])
        moments = [each.mixlora_stats_moments["default"].view(torch.float64) for each in (layer, expected)]
        torch.testing.assert_close(*moments)


def right_or_refused(model, step, expected):
    """Whether the gradients are right, rather than refused in one line; neither is an assertion error."""
    try:
        actual = gradients_of(model, step)
    except MixLoraError as error:
        assert "\n" not in str(error) and "checkpoint" in str(error)
        return False
    assert_same(actual, expected)
    return True


# --- how others checkpoint: function(model, use_reentrant=...)


def through(function, module, **options):
    """Send calls of `module` through a checkpoint function, of which the reentrant ones take no keywords."""
    forward = module.forward

    def checkpointed(*args, **kwargs):
        return function(partial(forward, **kwargs), *args, **options)

    module.forward = checkpointed


def each_layer(model, **options):
    for layer in decoder(model).layers:
        through(checkpoint, layer, **options)


def first_layer_only(model, **options):
    through(checkpoint, decoder(model).layers[0], **options)


def last_layer_only(model, **options):
    through(checkpoint, decoder(model).layers[-1], **options)


def two_layers_at_once(model, **options):
    first, second = decoder(model).layers
    forward_first, forward_second = first.forward, second.forward

    def both(hidden, *args, **kwargs):
        output = forward_first(hidden, *args, **kwargs)
        return forward_second(output[0] if isinstance(output, tuple) else output, *args, **kwargs)

    def already_done(hidden, *args, **kwargs):
        return hidden if isinstance(forward_first.__self__.last_output, torch.Tensor) else (hidden,)

    first.register_forward_hook(lambda module, args, output: setattr(module, "last_output", output))
    first.forward, second.forward = both, already_done
    through(checkpoint, first, **options)


def each_mlp(model, **options):
    for layer in decoder(model).layers:
        through(checkpoint, layer.mlp, **options)


def each_adapted_layer(model, **options):
    """So that no average of an input is shared across checkpoints."""
    for module in layers(model).values():
        through(checkpoint, module, **options)


def nested_in_its_own_kind(model, use_reentrant):
    each_mlp(model, use_reentrant=use_reentrant)
    each_layer(model, use_reentrant=use_reentrant)


def nested_in_the_other_kind(model, use_reentrant):
    each_mlp(model, use_reentrant=use_reentrant)
    each_layer(model, use_reentrant=not use_reentrant)


def nested_three_times(model, use_reentrant):
    each_adapted_layer(model, use_reentrant=use_reentrant)
    each_mlp(model, use_reentrant=use_reentrant)
    two_layers_at_once(model, use_reentrant=use_reentrant)


def wrap(*kinds):
    def way(model, use_reentrant):
        kind = wrappers.CheckpointImpl.REENTRANT if use_reentrant else wrappers.CheckpointImpl.NO_REENTRANT
        wrappers.apply_activation_checkpointing(
            model,
            partial(wrappers.checkpoint_wrapper, checkpoint_impl=kind),
            lambda module: type(module).__name__.endswith(kinds),
        )

    way.__name__ = "wrapped " + " and ".join(kinds)
    return way


WAYS = {
    "each layer": each_layer,
    "first layer only": first_layer_only,
    "last layer only": last_layer_only,
    "two layers at once": two_layers_at_once,
    "each MLP": each_mlp,
    "each adapted layer": each_adapted_layer,
    "nested in its own kind": nested_in_its_own_kind,
    "nested in the other kind": nested_in_the_other_kind,
    "nested three times": nested_three_times,
    "wrapped layers": wrap("DecoderLayer"),
    "wrapped attention and MLP": wrap("Attention", "MLP"),
    "wrapped adapted layers": wrap("MixLoraLinear"),
}
by_each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
of_both_kinds = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])


# --- how others train: step(model)


def fail(gradient):
    raise KeyError("as a user's hook may")


def one_forward(model):
    model(**batch()).loss.backward()


def two_forwards_in_one_backward(model):
    (model(**batch(0)).loss + model(**batch(1)).loss * 2).backward()


def two_forwards_of_equal_weight(model):
    (model(**batch(0)).loss + model(**batch(1)).loss).backward()


def two_backwards_in_turn(model):
    losses = [model(**batch(number)).loss for number in (0, 1)]
    for loss in losses:
        loss.backward()


def two_backwards_in_reversed_order(model):
    losses = [model(**batch(number)).loss for number in (0, 1)]
    for loss in reversed(losses):
        loss.backward()


def accumulated_with_losses_kept(model):
    losses = []
    for number in (0, 1, 0):
        losses.append(model(**batch(number)).loss)
        losses[-1].backward()


def in_another_thread(step):
    """Run it there, and raise here what it raises."""
    failures = []

    def run():
        try:
            step()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def backward_in_another_thread(model):
    loss = model(**batch(0)).loss + model(**batch(1)).loss * 2
    in_another_thread(loss.backward)


def forwards_in_two_threads(model):
    """Whose operations autograd numbers alike."""
    losses = [model(**batch(0)).loss]
    in_another_thread(lambda: losses.append(model(**batch(1)).loss * 2))
    sum(losses).backward()


def twice_through_one_graph(model):
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    model(**batch(1)).loss.backward()
    loss.backward()


def from_the_logits(model):
    model(**batch()).logits.square().mean().backward()


def from_loss_and_logits(model):
    output = model(**batch())
    (output.loss + output.logits.square().mean()).backward()


def from_a_tuple(model):
    model(**batch(), return_dict=False)[0].backward()


def from_hidden_states(model):
    hidden = model(**batch(), output_hidden_states=True).hidden_states
    (hidden[-1].square().mean() + hidden[1].square().mean()).backward()


def other_forwards_between(model):
    loss = model(**batch()).loss
    with torch.no_grad():
        model(**batch(1))
        model.eval().generate(random_ids(2, 4), attention_mask=torch.ones(2, 4), max_new_tokens=2, pad_token_id=0)
    model.train()
    loss.backward()


def a_forward_within_the_backward(model):
    loss = model(**batch()).loss

    def look(gradient):
        with torch.no_grad():
            model(**batch(1))
        with torch.enable_grad():
            model(**batch(1)).loss.backward()

    loss.register_hook(look)
    loss.backward()


def after_a_failed_backward(model):
    output = model(**batch(1), output_hidden_states=True)
    output.hidden_states[1].register_hook(fail)
    with pytest.raises(KeyError):
        output.loss.backward()
    model.zero_grad()
    one_forward(model)


def saved_on_cpu(model):
    with torch.autograd.graph.save_on_cpu():
        loss = model(**batch()).loss
    loss.backward()


STEPS = {
    step.__name__.replace("_", " "): step
    for step in (
        two_forwards_in_one_backward,
        two_backwards_in_turn,
        two_backwards_in_reversed_order,
        accumulated_with_losses_kept,
        backward_in_another_thread,
        forwards_in_two_threads,
        twice_through_one_graph,
        from_the_logits,
        from_loss_and_logits,
        from_a_tuple,
        from_hidden_states,
        other_forwards_between,
        a_forward_within_the_backward,
        after_a_failed_backward,
        saved_on_cpu,
    )
}


@of_both_kinds
@by_each_way
def test_checkpointing_changes_no_gradient(_llama, llama, copy_of, way, use_reentrant):
    expected = gradients_of(adapt(copy_of(_llama)), two_forwards_in_one_backward)
    model = adapt(llama)
    way(model, use_reentrant=use_reentrant)
    assert_same(gradients_of(model, two_forwards_in_one_backward), expected)


@of_both_kinds
@pytest.mark.parametrize("way", [each_layer, wrap("DecoderLayer")], ids=["function", "wrapper"])
def test_model_may_be_checkpointed_before_it_is_adapted(_llama, llama, copy_of, way, use_reentrant):
    expected = gradients_of(adapt(copy_of(_llama)), two_forwards_in_one_backward)
    bare = nn.Module()  # as deep as an adapter would make it
    bare.base_model = nn.Module()
    bare.base_model.model = llama
    way(bare, use_reentrant=use_reentrant)
    assert_same(gradients_of(adapt(llama), two_forwards_in_one_backward), expected)


@pytest.mark.parametrize("way", [each_layer, nested_in_its_own_kind])
@of_both_kinds
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_checkpointing_changes_no_gradient_of_any_step(_llama, llama, copy_of, step, use_reentrant, way):
    expected = gradients_of(adapt(copy_of(_llama)), step)
    model = adapt(llama)
    way(model, use_reentrant=use_reentrant)
    assert_same(gradients_of(model, step), expected)


@pytest.mark.parametrize("way", [each_layer, each_adapted_layer, wrap("DecoderLayer")])
def test_gradients_may_be_asked_for(_llama, llama, copy_of, way):
    """By `torch.autograd.grad`, which PyTorch refuses for reentrant checkpoints."""

    def step(model):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        target = model(**batch(0)).logits.square().mean() + model(**batch(1)).loss
        for parameter, gradient in zip(trained, torch.autograd.grad(target, trained)):
            parameter.grad = gradient

    expected = gradients_of(adapt(copy_of(_llama)), step)
    model = adapt(llama)
    way(model, use_reentrant=False)
    assert_same(gradients_of(model, step), expected)


@of_both_kinds
def test_decoder_that_is_called_without_its_head_knows_its_padding(_llama, llama, copy_of, use_reentrant):
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    attended = inputs["attention_mask"].unsqueeze(-1)

    def whole(model):
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        (hidden * attended).square().sum().backward()

    def decoder_alone(model):
        (decoder(model)(**inputs).last_hidden_state * attended).square().sum().backward()

    expected = gradients_of(adapt(copy_of(_llama)), whole)
    assert_same(gradients_of(adapt(copy_of(_llama)), decoder_alone), expected)
    model = adapt(llama)
    each_layer(model, use_reentrant=use_reentrant)
    assert_same(gradients_of(model, decoder_alone), expected)


# --- what a layer draws, counts and balances


@of_both_kinds
@pytest.mark.parametrize("way", [each_layer, each_adapted_layer, nested_in_its_own_kind, wrap("Attention", "MLP")])
@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.4}, {"balance_loss_weight": 0.3}, {"decode_routing": "step"}],
    ids=["dropout", "balance", "step"],
)
def test_recomputation_draws_and_counts_as_the_forward_did(_llama, llama, copy_of, options, way, use_reentrant):
    model, checkpointed = adapt(copy_of(_llama), **options), adapt(llama, **options)
    way(checkpointed, use_reentrant=use_reentrant)
    torch.manual_seed(3)
    expected = gradients_of(model, two_forwards_in_one_backward)
    torch.manual_seed(3)
    assert_same(gradients_of(checkpointed, two_forwards_in_one_backward), expected)
    assert_counted_once(checkpointed, model)


@of_both_kinds
def test_random_routes_are_drawn_again(_llama, llama, copy_of, use_reentrant):
    model, checkpointed = adapt(copy_of(_llama), routing="random"), adapt(llama, routing="random")
    each_layer(checkpointed, use_reentrant=use_reentrant)
    gradients = []
    for each in (model, checkpointed):
        torch.manual_seed(3)
        two_forwards_in_one_backward(each)
        gradients.append([parameter.grad for parameter in each.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("most_numbers", [training_statistics.MOST_NUMBERS, 1], ids=["late", "at once"])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.4}, {"balance_loss_weight": 0.3}], ids=str)
@pytest.mark.parametrize("way", [each_layer, each_mlp, each_adapted_layer])
def test_selective_checkpointing_changes_no_gradient(_llama, llama, copy_of, monkeypatch, way, options, most_numbers):
    """It hands out the kept results of an operation in the order of the forward pass, whichever asks for them.

    So statistics, which are made in the forward pass only, have to be none of its business.
    """
    monkeypatch.setattr(training_statistics, "MOST_NUMBERS", most_numbers)
    kept = [getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm")]
    model, checkpointed = adapt(copy_of(_llama), **options), adapt(llama, **options)
    way(checkpointed, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, kept))
    torch.manual_seed(3)
    expected = gradients_of(model, two_forwards_in_one_backward)
    torch.manual_seed(3)
    assert_same(gradients_of(checkpointed, two_forwards_in_one_backward), expected)


# --- models of another making


class Blocks(nn.Module):
    """A model by which nobody thought of transformers. `kind` makes what it returns."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
        self.kind, self.options = kind, None

    def forward(self, inputs_embeds, attention_mask=None, labels=None):
        if self.options is None:
            return self.kind(self.blocks(inputs_embeds))
        return self.kind(checkpoint_sequential(self.blocks, 2, inputs_embeds, **self.options))


KINDS = {
    "tensor": (lambda y: y, lambda output: output),
    "tuple": (lambda y: (None, (y,)), lambda output: output[1][0]),
    "dict": (lambda y: {"states": [y]}, lambda output: output["states"][0]),
}


@of_both_kinds
@pytest.mark.parametrize("kind, result", KINDS.values(), ids=KINDS)
def test_sequential_checkpoints_of_any_model(kind, result, use_reentrant):
    def step(model):
        total = 0
        for number in (0, 1):
            inputs = batch(number)
            x = nn.functional.one_hot(inputs["input_ids"] % 8).float().requires_grad_()
            output = model(inputs_embeds=x, attention_mask=inputs["attention_mask"], labels=inputs["labels"])
            total = total + result(output).square().mean()
        total.backward()

    gradients = []
    for options in (None, {"use_reentrant": use_reentrant}):
        torch.manual_seed(0)
        config = paper_form(r=2, num_factors=6, lora_alpha=8, target_modules=r"blocks\.\d\.0")
        model = randomise(get_peft_model(Blocks(kind), config)).train()
        model.base_model.model.options = options
        gradients.append(gradients_of(model, step))
    assert_same(gradients[1], gradients[0])


@deepspeed_on_cpu
@pytest.mark.parametrize("name", ["checkpoint", "non_reentrant_checkpoint"])
@pytest.mark.parametrize("step", [one_forward, two_forwards_in_one_backward])
def test_checkpointing_by_deepspeed_is_right_or_refused(_llama, llama, copy_of, monkeypatch, name, step):
    checkpointing = pytest.importorskip("deepspeed").checkpointing
    monkeypatch.setattr(checkpointing, "deepspeed_checkpointing_enabled", True)  # configure() asks for processes
    monkeypatch.setattr(checkpointing, "see_memory_usage", lambda *_, **__: None)
    expected = gradients_of(adapt(copy_of(_llama)), step)
    model = adapt(llama)
    for layer in decoder(model).layers:
        through(getattr(checkpointing, name), layer)
    assert right_or_refused(model, step, expected)


# --- a backward pass that starts within the model


def caught(model, number):
    """A batch's loss, and a number made of what goes into its last decoder layer, which is no output of the model."""
    inside = []
    hook = decoder(model).layers[-1].register_forward_pre_hook(lambda module, args: inside.append(args[0]))
    loss = model(**batch(number)).loss
    hook.remove()
    return loss, inside[0].square().mean()


def from_within(model):
    caught(model, 0)[1].backward()


def from_within_after_a_step(model):
    model(**batch(1)).loss.backward()
    from_within(model)


def from_within_after_a_failed_step(model):
    output = model(**batch(1), output_hidden_states=True)
    output.hidden_states[1].register_hook(fail)
    with pytest.raises(KeyError):
        output.loss.backward()
    model.zero_grad()
    from_within(model)


def from_within_an_older_forward_after_a_failed_step(model):
    inside = caught(model, 0)[1]
    output = model(**batch(1), output_hidden_states=True)
    output.hidden_states[1].register_hook(fail)
    with pytest.raises(KeyError):
        output.loss.backward()
    model.zero_grad()
    inside.backward()


def from_within_in_a_worker_that_has_failed(model):
    """As on a GPU, whose backward passes all run in one thread of autograd's."""
    output = model(**batch(1), output_hidden_states=True)
    output.hidden_states[1].register_hook(fail)
    with ThreadPoolExecutor(1) as worker:
        with pytest.raises(KeyError):
            worker.submit(output.loss.backward).result()
        model.zero_grad()
        worker.submit(caught(model, 0)[1].backward).result()


def from_within_and_from_the_loss(model):
    sum(caught(model, 0)).backward()


def from_within_the_earlier_forward(model):
    inside = caught(model, 0)[1]
    (inside + model(**batch(1)).loss).backward()


def from_within_the_later_forward(model):
    loss = model(**batch(1)).loss
    (caught(model, 0)[1] + loss).backward()


def from_within_both(model):
    (caught(model, 0)[1] + caught(model, 1)[1]).backward()


@pytest.mark.parametrize("way", [each_layer, nested_in_its_own_kind])
@of_both_kinds
@pytest.mark.parametrize(
    "step",
    [
        from_within,
        from_within_after_a_step,
        from_within_after_a_failed_step,
        from_within_an_older_forward_after_a_failed_step,
        from_within_in_a_worker_that_has_failed,
        from_within_and_from_the_loss,
        from_within_the_earlier_forward,
        from_within_the_later_forward,
        from_within_both,
    ],
)
def test_backward_from_within_the_model_is_right_or_refused(_llama, llama, copy_of, step, use_reentrant, way):
    plain = adapt(copy_of(_llama))
    expected = gradients_of(plain, step)
    reached = {name for name, gradient in expected.items() if gradient is not None}
    model = adapt(llama)
    way(model, use_reentrant=use_reentrant)
    for each in (plain, model):  # the last layer is not on the way
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name.replace(WRAPPED, "") in reached)
    expected = {name: gradient for name, gradient in expected.items() if name in reached}
    right_or_refused(model, step, expected)
    model.zero_grad()
    plain.zero_grad()
    assert_same(gradients_of(model, one_forward), gradients_of(plain, one_forward))  # nothing is left behind


@of_both_kinds
@pytest.mark.parametrize("options", [{}, {"balance_loss_weight": 0.3}], ids=str)
def test_whole_model_may_be_checkpointed(_llama, llama, copy_of, options, use_reentrant):
    def step(model):
        total = 0
        for number in (0, 1):
            inputs = {**batch(number), "input_ids": None}
            embeddings = model.get_input_embeddings()(batch(number)["input_ids"])
            total = total + checkpoint(
                lambda x, inputs=inputs: model(**inputs, inputs_embeds=x).loss,
                embeddings,
                use_reentrant=use_reentrant,
            )
        total.backward()

    plain, checkpointed = adapt(copy_of(_llama), **options), adapt(llama, **options)
    expected = gradients_of(plain, two_forwards_of_equal_weight)
    assert_same(gradients_of(checkpointed, step), expected)
    assert_counted_once(checkpointed, plain)


@of_both_kinds
def test_encoder_and_decoder_keep_their_own_prompts(use_reentrant):
    def step(model):
        losses = []
        for number in (0, 1):
            inputs = batch(number)
            inputs["labels"] = inputs["labels"][:, :6].contiguous()  # the encoder's sequence is another
            losses.append(model(**inputs).loss)
        sum(losses).backward()

    gradients = []
    for checkpoints in (False, True):
        torch.manual_seed(1)
        config = T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0,
        )  # fmt: skip
        model = adapt(
            T5ForConditionalGeneration(config), target_modules=["q", "v", "wi", "wo"], task_type="SEQ_2_SEQ_LM"
        )
        if checkpoints:
            wrap("T5Block")(model, use_reentrant=use_reentrant)
        gradients.append(gradients_of(model, step))
    assert_same(gradients[1], gradients[0])


# --- names


def test_wrapped_adapter_is_saved_under_its_usual_names(_llama, llama, copy_of):
    plain, wrapped = adapt(copy_of(_llama)), adapt(llama)
    one_forward(plain)  # so that there are statistics
    wrap("DecoderLayer")(wrapped, use_reentrant=False)
    one_forward(wrapped)
    expected, saved = get_peft_model_state_dict(plain), get_peft_model_state_dict(wrapped)
    assert sorted(saved) == sorted(expected)
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


# --- sharded by PyTorch


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What two processes have found out, by case."""
    folder = tmp_path_factory.mktemp("fsdp")
    multiprocessing.spawn(fsdp_worker.run, (str(folder),), nprocs=2)
    return torch.load(folder / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", fsdp_worker.CASES)
def test_sharded_and_checkpointed_gradients_are_the_mean_over_processes(sharded, case):
    errors = sharded[case]
    assert isinstance(errors, dict), errors  # or what was raised
    assert len(errors) == 14 * 5
    assert max(errors.values()) < 1e-5
