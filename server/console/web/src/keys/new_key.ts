// A new API key, made in the browser. Only its digest goes into a key file, and nothing of it is sent anywhere.
import type { Scope } from "../app/session";

/** What a key file says about a key. */
export interface KeyEntry {
  name: string;
  tenant: string;
  scopes: Scope[];
  /** Limits by their name in the key file; an empty one is none. */
  limits: Record<string, string>;
}

export interface NewKey {
  /** The key itself, for whoever uses it. */
  secret: string;
  /** The entry for the key file. */
  entry: string;
}

const NUM_BYTES = 32;
const NAME = /^[a-z0-9][a-z0-9._-]{0,127}$/;

/** Whether the browser can make a digest: only on pages over https or from this machine. */
export const canMakeKeys = (): boolean => isSecureContext;

/** What is wrong with a name or tenant; both may be left out. */
export function nameFault(text: string): string | undefined {
  if (!text || NAME.test(text)) return undefined;
  return "Lower-case letters, digits, '.', '_' and '-', at most 128, the first a letter or digit.";
}

/** What is wrong with a limit. */
export function limitFault(text: string): string | undefined {
  return text === "" || (/^[0-9]{1,12}$/.test(text) && Number(text) >= 1) ? undefined : "A whole number from 1.";
}

/** Make a key of 256 random bits, and its entry in TOML. */
export async function makeKey({ name, tenant, scopes, limits }: KeyEntry): Promise<NewKey> {
  const random = crypto.getRandomValues(new Uint8Array(NUM_BYTES));
  const base64 = btoa(String.fromCharCode(...random));
  const secret = `prelude-${base64.replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "")}`;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(secret)));
  const hex = [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const lines = ["[[keys]]", `key = "sha256:${hex}"`, `scopes = ${JSON.stringify(scopes)}`];
  if (name) lines.push(`name = ${JSON.stringify(name)}`);
  if (tenant) lines.push(`tenant = ${JSON.stringify(tenant)}`);
  for (const [limit, value] of Object.entries(limits)) if (value) lines.push(`${limit} = ${Number(value)}`);
  return { secret, entry: `${lines.join("\n")}\n` };
}
