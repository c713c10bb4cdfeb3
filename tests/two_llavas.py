"""Upstream's LLaVA and transformers' own, asked the same."""

import torch
from peft import PeftModel
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from .tiny import plain


class Upstream:
    """Upstream's LLaVA in float32, to which its own loader does not get without float16 in between."""

    def __init__(self, base, adapter=None, tokenizer=None):
        model = plain(base)
        model.get_vision_tower().load_model()
        self.model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or base, use_fast=False)
        self.image_processor = model.get_vision_tower().image_processor

    def inputs(self, picture, question, version="v1", image="<image>"):
        from llava.conversation import conv_templates
        from llava.mm_utils import process_images, tokenizer_image_token

        conversation = conv_templates[version].copy()
        conversation.append_message(conversation.roles[0], f"{image}\n{question}")
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), self.tokenizer, return_tensors="pt")[None]
        return ids, process_images([picture], self.image_processor, self.model.config)

    def logits(self, *asked, **options):
        ids, images = self.inputs(*asked, **options)
        with torch.no_grad():
            return self.model(input_ids=ids, images=images).logits

    def written(self, *asked, tokens=6, **options):
        ids, images = self.inputs(*asked, **options)
        return self.model.generate(inputs=ids, images=images, max_new_tokens=tokens, do_sample=False)[0].tolist()

    def answer(self, *asked, **options):
        return self.tokenizer.decode(self.written(*asked, **options), skip_special_tokens=True).strip()


class Native:
    """What `export-hf` has written, by transformers' own classes."""

    def __init__(self, folder, adapter=None):
        self.folder = folder
        self.base = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.model = self.base if adapter is None else PeftModel.from_pretrained(self.base, adapter).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def prompt(self, question):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def inputs(self, picture, question):
        return self.processor(images=picture, text=self.prompt(question), return_tensors="pt")

    def logits(self, *asked):
        with torch.no_grad():
            return self.model(**self.inputs(*asked)).logits

    def written(self, *asked, tokens=6):
        inputs = self.inputs(*asked)
        written = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
        return written[inputs.input_ids.shape[1] :].tolist()

    def answer(self, *asked, **options):
        return self.processor.decode(self.written(*asked, **options), skip_special_tokens=True).strip()
