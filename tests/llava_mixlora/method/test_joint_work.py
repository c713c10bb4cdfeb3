"""Layers that work together compute what each computes by itself, and are told apart where they must be."""

import copy
import importlib.util
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from llava_mixlora import MixLoraConfig
from llava_mixlora.method import joint_work
from llava_mixlora.method.companions import companions_of, separately
from llava_mixlora.method.model_inputs import IGNORE_INDEX

from ...tiny import LINEAR_LAYERS, layers, random_ids, randomise

FORMS = {
    "default": {},
    "hidden": {"router_input": "hidden"},
    "frozen routers": {"router_gradient": "none"},
    "two routers": {"pairing": "rank", "routing": "ifs"},
    "two routers, hidden": {"pairing": "rank", "routing": "ifs", "router_input": "hidden"},
    "balance": {"balance_loss_weight": 0.7},
    "tasks": {"task_loss_weight": 0.5, "balance_loss_weight": 0.3, "tasks": ["a", "b"]},
    "two routers, tasks": {"pairing": "rank", "routing": "ifs", "task_loss_weight": 0.5, "tasks": ["a", "b"]},
    "dropout": {"lora_dropout": 0.3},
    "ranks": {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"up_proj": 3}},
    "some layers": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "first layer": {"layers_to_transform": [0], "layers_pattern": "layers"},
}
CHECKPOINTING = {
    "none": None,
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
}
OLDEST = importlib.util.find_spec("transformers.quantizers") is None  # transformers 4.37, whose masks overflow float64
DTYPE = torch.float32 if OLDEST else torch.float64
EXACT = {"rtol": 1e-3, "atol": 1e-5} if OLDEST else {"rtol": 1e-9, "atol": 1e-11}


def adapt(model, checkpointing=None, **form):
    options = {"r": 2, "num_factors": 6, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": LINEAR_LAYERS}
    model = randomise(get_peft_model(model.to(DTYPE), MixLoraConfig(**{**options, **form}))).to(DTYPE).train()
    model.enable_input_require_grads()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model


def batch(kind="padded", seed=0):
    ids, mask = random_ids(3, 10, seed=seed), torch.ones(3, 10, dtype=torch.int64)
    labels = ids.clone()
    labels[:, :4] = IGNORE_INDEX
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
    if kind == "padded":
        mask[1, 7:] = 0
    if kind == "conversations":
        labels[0, 6:8] = labels[2, 5] = IGNORE_INDEX
    labels[mask == 0] = IGNORE_INDEX
    return inputs


def step(model, inputs):
    """The loss of a step, all gradients, the statistics that it adds, and the routes."""
    torch.manual_seed(7)  # of dropout
    for each in layers(model).values():
        each.mixlora_stats_usage["default"].zero_()
        each.mixlora_stats_moments["default"].zero_()
    if (words := model.base_model.model._modules.get("mixlora_stats_words")) is not None:
        words["default"].zero_()
    model.zero_grad(set_to_none=True)
    needs_tasks = model.peft_config["default"].task_loss_weight != 0
    loss = model(**inputs, **({"mixlora_tasks": torch.tensor([0, 1, 0])} if needs_tasks else {})).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    moments = {name: [each.clone() for each in layer.moments("default")] for name, layer in layers(model).items()}
    usage = {name: each.mixlora_stats_usage["default"].clone() for name, each in layers(model).items()}
    return loss.detach(), gradients, moments, usage, model.base_model.routes()


def assert_same(together, apart):
    torch.testing.assert_close(together[0], apart[0], **EXACT)
    assert together[1].keys() == apart[1].keys()
    for name, gradient in apart[1].items():
        torch.testing.assert_close(together[1][name], gradient, msg=lambda text, n=name: f"{n}: {text}", **EXACT)
    for name, moments in apart[2].items():
        for one, other in zip(together[2][name], moments):
            torch.testing.assert_close(one, other, **EXACT)
        assert torch.equal(together[3][name], apart[3][name])
    assert together[4].keys() == apart[4].keys()
    for name, route in apart[4].items():
        assert torch.equal(together[4][name].index_A, route.index_A), name
        assert torch.equal(together[4][name].index_B, route.index_B), name
        torch.testing.assert_close(together[4][name].score_A, route.score_A, **EXACT)


@pytest.fixture
def made_together(monkeypatch):
    """How many layers each joint computation of routes was for."""
    counts = []
    routed = joint_work._routed

    def count(runs, *args):
        counts.append(sum(map(len, runs)))
        return routed(runs, *args)

    monkeypatch.setattr(joint_work, "_routed", count)
    return counts


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["padded", "conversations"])
def test_a_step_is_that_of_layers_that_work_separately(llama, form, kind, checkpointing, made_together):
    model = adapt(llama, CHECKPOINTING[checkpointing], **FORMS[form])
    together = step(model, batch(kind))
    assert made_together and min(made_together) > 1
    made_together.clear()
    with separately():
        apart = step(model, batch(kind))
    assert not made_together
    assert len(apart[1]) > 7 and all(gradient.abs().max() > 0 for n, gradient in apart[1].items() if "_A" in n)
    assert_same(together, apart)


@pytest.mark.parametrize("form", ["default", "hidden", "two routers"])
def test_autocast_computes_in_the_same_precision(llama, form):
    model = adapt(llama, **FORMS[form]).float()
    with torch.autocast("cpu", torch.bfloat16):
        together = step(model, batch())
        with separately():
            apart = step(model, batch())
    torch.testing.assert_close(together[0], apart[0], rtol=1e-2, atol=1e-2)
    for name, route in apart[4].items():
        assert route.score_A.dtype == together[4][name].score_A.dtype == torch.float32
    for name, gradient in apart[1].items():
        assert gradient.dtype == together[1][name].dtype == torch.float32
        assert (together[1][name] - gradient).norm() <= 0.25 * gradient.norm(), name


