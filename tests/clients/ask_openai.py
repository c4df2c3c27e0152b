"""OpenAI's client for Python."""

import json
import sys

import openai

url, model = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
chat = {"messages": [{"role": "user", "content": "so?"}], "max_tokens": 16, "temperature": 0}
text = {"prompt": "the actor", "max_tokens": 16, "temperature": 0}
choice = client.chat.completions.create(model=model, logprobs=True, top_logprobs=2, **chat).choices[0]
stream = client.chat.completions.create(model=model, stream=True, stream_options={"include_usage": True}, **chat)
several = client.chat.completions.create(model=model, n=2, seed=5, **chat | {"temperature": 1})
text_stream = client.completions.create(model=model, stream=True, **text)
response = client.responses.create(model=model, input="so?", max_output_tokens=16, temperature=0)
try:
    client.chat.completions.create(model="nobody", **chat)
except openai.NotFoundError as error:
    message = error.message
print(
    json.dumps(
        {
            "chat": choice.message.content,
            "chat_stream": "".join(chunk.choices[0].delta.content for chunk in stream if chunk.choices),
            "text": client.completions.create(model=model, **text).choices[0].text,
            "text_stream": "".join(chunk.choices[0].text for chunk in text_stream),
            "choices": [choice.message.content for choice in several.choices],
            "tokens": [token.token for token in choice.logprobs.content],
            "response": response.output_text,
            "error": message,
        }
    )
)
