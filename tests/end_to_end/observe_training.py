"""Runs llava.train.train and notes what happens to its weights; started as `llava-mixlora run observe_training.py`.

Writes `observed.pt` into the output folder: a dict with
    frozen_before, frozen_after: every stored tensor of the weights that are not trained, by name
    quantized: names of the quantized layers
    trained: dtype of every trained parameter by name
    reached: names of the parameters that some step gave a gradient other than zero
"""

from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from llava.train import train
from llava.train.llava_trainer import LLaVATrainer
from transformers import TrainerCallback


def frozen(model):
    tensors = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            tensors |= {f"{name}.absmax": state.absmax, f"{name}.code": state.code, f"{name}.offset": state.offset}
            tensors |= {f"{name}.nested.absmax": state.state2.absmax, f"{name}.nested.code": state.state2.code}
        if isinstance(module, Linear8bitLt):
            # Kept with the weight until the first forward pass, with the layer afterwards.
            tensors[f"{name}.scale"] = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return {name: tensor.clone() for name, tensor in tensors.items()}


class Gradients(TrainerCallback):
    def __init__(self):
        self.reached = set()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.reached |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


class ObservedTrainer(LLaVATrainer):
    def train(self, *args, **kwargs):
        gradients = Gradients()
        self.add_callback(gradients)
        observed = {"frozen_before": frozen(self.model)}
        result = super().train(*args, **kwargs)
        observed["frozen_after"] = frozen(self.model)
        observed["reached"] = gradients.reached
        observed["trained"] = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        quantized = (Linear4bit, Linear8bitLt)
        observed["quantized"] = [name for name, module in self.model.named_modules() if isinstance(module, quantized)]
        torch.save(observed, Path(self.args.output_dir) / "observed.pt")
        return result


train.LLaVATrainer = ObservedTrainer
train.train()
