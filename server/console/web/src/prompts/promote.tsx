// Moving an alias: forward, and back.
import { useState } from "preact/hooks";
import { call, path } from "../api/client";
import type { Rollout } from "../api/types";
import { Dialog } from "../ui/dialog";
import { Button, Chip, Field } from "../ui/parts";
import { report } from "../ui/toast";
import { Conflict, useChange } from "./change";
import { rolloutText } from "./changes";
import { Consequence } from "./diff";
import type { Details } from "./prompt";

interface Props {
  details: Details;
  onClose: () => void;
  onDone: () => void;
}

/** Point an alias at a version, if it still points at `expected` and has the rollout `seen`, which this ends. */
function move(name: string, alias: string, version: number, expected: number | undefined, seen: Rollout | undefined, reason: string) {
  return call("PUT", path`/v1/prompts/${name}/aliases/${alias}`, { version, expected_version: expected ?? null, expected_rollout: seen ?? {}, reason: reason || null });
}

export function PromoteDialog({ details, version, onClose, onDone }: Props & { version: number }) {
  const { prompt } = details;
  const [alias, setAlias] = useState("latest");
  const [reason, setReason] = useState("");
  const { error, faster, isRunning, run } = useChange(prompt.id, alias);
  const from = prompt.aliases[alias];
  const isThere = from === version;
  const rollout = prompt.rollouts[alias];

  const promote = () =>
    run(async () => {
      await move(prompt.id, alias, version, from, rollout, reason);
      onClose();
      onDone();
      report(`${alias} now points at version ${version}.`, async () => {
        if (from === undefined) await call("DELETE", path`/v1/prompts/${prompt.id}/aliases/${alias}`);
        else await move(prompt.id, alias, from, version, undefined, "undo");
        report(from === undefined ? `The alias ${alias} is gone again.` : `${alias} points at version ${from} again.`);
        onDone();
      });
    });

  return (
    <Dialog title={`Promote version ${version} of ${prompt.id}`} onClose={onClose} wide>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (!isThere && alias && !isRunning) void promote();
        }}
      >
        <div class="pad consequence">
          <Field label="Alias" value={alias} onInput={setAlias} list="aliases" autoFocus hint="A bare name means latest. Another name makes a new alias." />
          <datalist id="aliases">{Object.keys(prompt.aliases).map((one) => <option key={one} value={one} />)}</datalist>
          <p class="move">
            <Chip kind="alias">{alias || "…"}</Chip> {from === undefined ? "new" : from} → {version}
          </p>
          <p class="dim">
            {isThere
              ? `${alias} points at version ${version} already.`
              : from === undefined
                ? `This makes the alias ${alias}. No request changes until one names it.`
                : `From the next request on, ${alias === "latest" ? prompt.id : `${prompt.id}@${alias}`} means version ${version}. Running requests keep version ${from}.`}
          </p>
          {rollout && !isThere && (
            <p class="note warn">
              {alias} has a rollout: {rolloutText(rollout)}. The promotion ends it, and Undo does not start it again.
            </p>
          )}
          {from !== undefined && !isThere && <Consequence name={prompt.id} from={from} to={version} />}
          <Field label="Reason (optional, for the history)" value={reason} onInput={setReason} />
          {error && <Conflict error={error} faster={faster} onReload={() => { onClose(); onDone(); }} />}
        </div>
        <footer>
          <Button onClick={onClose}>Cancel</Button>
          <Button kind="primary" submit blocked={isThere ? "The alias points there already." : alias ? undefined : "The alias has no name."}>
            Promote {version} → {alias}
          </Button>
        </footer>
      </form>
    </Dialog>
  );
}

/** The version that a rollback returns to: where the last move of the alias came from. */
function previousOf({ history, prompt }: Details, alias: string): number | undefined {
  const at = prompt.aliases[alias];
  const change = history.find((one) => one.alias === alias && one.action === "promote" && one.version === at && one.previous_version !== null);
  return change?.previous_version ?? undefined;
}

/** Whether requests of an alias go to canaries: a rollback ends these first, and moves nothing. */
const hasCanaries = ({ prompt }: Details, alias: string): boolean => Object.keys(prompt.rollouts[alias]?.canaries ?? {}).length > 0;

/** The aliases that can be rolled back. */
export function movable(details: Details): string[] {
  return Object.keys(details.prompt.aliases).filter((alias) => hasCanaries(details, alias) || previousOf(details, alias) !== undefined);
}

export function RollbackDialog({ details, onClose, onDone }: Props) {
  const { prompt } = details;
  const aliases = movable(details);
  const [alias, setAlias] = useState(aliases.includes("latest") ? "latest" : (aliases[0] ?? "latest"));
  const { error, faster, isRunning, run } = useChange(prompt.id, alias);
  const from = prompt.aliases[alias];
  const endsCanaries = hasCanaries(details, alias);
  const back = previousOf(details, alias);
  const rollout = prompt.rollouts[alias];
  const address = alias === "latest" ? prompt.id : `${prompt.id}@${alias}`;

  const rollBack = () =>
    run(async () => {
      const { version } = await call<{ version: number }>("POST", path`/v1/prompts/${prompt.id}/aliases/${alias}/rollback`, { expected_version: from ?? null, expected_rollout: rollout ?? {} });
      onClose();
      onDone();
      report(version === from ? `The rollout of ${alias} has ended; it points at version ${version} as before.` : `${alias} points at version ${version} again.`, async () => {
        await call("PUT", path`/v1/prompts/${prompt.id}/aliases/${alias}`, { ...rollout, version: from, expected_version: version, expected_rollout: {}, reason: "undo" });
        report(version === from ? `The rollout of ${alias} goes on.` : `${alias} points at version ${from} once more.`);
        onDone();
      });
    });

  return (
    <Dialog title={`Roll back ${prompt.id}`} onClose={onClose} wide>
      <div class="pad consequence">
        {aliases.length > 1 && (
          <div class="field">
            <label for="rollback-alias">Alias</label>
            <select id="rollback-alias" value={alias} onChange={(event) => setAlias(event.currentTarget.value)}>
              {aliases.map((one) => (
                <option key={one}>{one}</option>
              ))}
            </select>
          </div>
        )}
        {endsCanaries && rollout ? (
          <>
            <p class="move">
              <Chip kind="alias">{alias}</Chip> stays at {from}
            </p>
            <p class="dim">
              Now {rolloutText(rollout)}. This ends the rollout: from the next request on, version {from} answers all requests for {address}. Running requests keep their version. Roll back once more to move the alias itself.
            </p>
          </>
        ) : (
          <>
            <p class="move">
              <Chip kind="alias">{alias}</Chip> {from} → {back ?? "the version before"}
            </p>
            <p class="dim">From the next request on, {address} means the version before the last promotion. Running requests keep version {from}.</p>
            {rollout?.shadow && <p class="note warn">Version {rollout.shadow.version} gets no copies of requests any more.</p>}
            {from !== undefined && back !== undefined && <Consequence name={prompt.id} from={from} to={back} />}
          </>
        )}
        {error && <Conflict error={error} faster={faster} onReload={() => { onClose(); onDone(); }} />}
      </div>
      <footer>
        <Button onClick={onClose}>Cancel</Button>
        <Button kind="primary" blocked={isRunning ? "Rolling back …" : undefined} onClick={() => void rollBack()}>
          {endsCanaries ? "End the rollout" : "Roll back"}
        </Button>
      </footer>
    </Dialog>
  );
}
