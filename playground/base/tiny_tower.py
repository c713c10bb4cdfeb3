"""A CLIP vision tower small enough to train in a minute, in the place of LLaVA's CLIP-ViT-L/14.

LLaVA keeps its tower frozen, so a randomly initialised one would leave the tasks at chance. This one learns as CLIP
did (Radford et al. 2021, arXiv:2103.00020, section 2.3), from pictures and captions alone, on the training pictures of
`playground.data.tasks`. LLaVA then reads the patch tokens of its last layer but one.

    python -m playground.base.tiny_tower --data data --output tower
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPOutput

from playground.atomic import atomic_directory
from playground.data.tasks import WORDS

IMAGE_SIZE = 64
PATCH_SIZE = 16
HIDDEN_SIZE = 96
LAYERS = 4
PROJECTION_SIZE = 64
# LLaVA's --mm_vision_select_layer.
LLAVA_LAYER = -2

STEPS = 1200
WARMUP_STEPS = 50
BATCH_SIZE = 64
MUON_RATE = 4e-3
ADAMW_RATE = 2e-3
# Digits are learnt sooner than shapes, so they get less than their half of a batch.
DIGIT_SHARE = 0.25
DIGIT_SHIFT = 3


def build(data_dir: Path, output_dir: Path, seed: int = 0, steps: int = STEPS) -> None:
    """Train the tower on the training pictures below ``data_dir`` and save it as the folder ``output_dir``.

    ``data_dir`` is what `playground.data.tasks` wrote. The folder appears when training is complete, and loads with
    ``CLIPVisionModel.from_pretrained`` and ``CLIPImageProcessor.from_pretrained``, which is what LLaVA's
    ``CLIPVisionTower`` calls: 64x64 pixels in, [1 + 16, 96] features out, float32 weights.

    The same seed gives the same weights on one machine with one number of threads. The process's own random state is
    left as it was.

    Raises:
        FileExistsError: ``output_dir`` holds something else than an earlier result.
    """
    with atomic_directory(output_dir, marker="preprocessor_config.json") as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        processor = CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        )
        pixels, facts = _training_pictures(Path(data_dir), processor)
        model = _train(pixels, facts, steps)
        # From the whole model, because a CLIPVisionModel of transformers 5 saves itself under names that 4 lacks;
        # but without the text half, which would be reported as unexpected at each load.
        vision = {name: weight for name, weight in model.state_dict().items() if name.startswith("vision_model.")}
        model.save_pretrained(folder, state_dict=vision)
        processor.save_pretrained(folder)


def captions(facts: dict) -> list[str]:
    """The captions that training may pair with a picture, from its entry in ``images.json``.

    A shape has three, so that its form is asked for by itself too: colour alone would tell most pairs apart.
    """
    if "digit" in facts:
        return [f"a handwritten {WORDS[facts['digit']]}"]
    return [f"a {facts['color']} {facts['shape']}", f"a {facts['shape']}", f"a {facts['color']} shape"]


def contrastive_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, drawn: torch.Tensor, true: torch.Tensor
) -> torch.Tensor:
    """Symmetric InfoNCE over the different captions, in which no true caption counts as a negative.

    Args:
        image_features: [B, d], already scaled by the temperature.
        text_features: [C, d], one row for each different caption.
        drawn: [B] integers below C, the caption drawn for each picture.
        true: [B, C] bool, which captions are true of which picture; holds at ``drawn``.

    Returns:
        A scalar: the mean of two cross entropies, picture to its drawn caption among that and the false ones, and
        caption to any one of the pictures it was drawn for, over the captions drawn. Both can reach zero.
    """
    logits = image_features @ text_features.T
    positives = F.one_hot(drawn, len(text_features)).bool()
    logits = logits.masked_fill(true & ~positives, -torch.inf)
    to_text = F.cross_entropy(logits, drawn)
    occurring = positives.any(0)
    any_positive = logits.masked_fill(~positives, -torch.inf)[:, occurring].logsumexp(0)
    to_image = (logits[:, occurring].logsumexp(0) - any_positive).mean()
    return (to_text + to_image) / 2


def _train(pixels: torch.Tensor, facts: list[dict], steps: int) -> CLIPModel:
    """Fit a CLIP to normalised pictures [N, 3, H, W] and what they show."""
    texts = sorted({text for entry in facts for text in captions(entry)})
    true = torch.tensor([[text in captions(entry) for text in texts] for entry in facts])
    input_ids = _word_ids(texts)
    digit = torch.tensor(["digit" in entry for entry in facts])
    weights = torch.where(digit, DIGIT_SHARE / digit.sum(), (1 - DIGIT_SHARE) / (~digit).sum())
    room = torch.where(digit[:, None], DIGIT_SHIFT, _room(pixels))

    model = CLIPModel(_config(vocabulary=int(input_ids.max()) + 1, length=input_ids.shape[1])).train()
    optimizers = _optimizers(model)
    rate = partial(_warmup_then_cosine, steps=steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    with tqdm(range(steps), desc="vision tower", unit="step") as bar:
        for step in bar:
            chosen = torch.multinomial(weights, BATCH_SIZE, replacement=True)
            drawn = torch.multinomial(true[chosen].float(), 1).squeeze(1)
            batch = _augmented(pixels[chosen], room[chosen], mirror=~digit[chosen])
            output = model(input_ids=input_ids, pixel_values=batch, output_hidden_states=True)
            scale = model.logit_scale.exp()
            loss = sum(
                contrastive_loss(scale * features, output.text_embeds, drawn, true[chosen])
                for features in (output.image_embeds, _patch_embeds(model, output))
            )
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            if step % 20 == 0 or step == steps - 1:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def _patch_embeds(model: CLIPModel, output: CLIPOutput) -> torch.Tensor:
    """Unit vectors [B, d] from the mean patch token of the last layer but one, by way of CLIP's own head.

    CLIP's loss reads the class token alone, and leaves less of the shape in the patch tokens than LLaVA needs: with it
    only, a probe on them named 89% of the held-out shapes (1,500 steps); with this as a second view, 97% (1,200 steps).
    """
    patches = output.vision_model_output.hidden_states[LLAVA_LAYER][:, 1:]
    embeds = model.visual_projection(model.vision_model.post_layernorm(patches.mean(1)))
    return F.normalize(embeds, dim=-1)


def _optimizers(model: CLIPModel) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon/) for the layers' matrices, AdamW for everything else.

    In one trial (48x48 pixels, patches of 8) AdamW alone was at a loss of 0.64 after 950 steps, this at 0.44 after 480.
    Needs torch 2.9 or newer.
    """
    named = dict(model.named_parameters())
    matrices = [name for name, weight in named.items() if weight.ndim == 2 and ".layers." in name]
    rest = [weight for name, weight in named.items() if name not in matrices]
    return [
        torch.optim.Muon(
            [named[name] for name in matrices], lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=ADAMW_RATE, weight_decay=0.05, betas=(0.9, 0.98)),
    ]


