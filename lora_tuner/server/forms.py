"""Schemas of the form of outputs that a request asks for: JSON, grammars, calls of tools."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from . import neutral
from .fields import OBJECT, TEXT, Name, RequestModel, Text, text_or_object

MAX_CHOICES = 1000
Schema = dict[str, object]
# As vLLM has it, also as text.
SchemaOrText = Annotated[
    Annotated[Text, Tag(TEXT)] | Annotated[Schema, Tag(OBJECT)], Discriminator(text_or_object)
]
Choice = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


class JSONSchemaFormat(RequestModel):
    """The schema is enforced whatever `strict` is; name and description change nothing."""

    name: Name
    description: Text | None = None
    json_schema: Schema = Field(alias="schema")
    strict: bool = False


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = Field(None, validate_default=True)

    @field_validator("json_schema")
    @classmethod
    def _belongs_to_type(cls, value: JSONSchemaFormat | None, info: ValidationInfo) -> JSONSchemaFormat | None:
        kind = info.data.get("type")
        if kind is not None and (kind == "json_schema") != (value is not None):
            raise PydanticCustomError("contradiction", 'give it with type "json_schema", and with that alone')
        return value


class StructuredOutputs(RequestModel):
    """vLLM's newer name for the fields `guided_...`: one of them."""

    neutral_values = neutral.STRUCTURED_OUTPUTS

    json_schema: SchemaOrText | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choice | None = None
    grammar: Text | None = None
    json_object: bool = False

    @model_validator(mode="after")
    def _has_one(self) -> "StructuredOutputs":
        given = [*(form is not None for form in self.forms.values()), self.json_object]
        if sum(given) != 1:
            raise PydanticCustomError(
                "contradiction", "give one of json, regex, choice, grammar and json_object: true"
            )
        return self

    @property
    def forms(self) -> dict[str, str | Schema | list[str] | None]:
        return {
            "json": self.json_schema,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }


ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(RequestModel):
    name: ToolName
    description: Text | None = None
    parameters: Schema | None = Field(None, description="Default: no parameters.")
    strict: bool = Field(False, description="False: what masks cannot keep of the schema is left out.")


class Tool(RequestModel):
    type: Literal["function"]
    function: Function


class FunctionName(RequestModel):
    name: ToolName


class NamedTool(RequestModel):
    type: Literal["function"]
    function: FunctionName


class CalledFunction(RequestModel):
    name: Name
    arguments: Text


class RequestToolCall(RequestModel):
    """A call of an earlier answer."""

    neutral_values = neutral.TOOL_CALL

    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
