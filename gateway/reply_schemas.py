"""JSON Schemas of what the API replies; the bodies themselves are made in replies.py, and the tests hold real ones against these."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STAGES = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode", "other", "ttft", "total")
ROLES = ["prefill", "decode", "colocated"]
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
FINISH: Schema = {"type": ["string", "null"], "enum": ["stop", "length", None]}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def made(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def several(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def reply_schemas() -> dict[str, Schema]:
    return {**_answers(), **_parts(), **_others()}


def _answers() -> dict[str, Schema]:
    def head(kind: str) -> dict[str, Schema]:
        return {"id": TEXT, "object": {"const": kind}, "created": COUNT, "model": TEXT}

    chat = {"index": COUNT, "logprobs": _or_null(ref("ChatLogprobs")), "finish_reason": FINISH}
    message = made({"role": {"const": "assistant"}, "content": TEXT, "refusal": {"type": "null"}})
    delta = made({}, {"role": {"const": "assistant"}, "content": TEXT})
    text = made({"index": COUNT, "text": TEXT, "logprobs": _or_null(ref("Logprobs")), "finish_reason": FINISH})
    own = {"baton": ref("Baton")}
    last = {**own, "usage": _or_null(ref("Usage"))}
    return {
        "ChatCompletion": made(
            {**head("chat.completion"), "choices": several(made({**chat, "message": message})), "usage": ref("Usage")}, own
        ),
        "ChatCompletionChunk": made({**head("chat.completion.chunk"), "choices": several(made({**chat, "delta": delta}))}, last),
        "Completion": made({**head("text_completion"), "choices": several(text), "usage": ref("Usage")}, own),
        "CompletionChunk": made({**head("text_completion"), "choices": several(text)}, last),
    }


def _parts() -> dict[str, Schema]:
    token = {"token": TEXT, "logprob": NUMBER, "bytes": several({"type": "integer", "minimum": 0, "maximum": 255})}
    stages: dict[str, Schema] = {f"{stage}_ms": {"type": "number", "minimum": 0} for stage in STAGES}
    error = {"message": TEXT, "type": TEXT, "param": MAYBE_TEXT, "code": MAYBE_TEXT}
    return {
        "Usage": made(
            {
                "prompt_tokens": COUNT,
                "completion_tokens": COUNT,
                "total_tokens": COUNT,
                "prompt_tokens_details": made({"cached_tokens": COUNT}),
            }
        ),
        "ChatLogprobs": made({"content": several(made({**token, "top_logprobs": several(made(token))})), "refusal": {"type": "null"}}),
        "Logprobs": made(
            {
                "tokens": several(TEXT),
                "token_logprobs": several(NUMBER),
                "top_logprobs": several({"type": "object", "additionalProperties": NUMBER}),
                "text_offset": several(COUNT),
            }
        ),
        "Baton": made({"timeline": made({**stages, "attempts": {"type": "integer", "minimum": 1}})}),
        "Error": made({"error": made(error)}),
        "Model": made({"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT, "max_model_len": COUNT}),
    }


def _others() -> dict[str, Schema]:
    share = {"type": "number", "minimum": 0, "maximum": 1}
    percentiles = {"anyOf": [made({"p50": NUMBER, "p99": NUMBER}), {"type": "null"}]}
    worker = {
        "name": TEXT,
        "role": {"enum": ROLES},
        "free_pages": COUNT,
        "total_pages": COUNT,
        "running": COUNT,
        "waiting": COUNT,
        "draining": FLAG,
    }
    recent = {
        "window_s": NUMBER,
        "requests": COUNT,
        "attained": COUNT,
        "goodput_rps": NUMBER,
        "attainment": {"anyOf": [share, {"type": "null"}]},
        "ttft_ms": percentiles,
        "tpot_ms": percentiles,
        "failed": COUNT,
    }
    return {
        "Health": made({"status": {"const": "ok"}}),
        "Ready": made({"ready": FLAG, "workers": {"type": "object", "additionalProperties": COUNT}, "missing": several(TEXT)}),
        "Models": made({"object": {"const": "list"}, "data": several(ref("Model"))}),
        "Tokens": made({"count": COUNT, "max_model_len": COUNT, "tokens": several(COUNT)}, {"token_strs": several(TEXT)}),
        "Text": made({"prompt": TEXT}),
        "Demand": made({"requests": several(made({"age_s": {"type": "number"}, "input_tokens": COUNT, "output_tokens": COUNT}))}),
        "Fleet": made(
            {
                "model": TEXT,
                "missing": several(TEXT),
                "queue": made({"queued": COUNT, "running": COUNT}),
                "recoveries": COUNT,
                "workers": several(made(worker)),
                "recent": made(recent),
            }
        ),
    }
