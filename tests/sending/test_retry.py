"""Decisions as tables: what providers really say, read by the real parser, and what follows."""

from __future__ import annotations

import json
import math
import random
import string
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.chat.reply import parse
from batchrun.sending.classify import NEXT_STEPS, OK, classify
from batchrun.sending.patience import (
    LONGEST_ALONE_S,
    LONGEST_BACKOFF_S,
    MAX_REFUSALS,
    GiveUp,
    Persistence,
    Policy,
    Tally,
    Wait,
)
from batchrun.sending.waits import retry_after
from batchrun.types import Attempt, Decision, DecisionKind, ErrorBody, Failure, Reply, Request

# How long an example takes says how busy the machine is, nothing else.
unhurried = settings(deadline=None)
NOW_MS = 1_763_726_400_000  # 2025-11-21T12:00:00Z
MODEL = "Mistral-chat"
HTML = {"content-type": "text/html; charset=UTF-8"}


def request(
    *, row: int = 0, model: str = MODEL, model_from_row: bool = False, in_doubt: int = 0
) -> Request:
    return Request(
        row, b"{}", bytes(16), 0, row, model, model_from_row=model_from_row, in_doubt=in_doubt
    )


def says(
    status: int | None,
    body: object = b"",
    headers: Mapping[str, str] | None = None,
    *,
    failure: Failure | None = None,
    detail: str = "",
    sent: bool = True,
) -> Attempt:
    """An attempt as the endpoint room makes it; ``body`` is JSON unless it is bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Attempt(
        status,
        headers or {},
        raw,
        started_s=100.0,
        ended_s=103.0,
        finished_at_ms=NOW_MS,
        reply=parse(raw) if raw else None,
        failure=failure,
        detail=detail,
        sent=sent,
    )


def fails(failure: Failure, detail: str = "", *, sent: bool = True) -> Attempt:
    return says(None, failure=failure, detail=detail, sent=sent)


def completion(
    finish_reason: str | None = "stop", content: object = "Hello", **more: object
) -> dict[str, object]:
    message = {"role": "assistant", "content": content, **more}
    return {
        "id": "x",
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def error(
    message: str = "", code: object = None, type_: object = None, param: object = None
) -> Any:
    """OpenAI's shape."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def mistral(message: object, type_: object, code: object) -> Any:
    return {"object": "error", "message": message, "type": type_, "param": None, "code": code}


EXTRA = {
    "type": "extra_forbidden",
    "loc": ["body", "seed"],
    "msg": "Extra inputs are not permitted",
    "input": 1,
}
FORBIDDEN_SEED = "extra_forbidden: body.seed: Extra inputs are not permitted"
CLOUDFLARE = (
    b"<!DOCTYPE html><html><head><title>api.example.com | 502: Bad gateway</title>"
    b"<style>body{color:red}</style></head>\n<body><h1>Bad gateway</h1></body></html>"
)
TOO_LARGE_TPM = (
    "Request too large for gpt-4 in organization org-x on tokens per min (TPM): "
    "Limit 30000, Requested 36278."
)
GROQ_429 = error(
    "Rate limit reached for model x. Limit 6000, Used 5000. Please try again in 5.289s.",
    "rate_limit_exceeded",
    "tokens",
)


def case(id_: str, attempt: Attempt, kind: DecisionKind, **expected: object) -> Any:
    return pytest.param(attempt, kind, expected, id=id_)


def check(decision: Decision, kind: str, expected: Mapping[str, object]) -> None:
    found = {name: getattr(decision, name) for name in expected}
    assert (decision.kind, found) == (kind, dict(expected)), decision


# --- rows 1-6: status 200 ------------------------------------------------------------------------

COMPLETIONS = [
    case("stop", says(200, completion()), "ok"),
    case("empty content", says(200, completion(content="")), "ok"),
    case("length", says(200, completion("length")), "ok"),
    case("length, reasoning ate it all", says(200, completion("length", None)), "ok"),
    case("model_length", says(200, completion("model_length")), "ok"),
    case("tool_calls", says(200, completion("tool_calls", None, tool_calls=[{"id": "1"}])), "ok"),
    case("function_call", says(200, completion("function_call", None)), "ok"),
    case("content_filter", says(200, completion("content_filter", None)), "ok"),
    case("refusal", says(200, completion("stop", None, refusal="I cannot.")), "ok"),
    case("null finish with content (Ollama)", says(200, completion(None)), "ok"),
    case("a finish_reason nobody knows", says(200, completion("end_turn")), "ok"),
    case("content as parts", says(200, completion(content=[{"type": "text", "text": "x"}])), "ok"),
    case("null error beside an answer", says(200, {**completion(), "error": None}), "ok"),
    case("201 with an answer", says(201, completion()), "ok"),
    case(
        "blank lines before the answer (DeepSeek)",
        says(200, b"\n\n\n" + json.dumps(completion()).encode()),
        "ok",
    ),
    *(
        case(
            f"finish_reason {finish}",
            says(200, completion(finish)),
            "transient",
            code=finish.lower(),
            in_doubt=True,
            alike="",
            reason=f'the endpoint gave up on the answer: finish_reason "{finish}"',
        )
        for finish in ("error", "ERROR", "abort", "aborted", "insufficient_system_resource")
    ),
    case(
        "null finish without content",
        says(200, completion(None, None)),
        "invalid_response",
        code="no_finish",
        in_doubt=True,
    ),
    case("empty body", says(200), "invalid_response", code="empty_body", in_doubt=True),
    case("204", says(204), "invalid_response", reason="answered 204 with an empty body"),
    case(
        "not JSON",
        says(200, b"Service is starting"),
        "invalid_response",
        code="bad_json",
        in_doubt=True,
        alike="200|bad_json|",
        reason="answered 200 with something that is not whole JSON: Service is starting",
    ),
    case(
        "JSON cut short without a sign",
        says(200, json.dumps(completion()).encode()[:60]),
        "invalid_response",
        code="bad_json",
        reason="answered 200 with something that is not whole JSON",
    ),
    case(
        "an HTML page (captive portal)",
        says(200, b"<html><body>Log in</body></html>", HTML),
        "invalid_response",
        code="bad_json",
        alike="200|bad_json|",
        reason="answered 200 with an HTML page, not a completion; is the base URL right?",
    ),
    case("no choices", says(200, {"id": "x"}), "invalid_response", code="no_choices"),
    case(
        "no message",
        says(200, {"choices": [{"index": 0, "finish_reason": "stop"}]}),
        "invalid_response",
        code="no_message",
    ),
    case(
        "message null",
        says(200, {"choices": [{"message": None, "finish_reason": "stop"}]}),
        "invalid_response",
        code="no_message",
    ),
    case(
        "no message and no finish",
        says(200, {"choices": [{"text": "an older form"}]}),
        "invalid_response",
        code="no_message",
    ),
    case("choices []", says(200, {"choices": []}), "invalid_response", code="no_choices"),
    case("JSON null", says(200, b"null"), "invalid_response", code="no_choices"),
    case("JSON number", says(200, b"17"), "invalid_response", code="no_choices"),
]

