"""LangChain's classes for OpenAI."""

import json
import sys

import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

url, model = sys.argv[1:]
server = {"model": model, "base_url": url, "api_key": "none", "max_retries": 0, "max_tokens": 16}
chat = ChatOpenAI(temperature=0, logprobs=True, top_logprobs=2, stream_usage=True, **server)
text = OpenAI(temperature=0, **server)
several = ChatOpenAI(temperature=1, n=2, seed=5, **server)
response = ChatOpenAI(temperature=0, use_responses_api=True, **server)
answer = chat.invoke("so?")
try:
    ChatOpenAI(**server | {"model": "nobody"}).invoke("so?")
except openai.NotFoundError as error:
    message = error.message
print(
    json.dumps(
        {
            "chat": answer.content,
            "chat_stream": "".join(part.content for part in chat.stream("so?")),
            "text": text.invoke("the actor"),
            "text_stream": "".join(text.stream("the actor")),
            "choices": [each.text for each in several.generate([[HumanMessage("so?")]]).generations[0]],
            "tokens": [token["token"] for token in answer.response_metadata["logprobs"]["content"]],
            "response": response.invoke("so?").text,
            "error": message,
        },
        default=str,
    )
)
