// Changing an alias: a conflict says who was faster.
import { useState } from "preact/hooks";
import { ApiError, call, path, query } from "../api/client";
import type { ChangePage } from "../api/types";
import { ago } from "../ui/format";
import { Button, ErrorNote } from "../ui/parts";
import { actorOf, changeText } from "./changes";

/** Who moved the alias meanwhile. */
async function whoWasFaster(name: string, alias: string): Promise<string> {
  const { data } = await call<ChangePage>("GET", path`/v1/prompts/${name}/history` + query({ limit: 20 }));
  const change = data.find((one) => one.alias === alias);
  return change ? `${actorOf(change) || "Another client"} ${changeText(change)}, ${ago(change.created_at)}.` : "";
}

/** Run changes of an alias, one at a time. */
export function useChange(name: string, alias: string) {
  const [error, setError] = useState<ApiError>();
  const [faster, setFaster] = useState("");
  const [isRunning, setRunning] = useState(false);
  async function run(change: () => Promise<void>) {
    setRunning(true);
    setError(undefined);
    try {
      await change();
    } catch (failure) {
      if (!(failure instanceof ApiError)) throw failure;
      if (failure.code === "conflict") setFaster(await whoWasFaster(name, alias).catch(() => ""));
      setError(failure);
    } finally {
      setRunning(false);
    }
  }
  return { error, faster, isRunning, run };
}

export function Conflict({ error, faster, onReload }: { error: ApiError; faster: string; onReload: () => void }) {
  return (
    <>
      <ErrorNote error={error} />
      {error.code === "conflict" && (
        <p class="row">
          <span>{faster} Nothing was changed.</span>
          <Button small onClick={onReload}>
            Show what is there now
          </Button>
        </p>
      )}
    </>
  );
}