LATE_ERRORS = [
    case(
        "OpenRouter 502 inside a 200",
        says(200, {"error": {"code": 502, "message": "Provider returned error"}}),
        "transient",
        code="502",
        in_doubt=True,
        reason="502 Bad Gateway: Provider returned error",
    ),
    case(
        "OpenRouter error beside a torn choice",
        says(200, {**completion("error", "Hel"), "error": {"code": "502", "message": "gone"}}),
        "transient",
        code="502",
        in_doubt=True,
    ),
    case(
        "OpenRouter 429 inside a 200",
        says(200, {"error": {"code": 429, "message": "slow down"}}),
        "rate_limit",
        in_doubt=False,
        pushback="rate",
    ),
    case(
        "401 inside a 200",
        says(200, {"error": {"code": 401, "message": "No auth credentials found"}}),
        "fatal",
        code="unauthorized",
    ),
    case("402 inside a 200", says(200, {"error": {"code": 402}}), "fatal", code="no_credit"),
    case(
        "403 moderation inside a 200",
        says(200, {"error": {"code": 403, "message": "Your input was flagged"}}),
        "rejected",
        in_doubt=False,
        alike="",
    ),
    case(
        "400 inside a 200",
        says(200, {"error": {"code": 400, "message": "bad value"}}),
        "rejected",
        in_doubt=False,
    ),
    case(
        "an error after a whole answer",
        says(200, {**completion(), "error": {"code": 502, "message": "gone"}}),
        "transient",
        code="502",
        in_doubt=True,
    ),
    case(
        "vLLM 500 inside a stream",
        says(200, {"error": {"message": "boom", "type": "InternalServerError", "code": 500}}),
        "transient",
        code="500",
        in_doubt=True,
    ),
    case(
        "a code that is no status",
        says(200, error("upstream died", "upstream_error")),
        "transient",
        code="upstream_error",
        in_doubt=True,
        reason="error: upstream died",
    ),
    case("a number that is no error status", says(200, error("?", 200)), "transient"),
    case("error as a string", says(200, {"error": "boom"}), "transient", reason="error: boom"),
    case("known code inside a 200", says(200, error("x", "insufficient_quota")), "fatal"),
    case("rate code inside a 200", says(200, error("x", "rate_limit_exceeded")), "rate_limit"),
    case(
        "error inside the choice",
        says(200, {"choices": [{"index": 0, "error": {"code": 503, "message": "full"}}]}),
        "transient",
        code="503",
        pushback="capacity",
    ),
]

# --- rows 7-10: 429 ------------------------------------------------------------------------------

LIMITS = [
    case(
        "OpenAI insufficient_quota",
        says(
            429,
            error("You exceeded your current quota", "insufficient_quota", "insufficient_quota"),
        ),
        "fatal",
        code="no_credit",
    ),
    case(
        "insufficient_quota as type only",
        says(429, error("x", None, "insufficient_quota")),
        "fatal",
    ),
    case("credit_balance_exhausted", says(429, error("x", "credit_balance_exhausted")), "fatal"),
    case(
        "billing_hard_limit_reached", says(429, error("x", "billing_hard_limit_reached")), "fatal"
    ),
    case("spend limit (Anthropic)", says(429, error("x", "enforced_spend_limit_reached")), "fatal"),
    case(
        "quota outranks Retry-After",
        says(429, error("x", "insufficient_quota"), {"retry-after": "5"}),
        "fatal",
        code="no_credit",
    ),
    case(
        "no allowance for the model (Mistral)",
        says(
            429,
            mistral("Rate limit exceeded", "rate_limited", "1300"),
            {"x-ratelimit-limit-req-minute": "0"},
        ),
        "fatal",
        code="no_allowance",
        reason='allows no requests to model "Mistral-chat" (429, limit 0 a minute)',
    ),
    case(
        "the month's tokens are gone (Mistral)",
        says(
            429, mistral("x", "rate_limited", "1300"), {"x-ratelimit-remaining-tokens-month": "0"}
        ),
        "fatal",
        code="no_credit",
    ),
    case(
        "an allowance above 0 is a pause",
        says(429, mistral("x", "rate_limited", "1300"), {"x-ratelimit-limit-req-minute": "60"}),
        "rate_limit",
        code="1300",
    ),
    case(
        "larger than the limit (OpenAI)",
        says(429, error(TOO_LARGE_TPM, "rate_limit_exceeded", "tokens")),
        "rejected",
        code="rate_limit_exceeded",
        alike="",
        in_doubt=False,
    ),
    case(
        "larger than the limit (Groq, 413)",
        says(413, error(TOO_LARGE_TPM, "rate_limit_exceeded", "tokens")),
        "rejected",
        alike="",
    ),
    case(
        "Retry-After",
        says(429, error("x", "rate_limit_exceeded", "requests"), {"retry-after": "7"}),
        "rate_limit",
        wait_s=7.0,
        pushback="rate",
        in_doubt=False,
        alike="",
    ),
    case(
        "a day (Azure) stays a day",
        says(429, error("Please retry after 86400 seconds."), {"retry-after": "86400"}),
        "rate_limit",
        wait_s=86400.0,
    ),
    case(
        "body hint (Groq)",
        says(429, GROQ_429),
        "rate_limit",
        wait_s=5.289,
        code="rate_limit_exceeded",
    ),
    case(
        "body hint (Azure)",
        says(429, error("Please retry after 26 seconds.", "429")),
        "rate_limit",
        wait_s=26.0,
    ),
    case(
        "body hint (Gemini, in an array)",
        says(
            429,
            [
                {
                    "error": {
                        "code": 429,
                        "message": "You exceeded your current quota, please check your plan and "
                        "billing details. Please retry in 33.1s.",
                        "status": "RESOURCE_EXHAUSTED",
                    }
                }
            ],
        ),
        "rate_limit",
        wait_s=33.1,
    ),
    case(
        "reset header of the used-up limit",
        says(
            429,
            error("Rate limit reached", "rate_limit_exceeded"),
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "8.64s",
                "x-ratelimit-remaining-tokens": "39000",
                "x-ratelimit-reset-tokens": "6m0s",
            },
        ),
        "rate_limit",
        wait_s=8.64,
    ),
    case(
        "Mistral 1300",
        says(429, mistral("Rate limit exceeded", "rate_limited", "1300")),
        "rate_limit",
        code="1300",
        wait_s=None,
        pushback="rate",
        reason="429 Too Many Requests: Rate limit exceeded",
    ),
    case(
        "Mistral 1300 as a number",
        says(429, mistral("x", "rate_limited", 1300)),
        "rate_limit",
        code="1300",
    ),
    case(
        "Mistral, older",
        says(429, {"message": "Requests rate limit exceeded"}),
        "rate_limit",
        code="429",
    ),
    case(
        "Mistral 3505 as 429",
        says(
            429,
            mistral(
                "Service tier capacity exceeded for this model.",
                "service_tier_capacity_exceeded",
                "3505",
            ),
        ),
        "rate_limit",
        code="3505",
        pushback="capacity",
    ),
    case(
        "Mistral 3505 as 503",
        says(
            503,
            mistral(
                "Service tier capacity exceeded for this model.",
                "service_tier_capacity_exceeded",
                "3505",
            ),
        ),
        "rate_limit",
        code="3505",
        pushback="capacity",
        in_doubt=False,
    ),
    case(
        "slow_down",
        says(429, error("x", "slow_down", "rate_limit_error")),
        "rate_limit",
        pushback="capacity",
    ),
    case("DeepSeek", says(429, error("Too many", None, "rate_limit_reached_error")), "rate_limit"),
    case(
        "Anthropic",
        says(429, {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}}),
        "rate_limit",
        code="rate_limit_error",
    ),
    case("without a body", says(429), "rate_limit", code="429", reason="429 Too Many Requests"),
    case("an HTML page", says(429, CLOUDFLARE, HTML), "rate_limit", code="429"),
    case("body cut short", says(429, b'{"err', failure="cut"), "rate_limit", in_doubt=False),
    case(
        "a rate code outranks its status",
        says(400, mistral("Rate limit exceeded", "rate_limited", "1300")),
        "rate_limit",
    ),
    case(
        "x-should-retry: false without a wait",
        says(429, error("x"), {"x-should-retry": "false"}),
        "rejected",
    ),
    case(
        "x-should-retry: false with a wait",
        says(429, error("x"), {"x-should-retry": "false", "retry-after": "2"}),
        "rate_limit",
        wait_s=2.0,
    ),
]

