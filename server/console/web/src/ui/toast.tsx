// A short report of what has just been done, with a way to undo it.
import { signal } from "@preact/signals";
import { ApiError } from "../api/client";
import { Button } from "./parts";

interface Toast {
  text: string;
  kind: "ok" | "bad";
  undo?: (() => Promise<void>) | undefined;
}

const current = signal<Toast | null>(null);

/** Report a finished action; `undo` takes it back. */
export function report(text: string, undo?: () => Promise<void>): void {
  current.value = { text, kind: "ok", undo };
}

export function reportError(error: unknown): void {
  if (!(error instanceof ApiError)) throw error;
  current.value = { text: error.message, kind: "bad" };
}

export function clearReport(): void {
  current.value = null;
}

export function Toasts() {
  const toast = current.value;
  const undo = toast?.undo;
  return (
    <div class="toasts" role="status" aria-live="polite">
      {toast && (
        <div class={`toast ${toast.kind}`}>
          <span>{toast.text}</span>
          {undo && (
            <Button
              small
              onClick={() => {
                current.value = null;
                undo().catch(reportError);
              }}
            >
              Undo
            </Button>
          )}
          <Button small kind="quiet" icon="close" label="Dismiss" onClick={clearReport} />
        </div>
      )}
    </div>
  );
}
