"""What clients send, in OpenAI's words. What would change the answer and is not served is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qft.bundle.sampling import SAMPLING_NAMES, Sampling

# Fields that are not served, with the values at which they ask for nothing.
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "functions": ([],),
    "audio": (),
}


class _Asked(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    top_k: int | None = None  # this and the next two as other servers of open models spell them
    min_p: float | None = None
    repetition_penalty: float | None = None

    @model_validator(mode="after")
    def _served(self) -> _Asked:
        for name, value in (self.model_extra or {}).items():
            if name in _NOT_SERVED and value is not None and value not in _NOT_SERVED[name]:
                raise ValueError(f"{name} is not served here; leave it out")
        return self

    @property
    def sampling(self) -> Sampling:
        """Greedy unless chance is asked for. Raises InputError for a value out of range."""
        return Sampling.asked(**{name: getattr(self, name) for name in SAMPLING_NAMES})

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with how many tokens were read and written."""
        return bool((self.stream_options or {}).get("include_usage"))


class JsonSchema(BaseModel):
    """A named JSON Schema."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What form an answer must have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @property
    def schema_wanted(self) -> Any:
        """A JSON Schema, or None for free text."""
        if self.type == "json_schema":
            return self.json_schema.schema_ if self.json_schema else None
        return {"type": "object"} if self.type == "json_object" else None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema needs name and schema")
        return self


class ChatAsked(_Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] = "auto"
    response_format: ResponseFormat = ResponseFormat()


class CompletionAsked(_Asked):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    response_format: ResponseFormat = ResponseFormat()

    @property
    def text(self) -> str:
        """The one prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class TextsAsked(BaseModel):
    """POST /classify and /translate."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=256)]
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 256

    @property
    def texts(self) -> list[str]:
        """One or many."""
        return [self.input] if isinstance(self.input, str) else self.input


class QuestionAsked(BaseModel):
    """POST /answer."""

    question: str
    context: str
    model: str | None = None
