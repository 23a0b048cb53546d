// How an alias shares its requests among versions: what is there, and how it is started, changed and ended.
import { useState } from "preact/hooks";
import { call, path, query } from "../api/client";
import type { Diff, Prompt, Rollout } from "../api/types";
import { decimals, plural } from "../ui/format";
import { Dialog } from "../ui/dialog";
import { useLoad } from "../ui/load";
import { Button, Card, Chip, Field } from "../ui/parts";
import { report } from "../ui/toast";
import { Conflict, useChange } from "./change";
import { rolloutText } from "./changes";
import type { Details } from "./prompt";

const NONE: Rollout = { canaries: {} };

/** Set the whole rollout of an alias, if it still points at `version` and has the rollout `seen`. */
function put(name: string, alias: string, version: number, seen: Rollout | undefined, rollout: Rollout, reason: string) {
  return call("PUT", path`/v1/prompts/${name}/aliases/${alias}`, { ...rollout, version, expected_version: version, expected_rollout: seen ?? NONE, reason: reason || null });
}

interface CardProps {
  prompt: Prompt;
  onOpen: (alias: string) => void;
  onDone: () => void;
}

export function RolloutCard({ prompt, onOpen, onDone }: CardProps) {
  const aliases = Object.keys(prompt.rollouts);
  const isAlone = prompt.num_versions === 1;
  return (
    <Card
      title="Rollouts"
      side={
        <Button small needs="prompts:write" blocked={isAlone ? "A rollout needs a second version." : undefined} onClick={() => onOpen(aliases.includes("latest") ? "" : "latest")}>
          Start a rollout
        </Button>
      }
    >
      {aliases.length === 0 && <p class="pad dim">Each alias sends all its requests to its own version.</p>}
      <ul class="lines">
        {aliases.map((alias) => (
          <AliasRollout key={alias} prompt={prompt} alias={alias} onOpen={onOpen} onDone={onDone} />
        ))}
      </ul>
    </Card>
  );
}

function AliasRollout({ prompt, alias, onOpen, onDone }: CardProps & { alias: string }) {
  const rollout = prompt.rollouts[alias]!;
  const version = prompt.aliases[alias]!;
  const { canaries = {}, shadow } = rollout;
  const rest = 100 - Object.values(canaries).reduce((sum, percent) => sum + percent, 0);
  const { error, faster, isRunning, run } = useChange(prompt.id, alias);
  const end = () =>
    run(async () => {
      await put(prompt.id, alias, version, rollout, NONE, "");
      onDone();
      report(`The rollout of ${alias} has ended.`, async () => {
        await put(prompt.id, alias, version, NONE, rollout, "undo");
        report(`The rollout of ${alias} goes on.`);
        onDone();
      });
    });
  return (
    <li>
      <span class="row">
        <Chip kind="alias">{alias}</Chip>
        <Chip>
          {decimals(rest)}% version {version}
        </Chip>
        {Object.entries(canaries).map(([canary, percent]) => (
          <Chip key={canary} kind="warn">
            {decimals(percent)}% version {canary}
          </Chip>
        ))}
        {shadow && (
          <Chip>
            copies of {decimals(shadow.percent)}% to version {shadow.version}
          </Chip>
        )}
        <span class="grow" />
        <Button small needs="prompts:write" label={`Change the rollout of ${alias}`} onClick={() => onOpen(alias)}>
          Change
        </Button>
        <Button small kind="danger" needs="prompts:write" label={`End the rollout of ${alias}`} blocked={isRunning ? "It is being ended." : undefined} onClick={() => void end()}>
          End
        </Button>
      </span>
      {shadow && <ShadowResult name={prompt.id} version={version} shadow={shadow.version} />}
      {error && <Conflict error={error} faster={faster} onReload={onDone} />}
    </li>
  );
}

/** What the comparisons with a shadow have found so far. */
function ShadowResult({ name, version, shadow }: { name: string; version: number; shadow: number }) {
  const { data } = useLoad(`${name} ${version} ${shadow}`, (signal) => call<Diff>("GET", path`/v1/prompts/${name}/diff` + query({ from: version, to: shadow, max_tokens: 0 }), undefined, signal));
  if (!data) return null;
  const { equal, different, errors, mean_logprob_difference: mean } = data.shadow;
  if (equal + different + errors === 0) return <small class="dim3">No request has been copied yet.</small>;
  return (
    <small class="dim3">
      {plural(equal, "equal answer")}, {different} different, {plural(errors, "error")}
      {mean !== null && `; log-probability per token ${mean >= 0 ? "+" : "−"}${decimals(Math.abs(mean))}`}
    </small>
  );
}

interface Shares {
  /** Percent by version, as typed. */
  canaries: Record<number, string>;
  shadow: string;
  shadowPercent: string;
}

function sharesOf(rollout: Rollout | undefined): Shares {
  return {
    canaries: Object.fromEntries(Object.entries(rollout?.canaries ?? {}).map(([version, percent]) => [version, String(percent)])),
    shadow: String(rollout?.shadow?.version ?? ""),
    shadowPercent: String(rollout?.shadow?.percent ?? 10),
  };
}

