// What the page asks of its server: OpenAI's interface, and the training tasks of an adapter.

const KEY = "llava-mixlora-key";

// What went wrong, in words; `status` of HTTP, 0 where there was no answer.
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key === null ? {} : { authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new ApiError(said?.error?.message ?? `The server answered with status ${response.status}.`, response.status);
}

export async function models() {
  return (await (await ask("v1/models")).json()).data;
}

// `tasks`, and `usage` by layer: [tasks][pools][factors], the share of a task's samples that choose a factor.
export async function trainingTasks(model) {
  return (await ask(`page/tasks?model=${encodeURIComponent(model)}`)).json();
}

// The chunks of an answer, until it ends or `signal` stops it.
export async function* chat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, mixlora_routes: true }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The connection to the server broke off.");
    }
    if (part.done) throw new ApiError("The server ended before the answer did.");
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, 500);
      yield chunk;
    }
  }
}
