"""LLaVA's conversation templates in Jinja, as processors and servers take them."""

from __future__ import annotations

import json
from typing import Any

from ..errors import MixLoraError

IMAGE = "<image>"
"""What stands for an image in a text: `llava.constants.DEFAULT_IMAGE_TOKEN`, and transformers' default."""

_TURN = """\
{%- set spoken = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set spoken.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set spoken.text = spoken.text + IMAGE -%}{%- endif -%}
{%- endfor -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set spoken.text = spoken.text + part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
"""
"""`spoken.text`: what a message says, its images first, each in a line of its own, as LLaVA's training puts them."""

_SYSTEM = """\
{%- set system = SYSTEM -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] -%}
{%- set message = messages[0] -%}
@TURN@{%- set system = spoken.text -%}
{%- endif -%}
"""

_SPOKEN = """\
@SYSTEM@{{- system + SEPARATOR + EXAMPLES -}}
{%- for message in turns -%}
@TURN@{%- if message['role'] == 'user' -%}
{{- ASKER + spoken.text + SEPARATOR -}}
{%- else -%}
{{- OPEN -}}@ANSWER@{{- SPACE + spoken.text + END -}}@ANSWERED@
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- OPEN -}}{%- endif -%}
"""

_LLAMA_2 = """\
@SYSTEM@{%- set begun = namespace(separator='', system=system) -%}
{%- for message in turns -%}
@TURN@{%- if message['role'] == 'user' -%}
{%- if begun.system -%}
{%- set spoken.text = '<<SYS>>\\n' + begun.system + '\\n<</SYS>>\\n\\n' + spoken.text -%}
{%- endif -%}
{{- begun.separator + '[INST] ' + spoken.text + ' [/INST]' -}}
{%- set begun.separator = SEPARATOR -%}
{%- set begun.system = '' -%}
{%- else -%}
@ANSWER@{{- ' ' + spoken.text + ' ' + END -}}@ANSWERED@
{%- endif -%}
{%- endfor -%}
"""


def chat_template(template: Any, image: str = IMAGE, training: bool = False, begins: bool = True) -> str:
    """A conversation template of LLaVA in Jinja.

    Args:
        template: a `llava.conversation.Conversation`, of which the texts are taken, and no message.
        image: what stands for an image, such as `<im_start><image><im_end>`.
        training: whether it is for trainers such as TRL's, which put nothing before a text and ask the template what
            the assistant says. Those tokens have the labels that upstream's `preprocess` gives them.
        begins: whether the tokenizer puts a token before a text.

    Returns:
        A chat template. A system message takes the place of LLaVA's; what the tokenizer puts before a text (Llama's
        `<s>`) is in it for training only.

    Raises:
        MixLoraError: the template has no questions and answers (`plain`), or shows images in a turn of their own.
    """
    style = template.sep_style.name
    if "mmtag" in template.version or style == "PLAIN":
        raise MixLoraError(
            "it cannot be a chat template, since it has no place for an image in a question; say another with --version"
        )
    asker, answerer = template.roles
    colon = "" if style == "MPT" else ":"
    space = " " if colon else ""
    values = {
        "SYSTEM": template.system,
        "SEPARATOR": template.sep,
        # What some templates hold: a question and an answer, before all others.
        "EXAMPLES": template.get_prompt().removeprefix(template.system + template.sep),
        "END": template.sep2 if style in ("TWO", "LLAMA_2") else template.sep,
        "ASKER": f"{asker}{colon}{space}",
        "OPEN": f"{answerer}{colon}",
        "SPACE": space,
        "IMAGE": f"{image}\n",
    }
    body = _LLAMA_2 if style == "LLAMA_2" else _SPOKEN
    marks = ("{%- generation -%}", "{%- endgeneration -%}") if training else ("", "")
    body = body.replace("@ANSWER@", marks[0]).replace("@ANSWERED@", marks[1])
    body = body.replace("@SYSTEM@", _SYSTEM).replace("@TURN@", _TURN)
    used = (f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}" for name, text in values.items())
    return "\n".join([*(["{{- bos_token -}}"] if training and begins else []), *used, body])
