"""`llava.serve.gradio_web_server`: LLaVA's own web page, which is refused where it cannot answer.

It hands gradio pairs of a question and an answer. gradio 6 takes messages with a role and nothing else, so that the
page would start, take a question and show "Error"; and each gradio since 4 has taken away more of what it uses.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from ..errors import MixLoraError

MODULE = "llava.serve.gradio_web_server"
TAKES_NO_PAIRS = Version("6")


def check_gradio(module: str) -> None:
    """Refuse to run a module that is LLaVA's web page where gradio is missing, or one that it cannot answer with.

    Raises:
        MixLoraError: it names our own page.
    """
    if module != MODULE:
        return
    try:
        installed = version("gradio")
    except PackageNotFoundError:
        problem = "gradio is not installed here"
    else:
        if Version(installed) < TAKES_NO_PAIRS:
            return
        problem = f"on gradio {installed} it answers every question with 'Error'; it was written for gradio 4"
    raise MixLoraError(f"-m {module}: {problem}. `llava-mixlora serve ADAPTER` has a page to talk to a model; run that")
