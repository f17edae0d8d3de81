"""A conversation template of ours as the Jinja template that transformers, vLLM and SGLang render.

Each of the five styles becomes a few lines of Jinja that write, blank for blank, what `Template.prompt` writes.
Messages are those of the OpenAI format: `content` is a text, or a list of `{"type": "image"}` and `{"type": "text",
"text": ...}`. As at inference here, images without `<image>` in the text are put in front of it, each on a line of its
own.

The servers look at the template's loops to find out whether it takes lists of parts: they know a loop over `messages`
whose variable is `message`, with a loop over `message['content']`. The macro's parameter is called so for that reason.
"""

import json
import re
from typing import Final

from llava_ft.constants import IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN
from llava_ft.conversation import Template, TemplateStyle

_TEXT_MACRO: Final = """\
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content']@PLACED@ -}}
    {%- else -%}
        {%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
        {%- if @IMAGE@ not in texts -%}
            {%- for part in message['content'] -%}
                {%- if part['type'] == 'image' -%}{{- @IMAGE_LINE@ -}}{%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- texts@PLACED@ -}}
    {%- endif -%}
{%- endmacro -%}
"""

_SYSTEM: Final = """\
{%- set ns = namespace(system=@SYSTEM@, previous='', position=0) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- if not loop.first -%}
            {{- raise_exception('A system message is only possible at the beginning.') -}}
        {%- endif -%}
        {%- set ns.system = text_of(message) -%}
    {%- elif message['role'] not in ('user', 'assistant') -%}
        {{- raise_exception('Roles are system, user and assistant; found ' ~ message['role']) -}}
    {%- endif -%}
{%- endfor -%}
"""

_TURNS: Final = """\
{%- for message in messages -%}
    {%- if message['role'] != 'system' -%}
        {%- if message['role'] == ns.previous -%}
            {{- raise_exception('Two messages of the role ' ~ message['role'] ~ ' follow each other.') -}}
        {%- endif -%}
        {%- set text = text_of(message) -%}
        {%- if message['role'] == 'user' -%}
            @HUMAN@
            {%- set ns.position = ns.position + 1 -%}
        {%- elif ns.previous or @KEEPS_LEADING_ANSWER@ -%}
            @ASSISTANT@
            {%- set ns.position = ns.position + 1 -%}
        {%- endif -%}
        {%- set ns.previous = message['role'] -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.previous == 'user' -%}@OPEN@{%- endif -%}
"""


def chat_template(template: Template, *, mm_use_im_start_end: bool = False, begin: str | None = None) -> str:
    """Write a template in Jinja.

    Args:
        template: The template.
        mm_use_im_start_end: Whether `<im_start>` and `<im_end>` go around each image.
        begin: What to write behind the begin token, in front of everything else, for programs that add none when they
            tokenise; None to write no begin token.
    """
    start, human, assistant, opening = _parts(template)
    image = f"<Image>{IMAGE_TOKEN}</Image>" if template.wraps_images else IMAGE_TOKEN
    if mm_use_im_start_end:
        image = image.replace(IMAGE_TOKEN, f"{IM_START_TOKEN}{IMAGE_TOKEN}{IM_END_TOKEN}")
    values = {
        "IMAGE": _quoted(IMAGE_TOKEN),
        "IMAGE_LINE": _quoted(f"{image}\n"),
        "PLACED": "" if image == IMAGE_TOKEN else f".replace({_quoted(IMAGE_TOKEN)}, {_quoted(image)})",
        "SYSTEM": _quoted(template.system),
        "HUMAN": human,
        "ASSISTANT": assistant,
        "OPEN": opening,
        "KEEPS_LEADING_ANSWER": "true" if template.keeps_leading_answer else "false",
    }
    body = re.sub(r"@([A-Z_]+)@", lambda name: values[name[1]], f"{_TEXT_MACRO}{_SYSTEM}{start}\n{_TURNS}")
    return body if begin is None else f"{{{{- bos_token + {_quoted(begin)} -}}}}\n{body}"


def _parts(template: Template) -> tuple[str, str, str, str]:
    """Return the beginning, a turn of the human, one of the assistant, and an opened one, in Jinja."""
    stop = _quoted(template.stop)
    match template.style:
        case TemplateStyle.PAIRS | TemplateStyle.BLOCKS:
            is_pairs = template.style is TemplateStyle.PAIRS
            return (
                _written("ns.system + ' '" if is_pairs else f"ns.system + {stop}"),
                _heading(f"{template.human}:") + _if_text(f"' ' + text + {_quoted(' ') if is_pairs else stop}"),
                _heading(f"{template.assistant}:") + _if_text(f"' ' + text + {stop}"),
                _heading(f"{template.assistant}:"),
            )
        case TemplateStyle.CHATML:
            return (
                _written(f"{_quoted('<|im_start|>system' + chr(10))} + ns.system + {stop}"),
                _heading(template.human) + _if_text(f"text + {stop}"),
                _heading(template.assistant) + _if_text(f"text + {stop}"),
                _heading(template.assistant),
            )
        case TemplateStyle.INST:
            first = (
                "{%- if ns.position == 0 and not text -%}"
                "{{- raise_exception('This template needs a first question.') -}}"
                "{%- elif ns.position == 0 and ns.system -%}"
                f"{{%- set text = {_quoted('<<SYS>>' + chr(10))} + ns.system + "
                f"{_quoted(chr(10) + '<</SYS>>' + chr(10) * 2)} + text -%}}"
                "{%- endif -%}"
            )
            again = f"(({_quoted(template.turn_start)}) if ns.position else '')"
            return (
                "",
                first + _if_text(f"{again} + '[INST] ' + text + ' [/INST]'"),
                _if_text(f"' ' + text + {_quoted(' ' + template.stop)}"),
                "",
            )
        case TemplateStyle.PLAIN:
            return "", _if_text(f"text + {stop}"), _if_text(f"text + {stop}"), ""


def _written(expression: str) -> str:
    return f"{{{{- {expression} -}}}}"


def _heading(text: str) -> str:
    return _written(_quoted(text))


def _if_text(expression: str) -> str:
    return f"{{%- if text -%}}{_written(expression)}{{%- endif -%}}"


def _quoted(text: str) -> str:
    """Write a text as a Jinja string."""
    return json.dumps(text)
