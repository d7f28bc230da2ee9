"""Requests and answers of the HTTP interface, after OpenAI's and, for tokenizing, vLLM's.

Unknown fields are refused. Of the fields that OpenAI knows, those of :data:`IGNORED` change nothing here and are left
alone, which the header ``x-dspark-ignored`` says; those that would change the answer and cannot be honoured take only
the values that change nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dspark_runtime.decoding.request import MAX_STOP_LENGTH, MAX_STOPS
from dspark_runtime.serving.options import MOST_PRIORITY
from dspark_runtime.speculation.sampling import MOST_BIASES, MOST_LOGPROBS

MOST_CHOICES = 8
MOST_PROMPTS = 64

IGNORED = (
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)

StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Model(BaseModel):
    """JSON as it is: no other types taken for the right one, no unknown fields, no infinite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Model):
    """What a stream holds beside its text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    token_by_token: bool | None = Field(None, description="An event for each token, not for each round.")
    include_drafters: bool | None = Field(
        None, description="Each chunk has the text of every token and the names of the drafters that proposed it."
    )


class JsonSchema(Model):
    """A named schema."""

    name: str = Field(max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Model):
    """No restriction."""

    type: Literal["text"]


class JsonObjectFormat(Model):
    """The answer is a JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Model):
    """The answer fits a JSON schema, whether ``strict`` says so or not."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Sampling(Model):
    """What chat and completions share."""

    model: str
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31, description="0 keeps all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MOST_BIASES)
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = Field(None, description="A JSON schema.")
    guided_regex: str | None = Field(None, description="A regular expression for the whole text.")
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None
    guided_grammar: str | None = Field(None, description="A grammar in llguidance's Lark.")
    speculate: Literal["auto", "off"] | None = Field(None, description="Off: draft nothing for this request.")
    priority: int | None = Field(None, ge=0, le=MOST_PRIORITY, description="Of requests that wait, 9 goes first.")
    timeout: float | None = Field(None, gt=0, le=1e6, description="Seconds after which the answer is not wanted.")

    metadata: dict[str, Any] | None = Field(None, description="Ignored.")
    prediction: dict[str, Any] | None = Field(None, description="Ignored: what is drafted is the server's choice.")
    prompt_cache_key: str | None = Field(None, description="Ignored.")
    prompt_cache_retention: str | None = Field(None, description="Ignored.")
    safety_identifier: str | None = Field(None, description="Ignored.")
    service_tier: str | None = Field(None, description="Ignored.")
    store: bool | None = Field(None, description="Ignored: nothing is stored.")
    user: str | None = Field(None, description="Ignored.")

    @field_validator("logit_bias")
    @classmethod
    def _biased_tokens(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if wrong := [key for key in bias or () if not (key.isascii() and key.isdecimal() and len(key) < 11)]:
            raise ValueError(f"{wrong[0][:40]!r} is not a token id")
        return bias

    def ignored(self) -> list[str]:
        """Names of the fields that were given and change nothing."""
        return [name for name in IGNORED if getattr(self, name) is not None]

    def biases(self) -> dict[int, float]:
        """``logit_bias`` by token id."""
        return {int(token): value for token, value in (self.logit_bias or {}).items()}

    def stops(self) -> list[str]:
        """``stop`` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class TextPart(Model):
    """A part of a message; only text is taken."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class _Message(Model):
    name: str | None = None


class SystemMessage(_Message):
    """What the conversation is about."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Message):
    """What the user says."""

    role: Literal["user"]
    content: Content


class CalledFunction(Model):
    """The function of a call; ``arguments`` is JSON."""

    name: str
    arguments: str


class ToolCall(Model):
    """A call that the model made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ToolMessage(_Message):
    """What a call gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = None


class AssistantMessage(_Message):
    """What the model said before."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[ToolCall] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Model):
    """What the model may call; ``parameters`` is a JSON schema."""

    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Model):
    """A function the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Model):
    """The name of a function."""

    name: str


class NamedTool(Model):
    """The one function to call."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=2048)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="Most tokens of the answer; default: all room.")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="The newer name of `max_tokens`.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the model's chat template.")
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="Whether an answer that has to call may call twice.")

    modalities: list[Literal["text"]] | None = None
    audio: None = None
    function_call: None = Field(None, description="Not supported: use `tool_choice`.")
    functions: None = Field(None, description="Not supported: use `tools`.")
    reasoning_effort: None = Field(None, description="Not supported: use `chat_template_kwargs`.")
    verbosity: None = None
    web_search_options: None = None


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="Most tokens of the text; default: 16.")

    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Not supported unless it equals `n`.")
    echo: Literal[False] | None = None
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """Every prompt."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(Model):
    """``POST /tokenize``: of a text, or of a conversation as the model would read it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=2048)
    add_special_tokens: Literal[True] | None = None
    add_generation_prompt: Literal[True] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Model):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=2**20)


class _Answer(BaseModel):
    """For the description of the interface only: answers are made as plain data."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer):
    """Any answer but a successful one."""

    error: ErrorDetail


class PromptDetails(_Answer):
    """Of the prompt's tokens."""

    cached_tokens: int


class CompletionDetails(_Answer):
    """Of the text's tokens: drafts that were accepted, and those that were verified in vain."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int


class Usage(_Answer):
    """Tokens that were read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ChatAnswerMessage(_Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None


class ChatChoice(_Answer):
    """One answer."""

    index: int
    message: ChatAnswerMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: dict[str, Any] | None


class ChatCompletion(_Answer):
    """A whole answer; a stream has chunks of ``object`` ``chat.completion.chunk``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(_Answer):
    """One text."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None


class Completion(_Answer):
    """All texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(_Answer):
    """What is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Answer):
    """All that is served: one."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(_Answer):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(_Answer):
    """A text."""

    prompt: str


class HealthAnswer(_Answer):
    """Whether the server takes requests."""

    status: str
