"""Prompt tokens of models whose tokenizer and chat template are at hand: render, then tokenize. Exact."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.sandbox

from services.tokenization.conversation import Conversation, Turn
from services.tokenization.counting import Count, Method


class TemplateRefused(Exception):
    """The template raised: the model takes no such conversation."""


def _refuse(message: str) -> None:
    raise TemplateRefused(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return datetime.datetime.now(datetime.UTC).strftime(form)


class ChatTemplate:
    """A chat template as Hugging Face defines them: Jinja with `messages`, `tools`, `add_generation_prompt`, special tokens.

    The sandbox keeps a template, which comes with a model file, from reaching anything but its input.
    """

    def __init__(self, source: str, special: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        self._template = environment.from_string(source)
        self._special = special

    def render(self, conversation: Conversation) -> str:
        """The prompt as text. Raises TemplateRefused when the template does."""
        tools = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": _parsed(tool.parameters)},
            }
            for tool in conversation.tools
        ]
        try:
            return self._template.render(
                messages=[_message(turn) for turn in conversation.turns],
                tools=tools or None,
                add_generation_prompt=True,
                **self._special,
            )
        except jinja2.TemplateError as error:
            raise TemplateRefused(str(error)) from error


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": str(turn.role), "content": turn.text}
    if turn.name:
        message["name"] = turn.name
    if turn.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _parsed(call.arguments)}}
            for call in turn.tool_calls
        ]
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


_REFUSED_BOUND: Final = 0.25
_PICTURE_TOKENS: Final = 1024


class TemplateCounter:
    """Counts with a model's own tokenizer and chat template."""

    method: Final = Method.EXACT
    error_bound: Final = 0.0

    def __init__(
        self,
        name: str,
        template: ChatTemplate | None,
        tokens: Callable[[str], int],
        prompt_tokens: Callable[[str], int],
    ) -> None:
        """`tokens` counts a plain text, `prompt_tokens` a rendered prompt, whose special tokens are one each."""
        self.name = name
        self._template = template
        self._tokens = tokens
        self._prompt_tokens = prompt_tokens

    def count(self, conversation: Conversation) -> Count:
        """See Counter. A conversation that the template refuses, or with pictures, is only near, and says so."""
        pictures = sum(len(turn.pictures) for turn in conversation.turns)
        if self._template is not None:
            try:
                total = self._prompt_tokens(self._template.render(conversation))
            except TemplateRefused:
                pass
            else:
                if not pictures and not conversation.tools:
                    return Count(total, self.method, self.name, 0.0)
                # How a server writes tools into a prompt whose template has no place for them, and what it makes of pictures, is its own.
                return Count(total + pictures * _PICTURE_TOKENS, Method.ESTIMATED, self.name, _REFUSED_BOUND)
        total = sum(self._tokens(turn.text) + 6 for turn in conversation.turns) + 4 + pictures * _PICTURE_TOKENS
        total += sum(
            self._tokens(call.name) + self._tokens(call.arguments) + 6 for t in conversation.turns for call in t.tool_calls
        )
        total += sum(self._tokens(tool.parameters) + self._tokens(tool.description) + 12 for tool in conversation.tools)
        return Count(total, Method.ESTIMATED, self.name, _REFUSED_BOUND)

    def count_text(self, text: str) -> Count:
        """See Counter."""
        return Count(self._tokens(text), self.method, self.name, 0.0)