# --- rows 11-16: what ends the run ---------------------------------------------------------------

REFUSALS = [
    case(
        "Mistral detail",
        says(401, {"detail": "Unauthorized"}),
        "fatal",
        code="unauthorized",
        reason="refused the key: 401 Unauthorized",
    ),
    case(
        "Mistral message",
        says(401, {"message": "Unauthorized", "request_id": "r"}),
        "fatal",
        reason="refused the key: 401 Unauthorized",
    ),
    case("empty body", says(401), "fatal", reason="refused the key: 401 Unauthorized"),
    case(
        "OpenAI",
        says(
            401,
            error(
                "Incorrect API key provided: sk-a***z.", "invalid_api_key", "invalid_request_error"
            ),
        ),
        "fatal",
        code="unauthorized",
        reason="refused the key: 401 Unauthorized: Incorrect API key provided: sk-a***z.",
    ),
    case(
        "Anthropic",
        says(401, {"type": "error", "error": {"type": "authentication_error", "message": "x"}}),
        "fatal",
        code="unauthorized",
    ),
    case("cut short", says(401, b'{"det', failure="cut"), "fatal", code="unauthorized"),
    case(
        "Gemini calls it 400",
        says(
            400,
            [
                {
                    "error": {
                        "code": 400,
                        "message": "API key not valid. Please pass a valid API key.",
                        "status": "INVALID_ARGUMENT",
                    }
                }
            ],
        ),
        "fatal",
        code="unauthorized",
    ),
    case(
        "xAI calls it 400",
        says(400, {"error": "Incorrect API key provided: xx"}),
        "fatal",
        code="unauthorized",
    ),
    case(
        "invalid_api_key as 403",
        says(403, error("x", "invalid_api_key")),
        "fatal",
        code="unauthorized",
    ),
    case(
        "402 DeepSeek",
        says(402, error("Insufficient Balance", "invalid_request_error", "unknown_error")),
        "fatal",
        code="no_credit",
        reason="wants payment first: 402 Payment Required: Insufficient Balance",
    ),
    case(
        "402 Together",
        says(402, error("You have reached your spending limit")),
        "fatal",
        code="no_credit",
    ),
    case("402 Fireworks, no body", says(402), "fatal", code="no_credit"),
    case("402 Anthropic", says(402, error("x", None, "billing_error")), "fatal", code="no_credit"),
    case(
        "402 OpenRouter, no credits",
        says(402, {"error": {"code": 402, "message": "Insufficient credits"}}),
        "fatal",
        code="no_credit",
    ),
    case(
        "402 OpenRouter, in-flight budget",
        says(
            402,
            {
                "error": {
                    "code": 402,
                    "message": "In-flight budget exceeded",
                    "metadata": {"limit_source": "openrouter_in_flight_budget"},
                }
            },
            {"retry-after": "3"},
        ),
        "rate_limit",
        wait_s=3.0,
        pushback="rate",
    ),
    case(
        "400 Anthropic, credit balance",
        says(
            400,
            error(
                "Your credit balance is too low to access the API.", None, "invalid_request_error"
            ),
        ),
        "fatal",
        code="no_credit",
    ),
    case(
        "403 Together, context",
        says(403, error("The sum of input and max_tokens must be less than the context length")),
        "rejected",
        alike="",
    ),
    case(
        "403 context_length_exceeded", says(403, error("x", "context_length_exceeded")), "rejected"
    ),
    case(
        "403 OpenRouter, moderation",
        says(
            403,
            {"error": {"code": 403, "message": "Your input requires moderation and was flagged"}},
        ),
        "rejected",
        alike="",
    ),
    case(
        "403 Mistral, guardrail",
        says(403, mistral("Blocked by guardrail", "guardrail_blocked", None)),
        "rejected",
        alike="",
    ),
    case(
        "403 guardrail by its code",
        says(403, mistral("No.", "guardrail_violation", None)),
        "rejected",
    ),
    case("403 content policy", says(403, error("violates our content policy")), "rejected"),
    case(
        "403 country",
        says(
            403,
            error(
                "Country, region, or territory not supported",
                "unsupported_country_region_territory",
            ),
        ),
        "fatal",
        code="no_access",
        reason="refuses access: 403 Forbidden: Country, region, or territory not supported",
    ),
    case(
        "403 tier 1910 (Mistral)",
        says(403, mistral("x", "tier_not_allowed", "1910")),
        "fatal",
        code="no_access",
    ),
    case(
        "403 account flagged",
        says(403, error("Your account has been flagged")),
        "fatal",
        code="no_access",
    ),
    case(
        "403 Cloudflare",
        says(403, b"<html><title>Attention Required!</title></html>", HTML),
        "fatal",
        code="no_access",
        reason="refuses access: 403 Forbidden: Attention Required!",
    ),
    case("403 without a body", says(403), "fatal", reason="refuses access: 403 Forbidden"),
    case(
        "404 nginx",
        says(404, b"<html><h1>404 Not Found</h1><hr>nginx</html>", HTML),
        "fatal",
        code="wrong_url",
        reason="has no chat completions at this URL: 404 Not Found nginx",
    ),
    case("404 FastAPI", says(404, {"detail": "Not Found"}), "fatal", code="wrong_url"),
    case(
        "404 OpenAI, URL",
        says(
            404, error("Invalid URL (POST /v1/v1/chat/completions)", None, "invalid_request_error")
        ),
        "fatal",
        code="wrong_url",
    ),
    case("404 without a body", says(404), "fatal", code="wrong_url"),
    case("405", says(405, {"detail": "Method Not Allowed"}), "fatal", code="wrong_url"),
    case("407", says(407), "fatal", code="proxy"),
    case(
        "501",
        says(501, error("not supported", 501, "NotImplementedError")),
        "fatal",
        code="wrong_url",
    ),
    *(
        case(
            f"{status}",
            says(status, b"moved", {"location": "https://a.example/v1"}),
            "fatal",
            code="redirect",
            reason=f"redirects to https://a.example/v1 ({status}); redirects are never followed",
        )
        for status in (301, 302, 303, 307, 308)
    ),
    case(
        "302 to nowhere",
        says(302),
        "fatal",
        reason="redirects without saying where (302); redirects are never followed",
    ),
]

