"""llama-index's class for servers like OpenAI's."""

import json
import sys

import openai
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

url, model = sys.argv[1:]
server = {"api_base": url, "api_key": "none", "max_retries": 0, "max_tokens": 16, "context_window": 128}
question = [ChatMessage(role="user", content="so?")]


def ask(is_chat, name=model, **settings):
    return OpenAILike(model=name, is_chat_model=is_chat, **{"temperature": 0} | server | settings)


answer = ask(True, logprobs=True, top_logprobs=2).chat(question)
several = ask(True, temperature=1, additional_kwargs={"n": 2, "seed": 5}).chat(question)
try:
    ask(True, "nobody").chat(question)
except openai.NotFoundError as error:
    message = error.message
print(
    json.dumps(
        {
            "chat": answer.message.content,
            "chat_stream": "".join(part.delta or "" for part in ask(True).stream_chat(question)),
            "text": ask(False).complete("the actor").text,
            "text_stream": "".join(part.delta or "" for part in ask(False).stream_complete("the actor")),
            "choices": [choice.message.content for choice in several.raw.choices],
            "tokens": [token.token for token in answer.raw.choices[0].logprobs.content],
            "error": message,
        }
    )
)
