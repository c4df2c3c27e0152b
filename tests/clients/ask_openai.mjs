// OpenAI's client for JavaScript.

import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const chat = { messages: [{ role: "user", content: "so?" }], max_tokens: 16, temperature: 0 };
const text = { prompt: "the actor", max_tokens: 16, temperature: 0 };
const whole = await client.chat.completions.create({ model, logprobs: true, top_logprobs: 2, ...chat });
let streamed = "", textStreamed = "";
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ model, ...options, ...chat }))
  streamed += chunk.choices[0]?.delta?.content ?? "";
for await (const chunk of await client.completions.create({ model, stream: true, ...text }))
  textStreamed += chunk.choices[0].text;
const several = await client.chat.completions.create({ model, ...chat, n: 2, seed: 5, temperature: 1 });
const response = await client.responses.create({ model, input: "so?", max_output_tokens: 16, temperature: 0 });
let message = "";
try {
  await client.chat.completions.create({ model: "nobody", ...chat });
} catch (error) {
  if (!(error instanceof OpenAI.NotFoundError)) throw error;
  message = error.message;
}
console.log(JSON.stringify({
  chat: whole.choices[0].message.content,
  chat_stream: streamed,
  text: (await client.completions.create({ model, ...text })).choices[0].text,
  text_stream: textStreamed,
  choices: several.choices.map(choice => choice.message.content),
  tokens: whole.choices[0].logprobs.content.map(token => token.token),
  response: response.output_text,
  error: message,
}));
