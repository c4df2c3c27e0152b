"""Types that the fields of requests share, and the base class of their schemas.

As in OpenAI's API, null stands for an omitted field.
"""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from ..config import INVALID_TEXT
from . import neutral


def _valid_text(value: str) -> str:
    if INVALID_TEXT.search(value):
        raise PydanticCustomError("invalid_text", "text cannot contain null bytes or lone surrogates")
    return value


Text = Annotated[str, AfterValidator(_valid_text)]
Name = Annotated[Text, Field(max_length=256)]
# Alternatives of a field. Named by its tag, only the one that was meant reports its problems.
TEXT, TEXTS, TOKENS, TOKEN_LISTS, OBJECT = ALTERNATIVES = (
    "(text)",
    "(texts)",
    "(tokens)",
    "(token lists)",
    "(object)",
)


def text_or_list(value: object) -> str:
    return TEXTS if isinstance(value, list) else TEXT


def text_or_object(value: object) -> str:
    return OBJECT if isinstance(value, dict) else TEXT


class RequestModel(BaseModel, extra="forbid", strict=True, frozen=True, allow_inf_nan=False):
    neutral_values: ClassVar[neutral.Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: object) -> object:
        if isinstance(data, dict):
            data = {
                name: value
                for name, value in data.items()
                if not neutral.is_neutral(cls.neutral_values, name, value)
            }
        return data

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Declare that optional fields, and unknown ones, may be null, and the neutral values."""
        json_schema = handler.resolve_ref_schema(handler(schema))
        properties = json_schema["properties"]
        for name in properties.keys() - json_schema.get("required", ()):
            properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
        json_schema["properties"] = neutral.json_schema(cls.neutral_values, properties)
        json_schema["additionalProperties"] = {"type": "null"}
        return json_schema
