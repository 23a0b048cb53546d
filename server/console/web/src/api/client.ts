// Requests to the server that served this page. The session's cookie is sent by the browser; no key is kept here.
import { signal } from "@preact/signals";

/** One fault of a request or of an uploaded file. */
export interface Fault {
  code?: string;
  message: string;
  param?: string | null;
  file?: string;
  field?: string;
}

/** An error in the API's standard shape. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
    readonly param: string | null,
    readonly details: unknown,
  ) {
    super(message);
  }

  /** Every fault that the server lists; the error itself if it lists none. */
  get faults(): Fault[] {
    const listed = Array.isArray(this.details) ? (this.details as Fault[]) : [];
    return listed.length > 0 ? listed : [{ code: this.code, message: this.message, param: this.param }];
  }
}

/** Incremented when the server no longer accepts the session. */
export const refusedSessions = signal(0);

/** Whether the server answered the last request. */
export const isReachable = signal(true);

export const HEADERS = { "X-Prelude-Console": "1" };

/** Read an error response. */
export async function errorOf(response: Response): Promise<ApiError> {
  return toError(response.status, await response.text());
}

/** The error in the text of a response. */
export function toError(status: number, text: string): ApiError {
  try {
    const { message, code, param, details } = JSON.parse(text).error;
    return new ApiError(status, String(code), String(message), param ?? null, details);
  } catch {
    return new ApiError(status, `http_${status}`, `The server answered with status ${status}.`, null, null);
  }
}

/** Send a request, and return the response if its status is a success. Throws ApiError otherwise. */
export async function send(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, {
      method,
      headers: body === undefined ? HEADERS : { ...HEADERS, "Content-Type": "application/json" },
      body: body === undefined ? null : JSON.stringify(body),
      credentials: "same-origin",
      cache: "no-store",
      signal: signal ?? null,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    isReachable.value = false;
    throw new ApiError(0, "unreachable", "The server does not answer.", null, null);
  }
  isReachable.value = true;
  if (response.ok) return response;
  const error = await errorOf(response);
  if (error.status === 401 && !path.startsWith("/console/")) refusedSessions.value += 1;
  throw error;
}

/** Send a request, and return the JSON of its response. */
export async function call<T>(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<T> {
  const response = await send(method, path, body, signal);
  return (response.status === 204 ? undefined : await response.json()) as T;
}

/** A path with its parts escaped: path`/v1/prompts/${name}`. */
export function path(parts: TemplateStringsArray, ...values: (string | number)[]): string {
  return String.raw({ raw: parts }, ...values.map((value) => encodeURIComponent(String(value))));
}

/** A query string of the values that are given, with its question mark. */
export function query(values: Record<string, string | number | boolean | null | undefined>): string {
  const given = Object.entries(values).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return given.length === 0 ? "" : `?${new URLSearchParams(given.map(([key, value]) => [key, String(value)]))}`;
}
