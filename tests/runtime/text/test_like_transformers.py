"""Chat templates render what transformers renders, construct by construct; what fails there fails here."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_runtime.errors import ChatTemplateError, UsageError
from dspark_runtime.text.chat_template import ChatTemplate
from dspark_runtime.text.codec import TextCodec
from tests import tiny_models

USER: list[dict[str, Any]] = [{"role": "user", "content": "Gr\u00fc\u00dfe <b> & 'x'"}]
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": " be brief ", "name": None},
    {"role": "user", "content": [{"type": "text", "text": "hey"}, {"type": "image"}]},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "why",
        "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"city": "Z\u00fcrich", "n": 1, "x": 1.5}}}
        ],
    },
    {"role": "tool", "content": "ok", "tool_call_id": "1"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<does> it", "parameters": {"b": 1, "a": None}}}]
DOCUMENTS = [{"title": "T", "text": "a text"}]

CONSTRUCTS = [
    # JSON
    "{{ messages | tojson }}",
    "{{ messages | tojson(True) }}",
    "{{ messages | tojson(False, 2) }}",
    "{{ messages | tojson(False, None, (',', ':')) }}",
    "{{ messages | tojson(False, None, None, True) }}",
    "{{ messages | tojson(ensure_ascii=False, indent=4, separators=(', ', ' : '), sort_keys=True) }}",
    "{{ messages | tojson(indent='\t') }}{{ messages | tojson(indent=0) }}{{ messages | tojson(indent=-1) }}",
    "{{ [none, true, 1.0, '\u2028</script>', {'1': 2}] | tojson }}",
    "{{ nothing | tojson }}",
    "{{ (1, 2) | tojson }}{{ {1: 'a'} | tojson }}",
    # What is defined
    "{{ tools is none }}{{ tools is defined }}{{ documents is none }}{{ documents is defined }}{{ tools is not none }}",
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{% if tools is not none %}T{% endif %}x",
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ cls_token }}|{{ mask_token }}|{{ sep_token }}",
    "{{ bos_token is defined }}{{ unk_token is defined }}{{ continue_final_message is defined }}",
    "{{ add_generation_prompt }}{{ enable_thinking is defined }}",
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}",
    "{{ messages[0].tool_calls is defined }}{% if messages[0].tool_calls %}T{% endif %}",
    (
        "{% for m in messages %}{{ m.content is defined }}{{ 'name' in m }}{{ m.reasoning_content }}"
        "{{ m.thinking }}{% endfor %}"
    ),
    "{{ foo | default('x') }}{{ messages[0].name | default('', true) }}",
    "{{ foo.bar is defined }}",
    "{{ foo.bar.baz }}",
    "{{ messages[7].role }}",
    # Formatting
    "{{ 'Today is %s, %05.1f|%-4d|%r|%%' % (messages[0].role, 2.345, 7, 'a') }}",
    "{{ '%(role)s!' % messages[0] }}",
    "{{ '%*d|%.*f' % (5, 3, 2, 1.0) }}",
    "{{ '%d' % 'a' }}",
    "{{ '%s' % 1 }}{{ 'a%sb' % 'x' * 2 }}",
    "{{ '<{}> {:>6} {x!r:<8} {0[role]}'.format(messages[0], 2, x='y') }}",
    "{{ '{role}'.format_map(messages[0]) }}{{ '{:,.2f}'.format(1234.5) }}{{ '{0.__class__}'.format('a') }}",
    "{{ '{:{w}}|'.format('a', w=5) }}{{ '{{}}'.format() }}",
    "{{ '<%s>%d' | format(messages[0].role, 3) }}{{ '%(a)s' | format(a=1) }}",
    "{{ 5 % 3 }}{{ -5 // 2 }}{{ 2 ** 5 }}{{ 7 / 2 }}",
    # Flow
    (
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ loop.index }}"
        "{{ m.role }} {% endfor %}"
    ),
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    (
        "{% for m in messages if m.role != 'tool' %}{{ loop.length }}{{ loop.last }}{{ loop.revindex }}"
        "{{ loop.cycle('a', 'b') }}{% else %}none{% endfor %}"
    ),
    "{% for m in [] %}x{% else %}none{% endfor %}{% for x in nothing %}x{% endfor %}",
    (
        "{% for m in messages %}"
        "{{ loop.previtem.role if loop.previtem is defined }}>{{ loop.nextitem.role if not loop.last }}"
        "{{ loop.changed(m.role) }};{% endfor %}"
    ),
    "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}{% endgeneration %}{% endfor %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    (
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% for k, v in messages[0] | items %}"
        "{{ k }}{% endfor %}"
    ),
    "{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}",
    (
        "{% for a in [[1, [2]], [3]] recursive %}{% if a is iterable %}({{ loop(a) }}){% else %}{{ a }}"
        "{% endif %}{% endfor %}"
    ),
    "{% for m in messages[::-1] %}{{ m.role }}{% endfor %}{{ messages[-1].role }}{{ messages[1:] | length }}",
    "{% set messages = messages[1:] %}{{ messages | length }}{% for i in range(2, 8, 3) %}{{ i }}{% endfor %}",
    "{{ range(10 ** 6) | length }}",
    "{% if messages[0].role == 'system' and not messages[0].content | trim == '' %}S{% elif true %}E{% endif %}",
    # Variables
    (
        "{% set ns = namespace(n=0, found=false) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{{ ns.found }}"
    ),
    "{% set ns = namespace({'a': 1}) %}{{ ns.a }}{{ ns.b is defined }}{{ ns }}",
    "{% set ns = namespace(_a=1) %}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{% set d = dict(a=1, **{'b': 2}) %}{{ d.a }}{{ d }}{{ dict.fromkeys(['x'], 1) }}{{ dict is callable }}",
    "{% set x %}a{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ x | length }}{{ x }}",
    "{% set x | upper %}abc{% endset %}{{ x }}{% with y = 3 %}{{ y }}{% endwith %}{{ y is defined }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{{ [1, 2] + [3] }}{{ (1,) }}{{ {'a': [1, none]} }}",
    "{% set l = [] %}{{ l.append(1) or '' }}{{ l | length }}",
    "{% set d = {} %}{{ d.update({'a': 1}) or '' }}",
    (
        "{% macro f(x, y=2) %}[{{ x }}{{ y }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ f('a') }}"
        "{{ f('b', y=3) }}{{ f(1, 2, 3, z=4) }}"
    ),
    "{% macro f() %}<{{ caller(1) }}>{% endmacro %}{% call(n) f() %}{{ n }}{% endcall %}{{ f.name }}",
    "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
    "{% filter upper %}a{{ 'b' }}{% endfilter %}{% raw %}{{ x }}{% endraw %}{# gone #}",
    "{% block a %}in{% endblock %}{{ self.a() }}",
    # Texts
    (
        "{{ 'a</think>b '.split('</think>')[-1].lstrip('\\n').strip() }}{{ 'a,b,c'.rsplit(',', 1) }}"
        "{{ 'ab'.partition('b') }}"
    ),
    (
        "{{ 'x'.startswith('x') }}{{ 'abc'.find('c') }}{{ 'a b'.title() }}{{ 'ab' | upper | replace('A', 'x') }}"
        "{{ 'a-b'.replace('-', '+', 1) }}"
    ),
    (
        "{{ 'a\nb' | indent(2) }}{{ 'a b c' | wordcount }}{{ 'abc' | truncate(2, true, '') }}"
        "{{ 'abc' | reverse }}{{ ['a', 'b'] | join('-') }}"
    ),
    "{{ 'a' ~ 1 ~ none ~ 1.5 ~ [1] }}{{ 'a' * 3 }}{{ 'abc'[1] }}{{ 'abc'[::-1] }}{{ 'b' in 'abc' }}",
    (
        "{{ '\u2581' }}{{ '\\u2581' }}{{ 'it''s' }}{{ \"q\" }}{{ messages[0].content | safe }}{{ '<' | escape }}"
        "{{ '<' | e ~ '>' }}"
    ),
    (
        "{{ '3' | int + 1 }}{{ '1.5' | float }}{{ 3.7 | round }}{{ 3 | string }}{{ -3 | abs }}{{ [3, 1] | sort }}"
        "{{ [1, 2] | sum }}{{ [1, 2] | max }}"
    ),
    (
        "{{ messages | map(attribute='role') | join(',') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    ),
    (
        "{{ messages | rejectattr('content', 'defined') | list | length }}{{ [1, 2, 3] | batch(2) | list }}"
        "{{ [1, 2, 3] | select('odd') | list }}"
    ),
    (
        "{{ messages | groupby('role') | map('first') | list }}{{ [1, 1] | unique | list }}"
        "{{ messages | first | length }}{{ [1] | last }}"
    ),
    (
        "{{ messages is sequence }}{{ messages[0] is mapping }}{{ 'a' is string }}{{ 1 is number }}"
        "{{ none is none }}{{ 1 is odd }}{{ true is boolean }}{{ 2 is divisibleby 2 }}"
    ),
    "{{ strftime_now('%Y') }}{{ strftime_now('') }}",
    "{{ raise_exception('no') }}",
    "{% if false %}{{ raise_exception('no') }}{% endif %}fine",
    "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    # White space
    "{% if true %}\n  x\n{% endif %}\n",
    "  {%- if true -%}  \n x {%+ if true %} y {% endif %}\n{%- endif %}\n\n",
    "a\n    {% set x = 1 %}\n    {{ x }}\n\n",
    "{{ 'a' }}\n{{- 'b' -}}\n{{ 'c' }}",
    "\r\na\r\n{{ 1 }}\r\n",
    "",
]


def both(source: str, messages: Any, **variables: Any) -> tuple[str | None, str | None]:
    """What transformers and this project render; None where it fails."""
    reference = tiny_models.tokenizer()
    reference.chat_template = source
    try:
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
    except Exception:
        expected = None
    try:
        found = ChatTemplate(source, dict(reference.special_tokens_map)).render(messages, **variables)
    except (ChatTemplateError, UsageError):
        found = None
    return expected, found


@pytest.mark.parametrize("source", CONSTRUCTS)
@pytest.mark.parametrize("messages", [USER, TURNS], ids=["user", "turns"])
def test_constructs(source: str, messages: Any) -> None:
    expected, found = both(source, messages)
    assert found == expected


@pytest.mark.parametrize(
    "variables",
    [
        {"tools": TOOLS},
        {"tools": []},
        {"documents": DOCUMENTS},
        {"tools": TOOLS, "documents": DOCUMENTS, "enable_thinking": False, "date_string": "today"},
        {"bos_token": "other"},
        {"x": np.bool_(False)},
        {"x": np.float32(0.5)},
        {"x": (1, {"a": object()})},
        {"x": 10**400},
        {"documents": ["text"]},
        {"tools": ["f"]},
        {"tools": [3]},
    ],
)
def test_variables(variables: dict[str, Any]) -> None:
    source = (
        "{{ tools }}{{ documents | tojson }}{{ enable_thinking }}{{ bos_token }}{{ date_string }}{{ x }}"
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    )
    expected, found = both(source, USER, **variables)
    assert found == expected


class Role(enum.StrEnum):
    USER = "user"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Message:
    role: str
    content: Any


class Dumped:
    def model_dump(self) -> dict[str, Any]:
        return {"role": "user", "content": "dumped", "name": None}


@pytest.mark.parametrize(
    "message",
    [
        {"role": Role.USER, "content": Level.HIGH},
        {"role": "user", "content": np.str_("text")},
        {"role": "user", "content": [Message("a", (1, None))], "thinking": "t"},
        {"role": "user", "content": [{"image": np.zeros(3)}], "reasoning_content": "r", "thinking": "t"},
    ],
    ids=str,
)
def test_messages_are_plain_data(message: Any) -> None:
    expected, found = both(
        "{{ messages }}{% for m in messages %}{{ m.thinking }}{{ m.content }}{% endfor %}", [message]
    )
    assert found == expected
    assert found is not None


def test_objects_as_messages() -> None:
    template = ChatTemplate("{{ messages | tojson }}")
    assert template.render([Message("user", "hi")]) == '[{"role": "user", "content": "hi"}]'  # type: ignore[list-item]
    assert template.render([Dumped()]) == '[{"role": "user", "content": "dumped"}]'  # type: ignore[list-item]
    for wrong in (["x"], [1], "text", {"role": "user"}, 5, None):
        with pytest.raises(UsageError, match="message"):
            template.render(wrong)  # type: ignore[arg-type]
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UsageError, match="200 deep"):
        template.render([{"role": "user", "content": loop}])


NAMED = {"default": "{{ bos_token }}plain{{ messages[0].content }}", "tool_use": "{{ bos_token }}{{ tools | tojson }}"}


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = dict(NAMED)
    tokenizer.save_pretrained(tmp_path)
    codec = TextCodec(tmp_path)
    for variables in ({}, {"tools": TOOLS}, {"tools": None}):
        expected = tokenizer.apply_chat_template(USER, tokenize=False, **variables)
        assert codec.render_chat(USER, **variables) == expected
        assert codec.encode_chat(USER, **variables) == tokenizer(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("make", [tiny_models.tokenizer, tiny_models.byte_fallback_tokenizer])
@pytest.mark.parametrize("name", [None, "chatml"])
def test_ids_of_conversations(make: Any, name: str | None, tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.chat_template = tiny_models.CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    codec = TextCodec(tmp_path)
    texts = [
        "hello there",
        "  two  spaces\n",
        "Gr\u00fc\u00dfe \U0001f642",
        f"a {tokenizer.eos_token} b{tokenizer.bos_token}",
    ]
    for text in texts:
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": text},
        ]
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
        assert codec.encode_chat(messages) == expected
