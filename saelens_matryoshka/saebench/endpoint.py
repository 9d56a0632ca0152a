"""A chat model behind an OpenAI-compatible endpoint: what it is asked, what it costs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


class EndpointError(RuntimeError):
    """The endpoint refuses every request: a wrong key, address or model name."""


@dataclass(frozen=True)
class Endpoint:
    """Where the chat model is, and how it is asked."""

    model: str
    """its name at the endpoint"""
    base_url: str | None = None
    """address of the endpoint; None: the environment's OPENAI_BASE_URL, else OpenAI's"""
    key_variable: str = "OPENAI_API_KEY"
    """environment variable that holds the key"""
    max_retries: int = 5
    """of a request that the endpoint is too busy for, or that is lost; the client waits longer each time"""
    timeout: float = 120.0
    """seconds for one request"""


@dataclass(frozen=True)
class Prices:
    """USD for a million tokens."""

    prompt: float
    """what is sent"""
    completion: float
    """what is answered"""


@dataclass(frozen=True)
class Estimate:
    """What descriptions will take, before anything is sent."""

    n_latents: int
    n_requests: int
    prompt_tokens: int
    """counted with the language model's own tokenizer, so approximate for the chat model's"""
    completion_tokens: int
    """at most"""

    def cost(self, prices: Prices) -> float:
        """USD, at most."""
        return (self.prompt_tokens * prices.prompt + self.completion_tokens * prices.completion) / 1e6

    def __str__(self) -> str:
        return (
            f"{self.n_latents:,} latents: {self.n_requests:,} requests, about {self.prompt_tokens:,} tokens "
            f"of prompts and at most {self.completion_tokens:,} of answers"
        )


class ChatModel:
    """Sends messages. May be used from several threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        from openai import OpenAI  # pyright: ignore[reportMissingImports]

        self.endpoint = endpoint
        key = os.environ.get(endpoint.key_variable)
        if not key:
            raise EndpointError(
                f"The environment variable {endpoint.key_variable} is not set: it holds the endpoint's "
                "key. Any text will do for a local server that asks for none."
            )
        self._client = OpenAI(
            api_key=key,
            base_url=endpoint.base_url,
            max_retries=endpoint.max_retries,
            timeout=endpoint.timeout,
        )

    def answer(self, messages: list[dict[str, str]], max_tokens: int) -> str:
        """The chat model's answer.

        Raises:
            EndpointError: the endpoint will refuse the other requests too.
            openai.OpenAIError: this request failed, after all retries, or what came back is no answer.
        """
        import openai  # pyright: ignore[reportMissingImports]

        try:
            result = self._client.chat.completions.create(
                model=self.endpoint.model,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=max_tokens,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EndpointError(
                f"The endpoint refuses the key in {self.endpoint.key_variable} ({error.status_code})."
            ) from None
        except openai.NotFoundError as error:
            raise EndpointError(
                f"The endpoint {self._client.base_url} does not have model {self.endpoint.model!r}: "
                f"{_text(error)}"
            ) from None
        except ValueError as error:
            raise openai.OpenAIError(f"the answer is no JSON: {error}") from None
        # The client checks nothing: a proxy's page comes as a str, a gateway's error without choices.
        choices = getattr(result, "choices", None)
        if not choices:
            raise openai.OpenAIError(f"the answer is no chat completion: {str(result)[:200]}")
        text = (choices[0].message.content or "").strip()
        if not text:
            reason = choices[0].finish_reason  # "length": a model that thinks has used up its tokens
            raise openai.OpenAIError(
                f"the answer is empty, of at most {max_tokens} tokens (finish_reason {reason!r})"
            )
        return text


def _text(error: Any) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error)