NAMES_THE_MODEL = [
    pytest.param(says(status, body), id=id_)
    for id_, status, body in (
        ("Mistral 1500", 400, mistral("Invalid model: Mistral-chat", "invalid_model", "1500")),
        ("Mistral 1500 as a number", 400, mistral("?", "", 1500)),
        (
            "OpenAI",
            404,
            error(
                "The model `x` does not exist or you do not have access to it.", "model_not_found"
            ),
        ),
        ("OpenAI 403", 403, error("Project does not have access to model x", "model_not_found")),
        (
            "OpenAI, not for chat",
            404,
            error("This is not a chat model", None, "invalid_request_error", "model"),
        ),
        (
            "vLLM",
            404,
            error("The model `Mistral-chat` does not exist.", 404, "NotFoundError", "model"),
        ),
        ("vLLM, older", 404, mistral("The model `x.y-1` does not exist.", "NotFoundError", 404)),
        (
            "Ollama",
            404,
            {"error": {"message": "model 'Mistral-chat' not found, try pulling it first"}},
        ),
        ("Scaleway", 422, {"error": "Model not found"}),
        ("DeepSeek", 400, error("Model Not Exist", "invalid_request_error")),
        (
            "OpenRouter 400",
            400,
            {"error": {"code": 400, "message": "Mistral-chat is not a valid model ID"}},
        ),
        ("OpenRouter 404", 404, {"error": {"code": 404, "message": "No endpoints found for a/b."}}),
        ("Together", 404, error("Unable to access model x. Please visit the site")),
        (
            "Fireworks",
            404,
            error("Model not found, inaccessible, and/or not deployed", "NOT_FOUND"),
        ),
        (
            "Azure",
            404,
            error("The API deployment for this resource does not exist.", "DeploymentNotFound"),
        ),
        (
            "Anthropic",
            404,
            {"type": "error", "error": {"type": "not_found_error", "message": "model: abc"}},
        ),
        (
            "Groq, retired",
            400,
            error("The model `x` has been decommissioned", "model_decommissioned"),
        ),
        (
            "Gemini",
            404,
            [{"error": {"code": 404, "message": "models/x is not found for API version v1"}}],
        ),
        ("in no known words, but by name", 404, error("Mistral-chat: ressource introuvable")),
        (
            "a wanted field",
            422,
            {"detail": [{"type": "missing", "loc": ["body", "model"], "msg": "Field required"}]},
        ),
    )
]

# --- rows 17-26 ----------------------------------------------------------------------------------

ROW_ERRORS = [
    case(
        "context (OpenAI)",
        says(
            400,
            error(
                "This model's maximum context length is 8192 tokens",
                "context_length_exceeded",
                None,
                "messages",
            ),
        ),
        "rejected",
        code="context_length_exceeded",
        alike="",
    ),
    *(
        case(
            f"context: {words[:30]}",
            says(400, error(words, None, "BadRequestError")),
            "rejected",
            alike="",
        )
        for words in (
            "maximum context length is 4096 tokens",
            "Prompt contains 300112 tokens, too large for model with 262144 maximum context length",
            "your model's context length is only 2048",
            "the input is longer than the model's context length",
            "request exceeds the available context size",
            "tokens to keep greater than the context length",
            "prompt is too long: 210000 tokens > 200000 maximum",
            "Please reduce the length of the messages or completion.",
            "Your request exceeded model token limit: 8192",
            "The input token count (40000) exceeds the maximum",
        )
    ),
    case(
        "content filter (Azure)",
        says(
            400,
            {
                "error": {
                    "message": "The response was filtered due to the prompt",
                    "type": None,
                    "param": "prompt",
                    "code": "content_filter",
                    "status": 400,
                    "innererror": {"code": "ResponsibleAIPolicyViolation"},
                }
            },
        ),
        "rejected",
        code="content_filter",
        alike="",
    ),
    case(
        "content_policy_violation",
        says(400, error("x", "content_policy_violation")),
        "rejected",
        alike="",
    ),
    case(
        "bad value",
        says(
            400, error("Expected a number", "invalid_value", "invalid_request_error", "temperature")
        ),
        "rejected",
        code="invalid_value",
        alike="400|invalid_value|temperature",
        reason="invalid_value: temperature: Expected a number",
        in_doubt=False,
    ),
    case(
        "extra_forbidden in detail (Mistral)",
        says(422, {"detail": [EXTRA]}),
        "rejected",
        code="extra_forbidden",
        alike="422|extra_forbidden|body.seed",
        reason=FORBIDDEN_SEED,
    ),
    case(
        "extra_forbidden in message.detail (Mistral)",
        says(422, mistral({"detail": [EXTRA]}, "invalid_request_error", None)),
        "rejected",
        reason=FORBIDDEN_SEED,
    ),
    case(
        "3001 with detail and message lists (Mistral)",
        says(
            422,
            {
                "object": "Error",
                "detail": [EXTRA],
                "message": [EXTRA],
                "type": "invalid_request_error",
                "code": 3001,
            },
        ),
        "rejected",
        code="3001",
        reason="3001: body.seed: Extra inputs are not permitted",
    ),
    case(
        "message a JSON string (Mistral 2024)",
        says(422, mistral(json.dumps({"detail": [EXTRA]}), "invalid_request_error", None)),
        "rejected",
        reason=FORBIDDEN_SEED,
    ),
    case(
        "vLLM, flat",
        says(400, mistral("bad", "BadRequestError", 400)),
        "rejected",
        code="400",
        alike="400|400|",
    ),
    case("400 without a body", says(400), "rejected", code="400", reason="400 Bad Request"),
    case("400, two lines", says(400, error("a\n\tb\x1b[31m")), "rejected", reason="a b [31m"),
    case(
        "400, HTML in JSON",
        says(400, {"error": "<p>no <b>way</b></p>"}),
        "rejected",
        reason="no way",
    ),
    case("413", says(413, CLOUDFLARE, HTML), "rejected", code="413", alike=""),
    case("413 Anthropic", says(413, error("x", None, "request_too_large")), "rejected", alike=""),
    case("415", says(415), "rejected", code="415", alike="415|415|"),
    case("412 Fireworks", says(412), "rejected", code="412"),
    case("410", says(410), "rejected"),
    case("424 Groq", says(424), "rejected"),
    case("422 Groq", says(422, error("hallucinated", None, "invalid_request_error")), "rejected"),
    case("418", says(418), "rejected"),
    case("451", says(451), "rejected"),
    case("x-should-retry: true", says(400, error("x"), {"x-should-retry": "true"}), "transient"),
    case(
        "a quoted prompt proves nothing",
        says(400, error("Bad value: " + "x" * 300 + " invalid model")),
        "rejected",
    ),
]

