// Deleting a version or a whole soft prompt: first what hangs on it, afterwards a way back.
import { useState } from "preact/hooks";
import { ApiError, call, path, query } from "../api/client";
import type { Deletion } from "../api/types";
import { go, href, setParams } from "../app/router";
import { date, plural } from "../ui/format";
import { Dialog } from "../ui/dialog";
import { Button, Chip, ErrorNote, Field } from "../ui/parts";
import { report } from "../ui/toast";
import { aliasesOf, type Details } from "./prompt";

interface Props {
  details: Details;
  version?: number | undefined;
  onClose: () => void;
  onDone: () => void;
}

export function DeleteDialog({ details, version, onClose, onDone }: Props) {
  const { prompt } = details;
  const [typed, setTyped] = useState("");
  const [error, setError] = useState<ApiError>();
  const what = version === undefined ? prompt.id : `${prompt.id}@${version}`;
  const aliases = version === undefined ? Object.keys(prompt.aliases) : aliasesOf(prompt, version);
  const isLast = version === undefined || prompt.num_versions === 1;
  const mustType = isLast || aliases.length > 0;

  async function remove() {
    const where = version === undefined ? path`/v1/prompts/${prompt.id}` : path`/v1/prompts/${prompt.id}/versions/${version}`;
    try {
      const deletion = await call<Deletion>("DELETE", where + query({ force: true }));
      onClose();
      if (isLast) go(href(["prompts"]));
      else {
        setParams({ version: null });
        onDone();
      }
      const until = deletion.restorable_until;
      report(
        `${what} is deleted${until === null ? " for good" : `; it can be restored until ${date(until)}`}.`,
        until === null
          ? undefined
          : async () => {
              await call("POST", path`/v1/prompts/${prompt.id}/restore`, version === undefined ? {} : { version });
              report(`${what} is back.`);
              if (isLast) go(href(["prompts", prompt.id]));
              else onDone();
            },
      );
    } catch (failure) {
      if (!(failure instanceof ApiError)) throw failure;
      setError(failure);
    }
  }

  return (
    <Dialog title={`Delete ${what}`} onClose={onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (!mustType || typed === what) void remove();
        }}
      >
        <div class="pad consequence">
          <p>{version === undefined ? `${plural(prompt.num_versions, "version")} will be deleted.` : `Version ${version} will be deleted.`} Running requests finish with it.</p>
          {aliases.length > 0 ? (
            <p class="row">
              These aliases go with it, and requests that name them fail:
              {aliases.map((alias) => (
                <Chip key={alias} kind="alias">
                  {alias}
                </Chip>
              ))}
            </p>
          ) : (
            <p class="dim">No alias points at it.</p>
          )}
          {mustType && <Field label={`Type ${what} to confirm`} value={typed} onInput={setTyped} autoFocus />}
          {error && <ErrorNote error={error} />}
        </div>
        <footer>
          <Button onClick={onClose}>Cancel</Button>
          <Button kind="danger" submit blocked={mustType && typed !== what ? "Type the name first." : undefined}>
            Delete {what}
          </Button>
        </footer>
      </form>
    </Dialog>
  );
}
