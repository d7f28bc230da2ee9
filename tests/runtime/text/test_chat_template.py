"""Chat templates: what models ship works, what attacks does not."""

from __future__ import annotations

import time

import pytest

from dspark_runtime.errors import ChatTemplateError
from dspark_runtime.text.chat_template import ChatTemplate, TemplateLimits

MESSAGES = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi {{ x }} {% if %}"}]

CHATML = """{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nDefault<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def test_a_usual_template() -> None:
    template = ChatTemplate(CHATML)
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ x }} {% if %}<|im_end|>\n"
    assert template.render(MESSAGES) == expected + "<|im_start|>assistant\n"
    assert template.render(MESSAGES, add_generation_prompt=False) == expected
    assert template.render(MESSAGES[1:]).startswith("<|im_start|>system\nDefault")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token ~ messages[0].role }}", "<s>system"),
        ("{{ messages | map(attribute='role') | join(',') }}", "system,user"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages[:1] | tojson }}", '[{"role": "system", "content": " Be brief. "}]'),
        ("{{ {'a': '<é>'} | tojson(indent=1) }}", '{\n "a": "<é>"\n}'),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% generation %}{{ messages[1].role }}{% endgeneration %}", "user"),
        ("{{ 'x' if tools is defined and tools else 'none' }}", "none"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ messages[0].content.strip().split(' ')[0].upper() }}", "BE"),
        ("{% macro f(m) %}[{{ m.role }}]{% endmacro %}{{ f(messages[0]) }}{{ f(m=messages[1]) }}", "[system][user]"),
        ("{{ [1, 2, 3] | sum }}{{ 'abc'[::-1] }}{{ 7 % 4 }}{{ none }}{{ true }}", "6cba3NoneTrue"),
        ("a\n{% if true %}\nb\n{% endif %}\nc", "a\nb\nc"),
    ],
)
def test_what_templates_use(source: str, expected: str) -> None:
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES) == expected


ATTACKS = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "class escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals escape": "{{ messages.__init__.__globals__ }}",
    "macro escape": "{% macro f() %}{% endmacro %}{{ f.__globals__.os }}",
    "cycler escape": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "attribute filter": "{{ ('' | attr('__class__')).__mro__ }}",
    "changing the messages": "{{ messages.append(1) }}",
    "large range": "{{ range(999999999) | list }}",
    "large product": "{{ 'a' * 10 ** 9 }}",
    "large list": "{{ ([0] * 10 ** 9) | length }}",
    "large power": "{{ 2 ** (10 ** 9) }}",
    "padding": "{{ 'a'.ljust(10 ** 10) }}",
    "padding by filter": "{{ 'a' | center(10 ** 10) }}",
    "indent": "{{ 'a\\nb' | indent(10 ** 9) }}",
    "json indent": "{{ [1] | tojson(indent=10 ** 9) }}",
    "percent format": "{{ '%1000000000d' % 1 }}",
    "str.format": "{{ '{:>1000000000}'.format(1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "percent with a star": "{{ '%*d' % (10 ** 9, 1) }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "percent of a name with parentheses": "{{ '%((a)b)1000000000d' % {'(a)b': 1} }}",
    "percent of a name with a percent sign": "{{ '%(a%b)1000000000d' % {'a%b': 1} }}",
    "percent many times": "{{ ('%(a)s' * 100000) % {'a': 'b' * 3000000} }}",
    "str.format with a nested width": "{{ '{:>{}}'.format(1, 10 ** 9) }}",
    "str.format many times": "{{ ('{0}' * 100000).format('b' * 3000000) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "str.format escape": "{{ '{0.__class__.__mro__}'.format(messages) | length // 0 }}",
    "a large text many times in a list": "{% set s = 'a' * 3000000 %}{{ [s, s, s, s, s] * 10000 }}",
    "json of a deep value": (
        "{% set n = namespace(l=[]) %}{% for i in range(900) %}{% set n.l = [n.l] %}{% endfor %}"
        "{{ ([n.l] * 200) | tojson(indent=32) }}"
    ),
    "json separators": "{{ [1, 2] | tojson(separators=('a' * 3000000, 'b' * 9000000)) }}",
    "namespace of large texts": "{% set n = namespace(a='a' * 3000000) %}{% set m = namespace(a=[n] * 10000) %}{{ m }}",
    "doubling": "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "replace": "{{ 'a'.replace('', 'b' * 3000000).replace('', 'c' * 3000000) }}",
    "replace filter": "{{ 'aaaaaaaaaa' | replace('a', 'b' * 3000000) }}",
    "nested lists": "{% set n = namespace(l=1) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n }}",
    "dicts": "{% set n = namespace(l=1) %}{% for i in range(60) %}{% set n.l = dict(a=n.l, b=n.l) %}{% endfor %}",
    "10 MB of output": "{% for i in range(99999) %}{{ 'a' * 100 }}{% endfor %}",
    "10 MB of text": "{% for i in range(99999) %}" + "a" * 100 + "{% endfor %}",
    "10 MB into a variable": "{% set x %}{% for i in range(99999) %}" + "a" * 100 + "{% endfor %}{% endset %}",
    "division": "{{ 1 // 0 }}",
    "types": "{{ 1 + 'a' }}",
    "undefined": "{{ nothing.there }}",
    "unknown filter": "{{ 1 | nothing }}",
    "syntax": "{% if %}",
    "unclosed": "{% for a in b %}",
    "refusal": "{{ raise_exception('only one system message') }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_end_quickly_in_a_typed_error(attack: str) -> None:
    started = time.process_time()  # of the processor: other programs may slow the machine down
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(ATTACKS[attack]).render(MESSAGES)
    assert time.process_time() - started < 5
    assert "chat template" in str(caught.value)


def test_limits_can_be_set() -> None:
    with pytest.raises(ChatTemplateError, match="at most 10"):
        ChatTemplate("x" * 11, limits=TemplateLimits(template_chars=10))
    slow = "{% for a in range(90000) %}{% for b in range(5) %}{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match=r"longer than 0\.0"):
        ChatTemplate(slow, limits=TemplateLimits(seconds=0.0)).render(MESSAGES)
    with pytest.raises(ChatTemplateError, match="500 characters"):
        ChatTemplate("{{ 'a' * 600 }}", limits=TemplateLimits(output_chars=500)).render(MESSAGES)


def test_a_failed_rendering_leaves_the_template_usable() -> None:
    template = ChatTemplate("{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}ok")
    with pytest.raises(ChatTemplateError, match="refuses this conversation: no"):
        template.render(MESSAGES)
    assert template.render(MESSAGES[:1]) == "ok"
