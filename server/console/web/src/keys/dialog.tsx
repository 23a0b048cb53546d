// Making a key: first what it may do, then the key, which is shown once.
import { useState } from "preact/hooks";
import type { Scope } from "../app/session";
import { Dialog } from "../ui/dialog";
import { Button, Field } from "../ui/parts";
import { report } from "../ui/toast";
import { limitFault, makeKey, nameFault, type NewKey } from "./new_key";

const SCOPES: [Scope, string][] = [
  ["generate", "use soft prompts"],
  ["prompts:read", "read soft prompts and their history"],
  ["prompts:write", "upload, move and delete them"],
  ["admin", "metrics and keys; with the others: shared soft prompts, and those of all tenants"],
];
const LIMITS: [string, string][] = [
  ["requests_per_minute", "Requests per minute"],
  ["tokens_per_minute", "Tokens per minute"],
  ["max_concurrency", "Requests at the same time"],
];

export function NewKeyDialog({ onClose }: { onClose: () => void }) {
  const [name, setName] = useState("");
  const [tenant, setTenant] = useState("");
  const [scopes, setScopes] = useState<Scope[]>(["generate", "prompts:read"]);
  const [limits, setLimits] = useState<Record<string, string>>({});
  const [made, setMade] = useState<NewKey>();
  const faults = [nameFault(name), nameFault(tenant), ...Object.values(limits).map(limitFault)].filter(Boolean);
  const blocked = scopes.length === 0 ? "A key needs a scope." : faults[0];
  if (made) return <Made made={made} onClose={onClose} />;
  return (
    <Dialog title="New key" onClose={onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (!blocked) void makeKey({ name, tenant, scopes: SCOPES.map(([scope]) => scope).filter((scope) => scopes.includes(scope)), limits }).then(setMade);
        }}
      >
        <div class="pad consequence">
          <Field label="Name" value={name} onInput={setName} fault={nameFault(name)} autoFocus hint="For history and logs; may be empty." />
          <Field label="Tenant" value={tenant} onInput={setTenant} fault={nameFault(tenant)} hint="Keys of a tenant see the same soft prompts. Empty: a tenant of its own." />
          <fieldset class="stack plain">
            <legend>Scopes</legend>
            {SCOPES.map(([scope, words]) => (
              <label key={scope} class="check">
                <input type="checkbox" checked={scopes.includes(scope)} onChange={(event) => setScopes(event.currentTarget.checked ? [...scopes, scope] : scopes.filter((one) => one !== scope))} />
                <span>
                  <code>{scope}</code> <span class="dim3">{words}</span>
                </span>
              </label>
            ))}
          </fieldset>
          <div class="knobs">
            {LIMITS.map(([limit, label]) => (
              <Field key={limit} label={label} value={limits[limit] ?? ""} onInput={(value) => setLimits({ ...limits, [limit]: value })} fault={limitFault(limits[limit] ?? "")} inputMode="numeric" placeholder="no limit" />
            ))}
          </div>
        </div>
        <footer>
          <Button onClick={onClose}>Cancel</Button>
          <Button kind="primary" submit blocked={blocked}>
            Make the key
          </Button>
        </footer>
      </form>
    </Dialog>
  );
}

function Made({ made: { secret, entry }, onClose }: { made: NewKey; onClose: () => void }) {
  const copy = (text: string, what: string) => void navigator.clipboard.writeText(text).then(() => report(`${what} is copied.`));
  return (
    <Dialog title="New key" onClose={onClose}>
      <div class="pad consequence">
        <p class="note warn">Both are shown once: this page forgets them, and the server has not got them.</p>
        <div class="field">
          <span class="row">
            <b>The key</b>
            <span class="grow" />
            <Button small icon="copy" onClick={() => copy(secret, "The key")}>
              Copy the key
            </Button>
          </span>
          <pre class="output" aria-label="The key" role="group" tabIndex={0}>{secret}</pre>
          <small>For whoever is to use it.</small>
        </div>
        <div class="field">
          <span class="row">
            <b>The entry for the key file</b>
            <span class="grow" />
            <Button small icon="copy" onClick={() => copy(entry, "The entry")}>
              Copy the entry
            </Button>
          </span>
          <pre class="output" aria-label="The entry for the key file" role="group" tabIndex={0}>{entry}</pre>
          <small>Append it to the server’s TOML key file, which is read again when it changes. It has the key’s digest, not the key.</small>
        </div>
      </div>
      <footer>
        <Button kind="primary" onClick={onClose}>
          Done
        </Button>
      </footer>
    </Dialog>
  );
}
