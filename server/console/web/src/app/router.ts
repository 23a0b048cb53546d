// The view is in the URL's fragment, which is never sent: #/prompts/NAME?version=2. A text is never in it.
import { signal } from "@preact/signals";

export interface Route {
  parts: string[];
  params: URLSearchParams;
}

function parse(hash: string): Route {
  const [where = "", params = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const parts = where.split("/").filter(Boolean).map(decoded);
  return { parts, params: new URLSearchParams(params) };
}

function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

export const route = signal<Route>(parse(location.hash));
addEventListener("hashchange", () => {
  const before = route.value.parts.join("/");
  route.value = parse(location.hash);
  if (route.value.parts.join("/") === before) return;
  scrollTo(0, 0);
  // Without this, a screen reader stays silent, and the keyboard stays in the navigation.
  requestAnimationFrame(() => document.getElementById("main")?.focus({ preventScroll: true }));
});

/** The fragment of a view. */
export function href(parts: (string | number)[], params: Record<string, string | number | null | undefined> = {}): string {
  const given = Object.entries(params).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const query = new URLSearchParams(given.map(([key, value]) => [key, String(value)])).toString();
  return `#/${parts.map((part) => encodeURIComponent(String(part))).join("/")}${query && `?${query}`}`;
}

/** Change parameters of the current view, without an entry in the browser's history. */
export function setParams(changes: Record<string, string | number | null>): void {
  const params = Object.fromEntries(route.value.params);
  const next = href(route.value.parts, { ...params, ...changes });
  history.replaceState(null, "", next);
  route.value = parse(next);
}

export function go(to: string): void {
  location.hash = to;
}