/** The rollout that was typed, or what is wrong with it. */
function parse({ canaries, shadow, shadowPercent }: Shares, version: number | undefined): Rollout | string {
  const shares = Object.entries(canaries).filter(([canary, percent]) => percent.trim() !== "" && Number(canary) !== version);
  const wrong = shares.find(([, percent]) => !(Number(percent) > 0 && Number(percent) <= 100));
  if (wrong) return `The share of version ${wrong[0]} must be above 0 and at most 100.`;
  if (shares.length > 8) return "At most eight versions can have a share.";
  if (shares.reduce((sum, [, percent]) => sum + Number(percent), 0) > 100) return "The shares are more than 100% together.";
  if (shadow && !(Number(shadowPercent) > 0 && Number(shadowPercent) <= 100)) return "The share of copies must be above 0 and at most 100.";
  if (shares.length === 0 && !shadow) return "No version has a share.";
  return {
    canaries: Object.fromEntries(shares.map(([canary, percent]) => [canary, Number(percent)])),
    shadow: shadow ? { version: Number(shadow), percent: Number(shadowPercent) } : null,
  };
}

interface DialogProps {
  details: Details;
  /** The alias that the dialog begins with; empty if it is to be chosen. */
  alias: string;
  onClose: () => void;
  onDone: () => void;
}

export function RolloutDialog({ details: { prompt, versions }, alias: first, onClose, onDone }: DialogProps) {
  const aliases = Object.keys(prompt.aliases);
  const [alias, setAlias] = useState(first in prompt.aliases ? first : (aliases.find((one) => !prompt.rollouts[one]) ?? aliases[0] ?? ""));
  // What was typed belongs to the rollout that was there when the dialog was opened, not to one that arrives meanwhile.
  const [before, setBefore] = useState(prompt.rollouts[alias]);
  const [shares, setShares] = useState(sharesOf(before));
  const [reason, setReason] = useState("");
  const { error, faster, isRunning, run } = useChange(prompt.id, alias);
  const version = prompt.aliases[alias];
  const others = versions.filter((one) => one.version !== version);
  const wanted = parse(shares, version);
  const blocked = version === undefined ? "No alias can have a rollout." : typeof wanted === "string" ? wanted : isRunning ? "It is being set." : undefined;
  const address = alias === "latest" ? prompt.id : `${prompt.id}@${alias}`;

  const start = (rollout: Rollout, from: number) =>
    run(async () => {
      await put(prompt.id, alias, from, before, rollout, reason);
      onClose();
      onDone();
      report(before ? `The rollout of ${alias} has changed.` : `The rollout of ${alias} has started.`, async () => {
        await put(prompt.id, alias, from, rollout, before ?? NONE, "undo");
        report(before ? `The rollout of ${alias} is as it was.` : `The rollout of ${alias} has ended.`);
        onDone();
      });
    });

  return (
    <Dialog title={before ? `Change the rollout of ${alias}` : `Start a rollout of ${prompt.id}`} onClose={onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (!blocked && typeof wanted !== "string" && version !== undefined) void start(wanted, version);
        }}
      >
        <div class="pad consequence">
          <div class="field">
            <label for="rollout-alias">Alias</label>
            <select
              id="rollout-alias"
              value={alias}
              onChange={(event) => {
                setAlias(event.currentTarget.value);
                setBefore(prompt.rollouts[event.currentTarget.value]);
                setShares(sharesOf(prompt.rollouts[event.currentTarget.value]));
              }}
            >
              {aliases.map((one) => (
                <option key={one} value={one}>
                  {one} → {prompt.aliases[one]}
                </option>
              ))}
            </select>
          </div>
          <div class="knobs">
            {others.map((one) => (
              <Field
                key={one.version}
                label={`% answered by version ${one.version}`}
                value={shares.canaries[one.version] ?? ""}
                onInput={(percent) => setShares({ ...shares, canaries: { ...shares.canaries, [one.version]: percent } })}
                inputMode="decimal"
              />
            ))}
          </div>
          <div class="knobs">
            <div class="field">
              <label for="rollout-shadow">Shadow</label>
              <select id="rollout-shadow" value={shares.shadow} onChange={(event) => setShares({ ...shares, shadow: event.currentTarget.value })}>
                <option value="">none</option>
                {others.map((one) => (
                  <option key={one.version} value={one.version}>
                    version {one.version}
                  </option>
                ))}
              </select>
            </div>
            {shares.shadow && <Field label="% copied to the shadow" value={shares.shadowPercent} onInput={(percent) => setShares({ ...shares, shadowPercent: percent })} inputMode="decimal" />}
          </div>
          <p class="dim" role="status">
            {typeof wanted === "string" ? wanted : `From the next request on, of the requests for ${address}: ${rolloutText(wanted)}. Version ${version} answers all others.`}
          </p>
          <p class="dim3">A shadow’s answers are compared and thrown away. A promotion or a rollback of the alias ends the rollout.</p>
          <Field label="Reason (optional, for the history)" value={reason} onInput={setReason} />
          {error && <Conflict error={error} faster={faster} onReload={() => { onClose(); onDone(); }} />}
        </div>
        <footer>
          <Button onClick={onClose}>Cancel</Button>
          <Button kind="primary" submit blocked={blocked}>
            {before ? "Change the rollout" : "Start the rollout"}
          </Button>
        </footer>
      </form>
    </Dialog>
  );
}
