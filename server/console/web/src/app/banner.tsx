// What keeps the server from its work, in its own words.
import { isReachable } from "../api/client";
import { ago } from "../ui/format";
import { server } from "./server";

const TITLES: Record<string, string> = {
  loading: "Loading",
  restarting: "Restarting",
  draining: "Draining",
  failed: "Failed",
};

export function Banner() {
  const state = server.value;
  if (!isReachable.value)
    return (
      <div class="banner bad" role="alert">
        <b>Unreachable</b> <span>The server does not answer. This page comes back when it does.</span>
      </div>
    );
  if (!state) return null;
  if (state.phase !== "serving")
    return (
      <div class={`banner ${state.phase === "failed" ? "bad" : "warn"}`} role="alert">
        <b>{TITLES[state.phase] ?? state.phase}</b> <span>{state.reason}</span> <span class="dim3">since {ago(state.since)}</span>
      </div>
    );
  if (!state.store.is_available)
    return (
      <div class="banner warn" role="alert">
        <b>Catalog unavailable</b> <span>The database of soft prompts does not answer. What is loaded is still served.</span>
      </div>
    );
  return null;
}
