"""Labels of texts, with the response of vLLM's /classify."""

import time
from functools import partial
from typing import Annotated, Literal

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Discriminator, Field, Tag
from starlette.responses import Response
from transformers import PreTrainedTokenizerBase

from ..errors import RequestError, RequestTimeoutError
from ..inference.batch import PREFILL_CHUNK
from ..inference.classification import (
    NO_LABELS,
    Classification,
    LabelPrompts,
    batches,
    score_texts,
    text_values,
)
from ..text import format_count
from . import neutral
from .fields import TEXT, TEXTS, Name, RequestModel, Text, text_or_list
from .metrics import CLIENT_CLOSED_REQUEST, Metrics, RequestRecord
from .responses import PromptTokensDetails, Usage
from .service import ModelService

MAX_TEXTS = 10_000  # of a request, whatever the queue holds


class ClassifyRequest(RequestModel):
    """One text or several, and an adapter that was trained with --label-column."""

    neutral_values = neutral.CLASSIFY

    model: Name
    input: Annotated[
        Annotated[Text, Tag(TEXT)] | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS), Tag(TEXTS)],
        Discriminator(text_or_list),
    ]
    user: Name | None = None


class ClassifiedText(BaseModel):
    """The likeliest label, and the calibrated probability of each, in the order of `labels`."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(BaseModel):
    """`labels` are the names that `probs` have in order, which vLLM leaves to the model's configuration."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    labels: list[str]
    data: list[ClassifiedText]
    usage: Usage


async def classify(service: ModelService, body: ClassifyRequest, http_request: HTTPRequest) -> Response:
    """Tell the labels of texts, a few between two steps of what is generated meanwhile.

    Raises:
        RequestError: the model tells no labels, or a text is empty.
        QueueFullError: too many sequences wait.
        RequestTimeoutError: it takes too long.
    """
    record: RequestRecord = http_request.state.record
    metrics: Metrics = http_request.app.state.metrics
    record.user, record.prompts = body.user, body.input
    texts = [body.input] if isinstance(body.input, str) else body.input
    capacity = service.config.max_batch + service.config.max_waiting
    if len(texts) > capacity:
        raise RequestError(
            f"input: {format_count(len(texts), 'text')}, the limit of this server is {capacity:,}.",
            "input",
        )
    with service.scheduler.reserve(len(texts)):
        _, lora = await service.find_adapter(body.model)
        if lora is None or lora.labels is None:
            raise RequestError(f"model: {body.model} {NO_LABELS}", "model")
        record.model, info = body.model, lora.labels

        def encode(
            tokenizer: PreTrainedTokenizerBase,
        ) -> tuple[list[list[int]], list[list[int]]]:
            prompts = LabelPrompts(body.model, info, tokenizer, service.base.max_context)
            values = [text_values(body.model, info, text) for text in texts]
            return prompts.endings, [prompts.encode(each) for each in values]

        endings, prefixes = await service.run_with_tokenizer(sum(map(len, texts)), lora, encode)
        found: dict[int, Classification] = {}
        for batch in batches(prefixes, PREFILL_CHUNK):
            if time.monotonic() - record.started > service.config.timeout:
                raise RequestTimeoutError(f"The request took longer than {service.config.timeout:g} seconds.")
            if await http_request.is_disconnected():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            score = partial(
                score_texts,
                service.generator.engine,
                lora,
                [prefixes[number] for number in batch],
                endings,
            )
            logprobs = await service.run_in_thread(
                "classify", partial(service.scheduler.run_between_steps, score)
            )
            for number, row in zip(batch, logprobs, strict=True):
                found[number] = Classification.of_logprobs(info, row)
    tokens = sum(map(len, prefixes)) + len(texts) * sum(map(len, endings))
    metrics.tokens.labels(body.model, "prompt").inc(tokens)
    metrics.seconds.labels(body.model).observe(time.monotonic() - record.started)
    response = ClassifyResponse(
        id=f"classify-{record.id}",
        created=int(time.time()),
        model=body.model,
        labels=info.names,
        data=[
            ClassifiedText(
                index=number,
                label=found[number].label,
                probs=[*found[number].probabilities.values()],
                num_classes=len(info.names),
            )
            for number in range(len(texts))
        ],
        usage=Usage(
            prompt_tokens=tokens,
            completion_tokens=0,
            total_tokens=tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
        ),
    )
    return JSONResponse(response.model_dump())
