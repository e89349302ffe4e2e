// One streamed answer from the API: calls `onText` for each piece, resolves with what was measured.
import { headers } from "./settings.js";

const MOST_LINE = 1 << 20;

export async function streamAnswer(settings, model, messages, signal, onText) {
  const asked = {
    model, messages, stream: true, timeline: true, stream_options: { include_usage: true },
    temperature: settings.temperature, max_tokens: settings.max_tokens,
  };
  const started = performance.now();
  const told = { timeline: null, tokens: 0, ttft: null, last: null, finish: null };
  const reply = await fetch("/v1/chat/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json", ...headers(settings) }, body: JSON.stringify(asked),
  });
  if (!reply.ok) throw new Error(await reason(reply));
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) told.tokens = chunk.usage.completion_tokens;
    if (chunk.baton) told.timeline = chunk.baton.timeline;
    const choice = chunk.choices[0];
    if (choice?.finish_reason) told.finish = choice.finish_reason;
    if (choice?.delta?.content) {
      told.last = performance.now() - started;
      told.ttft ??= told.last;
      onText(choice.delta.content);
    }
  }
  if (!told.finish) throw new Error("The connection ended before the answer did.");
  return told;
}

async function* events(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const lines = rest.split("\n");
      rest = lines.pop();
      if (rest.length > MOST_LINE) throw new Error("The server sent a line that is too long.");
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function reason(reply) {
  try {
    const { error } = await reply.json();
    const wait = reply.headers.get("retry-after");
    return `${error.message}${wait ? ` (again in ${wait} s)` : ""}`;
  } catch {
    return `The server answered ${reply.status}.`;
  }
}
