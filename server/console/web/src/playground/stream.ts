// Reading a stream of server-sent events that answers a request.
import { ApiError, errorOf, HEADERS, isReachable, refusedSessions, toError } from "../api/client";
import type { Request } from "./model";

/** Send a request, and yield the JSON of each event. Throws ApiError for an error before or within the stream. */
export async function* streamed(request: Request, signal: AbortSignal): AsyncGenerator<Record<string, unknown>> {
  let response: Response;
  try {
    response = await fetch(request.path, {
      method: "POST",
      headers: { ...HEADERS, "Content-Type": "application/json" },
      body: JSON.stringify({ ...request.body, stream: true, stream_options: { include_usage: true }, return_timings: true }),
      signal,
    });
  } catch (error) {
    if (signal.aborted) throw error;
    isReachable.value = false;
    throw new ApiError(0, "unreachable", "The server does not answer.", null, null);
  }
  if (!response.ok || !response.body) {
    const error = await errorOf(response);
    if (error.status === 401) refusedSessions.value += 1;
    throw error;
  }
  yield* eventsOf(response.body);
}

/** The JSON of each event of a body; ends at [DONE]. */
export async function* eventsOf(body: ReadableStream<Uint8Array<ArrayBuffer>>): AsyncGenerator<Record<string, unknown>> {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop() ?? "";
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
        if (data === undefined) continue;
        if (data === "[DONE]") return;
        const parsed = JSON.parse(data) as Record<string, unknown>;
        if (parsed.error) throw toError(200, data);
        yield parsed;
      }
    }
  } finally {
    // Of a stream that was aborted, this rejects too; who reads it knows already.
    reader.cancel().catch(() => undefined);
  }
}
