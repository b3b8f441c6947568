/**
 * OpenAI's API of the server that this page comes from: its models, and answers as streams.
 *
 * A model is an entry of `/v1/models`. A token is {text, logProb, alternatives: [{text, logProb}, ...]}.
 */

const KEY = "jaxstages-api-key";
const ALTERNATIVES = 5;

/** An error of the server; status 0 means that there is no connection to it. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }

  get isOverfull() {
    return this.code === "context_length_exceeded" && this.param !== "max_tokens";
  }
}

/** Keep the key in this tab, until it is closed. */
export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export async function listModels() {
  const response = await request("models", {});
  return (await response.json()).data;
}

/**
 * Stream a model's answer.
 *
 * A model that was trained on chats reads all messages; another one reads the last message as a prompt, which the server
 * writes in the format of its task.
 *
 * @param {object} model
 * @param {{role: string, content: string}[]} messages
 * @param {object} sampling - Fields of the request. Those that are missing have the server's defaults.
 * @param {AbortSignal} signal
 * @yields {{text: string, tokens: object[], finishReason: ?string, usage: ?object}}
 * @throws {ApiError}
 */
export async function* streamAnswer(model, messages, sampling, signal) {
  const options = { ...sampling, model: model.id, stream: true, stream_options: { include_usage: true } };
  let response;
  if (model.chat) {
    const content = { ...options, messages, logprobs: true, top_logprobs: ALTERNATIVES };
    response = await post("chat/completions", content, signal);
  } else {
    const content = { ...options, prompt: messages.at(-1).content, logprobs: ALTERNATIVES };
    response = await postWithLength(model, content, signal);
  }

  for await (const event of readEvents(response.body, signal)) {
    if (event.error) throw new ApiError(500, event.error);
    yield event.choices.length
      ? readChoice(event.choices[0])
      : { text: "", tokens: [], finishReason: null, usage: event.usage };
  }
}

/** A completion is 16 tokens long by default. Ask for as many as in the evaluation, if the context has room for them. */
async function postWithLength(model, content, signal) {
  if (content.max_tokens !== undefined) return post("completions", content, signal);
  try {
    return await post("completions", { ...content, max_tokens: model.max_new_tokens }, signal);
  } catch (error) {
    if (error.param !== "max_tokens") throw error;
    return post("completions", content, signal);
  }
}

function post(path, content, signal) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(content), signal });
}

async function request(path, options) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) {
    try {
      headers.set("Authorization", `Bearer ${key}`);
    } catch {
      throw new ApiError(401, { message: "the key has characters that a header cannot carry" });
    }
  }

  let response;
  try {
    response = await fetch(new URL(`v1/${path}`, document.baseURI), { ...options, headers });
  } catch (error) {
    throw asApiError(error, options.signal);
  }
  if (response.ok) return response;

  const content = await response.json().catch(() => ({}));
  throw new ApiError(response.status, content.error ?? { message: `the server answered ${response.status}` });
}

/** Yield the JSON objects of server-sent events, up to "[DONE]". */
async function* readEvents(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) throw new TypeError("the stream ended early");
      buffer += value;

      const events = buffer.split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } catch (error) {
    throw asApiError(error, signal);
  } finally {
    reader.cancel().catch(() => {}); // the connection may be closed already
  }
}

/** Return an error of the connection as ApiError; an error by Stop stays what it is. */
function asApiError(error, signal) {
  if (signal?.aborted || error instanceof ApiError) return error;
  return new ApiError(0, { message: "the connection to the server is lost" });
}

function readChoice(choice) {
  const isChat = choice.delta !== undefined;
  const text = (isChat ? choice.delta.content : choice.text) ?? "";
  const tokens = isChat ? chatTokens(choice.logprobs) : completionTokens(choice.logprobs);
  return { text, tokens, finishReason: choice.finish_reason, usage: null };
}

function chatTokens(logprobs) {
  const read = ({ token, logprob }) => ({ text: token, logProb: logprob });
  return (logprobs?.content ?? []).map((entry) => ({ ...read(entry), alternatives: entry.top_logprobs.map(read) }));
}

function completionTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((text, number) => {
    const alternatives = Object.entries(logprobs.top_logprobs?.[number] ?? {});
    return {
      text,
      logProb: logprobs.token_logprobs[number],
      alternatives: alternatives.map(([other, logProb]) => ({ text: other, logProb })),
    };
  });
}