def test_two_forward_passes_before_one_backward(llama):
    model = adapt(llama, CHECKPOINTING["reentrant"])

    def both(context):
        model.base_model.model._modules["mixlora_stats_words"]["default"].zero_()
        model.zero_grad(set_to_none=True)
        with context:
            sum(model(**batch(seed=seed)).loss for seed in (0, 1)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together, apart = both(nullcontext()), both(separately())
    for name, gradient in apart.items():
        torch.testing.assert_close(together[name], gradient, **EXACT)


def test_checkpoints_smaller_than_a_block_route_within_themselves(llama, made_together):
    def smaller(module, reentrant):
        forward = module.forward
        module.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=reentrant, **kwargs)

    for reentrant in (True, False):
        model = adapt(copy.deepcopy(llama))
        with separately():
            apart = step(model, batch())
        for block in model.base_model.model.model.layers:
            smaller(block.mlp, reentrant)
        assert_same(step(model, batch()), apart)
    assert made_together


def test_copies_work_with_their_own_layers(llama):
    model = adapt(llama)
    step(model, batch())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "mixlora_" in name:
                parameter.mul_(1.5)
    together = step(twin, batch())
    with separately():
        assert_same(together, step(twin, batch()))


def test_a_further_adapter_finds_its_companions(llama):
    model = adapt(llama, target_modules=["q_proj"])
    step(model, batch())
    options = {"r": 2, "num_factors": 6, "task_type": "CAUSAL_LM", "target_modules": LINEAR_LAYERS}
    model.add_adapter("other", MixLoraConfig(**options))
    randomise(model).to(DTYPE)
    model.base_model.set_adapter(["default", "other"])
    loss = model(**batch()).loss
    with separately():
        torch.testing.assert_close(loss, model(**batch()).loss, rtol=1e-3, atol=1e-4)  # μ of words has moved


def test_frozen_layers_among_others_stay_without_a_gradient(llama):
    model = adapt(llama)
    frozen = [name for name, p in model.named_parameters() if "k_proj" in name and "mixlora_" in name]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    together = step(model, batch())
    assert not together[1].keys() & set(frozen)
    with separately():
        assert_same(together, step(model, batch()))


def test_parameters_that_are_spread_are_left_to_their_layers(llama, made_together):
    model = adapt(llama)
    for _, parameter in model.named_parameters():
        parameter.ds_id = 0  # as DeepSpeed's ZeRO-3 marks what it gathers for one layer at a time
    step(model, batch())
    assert not made_together


def test_inference_does_not_work_together(llama, made_together):
    model = adapt(llama).eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        with separately():
            torch.testing.assert_close(model(input_ids=ids).logits, logits, **EXACT)
    assert not made_together


class _Crossed(PreTrainedModel):
    """A decoder layer whose keys are of other states than its queries, and whose values are not always made."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(320, 16)
        self.layers = nn.ModuleList([nn.ModuleDict({n: nn.Linear(16, 16) for n in ("q_proj", "k_proj", "v_proj")})])
        self.skips, self.changes = False, False

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, labels=None, attention_mask=None):
        x = self.embeddings(input_ids)
        layer = self.layers[0]
        y = layer["q_proj"](x)
        if self.changes:
            x = x * 1
            x += 1
        y = y + layer["k_proj"](x.roll(1, 0)) * layer["q_proj"](x)
        if not self.skips:
            y = y + layer["v_proj"](x)
        return CausalLMOutput(loss=y.square().mean())


@pytest.mark.parametrize("router_input", ["words", "hidden"])
@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_names_that_mislead_cost_nothing_but_time(router_input, changes, skips):
    torch.manual_seed(0)
    model = _Crossed(PretrainedConfig())
    config = MixLoraConfig(
        r=2, num_factors=6, target_modules=["q_proj", "k_proj", "v_proj"], router_input=router_input,
        router_scope="prompt", balance_loss_weight=0.5,
    )  # fmt: skip
    model = randomise(get_peft_model(model.to(DTYPE), config)).to(DTYPE).train()
    model.base_model.model.skips, model.base_model.model.changes = skips, changes
    inputs = {"input_ids": random_ids(3, 6), "labels": batch()["labels"][:, :6]}
    together = step(model, inputs)
    with separately():
        apart = step(model, inputs)
    if skips:  # what nobody asked for has no gradient, or one of zero
        for name in [name for name in together[1] if name not in apart[1]]:
            assert "v_proj" in name and not together[1].pop(name).any()
    assert_same(together, apart)


def test_companions_are_found_by_name(llama):
    model = adapt(llama)
    root = model.base_model.model
    first = root.model.layers[0]
    attention = first.self_attn
    assert companions_of(first.mlp.up_proj, "default", root) == (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (first.mlp.gate_proj, first.mlp.up_proj),
        (first.mlp.down_proj,),
    )
    assert companions_of(first.mlp.up_proj, "default", None) is None
    hidden = adapt(copy.deepcopy(root), router_input="hidden", target_modules=["gate_proj", "up_proj", "o_proj"])
    first = hidden.base_model.model.model.layers[0]
    gate, up = first.mlp.gate_proj, first.mlp.up_proj
    assert companions_of(up, "default", hidden.base_model.model) == ((gate, up),)
    assert companions_of(first.self_attn.o_proj, "default", hidden.base_model.model) is None
