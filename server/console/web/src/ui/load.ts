// Reading from the server within a component.
import { useEffect, useRef, useState } from "preact/hooks";
import { ApiError } from "../api/client";

export interface Loaded<T> {
  data: T | undefined;
  error: ApiError | undefined;
  isLoading: boolean;
  reload: () => void;
}

/** Read when `key` changes, and on `reload`; what was read before stays until the new data is there. */
export function useLoad<T>(key: string, read: (signal: AbortSignal) => Promise<T>): Loaded<T> {
  const [state, setState] = useState<{ key: string; data?: T; error?: ApiError; isLoading: boolean }>({ key, isLoading: true });
  const [turn, setTurn] = useState(0);
  const reader = useRef(read);
  reader.current = read;
  useEffect(() => {
    const abort = new AbortController();
    setState((before) => (before.key === key ? { ...before, isLoading: true } : { key, isLoading: true }));
    reader.current(abort.signal).then(
      (data) => abort.signal.aborted || setState({ key, data, isLoading: false }),
      (error: unknown) => {
        if (abort.signal.aborted) return;
        if (!(error instanceof ApiError)) throw error;
        setState({ key, error, isLoading: false });
      },
    );
    return () => abort.abort();
  }, [key, turn]);
  const fresh = state.key === key;
  return {
    data: fresh ? state.data : undefined,
    error: fresh ? state.error : undefined,
    isLoading: !fresh || state.isLoading,
    reload: () => setTurn((before) => before + 1),
  };
}

/** Call `poll` now and then every `seconds`, but not while the page is hidden. */
export function usePolling(poll: () => void, seconds: number): void {
  const current = useRef(poll);
  current.current = poll;
  useEffect(() => {
    const tick = () => document.hidden || current.current();
    tick();
    const timer = setInterval(tick, seconds * 1000);
    document.addEventListener("visibilitychange", tick);
    return () => {
      clearInterval(timer);
      document.removeEventListener("visibilitychange", tick);
    };
  }, [seconds]);
}
