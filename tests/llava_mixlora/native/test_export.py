"""`export-hf`: logits, tokens and answers of upstream's LLaVA and of transformers' class are the same."""


import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor

from llava_mixlora.cli import main
from llava_mixlora.native.export import OLDEST

from ...tiny import draw_pictures, plain, write_adapter

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version(OLDEST), reason=f"export-hf needs transformers {OLDEST}"
)
FORMS = {
    "words": {"pairing": "same", "router_scope": "instruction", "router_input": "words", "routing": "ifs"},
    "paper": {"routing": "ifs_cfs"},
}
QUESTIONS = ["what color is the shape", "A  red circle?\nOr a blue square", "1234 ünïcodé"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    draw_pictures(place, 2)
    Image.open(place / "1.png").resize((40, 20)).save(place / "1.png")
    return [Image.open(place / f"{number}.png").convert("RGB") for number in range(2)]


@pytest.fixture(scope="module", params=FORMS)
def adapter(request, llava_folder, tmp_path_factory):
    return write_adapter(llava_folder, tmp_path_factory.mktemp(request.param), **FORMS[request.param])


def upstream(base, adapter=None):
    """Upstream's LLaVA in float32, to which its own loader does not get without float16 in between."""
    from transformers import AutoTokenizer

    model = plain(base)
    model.get_vision_tower().load_model()
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base, use_fast=False)
    return tokenizer, model.eval(), model.get_model().get_vision_tower().image_processor


def upstream_logits(loaded, picture, question, version="v1"):
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token

    tokenizer, model, image_processor = loaded
    conversation = conv_templates[version].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{question}")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
    images = process_images([picture], image_processor, model.config)
    with torch.no_grad():
        return model(input_ids=ids, images=images).logits


def native_inputs(processor, picture, question):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=picture, text=text, return_tensors="pt")


def test_logits_are_equal(adapter, llava_folder, pictures, tmp_path):
    out = tmp_path / "native"
    assert (
        main(
            [
                "export-hf",
                "--model-path",
                str(adapter),
                "--model-base",
                str(llava_folder),
                "--save-model-path",
                str(out),
            ]
        )
        == 0
    )
    loaded = upstream(llava_folder, adapter)
    base = transformers.LlavaForConditionalGeneration.from_pretrained(out)
    model, processor = PeftModel.from_pretrained(base, out / "adapter").eval(), AutoProcessor.from_pretrained(out)
    for picture in pictures:
        for question in QUESTIONS:
            expected = upstream_logits(loaded, picture, question)
            with torch.no_grad():
                logits = model(**native_inputs(processor, picture, question)).logits
            print((logits[..., : expected.shape[-1]] - expected).abs().max(), expected.abs().max(), logits.shape)
            assert torch.allclose(logits[..., : expected.shape[-1]], expected, atol=1e-5)