PASSING = [
    case("408", says(408), "transient", code="408", in_doubt=True),
    case("408, nothing sent", says(408, sent=False), "transient", in_doubt=False),
    case("409", says(409, error("conflict")), "transient", in_doubt=False),
    case("425", says(425), "transient", in_doubt=False),
    case(
        "498 Groq",
        says(498, error("Flex tier is full", "capacity_exceeded")),
        "transient",
        code="capacity_exceeded",
        pushback="capacity",
        in_doubt=False,
    ),
    case("499", says(499), "transient", in_doubt=True),
    *(
        case(
            f"{status}",
            says(status, error("x", None, "server_error")),
            "transient",
            in_doubt=in_doubt,
            pushback=pushback,
            wait_s=None,
            alike="",
            unreachable=False,
            may_be_outage=status in (502, 503, 504, 521, 522, 523),
        )
        for status, in_doubt, pushback in (
            (500, False, "none"),
            (502, False, "none"),
            (503, False, "capacity"),
            (504, True, "none"),
            (520, True, "none"),
            (521, False, "none"),
            (522, False, "none"),
            (523, False, "none"),
            (524, True, "none"),
            (529, False, "capacity"),
            (599, False, "none"),
        )
    ),
    case(
        "500 cut short", says(500, b'{"err', failure="cut"), "transient", code="500", in_doubt=True
    ),
    case("503 with Retry-After", says(503, b"", {"retry-after": "30"}), "transient", wait_s=30.0),
    case(
        "503 OpenAI overloaded",
        says(
            503,
            error("busy", "server_is_overloaded", "service_unavailable_error"),
            {"retry-after": "2"},
        ),
        "transient",
        wait_s=2.0,
        pushback="capacity",
    ),
    case(
        "a reset header is no wait of a 500",
        says(500, b"", {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "9s"}),
        "transient",
        wait_s=None,
    ),
    case(
        "502 Cloudflare",
        says(502, CLOUDFLARE, HTML),
        "transient",
        code="502",
        reason="502 Bad Gateway: api.example.com | 502: Bad gateway Bad gateway",
        in_doubt=False,
    ),
    case(
        "502, an empty page",
        says(502, b"", HTML),
        "transient",
        reason="502 Bad Gateway (an HTML page)",
    ),
    case(
        "524 says what helps",
        says(524, b"error code: 524"),
        "transient",
        reason="524 A Timeout Occurred: error code: 524"
        " (a gateway stopped waiting; --stream keeps long answers alive)",
    ),
    case(
        "529 Anthropic",
        says(529, error("Overloaded", None, "overloaded_error")),
        "transient",
        code="overloaded_error",
    ),
    case(
        "x-should-retry: false",
        says(500, error("x"), {"x-should-retry": "false"}),
        "rejected",
        code="500",
    ),
    case(
        "x-should-retry: false, 504",
        says(504, b"", {"x-should-retry": "false"}),
        "rejected",
        in_doubt=True,
    ),
    case("x-should-retry: true", says(500, error("x"), {"x-should-retry": "true"}), "transient"),
    case("a status nobody has heard of", says(799), "transient"),
]

BROKEN = [
    case(
        "connect",
        fails("connect", "cannot connect: Connection refused", sent=False),
        "transient",
        code="connect",
        unreachable=True,
        in_doubt=False,
        reason="cannot connect: Connection refused",
        alike="",
    ),
    case(
        "connect, whatever sent says",
        fails("connect"),
        "transient",
        in_doubt=False,
        unreachable=True,
    ),
    case("dns", fails("dns", sent=False), "transient", unreachable=True, in_doubt=False),
    case(
        "no_host",
        fails("no_host", "no such host: api.Mistral.com", sent=False),
        "fatal",
        code="no_host",
        reason="cannot be found: no such host: api.Mistral.com",
    ),
    case(
        "tls",
        fails("tls", "certificate not trusted: self-signed certificate", sent=False),
        "fatal",
        code="tls",
        reason="failed the TLS check: certificate not trusted: self-signed certificate",
    ),
    case("proxy", fails("proxy", sent=False), "fatal", code="proxy"),
    case("disconnected", fails("disconnected"), "transient", code="disconnected", in_doubt=True),
    case(
        "disconnected before sending",
        fails("disconnected", sent=False),
        "transient",
        in_doubt=False,
    ),
    case("cut", says(200, b'{"choices":[', failure="cut"), "transient", code="cut", in_doubt=True),
    case("cut after the finish", says(200, completion(), failure="cut"), "transient", code="cut"),
    case(
        "a stream without finish",
        says(
            200, completion(None), failure="cut", detail="the stream ended without a finish_reason"
        ),
        "transient",
        code="cut",
        in_doubt=True,
        reason="the stream ended without a finish_reason",
    ),
    case(
        "timeout",
        fails("timeout"),
        "timeout",
        code="timeout",
        in_doubt=True,
        reason="no answer within 3 s",
    ),
    case(
        "timeout in words",
        fails("timeout", "no answer within 600 s"),
        "timeout",
        reason="no answer within 600 s",
    ),
    case("timeout in the body", says(200, failure="timeout"), "timeout", in_doubt=True),
    case("timeout before sending", fails("timeout", sent=False), "timeout", in_doubt=False),
    case(
        "too_large",
        says(200, failure="too_large"),
        "invalid_response",
        code="too_large",
        in_doubt=True,
        alike="",
    ),
    case("bad_header", fails("bad_header"), "invalid_response", code="bad_header", in_doubt=True),
    case(
        "bad_encoding",
        says(200, failure="bad_encoding"),
        "invalid_response",
        code="bad_encoding",
        in_doubt=True,
    ),
    case("no head and no reason", says(None), "transient", code="disconnected", in_doubt=True),
]


@pytest.mark.parametrize(
    ("attempt", "kind", "expected"),
    [*COMPLETIONS, *LATE_ERRORS, *LIMITS, *REFUSALS, *ROW_ERRORS, *PASSING, *BROKEN],
)
def test_what_an_attempt_means(attempt: Attempt, kind: str, expected: Mapping[str, object]) -> None:
    check(classify(attempt, request()), kind, expected)


@pytest.mark.parametrize("attempt", NAMES_THE_MODEL)
def test_an_unknown_model_is_fatal_when_the_run_names_it(attempt: Attempt) -> None:
    decision = classify(attempt, request())
    assert (decision.kind, decision.code) == ("fatal", "model_not_found")
    assert decision.reason == f'has no model "Mistral-chat" ({attempt.status})'


@pytest.mark.parametrize("attempt", NAMES_THE_MODEL)
def test_an_unknown_model_is_the_rows_error_when_the_row_names_it(attempt: Attempt) -> None:
    decision = classify(attempt, request(model_from_row=True))
    assert (decision.kind, decision.in_doubt) == ("rejected", False)
    assert decision.alike


def test_no_allowance_is_the_rows_error_when_the_row_names_the_model() -> None:
    attempt = says(429, mistral("x", "rate_limited", "1300"), {"x-ratelimit-limit-req-minute": "0"})
    decision = classify(attempt, request(model_from_row=True))
    assert (decision.kind, decision.code) == ("rejected", "no_allowance")


def test_a_run_without_a_model_is_told_to_name_one() -> None:
    attempt = says(400, error("you must provide a model parameter", None, None, "model"))
    assert classify(attempt, request(model="")).reason == "wants a model (400)"


def test_every_fatal_code_has_its_next_step() -> None:
    decisions = [
        classify(param.values[0], request())
        for param in (*LIMITS, *REFUSALS, *BROKEN, *NAMES_THE_MODEL)
    ]
    fatal = {decision.code for decision in decisions if decision.kind == "fatal"}
    assert fatal == NEXT_STEPS.keys()


def test_an_answer_costs_no_new_object() -> None:
    assert classify(says(200, completion()), request()) is OK


def test_an_echoed_key_is_whole_or_absent_so_that_it_can_be_scrubbed() -> None:
    key = "sk-" + "k" * 40
    for padding in range(230, 330):
        attempt = says(401, {"detail": "é" * padding + " " + key + " was refused" * 40})
        reason = classify(attempt, request()).reason
        assert "sk-" not in reason.replace(key, "")


