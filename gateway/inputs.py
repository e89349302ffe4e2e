"""What a request asks about, as ids: a prompt of text or ids, or the messages of a chat."""

from __future__ import annotations

from typing import Any

from common.errors import BadRequest
from gateway.prompts import Model

MOST_PROMPTS = 32


def prompts_ids(fields: dict[str, Any], model: Model) -> list[list[int]]:
    """One prompt or several."""
    prompt = fields.get("prompt")
    if not isinstance(prompt, list) or not prompt or not all(isinstance(one, str | list) for one in prompt):
        return [_prompt_ids(prompt, model)]
    if len(prompt) > MOST_PROMPTS:
        raise BadRequest(f"{len(prompt)} prompts in one request; there may be {MOST_PROMPTS}", param="prompt")
    return [_prompt_ids(one, model) for one in prompt]


def _prompt_ids(prompt: Any, model: Model) -> list[int]:
    if isinstance(prompt, str):
        return model.encode(prompt)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        if not prompt:
            raise BadRequest("the prompt is empty", param="prompt")
        bad = next((token for token in prompt if not 0 <= token < model.vocabulary), None)
        if bad is not None:
            raise BadRequest(f"prompt holds the id {str(bad)[:20]}; ids are 0 to {model.vocabulary - 1}", param="prompt")
        return prompt
    raise BadRequest("prompt must be a string, a list of whole numbers (the token ids), or a list of such prompts", param="prompt")


def message_ids(fields: dict[str, Any], model: Model) -> list[int]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message", param="messages")
    return model.chat([_message(message, f"messages[{i}]") for i, message in enumerate(messages)])


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRequest(f"{where} must be an object", param=where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ("system", "developer", "user", "assistant"):
        raise BadRequest(f"{where}.role must be system, developer, user or assistant", param=f"{where}.role")
    extra = next((name for name, value in message.items() if name not in ("role", "content", "name") and value), None)
    if extra is not None:
        raise BadRequest(f"{where}.{extra} is not supported", param=f"{where}.{extra}", code="unsupported_parameter")
    return {"role": "system" if role == "developer" else role, "content": _content(content, f"{where}.content")}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a string or a list of text parts", param=where)
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRequest(f"{where}: only parts of type text are supported", param=where)
        texts.append(part["text"])
    return "".join(texts)
