"""`python -m playground.page_picture`: a picture of the page of `llava-mixlora serve`, with the embedded default in it.

After the main job (`bash scripts/finetune_mixlora.sh`). Needs Chromium, and playwright to drive it, which `bash
scripts/test.sh` puts into `.stacks/browser`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from playground import PLAYGROUND

NAME = "llava-v1-tiny-mixlora"
TASK = "book teal"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=PLAYGROUND / "results" / "page.png", help="(default: %(default)s)"
    )
    parser.add_argument("--width", type=int, default=900, help="in pixels (default: %(default)s)")
    given = parser.parse_args()
    adapter = PLAYGROUND / "output" / NAME
    if not adapter.is_dir():
        parser.error(f"{adapter}: no such folder; run bash scripts/finetune_mixlora.sh first")
    if (browser := next(filter(None, map(shutil.which, BROWSERS)), None)) is None:
        parser.error("no Chromium is installed; apt-get install chromium")
    command = [sys.executable, "-m", "llava_mixlora", "serve", str(adapter), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            serving = next((line for line in server.stdout if line.startswith("Serving ")), None)
            if serving is None:
                sys.exit("page_picture: the server did not start; see above")
            address = serving.split(" at ")[1].split()[0].removesuffix("v1")
            take(address, browser, given.output, given.width)
        finally:
            server.terminate()
    print(f"wrote {given.output} ({given.output.stat().st_size:,} bytes)")


def take(address: str, browser: str, output: Path, width: int) -> None:
    """Ask the adapter and its base the first held-out question of [`TASK`], and take the picture."""
    sys.path.append(str(PLAYGROUND.parent / ".stacks" / "browser"))
    from playwright.sync_api import expect, sync_playwright

    heldout = json.loads((PLAYGROUND / "cache" / "questions" / "heldout.json").read_text())
    sample = next(sample for sample in heldout if sample["task"] == TASK)
    question = sample["conversations"][0]["value"].removeprefix("<image>\n")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": width, "height": 1020}, color_scheme="light")
        page.goto(address)
        page.get_by_role("combobox", name="Ask").select_option(index=1)
        page.set_input_files("#file", PLAYGROUND / "cache" / "data" / "images" / sample["image"])
        expect(page.get_by_alt_text("The picture that goes")).to_be_visible()
        page.get_by_label("Question", exact=True).fill(question)
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".nearest")).to_be_visible(timeout=60_000)
        output.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=output)
        opened.close()


if __name__ == "__main__":
    main()
