"""What the main job shows: accuracies of the base, of a plain LoRA and of MixLoRA, in tables and in one picture."""

import json

from playground.report import draw_loss_curve, markdown, results, table

QUESTIONS = [{"task": task, "truth": "yes"} for task in ("color", "color", "book teal", "book teal")]
BEFORE, LORA, MIXLORA = ["no"] * 4, ["yes", "yes", "no", "no"], ["yes", "no", "yes", "yes"]


def test_lora_stands_beside():
    contents = results(QUESTIONS, BEFORE, MIXLORA, LORA)
    assert contents["tasks"]["color"] == {"before": 0.0, "after": 50.0, "n": 2}
    assert (contents["mean_before"], contents["mean_after"]) == (0.0, 75.0)
    assert contents["lora"] == {"tasks": {"color": 100.0, "book teal": 0.0}, "mean_after": 50.0}


def test_table_gives_the_code_books_a_mean_of_their_own():
    shown = [line.split() for line in table(results(QUESTIONS, BEFORE, MIXLORA, LORA)).splitlines()]
    assert shown[0] == ["task", "questions", "before", "LoRA", "MixLoRA"]
    assert ["book", "teal", "2", "0.0%", "0.0%", "100.0%"] in shown
    assert ["mean", "of", "the", "code", "books", "2", "0.0%", "0.0%", "100.0%"] in shown
    assert ["mean", "of", "the", "others", "2", "0.0%", "100.0%", "50.0%"] in shown
    assert shown[-1] == ["mean", "4", "0.0%", "50.0%", "75.0%"]


def test_table_of_markdown_says_the_same():
    lines = markdown(results(QUESTIONS, BEFORE, MIXLORA, LORA)).splitlines()
    assert lines[2] == "| task | questions | before | LoRA | MixLoRA |"
    assert "| color | 2 | 0.0% | 100.0% | 50.0% |" in lines
    assert lines[-1] == "| **mean** | **4** | **0.0%** | **50.0%** | **75.0%** |"


def test_losses_of_both_are_drawn(tmp_path):
    for name, loss in (("mixlora", 2.0), ("lora", "3.0")):  # some versions of transformers log numbers as text
        history = [{"step": 10, "loss": loss}, {"step": 20, "loss": 1.0}, {"step": 20, "train_runtime": 5.0}]
        (tmp_path / name).write_text(json.dumps({"log_history": history}))
    draw_loss_curve(tmp_path / "loss.png", tmp_path / "mixlora", tmp_path / "lora")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_loss_on_held_out_data_is_drawn_beside_that_of_training(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "playground.report._save",
        lambda figure, path: drawn.update({line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}),
    )
    trained = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}]
    held_out = [{"step": 10, "eval_loss": 2.5}, {"step": 20, "eval_loss": 2.25}]
    (tmp_path / "mixlora").write_text(json.dumps({"log_history": [*trained, *held_out]}))
    (tmp_path / "lora").write_text(json.dumps({"log_history": trained}))
    draw_loss_curve(tmp_path / "loss.png", tmp_path / "mixlora", tmp_path / "lora")
    assert drawn == {"MixLoRA": [2.0, 1.0], "MixLoRA, held-out": [2.5, 2.25], "LoRA": [2.0, 1.0]}