# --- waits that an endpoint names ----------------------------------------------------------------

WAITS = [
    pytest.param({"retry-after": "7"}, "", 7.0, id="seconds"),
    pytest.param({"retry-after": " 7 "}, "", 7.0, id="seconds with space"),
    pytest.param({"retry-after": "1.5"}, "", 1.5, id="fraction"),
    pytest.param({"retry-after": "Fri, 21 Nov 2025 12:00:30 GMT"}, "", 30.0, id="HTTP date"),
    pytest.param({"retry-after": "Friday, 21-Nov-25 12:00:30 GMT"}, "", 30.0, id="RFC 850 date"),
    pytest.param({"retry-after": "Fri Nov 21 12:00:30 2025"}, "", 30.0, id="asctime date"),
    pytest.param({"retry-after": "Fri, 21 Nov 2025 13:00:30 +0100"}, "", 30.0, id="date with zone"),
    pytest.param({"retry-after": "Fri, 21 Nov 2025 11:59:00 GMT"}, "", None, id="date gone by"),
    # Whoever names an instant has a clock of its own, and ours may be an hour off.
    pytest.param(
        {
            "date": "Fri, 21 Nov 2025 13:00:00 GMT",
            "retry-after": "Fri, 21 Nov 2025 13:00:30 GMT",
        },
        "",
        30.0,
        id="date by the endpoint's clock",
    ),
    pytest.param(
        {
            "date": "Fri, 21 Nov 2025 13:00:00 GMT",
            "x-ratelimit-remaining": "0",
            "x-ratelimit-reset": "1763730030000",
        },
        "",
        30.0,
        id="epoch by the endpoint's clock",
    ),
    pytest.param(
        {"date": "yesterday", "retry-after": "Fri, 21 Nov 2025 12:00:30 GMT"},
        "",
        30.0,
        id="date beside one that is none",
    ),
    pytest.param({"retry-after": "2025-11-21T12:00:30Z"}, "", 30.0, id="RFC 3339"),
    pytest.param({"retry-after": "30s"}, "", 30.0, id="Go duration"),
    pytest.param({"retry-after": "0"}, "", None, id="zero"),
    pytest.param({"retry-after": "-3"}, "", None, id="negative"),
    pytest.param({"retry-after": "nan"}, "", None, id="nan"),
    pytest.param({"retry-after": "inf"}, "", None, id="inf"),
    pytest.param({"retry-after": "1e3"}, "", None, id="exponent"),
    pytest.param({"retry-after": "9" * 400}, "", None, id="400 digits"),
    pytest.param({"retry-after": "soon"}, "", None, id="words"),
    pytest.param({"retry-after": ""}, "", None, id="empty"),
    pytest.param({"retry-after": "٣"}, "", None, id="digits of another script"),
    pytest.param({"retry-after-ms": "1500"}, "", 1.5, id="milliseconds"),
    pytest.param({"retry-after-ms": "20.5"}, "", 0.0205, id="milliseconds, fraction"),
    pytest.param({"retry-after-ms": "1500", "retry-after": "9"}, "", 1.5, id="ms come first"),
    pytest.param({"retry-after-ms": "x", "retry-after": "9"}, "", 9.0, id="broken ms"),
    pytest.param({"retry-after": "9"}, "try again in 5s", 9.0, id="header before hint"),
    pytest.param({}, "Please try again in 5.289s. Visit", 5.289, id="hint"),
    pytest.param({}, "Please try again in 1m2.3s", 62.3, id="hint with minutes"),
    pytest.param({}, "Please try again in 120ms", 0.12, id="hint in ms"),
    pytest.param({}, "retry after 6 seconds", 6.0, id="hint in words"),
    pytest.param({}, "Retry after 1 minute.", 60.0, id="hint of a minute"),
    pytest.param({}, "Try again in 2 minutes 5 seconds", 125.0, id="hint of two words"),
    pytest.param({}, "Please retry in 33.1s.", 33.1, id="hint of Gemini"),
    pytest.param({}, "try again in 1h0m3s", 3603.0, id="hint of an hour"),
    pytest.param({}, "wait for 500 milliseconds", 0.5, id="hint in milliseconds"),
    pytest.param({}, "try again in 2 days", 172800.0, id="hint of days"),
    pytest.param({}, "try again in 0s", None, id="hint of nothing"),
    pytest.param({}, "try again in 5 songs", None, id="no unit"),
    pytest.param({}, "try again later", None, id="later"),
    *(
        pytest.param({"x-ratelimit-reset-tokens": text}, "", wait_s, id=f"reset {text}")
        for text, wait_s in (
            ("1s", 1.0),
            ("6m0s", 360.0),
            ("20ms", 0.02),
            ("1h2m3s", 3723.0),
            ("2m59.56s", 179.56),
            ("7.66s", 7.66),
            ("350µs", 0.00035),
            ("12", 12.0),
            ("0.75", 0.75),
            ("0", None),
            ("0s", None),
            ("-1", None),
            (str(NOW_MS // 1000 + 40), 40.0),
            (str(NOW_MS + 2500), 2.5),
            (str(NOW_MS - 2500), None),
            ("2025-11-21T12:00:10Z", 10.0),
            ("2025-11-21T13:00:10+01:00", 10.0),
            ("2025-11-21T12:00:10", 10.0),
            ("2025-99-21T12:00:10Z", None),
        )
    ),
    pytest.param(
        {"x-ratelimit-remaining-requests": "14370", "x-ratelimit-reset-requests": "2m59.56s"},
        "",
        None,
        id="a limit that is not used up names no wait",
    ),
    pytest.param(
        {
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "2h0m0s",
            "x-ratelimit-remaining-tokens": "0",
            "x-ratelimit-reset-tokens": "7.66s",
        },
        "",
        7200.0,
        id="of two used-up limits the longer",
    ),
    pytest.param(
        {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "59.7s"},
        "Please try again in 2.3s",
        2.3,
        id="the hint knows better than a full reset",
    ),
    pytest.param(
        {
            "anthropic-ratelimit-tokens-remaining": "0",
            "anthropic-ratelimit-tokens-reset": "2025-11-21T12:00:20Z",
        },
        "",
        20.0,
        id="Anthropic",
    ),
    pytest.param({"X-RateLimit-Reset": str(NOW_MS + 60_000)}, "", 60.0, id="OpenRouter"),
    pytest.param({"x-rate-limit-reset-tokens": "11"}, "", 11.0, id="Azure's spelling"),
    pytest.param(
        {"x-ratelimit-reset-tokens": "11", "x-ratelimit-remaining-tokens": "-1"},
        "",
        None,
        id="Azure -1",
    ),
    pytest.param(
        {"ratelimit-reset": "17", "ratelimit-remaining": "0"}, "", 17.0, id="Mistral, older"
    ),
    pytest.param({"ratelimitbysize-reset": "17"}, "", 17.0, id="Mistral, by size"),
    pytest.param(
        {"x-ratelimit-remaining-requests-day": "0", "x-ratelimit-reset-requests-day": "33011.38"},
        "",
        33011.38,
        id="Cerebras",
    ),
    pytest.param({"x-reset": "5", "x-ratelimit-limit": "5"}, "", None, id="other headers"),
]


@pytest.mark.parametrize(("headers", "message", "wait_s"), WAITS)
def test_the_wait_an_endpoint_names(
    headers: Mapping[str, str], message: str, wait_s: float | None
) -> None:
    reply = Reply(True, error=ErrorBody(message=message)) if message else None
    found = retry_after(headers, reply, NOW_MS)
    assert found == (None if wait_s is None else pytest.approx(wait_s))


@unhurried
@given(
    st.dictionaries(
        st.sampled_from(["retry-after", "retry-after-ms", "x-ratelimit-reset"]),
        st.text() | st.from_regex(r"[0-9.:, +TZ-]{0,40}"),
    ),
    st.text(),
)
def test_a_named_wait_is_positive_and_finite(headers: dict[str, str], message: str) -> None:
    wait_s = retry_after(headers, Reply(True, error=ErrorBody(message=message)), NOW_MS)
    assert wait_s is None or (wait_s > 0 and math.isfinite(wait_s))


@pytest.mark.parametrize("header", ["retry-after", "x-ratelimit-reset-tokens"])
@pytest.mark.parametrize("text", ["Fri Nov 21 12:00:30 2025", "2025-11-21T12:00:30"])
def test_a_date_without_a_zone_is_utc_wherever_we_are(
    header: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        there.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        wait_s = retry_after({header: text}, None, NOW_MS)
    time.tzset()
    assert wait_s == pytest.approx(30.0)


# --- laws of classify ----------------------------------------------------------------------------

TEXTS = st.text(max_size=60) | st.sampled_from(
    ["429", "401", "1300", "1500", "3505", "insufficient_quota", "model_not_found", "<", "\ud800"]
)
ERRORS = st.builds(ErrorBody, code=TEXTS, type=TEXTS, message=TEXTS, loc=TEXTS)
REPLIES = st.builds(
    Reply,
    is_json=st.booleans(),
    choices=st.integers(0, 3),
    finish_reason=st.none() | TEXTS | st.just("stop"),
    has_content=st.booleans(),
    refusal=st.booleans(),
    error=st.none() | ERRORS,
)
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            "retry-after",
            "retry-after-ms",
            "location",
            "content-type",
            "x-should-retry",
            "x-ratelimit-reset-tokens",
            "x-ratelimit-limit-req-minute",
        ]
    ),
    TEXTS
    | st.sampled_from(["0", "true", "false", "1e999", "9" * 5000, "Mon, 99 Foo 99999 99:99:99"]),
)
FAILURES: tuple[Failure, ...] = (
    *("connect", "dns", "no_host", "tls", "proxy", "disconnected", "cut"),
    *("timeout", "too_large", "bad_header", "bad_encoding", "not_utf8"),
)
ATTEMPTS = st.builds(
    Attempt,
    status=st.none() | st.integers(-5, 1200),
    headers=HEADERS,
    body=st.binary(max_size=20),
    started_s=st.floats(),
    ended_s=st.floats(),
    finished_at_ms=st.integers(0, 2**53),
    reply=st.none() | REPLIES,
    failure=st.none() | st.sampled_from(FAILURES),
    detail=TEXTS,
    sent=st.booleans(),
)
REQUESTS = st.builds(request, model=TEXTS, model_from_row=st.booleans())