def _training_pictures(data_dir: Path, processor: CLIPImageProcessor) -> tuple[torch.Tensor, list[dict]]:
    """The training pictures [N, 3, H, W], as the processor gives them to the tower, and their N entries."""
    listed = json.loads((data_dir / "images.json").read_text(encoding="utf-8"))
    facts = [entry for entry in listed if entry["split"] == "train"]
    pictures = [Image.open(data_dir / "images" / entry["image"]) for entry in facts]
    return processor(pictures, return_tensors="pt")["pixel_values"], facts


def _room(pixels: torch.Tensor) -> torch.Tensor:
    """How far the shape in each of [N, 3, H, W] can move before it leaves the picture: [N, 4], up, down, left, right.

    easy-VQA draws on one plain colour and covers less than half of it, so the median pixel is the background.
    """
    background = pixels.flatten(2).median(2).values[:, :, None, None]
    shape = ((pixels - background).abs() > 0.1).any(1)
    rows, columns = shape.any(2).int(), shape.any(1).int()
    # argmax gives the first of equal values: the first row or column that the shape touches.
    return torch.stack([lines.argmax(1) for lines in (rows, rows.flip(1), columns, columns.flip(1))], dim=1)


def _augmented(pixels: torch.Tensor, room: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """Move each picture of [B, 3, H, W] within its ``room`` [B, 4] (up, down, left, right), repeating its border.

    Where ``mirror`` [B] allows it, half the pictures are also turned left to right.
    """
    count, _, height, width = pixels.shape
    span = room[:, 0::2] + room[:, 1::2] + 1
    # Reading from further down moves the picture up.
    shift = (room[:, 0::2] - (torch.rand(count, 2) * span).long())[:, :, None]
    rows = (torch.arange(height) + shift[:, 0]).clamp(0, height - 1)
    columns = (torch.arange(width) + shift[:, 1]).clamp(0, width - 1)
    turned = (mirror & (torch.rand(count) < 0.5))[:, None]
    columns = torch.where(turned, columns.flip(1), columns)
    which = torch.arange(count)[:, None, None]
    return pixels.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _word_ids(texts: list[str]) -> torch.Tensor:
    """Word numbers [C, length] for CLIP's text half; the largest number ends (and fills) each row.

    CLIP reads a text at its end token, which transformers finds as the largest id or by ``eos_token_id``.
    """
    words = sorted({word for text in texts for word in text.split()})
    length = max(len(text.split()) for text in texts) + 1
    rows = [[words.index(word) for word in text.split()] for text in texts]
    return torch.tensor([row + [len(words)] * (length - len(row)) for row in rows])


def _config(vocabulary: int, length: int) -> CLIPConfig:
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=PROJECTION_SIZE,
    )
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=PROJECTION_SIZE,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=vocabulary - 1,
    )
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=PROJECTION_SIZE)


def _warmup_then_cosine(step: int, steps: int) -> float:
    """The factor on the learning rate at ``step`` of ``steps``."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS))) / 2


def main() -> None:
    """Command line: train the tower on a folder that `playground.data.tasks` wrote."""
    parser = argparse.ArgumentParser(description="Train the playground's small CLIP vision tower.")
    parser.add_argument("--data", type=Path, required=True, help="folder that playground.data.tasks wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; an earlier result is replaced")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the batches (default: 0)")
    arguments = parser.parse_args()
    try:
        build(arguments.data, arguments.output, arguments.seed)
    except (FileExistsError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
