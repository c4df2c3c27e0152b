"""LiteLLM, with the server as OpenAI's and as vLLM's."""

import json
import sys

import litellm

url, model = sys.argv[1:]
server = {"api_base": url, "api_key": "none", "max_retries": 0}
chat = {"messages": [{"role": "user", "content": "so?"}], "max_tokens": 16, "temperature": 0, **server}
text = {"prompt": "the actor", "max_tokens": 16, "temperature": 0, **server}
named, text_model = f"openai/{model}", f"text-completion-openai/{model}"
choice = litellm.completion(model=named, logprobs=True, top_logprobs=2, **chat).choices[0]
stream = litellm.completion(model=f"hosted_vllm/{model}", stream=True, **chat)
several = litellm.completion(model=named, n=2, seed=5, **chat | {"temperature": 1})
text_stream = litellm.text_completion(model=text_model, stream=True, **text)
response = litellm.responses(model=named, input="so?", max_output_tokens=16, temperature=0, **server)
try:
    litellm.completion(model="openai/nobody", **chat)
except litellm.NotFoundError as error:
    message = error.message
print(
    json.dumps(
        {
            "chat": choice.message.content,
            "chat_stream": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
            "text": litellm.text_completion(model=text_model, **text).choices[0].text,
            "text_stream": "".join(chunk.choices[0].text or "" for chunk in text_stream),
            "choices": [choice.message.content for choice in several.choices],
            "tokens": [token["token"] for token in choice.logprobs["content"]],
            "response": response.output[0].content[0].text,
            "error": message,
        }
    )
)
