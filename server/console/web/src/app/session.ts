// Who uses the page: the key's name, tenant and scopes. The key itself is sent once, and not kept.
import { effect, signal } from "@preact/signals";
import { ApiError, call, refusedSessions } from "../api/client";
import type { Me } from "../api/types";

export type Scope = "generate" | "prompts:read" | "prompts:write" | "admin";

/** The caller; null if a key is needed, undefined until that is known. */
export const me = signal<Me | null | undefined>(undefined);

/** Why the login is shown. */
export const loginReason = signal<string | null>(null);

/** The scope that the caller lacks; undefined if it is there. No scope includes another, `admin` neither. */
export function lacking(scope: Scope): Scope | undefined {
  return me.value?.scopes.includes(scope) ? undefined : scope;
}

/** Find out who uses the page. */
export async function findMe(): Promise<void> {
  try {
    me.value = await call<Me>("GET", "/v1/me");
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) me.value = null;
    else if (me.value === undefined) setTimeout(findMe, 1000); // the server does not answer yet
  }
}

/** Begin a session. Throws ApiError if the key is not valid, or after too many tries. */
export async function logIn(key: string): Promise<void> {
  await call<void>("POST", "/console/session", { key });
  loginReason.value = null;
  await findMe();
}

export async function logOut(): Promise<void> {
  try {
    await call<void>("DELETE", "/console/session");
  } finally {
    me.value = null;
  }
}

effect(() => {
  if (refusedSessions.value === 0 || me.peek() === null) return;
  if (me.peek()) loginReason.value = "The session has ended. Log in again to go on.";
  me.value = null;
});