@unhurried
@given(ATTEMPTS, REQUESTS)
def test_classification_never_raises_and_always_explains_itself(
    attempt: Attempt, of: Request
) -> None:
    decision = classify(attempt, of)
    if decision.kind == "ok":
        assert decision is OK
        return
    assert decision.code
    assert decision.reason
    for text in (decision.code, decision.reason):
        assert text.isprintable()
        assert len(text) < 700
    assert decision.wait_s is None or 0 < decision.wait_s < math.inf
    if decision.in_doubt:
        assert attempt.sent or attempt.status is not None
    if decision.kind == "fatal":
        assert decision.code in NEXT_STEPS
        assert not decision.in_doubt


@unhurried
@given(ATTEMPTS, REQUESTS)
def test_what_never_reached_the_endpoint_is_no_rows_fault(attempt: Attempt, of: Request) -> None:
    decision = classify(attempt, of)
    if decision.unreachable:
        assert attempt.failure in ("connect", "dns")
        assert (decision.kind, decision.in_doubt, decision.alike) == ("transient", False, "")


@unhurried
@given(st.binary(max_size=200), st.sampled_from([200, 400, 403, 404, 422, 429, 500, 503]))
def test_any_bytes_get_a_verdict(body: bytes, status: int) -> None:
    assert classify(says(status, body), request()).kind


def test_hostile_text_is_read_in_linear_time() -> None:
    # Each of these makes a careless pattern backtrack for hours.
    for text in (
        "<" * 10**6,
        "<script" * 10**5,
        "1" * 10**6,
        "try again in " + "1s " * 10**6,
        "model " * 10**6,
    ):
        attempt = says(429, error(text), {"retry-after": text, "x-ratelimit-reset-tokens": text})
        assert classify(attempt, request()).kind == "rate_limit"
        assert classify(says(400, error(text)), request()).kind == "rejected"


# --- whether and when to try again ---------------------------------------------------------------

TRANSIENT = Decision(kind="transient", code="500")
DOUBTFUL = Decision(kind="timeout", code="timeout", in_doubt=True)
REFUSED = Decision(kind="rate_limit", code="1300")
REJECTED = Decision(kind="rejected", code="400")
GATEWAY = Decision(kind="transient", code="502", may_be_outage=True)


def policy(max_retries: int = 5, max_in_doubt: int = 2, max_wait_s: float = 600.0) -> Policy:
    return Policy(max_retries, max_in_doubt, max_wait_s, random.Random(7))


def steps(of: Policy, decision: Decision, *, tally: Tally | None = None) -> Iterator[Wait | GiveUp]:
    tally = tally or Tally()
    for _ in range(100):
        step = of.next(tally, decision)
        yield step
        if isinstance(step, GiveUp):
            return


@pytest.mark.parametrize("max_retries", [0, 1, 5])
def test_a_passing_failure_is_retried_max_retries_times(max_retries: int) -> None:
    *waits, last = steps(policy(max_retries), TRANSIENT)
    assert len(waits) == max_retries
    assert last == GiveUp()


@pytest.mark.parametrize("max_in_doubt", [0, 1, 2])
def test_what_may_have_been_billed_has_a_smaller_budget(max_in_doubt: int) -> None:
    *waits, last = steps(policy(max_in_doubt=max_in_doubt), DOUBTFUL)
    assert len(waits) == max_in_doubt
    assert last == GiveUp(doubt_spent=True)


def test_attempts_in_doubt_of_earlier_runs_count() -> None:
    *waits, last = steps(policy(), DOUBTFUL, tally=Tally(in_doubt=1))
    assert len(waits) == 1
    assert last == GiveUp(doubt_spent=True)


def test_a_retry_in_doubt_is_one_of_the_retries() -> None:
    *waits, last = steps(policy(1, 5), DOUBTFUL)
    assert len(waits) == 1
    assert last == GiveUp()


def test_a_rejected_row_is_final_at_once() -> None:
    assert list(steps(policy(), REJECTED)) == [GiveUp()]


def test_rate_limits_use_up_no_retries() -> None:
    tally = Tally()
    of = policy(1)
    for _ in range(10):
        assert isinstance(of.next(tally, REFUSED), Wait)
    assert isinstance(of.next(tally, TRANSIENT), Wait)
    assert of.next(tally, TRANSIENT) == GiveUp()


def test_a_row_refused_while_others_succeed_ends_after_20_refusals() -> None:
    *waits, last = steps(policy(), REFUSED)
    assert len(waits) == MAX_REFUSALS - 1
    assert last == GiveUp()


def test_a_row_refused_like_all_others_goes_on_waiting() -> None:
    of, tally = policy(), Tally()
    for _ in range(5 * MAX_REFUSALS):
        assert isinstance(of.next(tally, REFUSED, others_succeed=False), Wait)


@pytest.mark.parametrize("kind", ["rate_limit", "transient", "timeout", "invalid_response"])
def test_a_named_wait_is_kept_exactly_up_to_the_cap(kind: DecisionKind) -> None:
    for named, kept in ((0.25, 0.25), (42.0, 42.0), (601.0, 600.0), (86400.0, 600.0)):
        assert policy().next(Tally(), Decision(kind=kind, wait_s=named)) == Wait(kept)


def test_backoff_is_full_jitter_over_a_doubling_window() -> None:
    of = policy(10)
    rounds = [
        [step.seconds for step in steps(of, TRANSIENT) if isinstance(step, Wait)]
        for _ in range(300)
    ]
    for retry, waits in enumerate(zip(*rounds, strict=True)):
        window = min(0.5 * 2**retry, LONGEST_BACKOFF_S)
        assert 0 <= min(waits) < 0.1 * window
        assert 0.9 * window < max(waits) <= window


def test_the_same_seed_gives_the_same_waits() -> None:
    assert list(steps(policy(), TRANSIENT)) == list(steps(policy(), TRANSIENT))


PASSING_DECISIONS = st.builds(
    Decision,
    kind=st.sampled_from(["rate_limit", "transient", "timeout", "invalid_response"]),
    code=st.sampled_from(list(string.ascii_lowercase)),
    wait_s=st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    in_doubt=st.booleans(),
)


@unhurried
@given(
    st.integers(0, 6),
    st.integers(0, 4),
    st.floats(0.1, 1000),
    st.lists(PASSING_DECISIONS, max_size=60),
)
def test_no_wait_exceeds_its_cap_and_no_budget_is_overdrawn(
    max_retries: int, max_in_doubt: int, max_wait_s: float, decisions: list[Decision]
) -> None:
    of, tally = policy(max_retries, max_in_doubt, max_wait_s), Tally()
    retried, retried_in_doubt, refusals = 0, 0, 0
    for decision in decisions:
        step = of.next(tally, decision)
        if isinstance(step, GiveUp):
            break
        assert 0 <= step.seconds <= max_wait_s
        if decision.kind == "rate_limit":
            refusals += 1
        else:
            retried += 1
            retried_in_doubt += decision.in_doubt
    assert retried <= max_retries
    assert retried_in_doubt <= max_in_doubt
    assert refusals < MAX_REFUSALS


# --- what is remembered of unsettled rows --------------------------------------------------------


def persistence(max_retries: int = 5, max_in_doubt_retries: int = 2) -> Persistence:
    return Persistence(
        max_retries=max_retries,
        max_in_doubt_retries=max_in_doubt_retries,
        rng=random.Random(7),
    )


def test_a_row_answered_at_once_leaves_no_trace() -> None:
    assert persistence().settle(request()) is None


def test_a_settled_row_tells_all_its_attempts() -> None:
    memory, of = persistence(), request(in_doubt=1)
    assert memory.after(of, TRANSIENT).wait_s is not None
    assert memory.after(of, DOUBTFUL).wait_s is not None
    assert memory.settle(of) == (3, 1, False)
    assert memory.settle(of) is None


def test_a_row_that_ends_tells_whether_its_doubt_is_spent() -> None:
    memory = persistence(max_retries=1)
    first, last = request(row=1), request(row=2, in_doubt=2)
    assert memory.after(first, TRANSIENT).wait_s is not None
    assert memory.after(first, TRANSIENT) == (None, (2, 0, False))
    assert memory.after(last, DOUBTFUL) == (None, (1, 1, True))
    assert memory.after(request(row=3), REJECTED) == (None, (1, 0, False))


def test_rows_do_not_share_their_budgets() -> None:
    memory = persistence(max_retries=1)
    verdicts = [memory.after(request(row=row), TRANSIENT) for row in range(10)]
    assert all(verdict.wait_s is not None for verdict in verdicts)


def test_refusals_end_a_row_only_while_others_of_its_model_are_answered() -> None:
    memory = persistence()
    refused = request(row=0, model="a")

    def refusals(answered: str, most: int) -> int:
        for n in range(1, most + 1):
            if memory.after(refused, REFUSED).wait_s is None:
                return n
            memory.settle(request(row=n, model=answered))
        return most

    assert refusals("b", 100) == 100
    assert refusals("a", 100) <= MAX_REFUSALS + 1


def test_a_row_alone_is_refused_20_times_and_soon_again() -> None:
    memory = persistence()
    waits = [memory.after(request(), REFUSED, "before", few_left=True).wait_s for _ in range(20)]
    assert waits.pop() is None
    assert sum(wait_s for wait_s in waits if wait_s is not None) < 20 * LONGEST_ALONE_S
    # Without any answer, of this run or of an earlier one, it is the endpoint that refuses.
    waits = [memory.after(request(), REFUSED, "never", few_left=True).wait_s for _ in range(100)]
    assert None not in waits


def test_an_outage_uses_up_no_retries() -> None:
    memory, last = persistence(max_retries=1), request(row=0)
    for _ in range(100):
        assert memory.after(last, GATEWAY, "before").wait_s is not None
    # It is over: others are answered again, and what fails now is the row.
    memory.settle(request(row=1))
    assert memory.after(last, GATEWAY, "before").wait_s is not None
    assert memory.after(last, GATEWAY, "now").wait_s is None


def test_before_any_answer_a_gateways_error_is_the_rows() -> None:
    memory = persistence(max_retries=1)
    assert memory.after(request(), GATEWAY, "never").wait_s is not None
    assert memory.after(request(), GATEWAY, "never").wait_s is None


def test_a_row_alone_with_a_gateways_error_ends_too() -> None:
    memory = persistence(max_retries=1)
    verdicts = [memory.after(request(), GATEWAY, "before", few_left=True) for _ in range(20)]
    assert [verdict.wait_s is None for verdict in verdicts] == [False] * 19 + [True]


def test_an_outage_is_no_reason_to_pay_more_often() -> None:
    memory = persistence(max_in_doubt_retries=1)
    doubtful = Decision(kind="transient", code="504", in_doubt=True, may_be_outage=True)
    assert memory.after(request(), doubtful, "before").wait_s is not None
    assert memory.after(request(), doubtful, "before") == (None, (2, 2, True))


def test_what_was_answered_before_the_first_refusal_does_not_count() -> None:
    memory, refused = persistence(), request(row=0)
    memory.after(refused, TRANSIENT)
    memory.settle(request(row=1))
    verdicts = []
    for row in range(MAX_REFUSALS):
        verdicts.append(memory.after(refused, REFUSED))
        memory.settle(request(row=row + 2))
    assert all(verdict.wait_s is not None for verdict in verdicts)
    assert memory.after(refused, REFUSED).wait_s is None
